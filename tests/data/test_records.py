"""Data files: every kind of record, and one clear line for everything that can be wrong with a file."""

from __future__ import annotations

import csv
import gzip
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tokenizer_kit as kit
from hypothesis import given, settings
from hypothesis import strategies as st

from upslope.data.examples import EncodedRecords, example_of, examples_of
from upslope.data.records import Record, read_records, record_of
from upslope.errors import ConfigError, DataError, UpslopeError
from upslope.types import Message

USER, REPLY = {"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello there"}
ROWS: dict[str, dict[str, Any]] = {
    "text": {"text": "Hello there"},
    "messages": {"messages": [USER, REPLY]},
    "prompt": {"prompt": "The sum is", "answer": "19"},
    "completion": {"prompt": "The sum is", "completion": " 19."},
    "preference": {"prompt": "The sum is", "chosen": " 19.", "rejected": " 12."},
    "labelled": {"prompt": "The sum is", "completion": " 19.", "label": True},
}


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_csv(path: Path, rows: list[dict[str, Any]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        for row in rows:
            writer.writerow({k: json.dumps(v) if isinstance(v, list) else v for k, v in row.items()})
    return path


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    pyarrow = pytest.importorskip("pyarrow", reason="Parquet needs pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def write_json(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return path


WRITERS: dict[str, Callable[[Path, list[dict[str, Any]]], Path]] = {
    "jsonl": write_jsonl,
    "json": write_json,
    "csv": write_csv,
    "parquet": write_parquet,
}


def test_the_nulls_that_parquet_adds_are_not_the_datas(tmp_path: Path) -> None:
    """A column of objects has the keys of all its rows: two tools with different arguments fill each other's."""

    def row(tool: str, argument: str) -> dict[str, Any]:
        function = {"name": tool, "parameters": {"type": "object", "properties": {argument: {"type": "string"}}}}
        call = {"type": "function", "function": {"name": tool, "arguments": {argument: "x"}}}
        turns = [{"role": "user", "content": "Do it"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
        return {"messages": turns, "tools": [{"type": "function", "function": function}]}

    rows = [row("weather", "city"), row("price", "symbol")]
    expected = read_records(write_jsonl(tmp_path / "a.jsonl", rows))
    found = read_records(write_parquet(tmp_path / "a.parquet", rows))
    assert [(r.messages, r.tools) for r in found] == [(r.messages, r.tools) for r in expected]


@pytest.mark.parametrize("suffix", WRITERS)
@pytest.mark.parametrize("kind", ROWS)
def test_every_kind_from_every_file(kind: str, suffix: str, tmp_path: Path) -> None:
    path = WRITERS[suffix](tmp_path / f"data.{suffix}", [ROWS[kind], ROWS[kind]])
    records = read_records(path)
    assert [record.kind for record in records] == [kind, kind]
    expected = record_of(ROWS[kind], "")
    for name in ("text", "messages", "prompt", "completion", "chosen", "rejected", "label"):
        assert getattr(records[1], name) == getattr(expected, name)
    assert str(path) in records[0].where


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv"])
def test_packed_text_files(suffix: str, tmp_path: Path) -> None:
    plain = WRITERS[suffix](tmp_path / f"data.{suffix}", [ROWS["completion"]])
    packed = tmp_path / f"packed.{suffix}.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert read_records(packed)[0].completion == " 19."


def test_lines_of_text(tmp_path: Path) -> None:
    path = tmp_path / "lines.txt"
    path.write_bytes("\ufeffone\r\n\n  \nzwei äöü\u2028still two\n".encode())
    records = read_records(path)
    assert [record.text for record in records] == ["one", "zwei äöü\u2028still two"]
    assert [record.where for record in records] == [f"{path}:1", f"{path}:4"]


def test_where_counts_lines_as_an_editor_does(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a\u2028b"}\n\n{"text": "c"}', encoding="utf-8")
    assert [record.where for record in read_records(path)] == [f"{path}:1", f"{path}:3"]
    path = tmp_path / "a.csv"
    path.write_text('text\n"two\nlines"\nlast\n', encoding="utf-8")
    assert [record.where for record in read_records(path)] == [f"{path}:2", f"{path}:4"]


def test_columns_of_no_kind_are_kept(tmp_path: Path) -> None:
    record = record_of({"prompt": [USER], "answer": 19, "level": 2}, "here")
    prompt = record.as_prompt(7)
    assert (prompt.key, prompt.answer, prompt.messages) == (7, "19", (Message("user", "Hello"),))
    assert prompt.metadata["level"] == 2
    assert record_of(ROWS["prompt"], "here").as_prompt(0).text == "The sum is"
    with pytest.raises(DataError, match=r"here: .*no 'prompt'"):
        record_of(ROWS["text"], "here").as_prompt(0)


def test_messages_in_full() -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {}}}
    row = {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]},
            {"role": "assistant", "content": None, "tool_calls": [call], "weight": 0},
            {"role": "tool", "content": "19", "name": "add", "tool_call_id": "x1"},
            {"role": "assistant", "content": "19", "train": True, "name": None},
        ],
        "tools": json.dumps([call]),
    }
    record = record_of(row, "here")
    assert record.messages == (
        Message("user", "Hello"),
        Message("assistant", "", tool_calls=(call,), train=False),
        Message("tool", "19", name="add", tool_call_id="x1"),
        Message("assistant", "19", train=True),
    )
    assert record.tools == (call,)


def test_alpaca() -> None:
    row = {"instruction": "Add", "input": "12 7", "output": "19", "system": "Be brief.", "history": [["Hi", "Hello"]]}
    record = record_of(row, "here")
    assert record.kind == "completion"
    assert record.prompt == (
        Message("system", "Be brief."),
        Message("user", "Hi"),
        Message("assistant", "Hello"),
        Message("user", "Add\n12 7"),
    )
    assert record.completion == (Message("assistant", "19"),)
    bare = record_of({"instruction": "Add", "input": None, "output": "19"}, "here")
    assert bare.prompt == (Message("user", "Add"),)


def test_sharegpt() -> None:
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}, {"from": "observation", "value": "1"}]
    record = record_of({"conversations": turns, "system": "Be brief."}, "here")
    assert record.messages == (
        Message("system", "Be brief."),
        Message("user", "Hi"),
        Message("assistant", "Hello"),
        Message("tool", "1"),
    )
    assert record_of({"conversations": [USER, REPLY]}, "").messages[0] == Message("user", "Hello")


BAD_ROWS: list[tuple[Any, str]] = [
    ({"mesages": [USER]}, "unknown key 'mesages'; did you mean 'messages'?"),
    ({"prompt": "a", "competion": "b"}, "unknown key 'competion'; did you mean 'completion'?"),
    ({"prompt": "a", "chosen": "b", "rejectd": "c"}, "no 'rejected'; did you mean 'rejected' where it says 'rejectd'?"),
    ({"completion": "a", "question": "b"}, "has 'completion' but no 'prompt'; did you mean .* 'question'?"),
    (
        {"chosen": "a", "rejected": "b"},
        "have no beginning in common that could be the prompt; give a prompt",
    ),
    ({"chosen": "a b", "rejected": "a b"}, "'chosen' and 'rejected' are the same; give a prompt of its own, or drop"),
    ({"chosen": "a", "rejected": "b", "question": "c"}, "no 'prompt'; did you mean 'prompt' where it says 'question'?"),
    ({"chosen": [REPLY], "rejected": "b"}, "one of 'chosen' and 'rejected' is a text, the other messages"),
    ({"chosen": [REPLY], "rejected": [REPLY]}, "must be alike up to a reply, but nothing of them is alike"),
    ({"chosen": [USER], "rejected": [REPLY]}, "must be alike up to a reply, but nothing of them is alike"),
    (
        {"chosen": [USER, REPLY, USER, REPLY], "rejected": [USER, REPLY, {**USER, "content": "No"}, REPLY]},
        r"but 'chosen\[2\]' is a turn of the user; give a prompt",
    ),
    (
        {"prompt": "Other", "chosen": [USER, REPLY], "rejected": [USER, {**REPLY, "content": "No"}]},
        "'prompt' is none of the user's turns with which 'chosen' and 'rejected' begin",
    ),
    (
        {"question": "a", "answer": "b"},
        r"no known kind of record; rename them, or give --columns prompt=question completion=answer \(accepted",
    ),
    (
        {"foo": 1},
        r"its keys \('foo'\) .* --columns NAME=COLUMN \.\.\. \(accepted: text \| .* \| instruction, output \| conver",
    ),
    ({}, r"its keys \(none\)"),
    ({"instruction": "a", "response": "b"}, "has 'instruction' but no 'output'"),
    ({"text": None}, "'text' must be a text, is null; fill it in or drop the record"),
    ({"text": float("nan")}, "'text' must be a text, is NaN; fill it in"),
    ({"text": 3}, "'text' must be a text, is int 3"),
    ({"text": ""}, "'text' is empty"),
    ({"text": "a\ud800"}, "'text' holds half a surrogate pair at character 2"),
    ({"prompt": "a", "completion": None}, "'completion' must be a text, is null"),
    ({"prompt": [], "completion": "b"}, "'prompt' is an empty list"),
    ({"messages": "Hello"}, "'messages' must be a list of messages, is str 'Hello'"),
    ({"messages": None}, "'messages' must be a list of messages, is null; fill"),
    ({"messages": ["Hello"]}, r"'messages\[0\]' must be an object with role and content"),
    (
        {"messages": [{"role": "user", "contnt": "a"}]},
        r"'messages\[0\]' has the unknown key 'contnt'; did you mean 'con",
    ),
    ({"messages": [{"content": "a"}]}, r"'messages\[0\]' has no 'role'"),
    ({"messages": [{"role": "user"}]}, r"'messages\[0\]' has no 'content'"),
    (
        {"messages": [USER, {"role": "asistant", "content": "a"}]},
        "unknown role str 'asistant'; did you mean 'assistant'",
    ),
    ({"messages": [{"role": "gpt", "content": "a"}]}, "unknown role str 'gpt'; did you mean 'assistant'"),
    ({"messages": [{"role": ["user"], "content": "a"}]}, "unknown role list"),
    ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "a part that is no text"),
    ({"messages": [{"role": "user", "content": 3}]}, r"'messages\[0\].content' must be a text, is int 3"),
    ({"messages": [dict(REPLY, train="yes")]}, r"'messages\[0\].train' must be true or false"),
    ({"messages": [dict(REPLY, tool_calls="add")]}, "tool_calls' must be a list of objects"),
    ({"messages": [USER], "tools": "{"}, "'tools' is not valid JSON"),
    ({"messages": [USER], "tools": [1]}, r"'tools\[0\]' must be an object with type and function, is int 1"),
    ({"prompt": "a", "completion": "b", "label": "good"}, "'label' must be true or false, is str 'good'"),
    ({"prompt": "a", "completion": "b", "label": 2}, "'label' must be true or false, is int 2"),
    ({"conversations": [{"from": "bot", "value": "a"}]}, r"'conversations\[0\].from' is str 'bot'; accepted: system"),
    ({"conversations": [{"from": "gpt"}]}, r"'conversations\[0\]' has no 'value'"),
    ({"conversations": ["a"]}, "must be an object with from and value"),
    ({"instruction": "a", "output": "b", "history": ["x"]}, r"'history\[0\]' must be a pair"),
]


@pytest.mark.parametrize(("row", "message"), BAD_ROWS)
def test_bad_rows_name_key_and_remedy(row: Any, message: str) -> None:
    with pytest.raises(DataError, match=r"^data.jsonl:4: .*" + message) as caught:
        record_of(row, "data.jsonl:4")
    assert "\n" not in str(caught.value)


BAD_FILES: list[tuple[str, bytes, str]] = [
    ("a.jsonl", b"", "a.jsonl: the file is empty"),
    ("a.jsonl", b" \n\n", "a.jsonl: the file is empty"),
    ("a.json", b"[]", "a.json: holds no records"),
    ("a.csv", b"text\n", "a.csv: holds no records"),
    ("a.jsonl", b'{"text": "a"}\n{"text": "caf\xe9"}\n', "a.jsonl:2: not UTF-8 .byte 0xe9.; save the file as UTF-8"),
    ("a.jsonl", b'{"text": "a"}\n\n{"text" "b"}\n{"text": "c"}', "a.jsonl:3: invalid JSON at column 9: Expecting"),
    ("a.jsonl", b'{"text": "a"}\n{"text": "b', "a.jsonl:2: invalid JSON.*the last line: was the file cut off"),
    ("a.jsonl", b'["a"]\n', "a.jsonl:1: each line must be one JSON object, is a list"),
    ("a.jsonl", b"[" * 100_000, "a.jsonl:1: invalid JSON"),
    ("a.jsonl", b"1" * 5000, "a.jsonl:1: invalid JSON"),
    ("a.json", b'{"text": "a"}', "a.json: must be a list of objects, is an object"),
    ("a.json", b'[{"text": "a"}, 3]', "a.json: row 2: each entry .* is a number"),
    ("a.json", b'[\n{"text": "a"},\n{"text": }]', "a.json:3: invalid JSON at column 10"),
    ("a.json", b'{"text": "a"}\n{"text": "b"}', "a.json:2: .*one object per line: name it .jsonl"),
    ("a.jsonl", b'{"text": "a"}\n{"prompt": "b"}', "a.jsonl:2: a record of kind 'prompt' among 'text' .*a.jsonl:1"),
    ("a.jsonl", b'{"text": NaN}', "a.jsonl:1: 'text' must be a text, is NaN"),
    ("a.csv", b"text,text\na,b\n", "a.csv:1: the header has an empty or a repeated column"),
    ("a.csv", b"prompt,completion\na,b\na,b,c\n", "a.csv:3: 3 columns, the header has 2"),
    ("a.csv", b"prompt,completion\na\n", "a.csv:2: 1 columns, the header has 2"),
    ("a.csv", b'text\n"a', "a.csv:2: invalid CSV"),
    ("a.csv", b"prompt,completion\na,\n", "a.csv:2: 'completion' is empty"),
    ("a.csv", b'messages\n"[{"\n', "a.csv:2: 'messages' is not valid JSON"),
    ("a.parquet", b"PAR1 nonsense", "a.parquet: not a readable Parquet file"),
    ("a.jsonl.gz", b"nonsense", "a.jsonl.gz: the gzip file is damaged or cut off"),
    ("a.jsonl.gz", gzip.compress(b'{"text": "a"}', mtime=0)[:-9], "a.jsonl.gz: the gzip file is damaged or cut off"),
    ("a.xlsx", b"x", "a.xlsx: unknown kind of file; accepted: .jsonl, .json, .csv, .txt, .parquet"),
    ("a.parquet.gz", b"x", "a.parquet.gz: unknown kind of file"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES)
def test_bad_files_name_line_and_remedy(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read_records(path)
    assert "\n" not in str(caught.value)


def test_missing_files(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", [ROWS["text"]])
    with pytest.raises(DataError, match=r"tran.jsonl: no such file; did you mean 'train.jsonl'"):
        read_records(tmp_path / "tran.jsonl")
    with pytest.raises(DataError, match=r"the folder .* does not exist"):
        read_records(tmp_path / "x" / "train.jsonl")
    with pytest.raises(DataError, match=r"is a folder; name one data file"):
        read_records(tmp_path)
    with pytest.raises(ConfigError, match=r"a split .*not from a file"):
        read_records(tmp_path / "train.jsonl", split="test")


def fake_hub(monkeypatch: pytest.MonkeyPatch, load: Callable[..., Any]) -> None:
    module = ModuleType("datasets")
    module.load_dataset = load  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)


def test_hub_data_set(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def load(*args: Any, **kwargs: Any) -> list[Any]:
        seen.append((args, kwargs))
        return [ROWS["text"]]

    fake_hub(monkeypatch, load)
    record = read_records("owner/name:main", split="test")[0]
    assert (record.text, record.where) == ("Hello there", "owner/name:main[test] row 1")
    read_records("owner/name")
    assert seen == [(("owner/name", "main"), {"split": "test"}), (("owner/name", None), {"split": "train"})]


def test_hub_offline_and_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise ConnectionError("Couldn't reach\nthe hub")

    fake_hub(monkeypatch, load)
    with pytest.raises(DataError, match=r"owner/name: no such file.*Couldn't reach the hub; offline, pass the path"):
        read_records("owner/name")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"datasets.*pip install"):
        read_records("owner/name")


def complaint_of(call: Callable[[], Any]) -> str | None:
    """What one of our errors says; any other exception fails the test."""
    try:
        call()
    except UpslopeError as error:
        return str(error)
    return None


SHAPES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["role", "content", "from", "value", "train", "weight", "tool_calls", "name", "type", "text"]
            ),
            inner,
            max_size=3,
        )
    ),
    max_leaves=6,
)
KEYS = st.sampled_from(
    ["text", "messages", "prompt", "completion", "chosen", "rejected", "label", "tools", "conversations", "instruction",
     "input", "output", "system", "history", "mesages", "zzz"]
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(row=st.dictionaries(KEYS, SHAPES, max_size=4))
def test_any_row_is_a_record_or_one_clear_line(row: dict[str, Any]) -> None:
    complaint = complaint_of(lambda: isinstance(record_of(row, "file:1"), Record) or pytest.fail("no record"))
    assert complaint is None or complaint.startswith("file:1: ")


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rubbish")


SUFFIXES = st.sampled_from([".jsonl", ".json", ".csv", ".txt", ".parquet", ".jsonl.gz", ".csv.gz"])


@settings(max_examples=200, deadline=None)
@given(suffix=SUFFIXES, content=st.binary(max_size=60))
def test_rubbish_bytes(suffix: str, content: bytes, scratch: Path) -> None:
    path = scratch / f"rubbish{suffix}"
    path.write_bytes(content)
    complaint = complaint_of(lambda: read_records(path))
    assert complaint is None or (str(path) in complaint and "\n" not in complaint)


@settings(max_examples=150, deadline=None)
@given(data=st.data(), keep=st.floats(0, 0.999))
def test_cut_and_damaged_files(data: st.DataObject, keep: float, scratch: Path) -> None:
    kind, suffix = data.draw(st.sampled_from(sorted(ROWS))), data.draw(st.sampled_from(sorted(WRITERS)))
    path = WRITERS[suffix](scratch / f"cut.{suffix}", [ROWS[kind], ROWS[kind], ROWS[kind]])
    content = bytearray(path.read_bytes())
    content = content[: int(len(content) * keep)]
    if content:
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(0, 255))
    path.write_bytes(content)
    complaint = complaint_of(lambda: read_records(path))
    assert complaint is None or (str(path) in complaint and "\n" not in complaint)


def test_examples_of_the_supervised_kinds(chatml: Any) -> None:
    for kind in ("text", "messages", "completion"):
        example = example_of(record_of(ROWS[kind], "here"), chatml, max_length=None)
        assert any(example.mask)
        assert example.tokens[-1] == chatml.eos_token_id or kind == "messages"
    for kind in ("prompt", "preference", "labelled"):
        with pytest.raises(DataError, match=f"^here: a record of kind '{kind}' is nothing to imitate"):
            example_of(record_of(ROWS[kind], "here"), chatml, max_length=None)
    with pytest.raises(DataError, match=r"^here: no assistant turn is trained"):
        example_of(record_of({"messages": [USER]}, "here"), chatml, max_length=None)
    with pytest.raises(DataError, match=r"^here: .*no chat template"):
        example_of(record_of(ROWS["messages"], "here"), kit.byte_level(None), max_length=None)


def test_too_long_is_dropped_and_counted(chatml: Any) -> None:
    records = [record_of({"text": "a " * n}, f"file:{n}") for n in (2, 40, 3, 90)]
    encoded = examples_of(records, chatml, max_length=30)
    assert isinstance(encoded, EncodedRecords)
    whole = [example_of(record, chatml, max_length=None) for record in records]
    assert encoded.kept == [0, 2]
    assert encoded.examples == [whole[0], whole[2]]  # not cut
    assert encoded.too_long == [(1, len(whole[1].tokens)), (3, len(whole[3].tokens))]
    with pytest.raises(DataError, match=r"none of 4 records fits max_length 1"):
        examples_of(records, chatml, max_length=1)
    with pytest.raises(DataError, match=r"no records"):
        examples_of([], chatml, max_length=1)

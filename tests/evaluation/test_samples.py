"""Rows with references, hypotheses that answer them, and what is generated and written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_model import tiny_folder

from upslope.build import load_inference, make_engine
from upslope.errors import DataError
from upslope.evaluation.samples import encode_samples, generate, read_hypotheses, read_samples, sample_rows
from upslope.types import SamplingParams

CHAT = [{"role": "user", "content": "hi"}]


def rows(path: Path, *found: object) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return str(path)


def test_references_are_taken_from_the_first_key_there_is(tmp_path: Path) -> None:
    path = rows(
        tmp_path / "d.jsonl",
        {"prompt": "a", "references": ["x", "y"], "completion": "no"},
        {"prompt": "b", "reference": "r", "completion": "no"},
        {"prompt": CHAT, "completion": [{"role": "assistant", "content": "c"}]},
        {"prompt": "d", "answer": "42"},
        {"messages": [*CHAT, {"role": "assistant", "content": "hello"}]},
    )
    found = read_samples(path)
    assert [s.references for s in found] == [("x", "y"), ("r",), ("c",), ("42",), ("hello",)]
    assert [s.prompt.text for s in found if s.prompt] == ["a", "b", None, "d", None]
    assert found[4].prompt is not None
    assert [m.content for m in found[4].prompt.messages] == ["hi"]


def test_a_text_file_is_a_reference_a_line(tmp_path: Path) -> None:
    (tmp_path / "r.txt").write_text("one\n\nthree\r\n")
    assert [s.references for s in read_samples(str(tmp_path / "r.txt"))] == [("one",), ("",), ("three",)]


def test_hypotheses_stand_in_the_same_order(tmp_path: Path) -> None:
    samples = read_samples(rows(tmp_path / "d.jsonl", *({"prompt": p, "completion": p.upper()} for p in "ab")))
    (tmp_path / "h.txt").write_text("A\n")
    with pytest.raises(DataError, match=r"h.txt: holds 1 hypotheses for 2 references"):
        read_hypotheses(str(tmp_path / "h.txt"), samples)
    (tmp_path / "h.txt").write_text("A\n\n")
    assert read_hypotheses(str(tmp_path / "h.txt"), samples) == ["A", ""]
    swapped = rows(tmp_path / "h.jsonl", *({"prompt": p, "completion": p} for p in "ba"))
    with pytest.raises(DataError, match=r"h.jsonl:1: 'prompt' is not that of .*d.jsonl:1"):
        read_hypotheses(swapped, samples)
    with pytest.raises(DataError, match=r"h.jsonl:1: no 'completion' to judge \(keys: 'text'\)"):
        read_hypotheses(rows(tmp_path / "h.jsonl", {"text": "a"}, {"text": "b"}), samples)


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    path = rows(tmp_path / "d.jsonl", {"prompt": "a", "references": ["é", "\n"]}, {"prompt": CHAT, "reference": "z"})
    samples = read_samples(path)
    (tmp_path / "out.jsonl").write_text(sample_rows(samples, ["x\u2028y", ""]))
    assert read_hypotheses(str(tmp_path / "out.jsonl"), samples) == ["x\u2028y", ""]
    again = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().split("\n")[:-1]]
    assert [tuple(row["references"]) for row in again] == [s.references for s in samples]
    assert again[1]["prompt"] == CHAT


def test_generation_is_greedy_decoding_of_each_prompt(tmp_path: Path) -> None:
    policy = load_inference(tiny_folder(tmp_path / "m"), dtype="float32")
    path = rows(tmp_path / "d.jsonl", {"prompt": "abc", "completion": "x"}, {"prompt": CHAT, "reference": "y"})
    samples = read_samples(path)
    tokens = encode_samples(policy.tokenizer, samples)
    assert tokens[0] == policy.tokenizer.encode("abc")
    assert policy.tokenizer.decode(tokens[1]).endswith("<|im_start|>assistant\n")
    engine = make_engine(policy, sequences=2, longest=64)
    params = SamplingParams(max_tokens=7, temperature=0.0)
    seen: list[tuple[int, int]] = []
    found = generate(engine, samples, tokens, params, on_progress=lambda *x: seen.append(x))
    assert [c.tokens for c in found] == [engine.generate([t], params)[0][0].tokens for t in tokens]
    assert seen[-1] == (2, 2)


def test_a_prompt_that_does_not_fit_is_named(tmp_path: Path) -> None:
    policy = load_inference(tiny_folder(tmp_path / "m"), dtype="float32")
    path = rows(tmp_path / "d.jsonl", *({"prompt": "a" * n, "answer": "b"} for n in (1, 512)))
    samples = read_samples(path)
    tokens = encode_samples(policy.tokenizer, samples)
    engine = make_engine(policy, sequences=2, longest=64)
    with pytest.raises(DataError, match=r"d.jsonl:2: a prompt of 512 tokens leaves no room"):
        generate(engine, samples, tokens, SamplingParams(max_tokens=2))
    (tmp_path / "r.txt").write_text("only a reference\n")
    with pytest.raises(DataError, match=r"r.txt:1: has no prompt to answer"):
        encode_samples(policy.tokenizer, read_samples(str(tmp_path / "r.txt")))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a"}, "nothing says what is right"),
        ({"prompt": "a", "references": []}, "'references' must be a list of at least one text"),
        ({"prompt": "a", "references": ["x", 3]}, "'references' must be a list of at least one text"),
        ({"prompt": "a", "references": "[1"}, "invalid JSON"),
        ({"prompt": "a", "answer": 42}, "'answer' must be a text"),
        ({"prompt": "a", "reference": None}, "nothing says what is right"),
        ({"messages": CHAT}, "must be a question and end with the assistant's right reply"),
        ({"text": "a"}, "a row of kind 'text' asks nothing"),
        ({"prompt": "", "answer": "x"}, "'prompt' is empty"),
        ({"question": "a", "answer": "x"}, "keys"),
        ({}, "keys"),
    ],
)
def test_rubbish_is_refused_with_its_row(tmp_path: Path, row: object, message: str) -> None:
    with pytest.raises(DataError, match=rf"d\.jsonl:2.*{message}"):
        read_samples(rows(tmp_path / "d.jsonl", {"prompt": "a", "answer": "b"}, row))

"""Text files as a row of tokens: what lies in it, in how much memory, when it is made anew, and what is refused."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from upslope.data.corpus import Corpus, TokenStream, corpus_files, open_corpus, texts_of
from upslope.data.train_tokenizer import MASKED_SPECIALS, train_tokenizer
from upslope.errors import ConfigError, DataError, RunError

TOKENIZER = train_tokenizer(["the cat sat on the mat\n", "a dog\n"] * 5, "bpe", 280)


def encoded(folder: Path, *files: Path) -> Corpus:
    return open_corpus(list(files), TOKENIZER, cache=folder / "cache")


def write(path: Path, text: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def test_documents_stand_between_borders(tmp_path: Path) -> None:
    one = write(tmp_path / "a.txt", "the cat\nsat\n")
    two = write(tmp_path / "b.jsonl", '{"text": "a dog"}\n\n{"text": "on\\nthe mat", "other": 1}\n')
    corpus = encoded(tmp_path, one, two)
    assert TOKENIZER.decode(corpus.tokens.tolist()).split("<|endoftext|>") == [
        "",
        "the cat\nsat\n",
        "a dog",
        "on\nthe mat",
        "",
    ]
    assert corpus.documents == 3
    assert corpus.bytes == 12 + 5 + 10
    assert corpus.marks[:, 1].tolist() == [0, 8, 12, 17, 20, 27]
    for token, byte in corpus.marks[:-1].tolist():
        text = TOKENIZER.decode(corpus.tokens[1:token].tolist()).replace("<|endoftext|>", "")
        assert len(text.encode()) == byte


def test_crlf_and_byte_order_mark_change_nothing(tmp_path: Path) -> None:
    plain = encoded(tmp_path, write(tmp_path / "a.txt", "the cat\nsät\n"))
    other = encoded(tmp_path, write(tmp_path / "b.txt", "\ufeffthe cat\r\nsät\r\n"))
    assert plain.tokens.tolist() == other.tokens.tolist()
    assert plain.sha256 == other.sha256
    assert plain.bytes == other.bytes == 13
    row = encoded(tmp_path, write(tmp_path / "c.jsonl", json.dumps({"text": "the cat\r\nsät\r\n"})))
    assert row.tokens.tolist() == plain.tokens.tolist()


def test_a_border_in_the_text_separates_documents(tmp_path: Path) -> None:
    corpus = encoded(tmp_path, write(tmp_path / "a.txt", "the cat<|endoftext|>a dog"))
    assert corpus.tokens.tolist().count(TOKENIZER.eos_token_id) == 3


def test_chunks_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "a.txt", "".join(f"the cat {i} sat\n" for i in range(300)))
    rows = write(tmp_path / "b.jsonl", "".join(json.dumps({"text": f"a\ndog {i}"}) + "\n" for i in range(50)))
    whole = encoded(tmp_path, file, rows)
    for chunk in (1, 40, 1000):
        monkeypatch.setattr("upslope.data.corpus._CHUNK", chunk)
        parts = open_corpus([file, rows], TOKENIZER, cache=tmp_path / str(chunk))
        assert parts.tokens.tolist() == whole.tokens.tolist()
        assert parts.marks.tolist() == whole.marks.tolist()
        assert parts.sha256 == whole.sha256


def test_a_line_without_end_is_read_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("upslope.data.corpus._LONGEST", 7)
    text = "naïve café — " * 20
    corpus = encoded(tmp_path, write(tmp_path / "a.txt", text))
    assert TOKENIZER.decode(corpus.tokens[1:-1].tolist()) == text
    assert corpus.bytes == len(text.encode())


def test_it_is_made_once_and_again_when_a_file_changes(tmp_path: Path) -> None:
    file = write(tmp_path / "a.txt", "the cat\n")
    first = encoded(tmp_path, file)
    made = {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").glob("*/*")}
    assert encoded(tmp_path, file).sha256 == first.sha256
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").glob("*/*")} == made
    write(file, "the mat\n")
    os.utime(file, ns=(1, 1))
    assert TOKENIZER.decode(encoded(tmp_path, file).tokens[1:-1].tolist()) == "the mat\n"
    other = train_tokenizer(["the mat"], "char", 300)
    assert open_corpus([file], other, cache=tmp_path / "cache").tokens.tolist()[0] == other.eos_token_id


def test_an_interrupted_build_leaves_nothing(tmp_path: Path) -> None:
    good, bad = write(tmp_path / "a.txt", "the cat\n"), write(tmp_path / "b.txt", b"the\n\xff\n")
    with pytest.raises(DataError):
        encoded(tmp_path, good, bad)
    assert not [p for p in (tmp_path / "cache").iterdir() if p.suffix != ".lock"]
    write(bad, "a dog\n")
    assert encoded(tmp_path, good, bad).documents == 2


@pytest.mark.parametrize("name", ["tokens.bin", "marks.bin", "meta.json"])
@pytest.mark.parametrize("how", ["cut by one entry", "cut in an entry", "flipped", "emptied", "gone", "rubbish"])
def test_a_damaged_cache_is_made_again_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, how: str
) -> None:
    file = write(tmp_path / "a.txt", "the cat sat\non the mat\na dog\n")
    first = encoded(tmp_path, file)
    tokens, marks, facts = first.tokens.tolist(), first.marks.tolist(), (first.documents, first.sha256, first.bytes)
    (path,) = (tmp_path / "cache").glob(f"*/{name}")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    damaged = {"cut by one entry": content[:-16], "cut in an entry": content[:-3], "flipped": content, "emptied": b""}
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes(damaged.get(how, b'{"files": 3}'))
    capsys.readouterr()
    again = encoded(tmp_path, file)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert name in said[0] or (name == "meta.json" and "tokens.bin" in said[0])  # whose hash stands in it
    assert said[0].endswith("; the text is encoded again")
    assert (again.tokens.tolist(), again.marks.tolist()) == (tokens, marks)
    assert (again.documents, again.sha256, again.bytes) == facts
    encoded(tmp_path, file)
    assert capsys.readouterr().err == ""


def test_all_is_on_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    fsync, rename = os.fsync, os.replace

    def noted_fsync(handle: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{handle}"))
        fsync(handle)

    def noted_rename(source: Path, target: Path) -> None:
        synced.append(f"-> {target}")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_rename)
    encoded(tmp_path, write(tmp_path / "a.txt", "the cat\n"))
    at = next(i for i, each in enumerate(synced) if each.startswith("->"))
    assert {Path(each).name for each in synced[:at]} >= {"tokens.bin", "marks.bin", "meta.json"}
    assert str(tmp_path / "cache") in synced[at:]


def test_what_a_killed_build_left_is_removed(tmp_path: Path) -> None:
    file = write(tmp_path / "a.txt", "the cat\n")
    encoded(tmp_path, file)
    (made,) = (p for p in (tmp_path / "cache").iterdir() if p.is_dir())
    made.rename(made.with_name(f".{made.name}.tmp-x"))
    encoded(tmp_path, file)
    assert [p.name for p in (tmp_path / "cache").iterdir() if p.is_dir()] == [made.name]


def test_files_folders_and_patterns(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "deep/er/c.jsonl", "x.csv"):
        write(tmp_path / name, "x")
    names = [p.relative_to(tmp_path).as_posix() for p in corpus_files([str(tmp_path)])]
    assert names == ["a.txt", "b.txt", "deep/er/c.jsonl"]
    assert [p.name for p in corpus_files([str(tmp_path / "*.txt"), str(tmp_path / "b.txt")])] == ["a.txt", "b.txt"]
    assert [p.name for p in corpus_files([str(tmp_path / "**/*.jsonl")])] == ["c.jsonl"]


@given(st.integers(2, 60), st.integers(2, 9), st.integers(1, 8))
def test_windows_predict_every_token_once(count: int, length: int, stride: int) -> None:
    stream = TokenStream(np.arange(count, dtype=np.uint32), 0)
    windows = [stream.window(i, length) for i in range(stream.num_windows(length))]
    assert [t for w in windows for t in w[1:]] == list(range(1, count))
    assert all(2 <= len(w) <= length for w in windows)
    if stride >= length:
        return
    scored = []
    for i, (window, first) in enumerate(stream.strided(length, stride)):
        scored += window[first:]
        assert len(window) <= length
        assert i == 0 or first >= min(length - stride, len(window) - 1)
    assert scored == list(range(1, count))


def test_parts_of_a_corpus_end_at_lines_and_count_their_bytes(tmp_path: Path) -> None:
    lines = [f"the cat {i} sat\n" for i in range(100)]
    corpus = encoded(tmp_path, write(tmp_path / "a.txt", "".join(lines)))
    train, held = corpus.split(0.1)
    text = TOKENIZER.decode(held.tokens[1:-1].tolist())
    assert text == "".join(lines[91:]), "the first line that begins in the last tenth, and all after it"
    assert held.bytes == len(text.encode())
    assert train.bytes + held.bytes == corpus.bytes == corpus.head().bytes
    assert train.tokens[-1] == held.tokens[0]
    assert len(train.tokens) + len(held.tokens) == len(corpus.tokens) + 1
    assert corpus.head().tokens.tolist() == corpus.tokens.tolist()
    few = corpus.split(0.1, 30)[1]
    assert len(few.tokens) <= 31
    assert few.bytes == len(TOKENIZER.decode(few.tokens[1:].tolist()).encode())
    assert TOKENIZER.decode(corpus.head(1).tokens[1:].tolist()) == lines[0]
    with pytest.raises(DataError, match="too short"):
        encoded(tmp_path, write(tmp_path / "b.txt", "one line\n")).split(0.1)


def test_tokenizer_training_reads_the_same_lines(tmp_path: Path) -> None:
    files = [write(tmp_path / "a.txt", "x\r\ny"), write(tmp_path / "b.jsonl", '{"text": "z\\nw"}')]
    assert list(texts_of(files)) == ["x\n", "y", "z\n", "w"]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", b"fine\nfine\n\xff\xfe\n", r"a\.txt:3: not UTF-8 \(byte 0xff\)"),
        ("a.txt", "fine\nlatin: é".encode("latin-1"), r"a\.txt:2: not UTF-8 \(byte 0xe9\)"),
        ("a.txt", "text".encode("utf-16"), r"a\.txt:1: not UTF-8"),
        ("a.txt", "text".encode("utf-16-le"), r"a\.txt:1: a NUL byte"),
        ("a.txt", b"cut \xe2\x82", r"a\.txt:1: not UTF-8"),
        ("a.txt", b"", r"a\.txt: the file is empty"),
        ("a.txt", b"\n \n", r"a\.txt: the file is empty"),
        ("a.jsonl", b"", r"a\.jsonl: the file is empty"),
        ("a.jsonl", b'{"text": "x"}\n{"text": ', r"a\.jsonl:2: invalid JSON"),
        ("a.jsonl", b'["x"]', r"a\.jsonl:1: each line must be one JSON object"),
        ("a.jsonl", b'{"prompt": "x"}', r"""a\.jsonl:1: needs a column "text" .* has 'prompt'"""),
        ("a.jsonl", b'{"text": 3}', r"a\.jsonl:1: needs .* is 3"),
        ("a.jsonl", b'{"text": ""}', r"a\.jsonl:1: needs .* is ''"),
    ],
)
def test_bad_files_are_named_with_their_line(name: str, content: bytes, said: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=said) as caught:
        encoded(tmp_path, write(tmp_path / name, content))
    assert "\n" not in str(caught.value)


def test_bad_sources(tmp_path: Path) -> None:
    for source in ("absent.txt", "no*.txt", "", "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        if source:
            with pytest.raises(DataError, match="no such file"):
                corpus_files([str(tmp_path / source)])
    with pytest.raises(DataError, match=r"x\.csv: pretraining reads"):
        corpus_files([str(write(tmp_path / "x.csv", "a"))])


def test_a_tokenizer_without_a_border_is_refused(tmp_path: Path) -> None:
    bare = train_tokenizer(["x"], "char", 300, special_tokens=("[PAD]",))
    with pytest.raises(ConfigError, match="end-of-text"):
        open_corpus([write(tmp_path / "a.txt", "x")], bare, cache=tmp_path / "c")
    masked = train_tokenizer(["x"], "char", 300, special_tokens=MASKED_SPECIALS)
    corpus = open_corpus([tmp_path / "a.txt"], masked, cache=tmp_path / "c")
    assert corpus.tokens[0] == masked.sep_token_id


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(RunError, match="cache"):
        encoded(tmp_path, write(tmp_path / "a.txt", "x"))


MEASURE = """
import resource, sys
from pathlib import Path
from upslope.data.corpus import open_corpus, texts_of
from upslope.data.chat import load_tokenizer
from upslope.data.train_tokenizer import train_tokenizer
folder, small, large = map(Path, sys.argv[1:4])
tokenizer = load_tokenizer(folder)
def run(file):
    train_tokenizer(texts_of([file]), "bpe", 300)
    corpus = open_corpus([file], tokenizer, cache=folder / "cache")
    return len(corpus.tokens), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
(few, before), (many, after) = run(small), run(large)
print(few, many, (after - before) // 1024)
"""


@pytest.mark.skipif(sys.platform == "win32" or not hasattr(resource, "getrusage"), reason="needs getrusage")
def test_memory_does_not_grow_with_the_files(tmp_path: Path) -> None:
    """From 0.6 to 6 MB of text (2 million tokens) the peak hardly rises: neither is held whole."""
    TOKENIZER.save_pretrained(str(tmp_path))
    line = "the cat sat on the mat, and a dog sat there too " * 2 + "\n"
    small = write(tmp_path / "small.txt", line * (600_000 // len(line)))
    large = write(tmp_path / "large.txt", line * (6_000_000 // len(line)))
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path), str(small), str(large)],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    few, many, grown = map(int, done.stdout.split())
    assert many > 9 * few > 1_000_000
    assert grown < 12, f"{grown} MB more"

"""Bounds of what a data file may take: rows, and packed files that grow without end; others are read as before."""

from __future__ import annotations

import gzip
import json
import os
import resource
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from upslope.data import corpus, readers
from upslope.data.corpus import corpus_files, texts_of
from upslope.data.records import read_records
from upslope.errors import DataError


def written(path: Path, rows: list[str]) -> Path:
    """Rows {"text"} in the format that the name says."""
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"text": rows}), path)
    elif path.suffix == ".csv":
        path.write_text("text\n" + "".join(f'"{row}"\n' for row in rows))
    elif path.suffix == ".txt":
        path.write_text("\n".join(rows))
    else:
        objects = [{"text": row} for row in rows]
        text = json.dumps(objects) if ".json" in path.suffixes else "\n".join(map(json.dumps, objects))
        path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.csv", "a.txt", "a.parquet"])
def test_a_row_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    rows = ["short", "b" * 900, "c" * 1100, "d"]
    assert [r.text for r in read_records(written(tmp_path / name, rows))] == rows
    monkeypatch.setattr(readers, "LARGEST_ROW", 1000)
    with pytest.raises(DataError) as caught:
        read_records(tmp_path / name)
    line = str(caught.value)
    assert str(tmp_path / name) in line
    assert "3" in line.removeprefix(str(tmp_path)) or name == "a.csv"
    assert "1,000" in line or "1000" in line


def test_a_row_too_long_for_a_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "a.jsonl", ["short", "b" * 900 + "\n" + "c" * 300])
    assert sum(map(len, texts_of(corpus_files([str(path)])))) == 1206
    monkeypatch.setattr(corpus, "LARGEST_ROW", 500)
    with pytest.raises(DataError, match=r"a\.jsonl:2: a line of 901 characters in its text, at most 500"):
        list(texts_of(corpus_files([str(path)])))
    monkeypatch.setattr(corpus, "_LARGEST_ROW", 1000)
    with pytest.raises(DataError, match=r"a\.jsonl:2: a row of more than 1,000"):
        list(texts_of(corpus_files([str(path)])))


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.txt.gz", "a.csv.gz", "a.parquet"])
def test_a_packed_file_that_grows_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    path = tmp_path / name
    if name == "a.parquet":
        written(path, ["a"] * 40_000)
    else:
        content = b'{"text": "a"}\n' * 40_000 if "jsonl" in name else b"text\n" + b"a\n" * 400_000
        path.write_bytes(gzip.compress(content))
    monkeypatch.setattr(readers, "_UNPACKED", 1 << 19)
    with pytest.raises(DataError, match="over 100 times as many; unpack it yourself"):
        read_records(path)


def test_ordinary_packed_files_are_no_bombs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ratio counts only beyond the size up to which any file may grow, and only for packed files."""
    monkeypatch.setattr(readers, "_UNPACKED", 1 << 16)
    rows = [f"{i * i:x} {i**3:x} {i**5:x}" for i in range(5_000)]
    for name in ("a.jsonl.gz", "a.parquet"):
        assert [r.text for r in read_records(written(tmp_path / name, rows))] == rows
    assert len(read_records(written(tmp_path / "a.txt", ["a"] * 5_000))) == 5_000


@pytest.mark.parametrize(
    "kind", ["one line", pytest.param("rows", marks=pytest.mark.slow), "parquet", "shared", "plain"]
)
def test_a_real_bomb_in_little_memory(tmp_path: Path, kind: str) -> None:
    """A child that may take 2 GiB more reads a file of a megabyte or less, and ends with the one line."""
    path = tmp_path / ("bomb.parquet" if kind in ("parquet", "shared", "plain") else "bomb.jsonl.gz")
    if kind == "parquet":
        pq.write_table(pa.table({"text": pa.array(["a"]).take(pa.array([0] * 3_000_000))}), path)
    elif kind in ("shared", "plain"):
        texts = pa.DictionaryArray.from_arrays(pa.array([0] * 3000, pa.int32()), pa.array(["x" * 6_000_000]))
        pq.write_table(pa.table({"text": texts}), path, compression="zstd", store_schema=kind == "shared")
    else:
        piece = (b'{"text": "' + b"a" * (1 << 20)) if kind == "one line" else b'{"text": "a"}\n' * 80_000
        with gzip.open(path, "wb", 6) as file:
            for _ in range(150 if kind == "one line" else 40):
                file.write(piece)
    assert path.stat().st_size < 1 << 20
    child = os.fork()
    if not child:
        code = 1
        try:
            mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (mapped + (2 << 30), resource.RLIM_INFINITY))
            read_records(path)
        except DataError as error:
            code = 0 if str(path) in str(error) and "not a readable" not in str(error) else 2
        except MemoryError:
            code = 3
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_what_is_read_at_once_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.json", "a.csv"):
        os.truncate(written(tmp_path / name, ["a"]), 40 << 30)
        with pytest.raises(
            DataError, match=rf"{name}: cannot be read: 42,949,672,960 bytes, at most 536,870,912; split"
        ):
            read_records(tmp_path / name)
    rows = [f"{i**5:x}" for i in range(5_000)]
    path = tmp_path / "a.csv.gz"
    path.write_bytes(gzip.compress("\n".join(["text", *rows]).encode()))
    assert len(read_records(path)) == 5_000
    monkeypatch.setattr(readers, "_UNPACKED", 1 << 16)
    with pytest.raises(DataError, match=r"a\.csv\.gz: more than 65,536 bytes; split it, or save its rows as \.jsonl"):
        read_records(path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv.gz", "a.parquet", "a"])
def test_pipes_and_devices_are_named_as_what_they_are(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    (tmp_path / f"null.{name}").symlink_to("/dev/null")
    for path in (tmp_path / name, tmp_path / f"null.{name}"):
        with pytest.raises(DataError, match=f"{path}: a pipe or device, not a plain file; copy what it holds into one"):
            read_records(path)
    for read in (readers.text_of, lambda path: list(readers.lines_of(path)), lambda path: list(texts_of([path]))):
        with pytest.raises(DataError, match="cannot be read: a pipe or device, not a plain file"):
            read(tmp_path / name)


def test_lines_as_before(tmp_path: Path) -> None:
    """A byte-order mark, CRLF, separators inside a JSON text, blank lines, no end of the last line."""
    path = tmp_path / "a.jsonl"
    path.write_bytes('\ufeff{"text": "a\u2028b"}\r\n\r\n  \n{"text": "c"}'.encode())
    assert [(r.text, r.where) for r in read_records(path)] == [("a\u2028b", f"{path}:1"), ("c", f"{path}:4")]
    path.write_bytes(b'{"text": "a"}\n{"text": "c')
    with pytest.raises(DataError, match=r":2: .*the last line: was the file cut off"):
        read_records(path)
    path.write_bytes("\u00a0\n".encode())
    with pytest.raises(DataError, match="the file is empty"):
        read_records(path)

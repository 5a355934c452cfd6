"""Text files as one long row of tokens, on disk: what pretraining reads in windows.

Files are read line by line and encoded in chunks, so that memory does not grow with them; the tokens lie in a
memory-mapped file of uint32, made once per (files, tokenizer) and kept in a cache. The row is

    <border> document <border> document <border> ...

with the tokenizer's end-of-text token (or its separator) as border. A .txt file is one document, unless the border's
own text stands in it; a row of a .jsonl file is one, its column "text". Each line is encoded by itself, its line break
included; CRLF counts as one line break and a byte-order mark is left out.
"""

import codecs
import glob
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from upslope.atomic import fsync_folder, fsync_tree, read_object
from upslope.data.pieces import FastTokenizer, plain_backend
from upslope.data.readers import LARGEST_ROW, json_of, not_utf8, object_of, reading
from upslope.errors import ConfigError, DataError, RunError
from upslope.manifest import damaged_file, inventory

KINDS = (".txt", ".jsonl")
FILES = ("tokens.bin", "marks.bin")
_VERSION = 1  # raised when the same files would give another row
_CHUNK = 1 << 18  # characters encoded at a time
_LARGEST_ROW = 1 << 27  # bytes of a row of a .jsonl file
_LONGEST = 1 << 20  # bytes of a .txt line read at a time; what is longer is encoded in such parts


def corpus_files(sources: Sequence[str]) -> list[Path]:
    """The .txt and .jsonl files of files, folders (searched through) and glob patterns, in order, each once.

    Raises DataError, naming the source, when it matches nothing or is another kind of file.
    """
    found: dict[Path, None] = {}
    for source in sources:
        if (path := Path(source).expanduser()).is_file() and path.suffix.lower() not in KINDS:
            raise DataError(f"{path}: pretraining reads {' and '.join(KINDS)} files; convert it to one of them")
        inside = sorted(path.rglob("*")) if path.is_dir() else map(Path, sorted(glob.glob(str(path), recursive=True)))
        files = [path] if path.is_file() else [p for p in inside if p.suffix.lower() in KINDS and p.is_file()]
        if not files:
            raise DataError(f"{source}: no such file, and no {' or '.join(KINDS)} file in it or matching it")
        found.update(dict.fromkeys(files))
    return list(found)


def texts_of(files: Iterable[Path]) -> Iterator[str]:
    """The files' texts line by line, as they are encoded; for training a tokenizer."""
    for document in chain.from_iterable(map(_documents, files)):
        yield from document


def _documents(path: Path) -> Iterator[Iterator[str]]:
    """Documents of a file as lines with their line breaks; each has to be read before the next."""
    if path.suffix.lower() == ".txt":
        yield (line.replace("\r\n", "\n") for line in _lines(path, _LONGEST))
        return
    for number, line in enumerate(_lines(path, _LARGEST_ROW + 1), 1):
        if len(line) > _LARGEST_ROW:
            raise DataError(f"{path}:{number}: a row of more than {_LARGEST_ROW:,} characters; split the document")
        if line.strip():
            where = f"{path}:{number}"
            row = object_of(json_of(line.strip(), where), where, "each line must be one JSON object")
            if not isinstance((text := row.get("text")), str) or not text.strip():
                what = f"has {', '.join(map(repr, row)) or 'nothing'}" if "text" not in row else f"is {text!r}"[:60]
                raise DataError(f'{where}: needs a column "text" with a text in it; it {what}')
            yield _split(text, where)


def _split(text: str, where: str) -> Iterator[str]:
    """Lines with their breaks; only a line feed breaks one (JSON texts may hold other separators)."""
    start = 0
    text = text.replace("\r\n", "\n")
    while start < len(text):
        if (end := text.find("\n", start) + 1 or len(text)) - start > LARGEST_ROW:
            raise DataError(f"{where}: a line of {end - start:,} characters in its text, at most {LARGEST_ROW:,}")
        yield text[start:end]
        start = end


def _lines(path: Path, limit: int) -> Iterator[str]:
    """Decoded lines (or parts of at most `limit` bytes). DataError when empty, unreadable or not UTF-8."""
    decoder, number, empty = codecs.getincrementaldecoder("utf-8")(), 1, True
    try:
        with reading(path) as file:
            while raw := file.readline(limit):
                text = decoder.decode(raw)
                if "\x00" in text:
                    raise DataError(f"{path}:{number}: a NUL byte: not a text file, or not UTF-8; save it as UTF-8")
                if number == 1 and empty:
                    text = text.removeprefix("\ufeff")
                empty = empty and not text.strip()
                yield text
                number += raw.endswith(b"\n")
            decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise not_utf8(path, number, error) from error
    if empty:
        raise DataError(f"{path}: the file is empty; leave it out")


@dataclass(frozen=True, slots=True)
class TokenStream:
    """A run of tokens; all but the first are to be predicted. `bytes`: UTF-8 bytes of the text they spell."""

    tokens: np.ndarray
    bytes: int

    def num_windows(self, length: int) -> int:
        """How many windows of `length` tokens cover it; neighbours share a token, so each is predicted once."""
        return -(-(len(self.tokens) - 1) // (length - 1))

    def window(self, index: int, length: int) -> list[int]:
        """Tokens of a window; the last one may be shorter."""
        start = index * (length - 1)
        return self.tokens[start : start + length].tolist()

    def strided(self, length: int, stride: int) -> Iterator[tuple[list[int], int]]:
        """Windows `stride` tokens apart with the first position each one scores: every token is scored once.

        All but the first window's tokens are scored with at least length - stride tokens before them.
        """
        start, scored = 0, 1
        while scored < len(self.tokens):
            window = self.tokens[start : start + length].tolist()
            yield window, scored - start
            scored = start + len(window)
            start += stride


@dataclass(frozen=True, slots=True)
class Corpus:
    """An encoded corpus: its tokens (memory-mapped), and where its lines begin.

    marks [M, 2]: (token, byte) at which each line begins, and the end. sha256: of the tokens, the corpus's identity.
    """

    tokens: np.ndarray
    marks: np.ndarray
    documents: int
    sha256: str

    @property
    def bytes(self) -> int:
        """UTF-8 bytes of its text."""
        return int(self.marks[-1, 1])

    def head(self, max_tokens: int | None = None) -> TokenStream:
        """Whole lines from the beginning, up to `max_tokens` tokens (at least one line)."""
        return self._between(0, self._end(0, max_tokens))

    def split(self, share: float, max_tokens: int | None = None) -> tuple[TokenStream, TokenStream]:
        """(training part, held-out part): the lines of the last `share` of the tokens are held out.

        Of these the first ones are taken, up to `max_tokens` tokens (at least one line). Raises DataError where one
        part would be empty.
        """
        line = int(np.searchsorted(self.marks[:, 0], (1 - share) * len(self.tokens)))
        if not 0 < line < len(self.marks) - 1:
            raise DataError("the text is too short to hold out a part of it: give held-out text (eval_data)")
        return self._between(0, line), self._between(line, self._end(line, max_tokens))

    def _end(self, line: int, max_tokens: int | None) -> int:
        """The mark that ends `max_tokens` tokens of whole lines from `line` on."""
        if max_tokens is None:
            return len(self.marks) - 1
        limit = int(self.marks[line, 0]) + max_tokens
        return max(line + 1, int(np.searchsorted(self.marks[:, 0], limit, side="right")) - 1)

    def _between(self, first: int, last: int) -> TokenStream:
        """The lines first..last, with the one token before them."""
        (start, low), (end, high) = self.marks[first].tolist(), self.marks[last].tolist()
        if last == len(self.marks) - 1:
            end = len(self.tokens)  # the border behind the last document
        return TokenStream(self.tokens[start - 1 : end], high - low)


def open_corpus(files: Sequence[Path], tokenizer: FastTokenizer, *, cache: Path) -> Corpus:
    """The files' tokens, encoded now or taken from `cache` when neither files nor tokenizer have changed.

    A file counts as changed when its size or its time of modification differs. What the cache holds is read through
    and compared with its SHA-256 (once in a process); damaged, it is made again, and a line on stderr says so. Safe
    when several processes ask at once; an interrupted build leaves nothing behind that would be taken for a corpus.
    Raises DataError naming file and line, ConfigError for a tokenizer without an end-of-text or separator token,
    RunError where the cache cannot be written.
    """
    border = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    if border is None:
        raise ConfigError("the tokenizer has neither an end-of-text nor a separator token to stand between documents")
    folder = cache / _key(files, tokenizer)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if (meta := _meta(folder)) is None:
                for stale in cache.glob(f".{folder.name}.tmp-*"):
                    shutil.rmtree(stale)
                meta = _build(folder, files, tokenizer, border)
            tokens = np.memmap(folder / "tokens.bin", dtype=np.uint32, mode="r")
            marks = np.fromfile(folder / "marks.bin", dtype=np.uint64).reshape(-1, 2).astype(np.int64)
    except OSError as error:
        raise RunError(
            f"cannot keep the encoded text in {cache}: {error}; free space or choose another cache_dir"
        ) from error
    return Corpus(tokens, marks, meta["documents"], meta["sha256"])


def _meta(folder: Path) -> dict[str, Any] | None:
    """What the cache knows of a corpus that is there and whole; None where it has to be made, the old one removed."""
    if not folder.is_dir():
        return None
    reason = "meta.json is damaged or of an earlier version"
    with suppress(DataError, KeyError, TypeError):
        meta = read_object(folder / "meta.json", DataError)
        problem = damaged_file(folder, {name: meta["files"][name] for name in FILES})
        whole = isinstance(meta["documents"], int) and meta["sha256"] == meta["files"]["tokens.bin"]["sha256"]
        if problem is None and whole:
            return meta
        reason = problem or reason
    print(f"upslope: {folder}: {reason}; the text is encoded again", file=sys.stderr)
    shutil.rmtree(folder)
    return None


def _key(files: Sequence[Path], tokenizer: FastTokenizer) -> str:
    digest = hashlib.sha256(f"{_VERSION}\n{tokenizer.backend_tokenizer.to_str()}".encode())  # type: ignore[attr-defined]
    for file in files:
        try:
            facts = file.stat()
        except OSError as error:
            raise DataError(f"{file}: cannot be read: {error.strerror or error}") from error
        digest.update(f"\n{file.resolve()} {facts.st_size} {facts.st_mtime_ns}".encode(errors="surrogateescape"))
    return digest.hexdigest()[:24]


def _build(folder: Path, files: Sequence[Path], tokenizer: FastTokenizer, border: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.tmp-", dir=folder.parent) as work:
        temp = Path(work, "corpus")
        temp.mkdir()
        documents = _encode(files, tokenizer, border, temp)
        facts = {name: inventory(temp)[name] for name in FILES}
        meta = {"documents": documents, "sha256": facts[FILES[0]]["sha256"], "files": facts}
        (temp / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
        fsync_tree(temp)
        os.replace(temp, folder)
        fsync_folder(folder.parent)
    return meta


def _encode(files: Sequence[Path], tokenizer: FastTokenizer, border: int, folder: Path) -> int:
    """Encode the lines in chunks; tokens and marks are written as they come. Returns the number of documents."""
    inner = plain_backend(tokenizer.backend_tokenizer.to_str())
    count, size, documents = 1, 0, 0
    with (folder / FILES[0]).open("wb") as tokens, (folder / FILES[1]).open("wb") as marks:
        tokens.write(np.array([border], dtype=np.uint32).tobytes())
        for chunk in _chunks(files):
            encoded = inner.encode_batch_fast([line for line, _ in chunk], add_special_tokens=False)
            ids: list[int] = []
            begun: list[tuple[int, int]] = []
            for (line, last), encoding in zip(chunk, encoded, strict=True):
                begun.append((count + len(ids), size))
                ids += encoding.ids + [border] * last
                size += len(line.encode())
                documents += last
            count += len(ids)
            tokens.write(np.array(ids, dtype=np.uint32).tobytes())
            marks.write(np.array(begun, dtype=np.uint64).tobytes())
        marks.write(np.array([[count, size]], dtype=np.uint64).tobytes())
    return documents


def _chunks(files: Sequence[Path]) -> Iterator[list[tuple[str, bool]]]:
    """Lines of all documents, each with whether it is its document's last, some _CHUNK characters at a time."""
    chunk: list[tuple[str, bool]] = []
    characters = 0
    for document in chain.from_iterable(map(_documents, files)):
        for line, after in pairwise(chain(document, [None])):
            assert line is not None
            chunk.append((line, after is None))
            characters += len(line)
            if characters >= _CHUNK:
                yield chunk
                chunk, characters = [], 0
    if chunk:
        yield chunk

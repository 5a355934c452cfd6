"""Rows of a data file, each with the words that say where it stands. No row is skipped or guessed at."""

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain, pairwise
from pathlib import Path
from typing import IO, Any

from upslope.atomic import check_plain
from upslope.config import suggestion
from upslope.errors import ConfigError, DataError, one_line
from upslope.extras import require
from upslope.options.common import column_names

Row = tuple[str, Mapping[str, Any]]

LARGEST_ROW = 1 << 23  # bytes: no sequence that is trained on has so many, and its tokens take a hundred times as much
_ROW_COST = 500  # bytes that a row takes beyond its values
_UNPACKED = 1 << 29  # bytes up to which a packed file may grow, however small it is, and of what is read at once
_SPLIT = "split it, or save its rows as .jsonl, which is read line by line"
_GROWTH = 100
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?(:[\w.-]+)?")


def rows_of(source: str | Path, *, split: str | None = None, columns: Sequence[str] = ()) -> Iterator[Row]:
    """(where, row) pairs of a file or, when no such file exists and the name looks like one, of a hub data set.

    Files: .jsonl, .json (a list of objects), .csv (with a header), .txt (one text per line, blank lines skipped), each
    also as .gz, and .parquet. A hub id may name a configuration: "owner/name:configuration"; its split is "train"
    unless given. `columns`: what its columns are called, as in prompt=question (`options.common.column_names`).
    Raises DataError naming file and line or row; ConfigError for a missing optional package or a split asked of a file.
    """
    names = column_names(columns)
    for where, row in _rows_as_given(source, split):
        yield where, _renamed(row, names, where) if names else row


def _renamed(row: Mapping[str, Any], names: Mapping[str, str], where: str) -> Mapping[str, Any]:
    """The row with the keys of a record. DataError for a column that is not there."""
    for name, column in names.items():
        if column not in row:
            there = ", ".join(map(str, row))
            raise DataError(f"{header_of(where)}: no column {column!r} to take {name} from; there are {there}")
    rest = {key: value for key, value in row.items() if key not in names and key not in names.values()}
    return {**{name: row[column] for name, column in names.items()}, **rest}


def _rows_as_given(source: str | Path, split: str | None) -> Iterator[Row]:
    if (path := Path(source).expanduser()).is_file():
        if split is not None:
            raise ConfigError(f"{source}: a split ({split!r}) can be chosen from a hub data set, not from a file")
        yield from _reader(path)(path)
    elif path.is_dir():
        raise DataError(f"{source}: is a folder; name one data file in it")
    elif path.exists():
        raise DataError(f"{source}: a pipe or device, not a plain file; copy what it holds into one")
    elif str(source).lower().removesuffix(".gz").endswith(tuple(_READERS)) or not _HUB_ID.fullmatch(str(source)):
        raise DataError(f"{source}: no such file{near_file(path)}")
    else:
        name, _, configuration = str(source).partition(":")
        why, remedy = f"{source}: no such file, and as a hub data set", "; offline, pass the path of a local file"
        for where, row in table_rows(name, configuration, split or "train", str(source), why, remedy):
            yield where, _as_given(object_of(row, where, "a row must have named columns"))


def _reader(path: Path) -> Callable[[Path], Iterator[Row]]:
    name = path.name.lower().removesuffix(".gz")
    for suffix, reader in _READERS.items():
        if name.endswith(suffix) and not (suffix == ".parquet" and path.name.lower().endswith(".gz")):
            return reader
    raise DataError(f"{path}: unknown kind of file; accepted: {', '.join(_READERS)} (text kinds also as .gz)")


def near_file(path: Path) -> str:
    """What to add to "no such file": the nearest name in its folder, or that there is no such folder."""
    if not (folder := path.parent).is_dir():
        return f" (the folder {folder} does not exist)"
    return suggestion(path.name, (entry.name for entry in folder.iterdir()))


def header_of(where: str) -> str:
    """Where the columns of the row at `where` are named: of a CSV file in line 1."""
    return re.sub(r"(\.csv(\.gz)?):\d+\Z", r"\1:1", where, flags=re.IGNORECASE)


def text_of(path: Path) -> str:
    """The file's text without a byte-order mark. DataError when unreadable, empty, corrupt or not UTF-8."""
    with reading(path, _UNPACKED) as file:
        raw = file.read(_UNPACKED + 1) if _packed(path) else file.read()
        _check_growth(path, len(raw))
    if len(raw) > _UNPACKED:
        raise DataError(f"{path}: more than {_UNPACKED:,} bytes; {_SPLIT}")
    if not raw.strip():
        raise DataError(f"{path}: the file is empty")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise not_utf8(path, raw.count(b"\n", 0, error.start) + 1, error) from error


def not_utf8(path: Path, line: int, error: UnicodeDecodeError) -> DataError:
    """What is said of bytes that are no text."""
    return DataError(f"{path}:{line}: not UTF-8 (byte 0x{error.object[error.start]:02x}); save the file as UTF-8")


def _packed(path: Path) -> bool:
    return path.name.lower().endswith((".gz", ".parquet"))


@contextmanager
def reading(path: Path, most: int | None = None) -> Iterator[IO[bytes]]:
    """The file's bytes, unpacked. DataError for what cannot be read, or is a file of more than `most` bytes."""
    try:
        check_plain(path, most, _SPLIT)
        with path.open("rb") as raw:
            yield gzip.GzipFile(fileobj=raw) if path.name.lower().endswith(".gz") else raw
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: the gzip file is damaged or cut off ({error}); fetch or pack it again") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


def _check_growth(path: Path, held: int) -> None:
    """DataError for a packed file whose rows take a hundred times its own bytes, and half a gigabyte."""
    if held > _UNPACKED and _packed(path) and held > _GROWTH * (size := path.stat().st_size):
        raise DataError(
            f"{path}: its {size:,} bytes unpack to rows of more than {held:,} bytes, over {_GROWTH} times as many; "
            "unpack it yourself if that is meant"
        )


def lines_of(path: Path) -> Iterator[tuple[int, str]]:
    """(number, line) of those that are not blank, read one by one. DataError as `text_of`, and for a line too long."""
    number, held, empty = 0, 0, True
    with reading(path) as file:
        while raw := file.readline(LARGEST_ROW + 1):
            number += 1
            held += len(raw) + _ROW_COST
            if len(raw) > LARGEST_ROW:
                raise DataError(f"{path}:{number}: a line of more than {LARGEST_ROW:,} bytes; split the record")
            _check_growth(path, held)
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8").removesuffix("\n")
            except UnicodeDecodeError as error:
                raise not_utf8(path, number, error) from error
            if line.strip():
                empty = False
                yield number, line
    if empty:
        raise DataError(f"{path}: the file is empty")


def _check_row(row: Any, where: str) -> int:
    """How long the row's texts are. DataError where that is too long to be one sequence."""
    size, rest = 0, [row]
    while rest:
        if isinstance((value := rest.pop()), str | bytes):
            size += len(value)
        elif isinstance(value, list | Mapping):
            rest += value.values() if isinstance(value, Mapping) else value
    if size > LARGEST_ROW:
        raise DataError(f"{where}: {size:,} characters in one row, at most {LARGEST_ROW:,}; split the record")
    return size


def json_of(text: str, where: str, hint: str = "") -> Any:
    """`where` names the line already when `text` is one line, else the line inside `text` is added."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"{where}:{error.lineno}" if "\n" in text else where
        if error.msg == "Extra data" and error.lineno > 1:
            hint = "; it looks like one object per line: name it .jsonl"
        raise DataError(f"{place}: invalid JSON at column {error.colno}: {error.msg}{hint}") from error
    except RecursionError as error:
        raise DataError(f"{where}: invalid JSON: nested too deeply") from error
    except ValueError as error:  # a number of more digits than Python converts
        raise DataError(f"{where}: invalid JSON: {error}") from error


def _jsonl_rows(path: Path) -> Iterator[Row]:
    for (number, line), after in pairwise(chain(lines_of(path), [None])):  # type: ignore[misc]
        where = f"{path}:{number}"
        cut = after is None and number > 1
        row = json_of(line, where, " (the last line: was the file cut off?)" if cut else "")
        yield where, object_of(row, where, "each line must be one JSON object")


def _json_rows(path: Path) -> Iterator[Row]:
    text = text_of(path)
    if not isinstance((rows := json_of(text, str(path))), list):
        raise DataError(f"{path}: must be a list of objects, is {_kind(rows)}")
    for number, row in enumerate(rows, 1):
        where = f"{path}: row {number}"
        if len(text) > LARGEST_ROW:
            _check_row(row, where)
        yield where, object_of(row, where, "each entry of the list must be an object")


def _csv_rows(path: Path) -> Iterator[Row]:
    csv.field_size_limit(LARGEST_ROW)
    reader = csv.reader(io.StringIO(text_of(path), newline=""), strict=True)
    try:
        if len(set(header := next(reader))) != len(header) or not all(name.strip() for name in header):
            raise DataError(f"{path}:1: the header has an empty or a repeated column name: {header!r}")
        line = reader.line_num + 1
        for cells in reader:
            where, line = f"{path}:{line}", reader.line_num + 1
            if not cells:
                continue
            if len(cells) != len(header):
                raise DataError(f"{where}: {len(cells)} columns, the header has {len(header)}; quote text with commas")
            yield where, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num}: invalid CSV: {error}") from error


def _txt_rows(path: Path) -> Iterator[Row]:
    for number, line in lines_of(path):
        yield f"{path}:{number}", {"text": line.rstrip("\r")}


def _parquet_rows(path: Path) -> Iterator[Row]:
    pyarrow = require("data", "pyarrow")
    parquet = require("data", "pyarrow.parquet")
    number = held = texts = 0
    try:
        with parquet.ParquetFile(path) as file:
            _check_growth(path, _ROW_COST * file.metadata.num_rows)
            for batch in file.iter_batches(batch_size=_rows_at_once(path, file.metadata)):
                held += batch.nbytes + _ROW_COST * batch.num_rows
                _check_growth(path, held)
                for row in batch.to_pylist():
                    number += 1
                    texts += _check_row(row, f"{path}: row {number}")
                    _check_growth(path, texts)
                    yield f"{path}: row {number}", _as_given(row)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a readable Parquet file: {one_line(error)}") from error


def _rows_at_once(path: Path, metadata: Any) -> int:
    """Up to 1024: each may repeat the longest text, which may be all that its group of rows holds unpacked."""
    largest = max((metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups)), default=0)
    least = 1 if largest > _GROWTH // 10 * path.stat().st_size else 32
    return min(1024, max(least, 16 * LARGEST_ROW // max(1, largest)))


def table_rows(path: str, configuration: str, split: str, name: str, why: str, remedy: str = "") -> Iterator[Row]:
    """The rows of what `datasets` loads from a folder or the hub; a DataError begins with `why`."""
    datasets = require("data", "datasets")
    try:
        table = datasets.load_dataset(path, configuration or None, split=split)
    except Exception as error:  # the client raises a dozen unrelated kinds; what it says is passed on
        raise DataError(f"{why} (split {split!r}) it cannot be loaded: {one_line(error)}{remedy}") from error
    for number, row in enumerate(table, 1):
        yield f"{name}[{split}] row {number}", row


def _as_given(value: Any) -> Any:
    """A value without the keys that a table has put into its objects: all rows of a column have the keys of any."""
    if isinstance(value, Mapping):
        return {key: _as_given(item) for key, item in value.items() if item is not None}
    return [_as_given(item) for item in value] if isinstance(value, list) else value


def object_of(row: Any, where: str, rule: str) -> Mapping[str, Any]:
    """A row that is an object, as the rule says. DataError for anything else."""
    if not isinstance(row, Mapping):
        raise DataError(f"{where}: {rule}, is {_kind(row)}")
    return row


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, (int, float)) else type(value).__name__)


_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _jsonl_rows,
    ".json": _json_rows,
    ".csv": _csv_rows,
    ".txt": _txt_rows,
    ".parquet": _parquet_rows,
}

"""Damaged inputs by the thousand: seeded mutations, and children that read them under a bound of memory and time.

A `Family` makes good files once and, of a random generator, one damaged case with what reads it. A case passes when it
ends well or with one of the four errors of upslope.errors in one line; another exception, a crash, memory or time above
the bound fail it. The case's number alone makes the case: `python tests/fuzz/replay.py FAMILY NUMBER` runs it again.
"""

from __future__ import annotations

import copy
import json
import math
import os
import random
import re
import resource
import select
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from upslope.errors import UpslopeError

MEMORY = 2 << 30  # bytes a child may map beyond what it was born with
SECONDS = 5.0
LONGEST_MESSAGE = 1500

HOSTILE: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 64, 20_000, 2**31, 2**40, -(2**63), 10**400, 0.5, -0.5, 1e-320, 1e308),
    *(math.nan, math.inf, -math.inf, "", " ", "x", "32", "-1", "nan", "true", "null", "\0", "\ud800", "é" * 300),
    *("a" * 20_000, "../../x", "{{ 1 }}", [], [1], [[]], [None, "a"], [1] * 2000, {}, {"a": 1}, {"": None}),
)
BYTES = (b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\n", b"\r\n", b'"', b"\\", b"[" * 3000, b"9" * 5000)


@dataclass(frozen=True, slots=True)
class Family:
    """`make` gets a folder and returns what `case` reads: case(made, rng, scratch folder) raises, or it does not.

    room: whose reader it is. share: part of the cases of a run that go to this family, relative to the others'.
    """

    name: str
    room: str
    make: Callable[[Path], Any]
    case: Callable[[Any, random.Random, Path], None]
    share: float = 1.0
    seconds: float = SECONDS


@dataclass(frozen=True, slots=True)
class Failure:
    """A case that must not end as it did."""

    family: str
    number: int
    what: str

    def __str__(self) -> str:
        return f"{self.what}\n    again: .venv/bin/python tests/fuzz/replay.py {self.family} {self.number}"


def damaged(rng: random.Random, content: bytes, others: Sequence[bytes] = ()) -> bytes:
    """The bytes after one to three mutations: flips, cuts, repeats, insertions, splices with others."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        at = rng.randrange(len(content) + 1)
        size = rng.choice((1, 4, 16, 200))
        way = rng.randrange(8)
        if way == 0 and content:
            where = [rng.randrange(len(content)) for _ in range(rng.choice((1, 1, 3, 30)))]
            changed = bytearray(content)
            for i in where:
                changed[i] ^= 1 << rng.randrange(8)
            content = bytes(changed)
        elif way == 1:
            content = content[:at]
        elif way == 2:
            content = content[:at] + content[at + size :]
        elif way == 3:
            content = content[:at] + content[at : at + size] * rng.choice((2, 50)) + content[at + size :]
        elif way == 4:
            content = content[:at] + rng.choice(BYTES) + content[at:]
        elif way == 5:
            content = content[:at] + rng.randbytes(size) + content[at + size :]
        elif way == 6:
            other = rng.choice(others) if others else content
            start = rng.randrange(len(other) + 1)
            content = content[:at] + other[start : start + rng.choice((20, 2000))] + content[at:]
        elif way == 7:
            numbers = [m.span() for m in re.finditer(rb"-?\d+(\.\d+)?", content[:20_000])]
            if numbers:
                low, high = rng.choice(numbers)
                hostile = rng.choice((b"-1", b"0", b"1e999", b"NaN", b"99999999999999999999", b"0.5", b"true"))
                content = content[:low] + hostile + content[high:]
    return content


def damaged_json(rng: random.Random, content: bytes, others: Sequence[bytes] = ()) -> bytes:
    """A JSON text with one to three values replaced, removed, renamed, wrapped, given twice or nested deeply.

    Now and then mutated as bytes, in another encoding, or another file altogether.
    """
    way = rng.random()
    if way < 0.15:
        return damaged(rng, content, others)
    if way < 0.19:
        return rng.choice((b"", b"null", b"[]", b"1", b"{}", b'"a"', b"[" * 100_000, b'{"a":' * 20_000, b"\xff\xfe{"))
    if way < 0.21:
        return content.decode("utf-8", "replace").encode("utf-16")
    if way < 0.24 and others:
        return rng.choice(others)
    try:
        tree = json.loads(content)
    except (ValueError, RecursionError):
        return damaged(rng, content, others)
    holder = [tree]
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        _change(rng, holder)
    text = json.dumps(holder[0])
    if rng.random() < 0.05 and '": ' in text:  # a key given twice
        pairs = re.findall(r'"[^"]{1,40}": [\w.+-]+', text)
        if pairs and "{" in text:
            at = text.index("{") + 1
            text = f"{text[:at]}{rng.choice(pairs)}, {text[at:]}"
    return text.encode()


def _change(rng: random.Random, holder: list[Any]) -> None:
    places = list(_places(holder))
    tops = [p for p in places if p[0] is holder[0]] or places
    box, key = rng.choice(tops if rng.random() < 0.6 else places)
    way = rng.randrange(10)
    if way < 6:
        box[key] = copy.deepcopy(rng.choice(HOSTILE))
    elif way == 6:
        del box[key]
        if box is holder:
            holder.append(None)
    elif way == 7:
        other, there = rng.choice(places)
        box[key] = copy.deepcopy(other[there])
    elif way == 8:
        deep: Any = box[key]
        for _ in range(rng.choice((1, 30, 300))):
            deep = [deep] if rng.random() < 0.5 else {"a": deep}
        box[key] = deep
    elif isinstance(box, dict):
        box[rng.choice(("", "x", str(key)[:-1], str(key).upper(), f"{key}s"))] = box.pop(key)


def _places(value: Any, depth: int = 0) -> Iterator[tuple[Any, Any]]:
    """(container, key) of every value; of long lists the first few."""
    keys = list(value) if isinstance(value, dict) else range(min(len(value), 12))
    for key in list(keys)[:60]:
        yield value, key
        if isinstance(value[key], dict | list) and depth < 6:
            yield from _places(value[key], depth + 1)


def generator(family: str, number: int) -> random.Random:
    """The random numbers of a case: those of no other."""
    return random.Random(f"{family}:{number}")


def run(family: Family, made: Any, numbers: Iterable[int], scratch: Path) -> Counter[str | Failure]:
    """How the cases end: "well", "refused", or a Failure. Forked children read them; one that dies costs one case."""
    todo, ends = list(numbers), Counter[str | Failure]()
    while todo:
        begun = _in_child(family, made, todo, scratch, ends)
        todo = todo[begun:]
    return ends


class _Slow(BaseException):
    pass


def _in_child(family: Family, made: Any, numbers: Sequence[int], scratch: Path, ends: Counter[str | Failure]) -> int:
    """Read the cases until the child ends; how many were begun."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.close(reader)
        _read_all(family, made, numbers, scratch, writer)
    os.close(writer)
    begun, ended = 0, False

    def fail(what: str) -> None:
        ends[Failure(family.name, numbers[begun - 1], what)] += 1

    with os.fdopen(reader, "rb", buffering=0) as lines:
        rest = b""
        while not ended:
            if not select.select([lines], [], [], 4 * family.seconds)[0]:
                fail("hangs, deaf to signals")
                os.kill(child, signal.SIGKILL)
                break
            got = os.read(lines.fileno(), 1 << 16)
            if not got:
                fail("ends the process")
                break
            *whole, rest = (rest + got).split(b"\n")
            for line in whole:
                word, _, more = line.partition(b" ")
                begun += word == b"begin"
                ended = ended or word == b"end"
                if word == b"fail":
                    fail(json.loads(more))
                elif word in (b"well", b"refused"):
                    ends[word.decode()] += 1
    os.waitpid(child, 0)
    return begun


def _read_all(family: Family, made: Any, numbers: Sequence[int], scratch: Path, writer: int) -> NoReturn:
    silent = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        os.dup2(silent, descriptor)
    signal.signal(signal.SIGALRM, _alarm)
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY, resource.RLIM_INFINITY))
    status = 1
    try:
        for number in numbers:
            os.write(writer, b"begin\n")
            what = outcome(family, made, number, scratch)
            line = what if what in ("well", "refused") else f"fail {json.dumps(what)}"
            os.write(writer, f"{line}\n".encode())
        os.write(writer, b"end\n")
        status = 0
    finally:
        os._exit(status)


def outcome(family: Family, made: Any, number: int, scratch: Path) -> str:
    """How a case ends: "well", "refused", or what is wrong with its end."""
    folder = scratch / f"{family.name}-{number}"
    folder.mkdir(parents=True)
    signal.setitimer(signal.ITIMER_REAL, family.seconds)
    began, end = time.monotonic(), "well"
    try:
        family.case(made, generator(family.name, number), folder)
    except UpslopeError as error:
        message = str(error)
        if "\n" in message or not 0 < len(message) < LONGEST_MESSAGE:
            return f"{type(error).__name__} of {len(message)} characters, {message.count(chr(10))} line breaks"
        end = "refused"
    except _Slow:
        return f"takes more than {family.seconds:g} s, then in {_place()}"
    except BaseException as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:160]} in {_place()}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        _remove(folder)
    took = time.monotonic() - began
    return f"took {took:.1f} s, deaf to signals" if took > 2 * family.seconds else end


def _alarm(*_: object) -> None:
    raise _Slow


def _place() -> str:
    """Our innermost lines under the exception in flight."""
    frames = traceback.extract_tb(sys.exc_info()[2])
    ours = [f for f in frames if "/upslope/" in f.filename] or frames
    return " < ".join(f"{'/'.join(Path(f.filename).parts[-2:])}:{f.lineno}" for f in reversed(ours[-3:]))


def _remove(folder: Path) -> None:
    import shutil

    shutil.rmtree(folder, ignore_errors=True)


def linked(source: Path, target: Path, changed: dict[str, bytes | None]) -> Path:
    """A folder like `source` whose files are links to its own, but for those changed (None: left out)."""
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.rglob("*")):
        name = path.relative_to(source).as_posix()
        place = target / name
        if path.is_dir() and not path.is_symlink():
            place.mkdir(exist_ok=True)
        elif name not in changed:
            os.symlink(path.readlink() if path.is_symlink() else path.resolve(), place)
    for name, content in changed.items():
        if content is not None:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (target / name).write_bytes(content)
    return target

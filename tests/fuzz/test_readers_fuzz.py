"""Damaged files, templates and requests by the thousand end well or in one line: see fuzz_kit.

`make test` reads some 3,000 inputs; `make test-all` 100,000 of other numbers, in shards. What fails is printed with the
command that reads that one input again. Templates, the server and run folders can be listed apart: `-k templates`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fuzz_families import FAMILIES
from fuzz_kit import Failure, Family, generator, run

SHORT, LONG, SHARDS = 3_000, 100_000, 4
SHARE = sum(family.share for family in FAMILIES.values())


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The good files of every family that ran, made once."""
    return {}


def read(family: Family, made: dict[str, Any], first: int, last: int, folder: Path) -> None:
    if family.name not in made:
        place = folder / "made"
        place.mkdir()
        made[family.name] = family.make(place)
    ends = run(family, made[family.name], range(first, last), folder / "cases")
    failures = sorted((end for end in ends if isinstance(end, Failure)), key=lambda failure: failure.number)
    words = "\n".join(map(str, failures[:10]))
    print(f"{family.name}: {ends['well']} well, {ends['refused']} refused, {len(failures)} failed\n{words}")
    assert not failures, f"{len(failures)} of {last - first} inputs failed:\n{words}"
    assert ends["well"]


@pytest.mark.parametrize("name", FAMILIES)
def test_damaged_inputs(made: dict[str, Any], tmp_path: Path, name: str) -> None:
    """Success or one of the four errors in one line; no other exception, no hang, no memory without bounds."""
    read(FAMILIES[name], made, 0, round(SHORT * FAMILIES[name].share / SHARE), tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("shard", range(SHARDS))
@pytest.mark.parametrize("name", FAMILIES)
def test_many_damaged_inputs(made: dict[str, Any], tmp_path: Path, name: str, shard: int) -> None:
    """The same with numbers that the default suite does not read."""
    count = round(LONG * FAMILIES[name].share / SHARE / SHARDS)
    read(FAMILIES[name], made, 10_000 + shard * count, 10_000 + (shard + 1) * count, tmp_path)


def family_of(case: Any) -> Family:
    return Family("sham", "none", lambda _: None, case, seconds=0.3)


def test_what_must_not_happen_is_noticed(tmp_path: Path) -> None:
    """An exception of another kind, two lines, a hang, a death, a gigabyte too many; the cases after it are read."""
    import os
    import time

    from upslope.errors import DataError

    def case(_: Any, rng: Any, folder: Path) -> None:
        number = int(folder.name.rpartition("-")[2])
        if number == 1:
            raise KeyError("x")
        if number == 2:
            raise DataError("")
        if number == 3:
            time.sleep(60)
        if number == 4:
            os._exit(7)
        if number == 5:
            bytearray(3 << 30)
        if number == 6:
            raise DataError("row 1: as it should be")

    ends = run(family_of(case), None, range(8), tmp_path)
    said = {end.number: end.what for end in ends if isinstance(end, Failure)}
    assert said.keys() == {1, 2, 3, 4, 5}
    for number, word in ((1, "KeyError"), (2, "0 characters"), (3, "0.3 s"), (4, "ends the process"), (5, "MemoryErr")):
        assert word in said[number]
    assert (ends["well"], ends["refused"]) == (2, 1)
    assert "replay.py sham 1" in str(Failure("sham", 1, "x"))


def test_a_number_makes_the_same_case() -> None:
    assert [generator("a", 7).random() for _ in range(2)] == [generator("a", 7).random()] * 2
    assert generator("a", 7).random() != generator("b", 7).random()

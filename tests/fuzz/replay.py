"""Read damaged inputs of one family again: python tests/fuzz/replay.py FAMILY NUMBER, or a range FIRST-LAST.

A single case is read in this process and ends with its traceback; a range prints what fails, each kind once, with how
often. Without arguments: the families.
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent.parent / "src")]

import conftest  # noqa: E402, F401  (threads, before torch)
from fuzz_families import FAMILIES  # noqa: E402
from fuzz_kit import Failure, generator, run  # noqa: E402


def main(words: list[str]) -> int:
    """The exit code: 1 where something fails."""
    if len(words) != 2:
        print(__doc__, "\n", *sorted(FAMILIES))
        return 2
    family = FAMILIES[words[0]]
    first, _, last = words[1].partition("-")
    with tempfile.TemporaryDirectory() as folder:
        made = family.make(_new(Path(folder) / "made"))
        if not last:
            family.case(made, generator(family.name, int(first)), _new(Path(folder) / "case"))
            print("it ends well")
            return 0
        ends = run(family, made, range(int(first), int(last)), Path(folder) / "cases")
    failures = [end for end in ends if isinstance(end, Failure)]
    counts = Counter(map(_kind, failures))
    firsts = {_kind(failure): failure for failure in reversed(failures)}
    for kind, count in counts.most_common():
        print(f"{family.name} {count:5} times, first {firsts[kind].number}: {firsts[kind].what[:400]}")
    tally = f"{len(failures)} of {int(last) - int(first)} cases fail, in {len(counts)} ways"
    print(f"{family.name}: {tally}; {ends['refused']} refused, {ends['well']} well")
    return bool(failures)


def _kind(failure: Failure) -> str:
    """The exception and its place, without what it says."""
    head, _, place = failure.what.rpartition(" in ")
    return f"{head.partition(':')[0]} {place}"


def _new(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

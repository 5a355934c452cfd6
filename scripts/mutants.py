"""Plant the faults of tests/mutants.toml, one at a time, and see whether the tests named there notice.

    make mutants                                      all of them; a quarter of an hour on two cores
    .venv/bin/python scripts/mutants.py NAME ...      only these
    .venv/bin/python scripts/mutants.py --list FILE   another list

A fault is one replacement in one file of src/upslope. It is planted in a copy of the repository, never in the
repository itself, and is noticed when one of its tests fails, or hangs. One that cannot be imported or that names
what does not exist is broken, and not noticed. Exit codes: 0 every fault was noticed, 1 some were not, 2 the list or
the command is wrong or a test fails without any fault.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parent.parent
LIST = ROOT / "tests" / "mutants.toml"
QUIET = ("-q", "-x", "--no-header", "--tb=line", "-W", "ignore::pytest.PytestAssertRewriteWarning")
PYTEST = (*QUIET, "-p", "no:cacheprovider", "-o", "timeout=120")
LIMIT = 900.0
"""Seconds after which the tests of one fault are stopped: it hangs them, and was noticed."""
PASSED, FAILED, BROKEN = 0, 1, -1  # 0 and 1 are pytest's; its others say that something could not be collected


def preload() -> None:
    """Import once, before the forks, what the tests of every fault need: pytest's plugins, torch, transformers."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for plugin in entry_points(group="pytest11"):
        plugin.load()
    importlib.import_module("peft")
    for name in ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer", "PreTrainedTokenizerFast"):
        getattr(importlib.import_module("transformers"), name)


@dataclass(frozen=True, kw_only=True)
class Mutant:
    """A fault: in `file` (under src/upslope), `old` becomes `new`; one of `tests` must fail."""

    name: str
    fault: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    @property
    def path(self) -> Path:
        """Where it is planted, from the root."""
        return Path("src", "upslope", self.file)

    def complaint(self) -> str | None:
        """What is wrong with the entry itself, or None."""
        if not self.tests:
            return "no test is named"
        missing = [test for test in self.tests if not (ROOT / test.partition("::")[0]).is_file()]
        if missing:
            return f"there is no {missing[0]}"
        if ".." in self.path.parts or not (ROOT / self.path).is_file():
            return f"there is no {self.path}"
        if self.old == self.new:
            return "its new text is the old one"
        found = (ROOT / self.path).read_text(encoding="utf-8").count(self.old)
        return None if found == 1 else f"its old text occurs {found} times in {self.path}; it must occur once"


def listed(path: Path = LIST) -> list[Mutant]:
    """The faults of a list. Raises SystemExit with one line for a list or an entry that cannot be planted."""
    try:
        entries = tomllib.loads(path.read_text(encoding="utf-8")).get("mutant")
    except (OSError, ValueError) as error:
        refuse(f"{path}: {error}")
    if not isinstance(entries, list) or not entries:
        refuse(f"{path}: it has no [[mutant]]")
    mutants = [_mutant(path, entry) for entry in entries]
    names: set[str] = set()
    changes: dict[tuple[str, str, str], str] = {}
    for mutant in mutants:
        twin = changes.setdefault((mutant.file, mutant.old, mutant.new), mutant.name)
        wrong = "the name is taken" if mutant.name in names else mutant.complaint()
        if not wrong and twin != mutant.name:
            wrong = f"it is {twin} once more"
        if wrong:
            refuse(f"{path.name}: {mutant.name}: {wrong}")
        names.add(mutant.name)
    return mutants


def _mutant(path: Path, entry: Any) -> Mutant:
    name = entry.get("name") if isinstance(entry, dict) else entry
    fields = [field.name for field in dataclasses.fields(Mutant)]
    if not isinstance(entry, dict) or set(entry) != set(fields):
        refuse(f"{path.name}: {name}: an entry has {', '.join(fields)}, and nothing else")
    texts = [value for key, value in entry.items() if key != "tests"]
    if not isinstance(entry["tests"], list) or not all(isinstance(x, str) for x in [*texts, *entry["tests"]]):
        refuse(f"{path.name}: {name}: tests is a list of texts, everything else a text")
    return Mutant(**entry | {"tests": tuple(entry["tests"])})


def refuse(why: str) -> NoReturn:
    """End with one line and the exit code of a list that is wrong."""
    print(why, file=sys.stderr)
    raise SystemExit(2)


class Bench:
    """A copy of the repository in which one fault at a time is planted."""

    def __init__(self, folder: Path) -> None:
        self.root = folder
        names = subprocess.run(
            ["git", "ls-files", "-coz", "--exclude-standard"], cwd=ROOT, capture_output=True, check=True
        )
        for name in filter(None, names.stdout.decode().split("\0")):
            if (ROOT / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(ROOT / name, folder / name)
        self.log = folder.with_suffix(".log")
        self.clock = itertools.count(1_000_000_000)

    def write(self, path: Path, text: str) -> None:
        """Write a source file with a time of its own: compiled modules are recognised by seconds and size."""
        (self.root / path).write_text(text, encoding="utf-8")
        now = next(self.clock)
        os.utime(self.root / path, (now, now))

    def plant(self, mutant: Mutant) -> None:
        """Put the fault in its place."""
        text = (ROOT / mutant.path).read_text(encoding="utf-8")
        self.write(mutant.path, text.replace(mutant.old, mutant.new))

    def restore(self, mutant: Mutant) -> None:
        """Take the fault out again."""
        self.write(mutant.path, (ROOT / mutant.path).read_text(encoding="utf-8"))

    def start(self, tests: Iterable[str]) -> int:
        """Run pytest on the copy as it is, in a fork that need not import the large libraries again; its process id."""
        sys.stdout.flush()
        pid = os.fork()
        if pid:
            return pid
        code = 3
        try:
            os.setsid()
            os.chdir(self.root)
            log = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.environ["PYTHONPATH"] = str(self.root / "src")
            sys.path[0] = str(self.root)
            code = int(importlib.import_module("pytest").main([*PYTEST, *tests]))
        finally:
            sys.stdout.flush()
            os._exit(code)

    @property
    def said(self) -> str:
        """What pytest wrote."""
        return self.log.read_text(encoding="utf-8", errors="replace")


class Running:
    """The forks that run: what each of them tests, and since when."""

    def __init__(self) -> None:
        self.forks: dict[int, tuple[Bench, float]] = {}

    def start(self, bench: Bench, tests: Iterable[str]) -> int:
        """Run the tests on the bench as it is; the fork's process id."""
        pid = bench.start(tests)
        self.forks[pid] = (bench, time.monotonic())
        return pid

    def next(self, limit: float = LIMIT) -> tuple[int, int, float]:
        """The process id and exit code of the next fork to end, and its seconds; FAILED where it had to be stopped."""
        while True:
            for pid, (_, since) in self.forks.items():
                ended, status = os.waitpid(pid, os.WNOHANG)
                seconds = time.monotonic() - since
                if ended:
                    del self.forks[pid]
                    return pid, os.waitstatus_to_exitcode(status), seconds
                if seconds > limit:
                    self.stop(pid)
                    return pid, FAILED, seconds
            time.sleep(0.05)

    def stop(self, pid: int) -> None:
        """End a fork and what it started."""
        os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        del self.forks[pid]


def red_without_a_fault(running: Running, benches: Sequence[Bench], tests: Sequence[str]) -> Bench | None:
    """The bench on which the tests, shared among the benches, do not all pass; None where they do."""
    shares = {
        running.start(bench, share): bench for i, bench in enumerate(benches) if (share := tests[i :: len(benches)])
    }
    ends = {pid: code for pid, code, _ in (running.next(limit=float("inf")) for _ in shares)}
    return next((shares[pid] for pid, code in ends.items() if code != PASSED), None)


def plant_all(running: Running, benches: list[Bench], mutants: Sequence[Mutant]) -> list[str]:
    """Plant each fault, tell whether it was noticed, and return the names of those that were not."""
    todo, planted, missed = list(reversed(mutants)), {}, []
    while todo or planted:
        while todo and benches:
            mutant, bench = todo.pop(), benches.pop()
            bench.plant(mutant)
            planted[running.start(bench, mutant.tests)] = (mutant, bench)
        pid, code, seconds = running.next()
        mutant, bench = planted.pop(pid)
        if code == FAILED and ": NameError: " in bench.said:
            code = BROKEN
        verdict = {FAILED: "noticed", PASSED: "NOT NOTICED", BROKEN: "BROKEN (it names what does not exist)"}.get(
            code, f"BROKEN (pytest ended with {code})"
        )
        number = len(mutants) - len(todo) - len(planted)
        print(f"{number:4} {verdict}  {mutant.name}: {mutant.fault}  ({seconds:.0f} s)", flush=True)
        if code != FAILED:
            missed.append(mutant.name)
            print(bench.said, flush=True)
        bench.restore(mutant)
        benches.append(bench)
    return missed


def main() -> int:
    """Plant, count, report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="only these faults (default: all)")
    parser.add_argument("--list", type=Path, default=LIST, metavar="FILE", help="another list of faults")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), metavar="N", help="faults at a time")
    parser.add_argument("--json", action="store_true", help='end with {"planted": ..., "noticed": ...}')
    arguments = parser.parse_args()
    if arguments.workers < 1:
        parser.error(f"--workers is {arguments.workers}; it must be at least 1")
    mutants = listed(arguments.list)
    unknown = sorted(set(arguments.names) - {mutant.name for mutant in mutants})
    if unknown:
        parser.error(f"no fault is called {', '.join(unknown)}")
    mutants = [mutant for mutant in mutants if not arguments.names or mutant.name in arguments.names]
    preload()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    began, running = time.monotonic(), Running()
    with tempfile.TemporaryDirectory(prefix="mutants-", ignore_cleanup_errors=True) as folder:
        try:
            benches = [Bench(Path(folder) / str(i)) for i in range(min(arguments.workers, len(mutants)))]
            tests = list(dict.fromkeys(test for mutant in mutants for test in mutant.tests))
            print(f"planting {len(mutants)}; first the tests that must notice, without a fault", flush=True)
            red = red_without_a_fault(running, benches, tests)
            if red is not None:
                print(red.said)
                print("a test fails, is too slow here or does not exist, without any fault: mend that first")
                return 2
            missed = plant_all(running, benches, mutants)
        except KeyboardInterrupt:
            print("\nstopped; nothing was changed", file=sys.stderr)
            return 130
        finally:
            for pid in list(running.forks):
                running.stop(pid)
    noticed = len(mutants) - len(missed)
    print(f"{len(mutants)} planted, {noticed} noticed, in {(time.monotonic() - began) / 60:.1f} min")
    if missed:
        print(f"not noticed: {', '.join(missed)}")
    if arguments.json:
        print(json.dumps({"planted": len(mutants), "noticed": noticed}))
    return 0 if not missed else 1


if __name__ == "__main__":
    sys.exit(main())

"""Plant the faults of tests/mutants.toml, one at a time, and see whether the tests named there notice.

    make mutants                                  all of them; an hour or so on two cores
    .venv/bin/python scripts/mutants.py NAME ...  only these

A fault is one replacement in one file of src/upslope. It is planted in a copy of the repository, never in the
repository itself, and counts as noticed when a test fails on it: a fault that merely cannot be imported, or whose
tests are red without it, is an error of the list. The exit code is 0 only when every fault was noticed.
"""

from __future__ import annotations

import argparse
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
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIST = ROOT / "tests" / "mutants.toml"
QUIET = ("-q", "-x", "--no-header", "--tb=line", "-W", "ignore::pytest.PytestAssertRewriteWarning")
PYTEST = (*QUIET, "-p", "no:cacheprovider", "-o", "timeout=120")
LIMIT = 900.0
"""Seconds after which the tests of one fault are ended; a fault that hangs them was noticed."""
PASSED, FAILED = 0, 1  # exit codes of pytest; others say that something could not be collected


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
    """A fault: in `file` (under src/upslope), `old` becomes `new`; one of `tests` must fail.

    options: the options it is about, as PPOOptions.kl_coef.
    """

    name: str
    fault: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    options: tuple[str, ...] = ()

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
        if not (ROOT / self.path).is_file():
            return f"there is no {self.path}"
        found = (ROOT / self.path).read_text(encoding="utf-8").count(self.old)
        if found != 1 or self.old == self.new:
            return f"its old text occurs {found} times in {self.path}; it must occur once, and the new text be another"
        return None


def listed(path: Path = LIST) -> list[Mutant]:
    """The faults of a list. Raises SystemExit with one line for an entry that cannot be planted."""
    entries = tomllib.loads(path.read_text(encoding="utf-8"))["mutant"]
    mutants = []
    for entry in entries:
        try:
            lists = {name: tuple(entry[name]) for name in ("tests", "options") if name in entry}
            mutants.append(Mutant(**entry | lists))
        except (KeyError, TypeError) as error:
            sys.exit(f"{path.name}: {entry.get('name', entry)}: {error}")
    seen: set[str] = set()
    for mutant in mutants:
        wrong = "the name is taken" if mutant.name in seen else mutant.complaint()
        if wrong:
            sys.exit(f"{path.name}: {mutant.name}: {wrong}")
        seen.add(mutant.name)
    return mutants


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


def ended(started: dict[int, float]) -> tuple[int, int]:
    """The process id and exit code of the next of these to end; FAILED where it had to be killed."""
    while True:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            return pid, os.waitstatus_to_exitcode(status)
        for pid, since in started.items():
            if time.monotonic() - since > LIMIT:
                os.killpg(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                return pid, FAILED
        time.sleep(0.05)


def main() -> int:
    """Plant, count, report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="only these faults (default: all)")
    parser.add_argument("--list", type=Path, default=LIST, metavar="FILE", help="another list of faults")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count(), metavar="N", help="at a time (default: one a core)"
    )
    parser.add_argument("--json", action="store_true", help='end with {"planted": ..., "noticed": ...}')
    arguments = parser.parse_args()
    mutants = listed(arguments.list)
    unknown = set(arguments.names) - {mutant.name for mutant in mutants}
    if unknown:
        parser.error(f"no fault is called {sorted(unknown)[0]}")
    mutants = [mutant for mutant in mutants if not arguments.names or mutant.name in arguments.names]
    preload()
    began, missed = time.monotonic(), []
    with tempfile.TemporaryDirectory(prefix="mutants-", ignore_cleanup_errors=True) as folder:
        benches = [Bench(Path(folder) / str(i)) for i in range(max(1, min(arguments.workers, len(mutants))))]
        tests = list(dict.fromkeys(test for mutant in mutants for test in mutant.tests))
        print(f"{len(mutants)} faults; first their {len(tests)} tests without any", flush=True)
        pid = benches[0].start(tests)
        if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) != PASSED:
            print(benches[0].said)
            print("the tests are red without a fault: mend them first")
            return 2
        todo, running, started, done = list(reversed(mutants)), {}, {}, 0
        while todo or running:
            while todo and benches:
                mutant, bench = todo.pop(), benches.pop()
                bench.plant(mutant)
                pid = bench.start(mutant.tests)
                running[pid], started[pid] = (mutant, bench), time.monotonic()
            pid, code = ended(started)
            mutant, bench = running.pop(pid)
            seconds, done = time.monotonic() - started.pop(pid), done + 1
            verdict = {FAILED: "noticed", PASSED: "NOT NOTICED"}.get(code, f"BROKEN (pytest ended with {code})")
            print(f"{done:4} {verdict}  {mutant.name}: {mutant.fault}  ({seconds:.0f} s)", flush=True)
            if code != FAILED:
                missed.append(mutant.name)
                print(bench.said, flush=True)
            bench.restore(mutant)
            benches.append(bench)
    noticed = len(mutants) - len(missed)
    print(f"{len(mutants)} planted, {noticed} noticed, in {(time.monotonic() - began) / 60:.0f} min")
    if missed:
        print(f"not noticed: {', '.join(missed)}")
    if arguments.json:
        print(json.dumps({"planted": len(mutants), "noticed": noticed}))
    return 0 if not missed else 1


if __name__ == "__main__":
    sys.exit(main())

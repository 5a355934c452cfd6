"""Do two revisions train the same, bit for bit? Every recipe on tiny models, through the command line alone.

    python benchmarks/same_bits.py main .                       main against the working tree as it is
    python benchmarks/same_bits.py main HEAD --only 'ppo*'      one recipe
    python benchmarks/same_bits.py main . --keep /tmp/kept      main's results are kept for the next comparison

Both run the cases of benchmarks/same_bits_cases.py (`--list`) as `python -m upslope VERB ...`, one process and one
thread each, on the CPU, with this interpreter and its packages. Compared are all tensors of all checkpoints (bits,
dtype, shape), their states and the configurations of their models, metrics.jsonl, run.db (its token arrays decoded),
summary.json, and whatever else a run writes; not what tells times, speeds or memory (TIMES), nor IGNORED files. Options
and names that a later revision spells otherwise stand in WORDS and NAMES of the cases' file.

Exit code 0: every case ran in both revisions, was found to hold tensors and metrics, and is the same. 1: anything else.
What `--keep` holds is of one machine; a commit's case is run again when its words, its data, torch or Python changed.
The second revision's runs that are not the same are left in its folder `differing`.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import hashlib
import importlib.metadata
import importlib.util
import json
import math
import multiprocessing
import os
import re
import runpy
import shlex
import shutil
import sqlite3
import struct
import subprocess
import sys
import tempfile
import time
import tomllib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import same_bits_cases
from benchmarks.same_bits_cases import BY_VERB, CASES, NAMES, WORDS

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT_S = 300
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "NO_COLOR": "1",
    "COLUMNS": "200",
}
FORKS = multiprocessing.get_context("forkserver")
PRELOADED = ["torch._dynamo", "transformers.modeling_utils", "transformers.masking_utils", "peft", "tyro"]
PRELOADED += ["rich.progress", "sklearn.metrics"]
PRELOADED += [f"transformers.models.{name}.modeling_{name}" for name in ("llama", "qwen3", "bert", "roberta")]
"""Modules of other packages that every run would import for itself: five of its six seconds."""
IGNORED = re.compile(r"(^|/)(log|\.lock|env\.json|[^/]*\.toml|manifest\.json|run\.db-\w+|cache/.*)$")
TIMES = re.compile(
    r"(^|[ /_.])(time|seconds|clock|tokens_per_second|peak_memory_gb|reward_seconds|commands)($|[/.\[ ])"
)
"""Names that tell a time, a speed or memory, or how to call the next command."""
WORKPLACE = re.compile(r"[^\s'\"]*/\.runs-\w+/[ab]/")
"""Where a run was made: in texts only what follows it counts."""
KEYS = {"metrics": 2, "evaluations": 3, "token_arrays": 2, "meta": 1}
"""Tables of run.db whose rows are told apart by their first columns; others by their order."""
ARRAYS = {"prompt_tokens": "I32", "tokens": "I32", "mask": "U8"}
"""How run.db packs the arrays that are not float32."""
FORMATS = {"F64": "d", "F32": "f", "F16": "e", "I64": "q", "I32": "i", "I16": "h", "I8": "b", "U8": "B", "BOOL": "?"}


@dataclass(frozen=True)
class Array:
    """Numbers as they lie in a file, little-endian; dtype in safetensors' words."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes

    def __getitem__(self, index: int) -> Any:
        size = max(1, len(self.data) // max(1, math.prod(self.shape)))
        item = self.data[index * size : (index + 1) * size]
        if self.dtype == "BF16":
            return struct.unpack("<f", b"\0\0" + item)[0]
        return struct.unpack(f"<{FORMATS[self.dtype]}", item)[0] if self.dtype in FORMATS else item.hex()

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)}"


SAMPLING = {"reinforce", "ppo", "grpo", "expert"}
"""Verbs whose runs must hold rollouts."""
MEASURING = {"generate", "eval"}
"""Verbs that train nothing; a model is their first word."""

Found = dict[str, Any]
"""What runs left: "FILE: NAME" -> an Array, or a value of JSON or SQLite."""


# Reading


def read_case(folder: Path) -> Found:
    """Everything comparable under a folder; links are what they point to."""
    found: Found = {}
    for path in sorted(folder.rglob("*")):
        file = path.relative_to(folder).as_posix()
        if path.is_symlink():
            found[f"{file}: link"] = os.readlink(path)
        elif path.is_file() and not IGNORED.search(file):
            for name, value in _read(path):
                if not TIMES.search(name):
                    plain = WORKPLACE.sub("", value) if isinstance(value, str) else value
                    found[_unused(f"{file}: {name}", found)] = plain
    return found


def renamed(found: Found, names: Iterable[tuple[str, str]]) -> Found:
    """The same under today's and tomorrow's names alike; what has no name left is not compared."""
    for pattern, replacement in names:
        before, found = found, {}
        for name, value in before.items():
            if plain := re.sub(pattern, replacement, name):
                found[_unused(plain, found)] = value
    return found


def _unused(name: str, found: Found) -> str:
    """`name`, or the first of name #2, name #3 ... that nothing has yet: what is written twice is compared twice."""
    number = 1
    while (free := name if number == 1 else f"{name} #{number}") in found:
        number += 1
    return free


def _read(path: Path) -> Iterator[tuple[str, Any]]:
    if path.suffix == ".safetensors":
        yield from _tensors(path)
    elif path.suffix == ".db":
        yield from _rows(path)
    elif path.name == "metrics.jsonl":
        for line in path.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            step = record.pop("step")
            yield from ((f"step {step}: {name}", value) for name, value in record.items())
    elif path.suffix == ".jsonl":
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            yield from _leaves(json.loads(line), f"line {number}")
    elif path.suffix == ".json":
        yield from _leaves(json.loads(path.read_text(encoding="utf-8")))
    elif path.suffix == ".toml":
        yield from _leaves(tomllib.loads(path.read_text(encoding="utf-8")))
    else:
        yield "bytes", hashlib.sha256(path.read_bytes()).hexdigest()


def _tensors(path: Path) -> Iterator[tuple[str, Array]]:
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    for name, entry in json.loads(data[8:start]).items():
        if name != "__metadata__":
            low, high = entry["data_offsets"]
            yield name, Array(entry["dtype"], tuple(entry["shape"]), data[start + low : start + high])


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _leaves(item, f"{name}.{key}" if name else key)
    elif isinstance(value, list) and value:
        for place, item in enumerate(value):
            yield from _leaves(item, f"{name}[{place}]")
    else:
        yield name, value


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    connection = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)
    try:
        for (table,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name"):
            cursor = connection.execute(f'SELECT * FROM "{table}"')
            columns, keys = [column[0] for column in cursor.description], KEYS.get(table, 0)
            for number, row in enumerate(cursor):
                key = " ".join(map(str, row[:keys])) if keys else f"row {number}"
                for column, value in zip(columns[keys:], row[keys:], strict=True):
                    if isinstance(value, bytes):
                        dtype = ARRAYS.get(str(row[keys - 1]), "F32")
                        value = Array(dtype, (len(value) // struct.calcsize(FORMATS[dtype]),), value)
                    yield f"{table} {key} {column}", value
    finally:
        connection.close()


# Comparing


@dataclass(frozen=True)
class Difference:
    """One thing that is not the same: its first differing values, and how many values of how many differ."""

    name: str
    first: str
    second: str
    count: int = 1
    size: int = 1

    def __str__(self) -> str:
        many = f" ({self.count} of {self.size} values differ)" if self.size > 1 else ""
        return f"{self.name}: {self.first} | {self.second}{many}"


ABSENT = "(absent)"


def differences(one: Found, two: Found) -> list[Difference]:
    """What is not the same in both, in the order of the files, metrics first."""
    names = sorted({**one, **two}, key=lambda name: ("metrics.jsonl" not in name, "run.db" not in name))
    pairs = ((name, one.get(name, ABSENT), two.get(name, ABSENT)) for name in names)
    return [found for name, a, b in pairs if (found := _difference(name, a, b))]


def _difference(name: str, a: Any, b: Any) -> Difference | None:
    if a == b and repr(a) == repr(b):
        return None
    if isinstance(a, Array) and isinstance(b, Array) and (a.dtype, a.shape) == (b.dtype, b.shape):
        size = math.prod(a.shape)
        width = len(a.data) // size
        spots = [i for i in range(size) if a.data[i * width : (i + 1) * width] != b.data[i * width : (i + 1) * width]]
        first, second = _shown(a[spots[0]]), _shown(b[spots[0]])
        if first == second:  # NaN of different bits
            first, second = (x.data[spots[0] * width :][:width].hex() for x in (a, b))
        return Difference(f"{name}[{spots[0]}]", first, second, len(spots), size)
    return Difference(name, _shown(a), _shown(b))


def _shown(value: Any) -> str:
    text = str(value) if isinstance(value, Array) or value is ABSENT else repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def counted(found: Found) -> Counter[str]:
    """How much there is to compare, by kind."""
    kinds: Counter[str] = Counter()
    for name, value in found.items():
        file, _, item = name.partition(": ")
        if file.endswith(".safetensors"):
            kinds["tensors"] += 1
            kinds["tensor values"] += math.prod(value.shape)
        elif file.endswith("metrics.jsonl"):
            kinds["metrics"] += 1
        elif file.endswith(".db"):
            kinds["rollouts"] += item.startswith("rollouts ") and item.endswith(" completion")
            kinds["token arrays" if isinstance(value, Array) else "cells of run.db"] += 1
        else:
            kinds["other values"] += 1
    return kinds


# Running


class Revision:
    """One side: its source, and its results for each case. `kept`: where they are looked for and left; None: nowhere.

    Runs happen in `scratch`, where every path that a run sees is the same for both sides.
    """

    def __init__(self, name: str, kept: Path | None, scratch: Path, data: Path) -> None:
        self.name, self.kept, self.scratch, self.data = name, kept, scratch, data
        scratch.mkdir()
        (scratch / "data").symlink_to(data)
        self.source = ROOT / "src"
        self.helps: dict[str, str] = {}
        if name != ".":
            archive = subprocess.run(["git", "archive", name, "src"], cwd=ROOT, capture_output=True, check=True)
            subprocess.run(["tar", "-x", "-C", str(scratch)], input=archive.stdout, check=True)
            self.source = scratch / "src"

    def upslope(self, words: Sequence[str], log: Path) -> int | None:
        """Run the command with these words, what it says appended to a file; its exit code, None: it takes too long."""
        process = FORKS.Process(target=_upslope, args=(list(words), self.source, self.scratch, log))
        process.start()
        process.join(TIMEOUT_S)
        if process.exitcode is None:
            process.kill()
            process.join()
            return None
        return process.exitcode

    def lacks(self, verb: str, words: str) -> bool:
        """Whether `upslope VERB --help` does not have the last of these words."""
        if verb not in self.helps:
            self.upslope([verb, "--help"], log := self.scratch / f"help-{verb}")
            self.helps[verb] = log.read_text(encoding="utf-8")
        return not re.search(rf"(?<![\w-]){re.escape(words.split()[-1])}(?![\w-])", self.helps[verb])

    def commands(self, case: str) -> list[list[str]]:
        """The case's command lines as this revision spells them."""
        lines = []
        for line in lines_of(case):
            verb, _, rest = line.partition(" ")
            if "--resume" not in line:
                rest = f"{rest} {BY_VERB[verb]}" if verb in MEASURING else f"{BY_VERB[verb]} {rest}"
            for of, old, new in WORDS:
                if of == verb and old in rest and self.lacks(verb, old):
                    rest = re.sub(rf"(?<!\S){re.escape(old)}(?!\S)", new, rest)
            lines.append([verb, *shlex.split(rest.replace("OUT", f"runs/{case}"))])
        return lines

    def results(self, case: str) -> tuple[Path, str]:
        """The case's folder, and what went wrong (empty: nothing)."""
        commands = self.commands(case)
        versions = [importlib.metadata.version(name) for name in ("torch", "transformers", "tokenizers", "numpy")]
        told = json.dumps([commands, ENVIRONMENT, self.data.name, versions, sys.version])
        kept = self.kept and self.kept / f"{case}-{hashlib.sha256(told.encode()).hexdigest()[:12]}"
        if kept and kept.is_dir():
            return kept, ""
        folder = self.scratch / "runs" / case
        folder.mkdir(parents=True)
        for words in commands:
            code = self.upslope(words, log := folder / "log")
            if code != 0:
                last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1]
                ended = f"took longer than {TIMEOUT_S} s" if code is None else f"ended with exit code {code}"
                return folder, f"upslope {words[0]} {ended}: {last}"
        if kept:
            kept.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(OSError):  # another process has just put it there
                folder = folder.rename(kept)
        return folder, ""


def _upslope(words: list[str], source: Path, workplace: Path, log: Path) -> None:
    """`python -m upslope WORDS` in a process forked off one that has the heavy parts of other packages in memory."""
    os.chdir(workplace)
    os.environ["PYTHONPATH"] = str(source)
    sys.path[:] = [str(source), *(path for path in sys.path if path not in (str(ROOT), str(ROOT / "benchmarks")))]
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    print(f"$ upslope {shlex.join(words)}", flush=True)
    sys.argv = ["upslope", *words]
    found = importlib.util.find_spec("upslope")
    if found is None or not Path(found.origin or "").is_relative_to(source):
        raise SystemExit(f"upslope is imported from {found and found.origin}, not from {source}")
    runpy.run_module("upslope", run_name="__main__", alter_sys=True)


def lines_of(case: str) -> tuple[str, ...]:
    """A case's command lines in today's spelling."""
    found = CASES[case]
    return (found,) if isinstance(found, str) else found


def commit_of(revision: str) -> str:
    """The full hash, or "." for the working tree."""
    if revision == ".":
        return "."
    command = ["git", "rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if found.returncode:
        raise SystemExit(f"{revision} is no revision of {ROOT}")
    return found.stdout.strip()


def data_folder(keep: Path) -> Path:
    """Models and data of the cases, made once."""
    text = Path(same_bits_cases.__file__).read_text(encoding="utf-8").partition("\ndef make_data")[2]
    folder = keep / f"data-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
    if not folder.is_dir():
        with tempfile.TemporaryDirectory(dir=keep) as scratch:
            (made := Path(scratch) / "data").mkdir()
            same_bits_cases.make_data(made)
            with contextlib.suppress(OSError):  # another process has just made it
                made.rename(folder)
    return folder


def verdict_on(case: str, names: Sequence[str], outcomes: Sequence[tuple[Path, str]]) -> dict[str, Any]:
    """What failed, what differs and how much was compared, of both revisions' (folder, what went wrong)."""
    verdict: dict[str, Any] = {"case": case, "differences": [], "compared": Counter()}
    if failures := [f"{name}: {why}" for name, (_, why) in zip(names, outcomes, strict=True) if why]:
        return {**verdict, "failures": failures}
    one, two = (renamed(read_case(folder), NAMES) for folder, _ in outcomes)
    compared = counted({name: one[name] for name in one.keys() & two.keys()})
    verb = lines_of(case)[-1].split()[0]
    wanted = ["other values"] if verb in MEASURING else ["tensors", "metrics", *(["rollouts"] * (verb in SAMPLING))]
    failures = [f"no {kind} that both have" for kind in wanted if not compared[kind]]
    return {**verdict, "failures": failures, "differences": differences(one, two), "compared": compared}


def told(verdict: Mapping[str, Any], most: int) -> list[str]:
    """Lines about a case that is not the same: at most `most` files with as many differences each."""
    lines = [f"FAILED   {verdict['case']}: {failure}" for failure in verdict["failures"]]
    by_file: dict[str, list[Difference]] = {}
    for difference in verdict["differences"]:
        by_file.setdefault(difference.name.partition(": ")[0], []).append(difference)
    for file, found in list(by_file.items())[:most]:
        lines.append(f"DIFFERS  {verdict['case']}: {file}: {len(found)} differ")
        lines += [f"         {difference}" for difference in found[:most]]
    return lines + [f"         and {len(by_file) - most} more files"] * (len(by_file) > most)


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("revisions", nargs="*", metavar="REV", help="two revisions; . is the working tree as it is")
    parser.add_argument("--only", action="append", metavar="PATTERN", help="only these cases, as 'ppo*' (repeatable)")
    parser.add_argument("--list", action="store_true", help="print the cases and stop")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time; left out: one per core")
    parser.add_argument("--keep", type=Path, help="folder in which results of commits are kept; left out: none are")
    parser.add_argument("--fresh", action="store_true", help="run the second revision anew, kept or not")
    parser.add_argument("--most", type=int, default=3, help="files shown of a case, and differences of each")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output, with all differences")
    arguments = parser.parse_args()
    cases = [case for case in CASES if not arguments.only or any(fnmatch.fnmatch(case, p) for p in arguments.only)]
    if arguments.list:
        print("\n".join(f"{case}: {CASES[case]}" for case in cases))
        return 0
    if len(arguments.revisions) != 2 or not cases:
        parser.error("name two revisions, as in: main ." if cases else f"no case is called {arguments.only}")
    began = time.monotonic()
    os.environ |= ENVIRONMENT
    FORKS.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory(prefix="same-bits-") as temporary:
        keep = (arguments.keep or Path(temporary) / "keep").resolve()
        keep.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".runs-", dir=keep) as scratch:
            verdicts = _compare(arguments, cases, keep, Path(scratch))
    bad = [verdict for verdict in verdicts if verdict["failures"] or verdict["differences"]]
    compared = sum((verdict["compared"] for verdict in verdicts), Counter())
    summary = f"{len(verdicts) - len(bad)} of {len(cases)} cases are the same in {' and '.join(arguments.revisions)}"
    amounts = ", ".join(f"{count:,} {kind}" for kind, count in sorted(compared.items()))
    if arguments.json:
        cooked = [{**v, "differences": [vars(d) for d in v["differences"]]} for v in verdicts]
        print(json.dumps({"revisions": arguments.revisions, "same": not bad, "compared": compared, "cases": cooked}))
    print(f"{summary}; compared {amounts}; {time.monotonic() - began:.0f} s", file=sys.stderr)
    return 1 if bad else 0


def _compare(arguments: argparse.Namespace, cases: list[str], keep: Path, scratch: Path) -> list[dict[str, Any]]:
    data = data_folder(keep)
    commits = [commit_of(revision) for revision in arguments.revisions]
    sides = []
    for place, commit in enumerate(commits):
        anew = commit == "." or (place == 1 and (arguments.fresh or commits[0] == commit))
        sides.append(Revision(commit, None if anew else keep / commit, scratch / "ab"[place], data))
    verdicts = []
    with ThreadPoolExecutor(arguments.jobs) as pool:
        running = {case: [pool.submit(side.results, case) for side in sides] for case in cases}
        for case, futures in running.items():
            outcomes = [future.result() for future in futures]
            verdict = verdict_on(case, arguments.revisions, outcomes)
            verdicts.append(verdict)
            print("\n".join(told(verdict, arguments.most) or [f"same     {case}"]), file=sys.stderr, flush=True)
            folder = outcomes[1][0]
            if (verdict["differences"] or verdict["failures"]) and arguments.keep and folder.is_relative_to(scratch):
                shutil.rmtree(keep / "differing" / case, ignore_errors=True)
                shutil.move(folder, keep / "differing" / case)
    return verdicts


if __name__ == "__main__":
    sys.exit(main())

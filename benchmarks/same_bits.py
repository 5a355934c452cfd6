"""Do two revisions train the same, bit for bit? Every recipe on tiny models, through the command line alone.

    python benchmarks/same_bits.py main .                       main against the working tree as it is
    python benchmarks/same_bits.py main HEAD --only 'ppo*'      one recipe
    python benchmarks/same_bits.py main . --keep /tmp/kept      main's results are kept for the next comparison

Both run the cases of benchmarks/same_bits_cases.py (`--list`) as `python -m upslope VERB ...`, one process and one
thread each, on the CPU, with this interpreter and its packages. Compared are all tensors of all checkpoints (bits,
dtype, shape), their states and the configurations of their models, metrics.jsonl, run.db (its token arrays decoded),
summary.json, and whatever else a run writes; not what tells times, speeds or memory (TIMES in same_bits_results.py),
nor IGNORED files. Options and names that a later revision spells otherwise stand in WORDS and NAMES of the cases' file.

Exit code 0: every case ran in both revisions, was found to hold tensors and metrics, and is the same. 1: anything else.
What `--keep` holds is of one machine; a commit's case is run again when its command, its data, torch or Python has
changed.
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
import multiprocessing
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import same_bits_cases
from benchmarks.same_bits_cases import BY_VERB, CASES, NAMES, WORDS
from benchmarks.same_bits_results import Difference, counted, differences, read_case, renamed

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
PRELOADED = ["torch._dynamo", "transformers.modeling_utils", "transformers.masking_utils", "peft"]
PRELOADED += ["rich.progress", "sklearn.metrics"]
PRELOADED += [f"transformers.models.{name}.modeling_{name}" for name in ("llama", "qwen3", "bert", "roberta")]
"""Modules of other packages that every run would import for itself: five of its six seconds."""
SAMPLING = {"reinforce", "ppo", "grpo", "expert"}
"""Verbs whose runs must hold rollouts."""
MEASURING = {"generate", "eval"}
"""Verbs that train nothing; a model is their first word."""


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
    parser.add_argument(
        "--list", action="store_true", help="print the cases with their commands and stop; OUT is the run's folder"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time (default: one per core)")
    parser.add_argument("--keep", type=Path, help="folder in which results of commits are kept (default: none are)")
    parser.add_argument("--fresh", action="store_true", help="run the second revision anew, kept or not")
    parser.add_argument(
        "--most", type=int, default=3, help="files shown of a case, and differences of each (default: 3)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output, with all differences")
    arguments = parser.parse_args()
    cases = [case for case in CASES if not arguments.only or any(fnmatch.fnmatch(case, p) for p in arguments.only)]
    if arguments.list:
        print("\n".join(f"{case}: {' && '.join(lines_of(case))}" for case in cases))
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

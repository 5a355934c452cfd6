"""Does every learner learn what it should? Seeds fixed, median of five, one JSON line per case, learner and metric.

    python benchmarks/learning.py --json                 all cases
    python benchmarks/learning.py --case random_walks    one of them
    python benchmarks/learning.py --case key_door --learner ppo --seeds 2

What is expected of each case stands in benchmarks/cases/ and was written before the run that judges it. Results go to
benchmarks/results/learning/, one file per case.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.harness import CASES, Case, Outcome, commit, lines_of, load_case, save


def run_case(case: Case, learners: list[str], seeds: list[int], *, as_json: bool, keep: bool) -> bool:
    """Run a case; True when every expectation was met."""
    at, lines = commit(), []
    for learner in learners:
        outcomes: dict[int, Outcome] = {}
        own = getattr(case, "SEEDS_OF", {}).get(learner, seeds)
        for seed in [seed for seed in seeds if seed in own]:
            with tempfile.TemporaryDirectory(prefix="upslope-learning-") as folder:
                outcomes[seed] = case.run(learner, seed, Path(folder))
            print(f"{case.NAME} {learner} seed {seed}: {_words(outcomes[seed])}", file=sys.stderr)
        made = lines_of(case, learner, outcomes, at)
        for line in made:
            print(json.dumps(line) if as_json else _row(line), flush=True)
        lines += made
        if keep:
            save(case, learner, made, {str(seed): outcome.curve for seed, outcome in outcomes.items()})
    return all(line["met"] is not False for line in lines)


def _words(outcome: Outcome) -> str:
    numbers = ", ".join(f"{name} {value:.4g}" for name, value in outcome.metrics.items())
    return f"{numbers} ({outcome.samples} samples, {outcome.seconds:.1f} s)"


def _row(line: dict) -> str:
    numbers = " ".join(f"{line[key]!s:>10}" for key in ("median", "min", "max"))
    verdict = {True: "met", False: "NOT MET", None: ""}[line["met"]]
    named = f"{line['case']:<18} {line['learner']:<20} {line['metric']:<24}"
    return f"{named} {numbers} {line['expected'] or '':<10} {verdict}"


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES, action="append", help="only this case (may be repeated)")
    parser.add_argument("--learner", action="append", help="only this learner (may be repeated)")
    parser.add_argument("--seeds", type=int, help="only the first N seeds; nothing is saved then")
    parser.add_argument("--json", action="store_true", help="JSON lines on standard output")
    arguments = parser.parse_args()
    good = True
    for name in arguments.case or CASES:
        case = load_case(name)
        learners = arguments.learner or list(case.LEARNERS)
        unknown = set(learners) - set(case.LEARNERS)
        if unknown:
            parser.error(f"case {name} has no learner {sorted(unknown)[0]}: {', '.join(case.LEARNERS)}")
        seeds = list(case.SEEDS)[: arguments.seeds]
        keep = arguments.seeds is None
        good &= run_case(case, learners, seeds, as_json=arguments.json, keep=keep)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())

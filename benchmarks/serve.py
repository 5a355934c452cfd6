"""A load test of `upslope serve` beside `transformers serve` and `vllm serve`, over HTTP on this machine's processors.

    python benchmarks/serve.py --json              SmolLM2-135M, 1, 8, 32 and 64 clients, three rounds
    python benchmarks/serve.py --peer transformers one peer alone (may be repeated)
    python benchmarks/serve.py --report            the figures again, from the stored results
    python benchmarks/serve.py --quick             a tiny random model, 1 and 4 clients: does everything start?

Each server runs in a process and an environment of its own (those of the peers are made here), on all cores, with
bfloat16 weights, one at a time and in turn: ours, the peers, ours, ... The clients are one light process beside it.
At a level of n clients each asks one streamed completion after another, 3n (at least 9) in all, after a warm-up of n
short ones; all clients start at once. The work is equal to the token: the same prompts of some 24 to 96 tokens, no two
alike, 32, 64 and 96 new tokens in turn, greedy, the end of sequence ignored; tokens are counted by the server's
`usage`. One request that fails ends the run.

throughput: tokens of all requests over the seconds from the first request to the last answer; the ratio is ours /
theirs, paired by round. first token: from before the connection until text came. per token: of each request, the mean
from its first to its last token. p50 and p99 are over a round's requests; then median and range over the rounds.

A peer's options are tuned first, by a short load on each candidate (transformers: one request at a time; continuous
batching; continuous batching with a cache of the load's size. vLLM: compiled on all cores; eager; its own choice of
cores), and the fastest is taken, at each level for itself. The choice is stored with the results and made anew with
--look. vLLM is reported as missing where it does not install or start.

Results go to benchmarks/results/<machine>/serve.json after every round. The last line holds the ratio and our p99s.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import machine
from benchmarks.environments import bench_home
from benchmarks.harness import ROOT
from benchmarks.roofline import target_line
from benchmarks.serving import report
from benchmarks.serving.servers import KINDS, Failed, Server
from benchmarks.speed import runner, work

NAME = "serve"
PEERS = ("transformers", "vllm")
CLIENTS = (1, 8, 32, 64)
HEADLINE = 32
TARGETS = {"throughput_ratio": 3.0, "vllm_throughput_ratio": 1.0}
MAX_TOKENS = (32, 64, 96)
STORIES = (1, 2, 3, 4)
WARMUP_TOKENS = 8
LIMIT_S = 1800.0
"""One level of one server may take so long."""


def plan(levels: Sequence[int], *, quick: bool) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Per level the requests of warm-up, look and measurement: prompts (no two alike) with their max_tokens."""
    stories = iter(work.prompts(4096))

    def ask(sizes: Iterable[int]) -> list[dict[str, Any]]:
        prompts = (" ".join(itertools.islice(stories, n)) for n in itertools.cycle(STORIES))
        return [{"prompt": next(prompts), "max_tokens": size} for size in sizes]

    sizes = [8] if quick else MAX_TOKENS
    return {
        str(n): {
            "warmup": ask([WARMUP_TOKENS] * n),
            "look": ask([min(sizes)] * max(4, n)),
            "measure": ask(itertools.islice(itertools.cycle(sizes), max(9, 3 * n))),
        }
        for n in levels
    }


def drive(server: Server, requests: Sequence[Mapping[str, Any]], clients: int, limit_s: float) -> dict[str, Any]:
    """The figures of a load on a running server, made by a process of its own; Failed when a request failed."""
    bodies = [{**request, "stream": True, **KINDS[server.name].fields} for request in requests]
    settings = {"port": server.port, "clients": clients, "limit_s": limit_s, "requests": bodies}
    with tempfile.TemporaryDirectory(prefix="upslope-load-") as folder:
        asked, told = Path(folder) / "settings.json", Path(folder) / "result.json"
        asked.write_text(json.dumps(settings))
        command = [sys.executable, "-m", "benchmarks.serving.client", str(asked), str(told)]
        subprocess.run(command, cwd=ROOT, check=True, timeout=limit_s + 60)
        try:
            return report.figures(json.loads(told.read_text()))
        except ValueError as error:
            raise server.failed(f"{clients} clients: {error}") from error


class Benchmark:
    """One invocation: its results so far, and how to get on with them."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.data: dict[str, Any] = self.load() or {"looks": {}}
        self.missing: dict[str, str] = {}

    @property
    def _quick_file(self) -> Path:
        return bench_home() / f"{NAME}_quick.json"

    def load(self) -> dict[str, Any] | None:
        """What is stored, or None."""
        if not self.arguments.quick:
            return machine.load(NAME)
        return json.loads(self._quick_file.read_text()) if self._quick_file.is_file() else None

    def save(self) -> None:
        """Keep the results; those of a quick run outside the repository."""
        if self.data.get("rounds"):
            self.data["levels"] = report.levels_report(self.data)
            self.data["summary"] = report.summary(self.data["levels"], self.data["headline"])
        if self.arguments.quick:
            self._quick_file.parent.mkdir(parents=True, exist_ok=True)
            self._quick_file.write_text(machine.compact(self.data))
        else:
            machine.save(NAME, self.data)

    def run(self) -> None:
        """All rounds, stored after each; a vLLM that does not install or start leaves a reason."""
        a = self.arguments
        self.model = runner.policy_folder(quick=a.quick)
        self.plan = plan(a.clients, quick=a.quick)
        levels = list(self.plan)
        chosen = {"ours": dict.fromkeys(levels, 0)}
        for name in a.peer:
            with self.tolerating(name):
                chosen[name] = self.tuned(name)
        self.data = {
            "looks": self.data["looks"],
            "machine": machine.machine(),
            "threads": a.threads,
            "model": self.model.name,
            "dtype": "bfloat16",
            "servers": {name: KINDS[name].label or "upslope" for name in ("ours", *a.peer)},
            "headline": str(HEADLINE) if HEADLINE in a.clients else levels[-1],
            "missing": self.missing,
            "rounds": [],
        }
        for place in range(a.rounds):
            found: dict[str, Any] = {}
            for name in ("ours", *a.peer):
                if name not in self.missing:
                    with self.tolerating(name):
                        found[name] = self.turn(name, chosen[name])
            report.check_equal_work(found)
            self.data["rounds"].append(found)
            self.save()
            say(f"round {place + 1} of {a.rounds}: {json.dumps(self.data['summary'])}")

    @contextlib.contextmanager
    def tolerating(self, name: str) -> Iterator[None]:
        """What fails about vLLM is noted, anything else is raised."""
        try:
            yield
        except RuntimeError as error:
            if name != "vllm":
                raise
            self.missing[name] = str(error)[-600:]
            say(f"{name} is missing: {self.missing[name]}")

    def turn(self, name: str, chosen: Mapping[str, int]) -> dict[str, Any]:
        """One server's figures at every level: a process for each of the options chosen."""
        found: dict[str, Any] = {}
        for number in sorted(set(chosen.values())):
            with Server(name, self.model, KINDS[name].looks[number], self.arguments.threads) as server:
                for level in (level for level, look in chosen.items() if look == number):
                    found[level] = self.measured(server, level, "measure", LIMIT_S)
                    say(f"{name}, {level} clients: {found[level]['tokens_per_second']:.1f} tokens/s")
        return {level: found[level] for level in chosen}

    def measured(self, server: Server, level: str, part: str, limit_s: float) -> dict[str, Any]:
        """The figures of a level after its warm-up."""
        drive(server, self.plan[level]["warmup"], int(level), limit_s)
        return drive(server, self.plan[level][part], int(level), limit_s)

    def tuned(self, name: str) -> dict[str, int]:
        """A peer's best candidate at each level: those stored, or found by a first look."""
        looked = {"threads": self.arguments.threads, "model": self.model.name, "servers": KINDS[name].label}
        stored = self.data["looks"].get(name, {})
        known = all(level in stored.get("chosen", {}) for level in self.plan)
        if self.arguments.look or not known or any(stored[key] != value for key, value in looked.items()):
            looks: list[dict[str, Any]] = []
            for options in KINDS[name].looks:
                looks.append(self.look(name, options, looks))
                say(f"first look at {name}: {json.dumps(looks[-1])}")
            chosen = {level: report.best(looks, level) for level in self.plan}
            stored = self.data["looks"][name] = {**looked, "chosen": chosen, "looks": looks}
            self.save()
        return {level: stored["chosen"][level] for level in self.plan}

    def look(self, name: str, options: Mapping[str, Any], before: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """A candidate's throughput at each level until it fails, or is far slower than those before."""
        rates: dict[str, float] = {}
        tried: dict[str, Any] = {"options": dict(options), "tokens_per_second": rates}
        try:
            with Server(name, self.model, options, self.arguments.threads) as server:
                for level, parts in self.plan.items():
                    fastest = max((look["tokens_per_second"].get(level, 0.0) for look in before), default=0.0)
                    tokens = sum(request["max_tokens"] for request in parts["look"])
                    limit_s = min(LIMIT_S, 60 + 4 * tokens / fastest) if fastest else LIMIT_S
                    rates[level] = self.measured(server, level, "look", limit_s)["tokens_per_second"]
        except Failed as error:
            tried["error"] = str(error)[-600:]
        return tried


def say(text: str) -> None:
    """A line for whoever waits."""
    print(text, file=sys.stderr, flush=True)


def lines(data: Mapping[str, Any]) -> list[str]:
    """The figures for people, and what was wanted of them."""
    text = report.table(data["levels"], data["missing"])
    (figures,) = data["summary"].values()
    if int(data["headline"]) == HEADLINE:
        for name, bound in TARGETS.items():
            if figures[name] is not None:
                target = {"at_least": bound, "met": figures[name] >= bound}
                text.append(target_line(f"{HEADLINE} clients, {name}", figures[name], target))
    return text


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="the whole record as one JSON line")
    parser.add_argument("--peer", choices=PEERS, action="append", help="only beside this server (may be repeated)")
    parser.add_argument("--clients", type=int, nargs="+", help="the levels (default 1 8 32 64)")
    parser.add_argument("--rounds", type=int, help="rounds of all servers in turn (default 3)")
    parser.add_argument("--threads", type=int, default=machine.cores(), help="of each server (default: all cores)")
    parser.add_argument("--look", action="store_true", help="tune the peers anew")
    parser.add_argument("--quick", action="store_true", help="a tiny random model; stored outside the repository")
    parser.add_argument("--report", action="store_true", help="run nothing: print from the stored results")
    arguments = parser.parse_args()
    arguments.peer = list(dict.fromkeys(arguments.peer or PEERS))
    arguments.clients = sorted(set(arguments.clients or ((1, 4) if arguments.quick else CLIENTS)))
    arguments.rounds = arguments.rounds if arguments.rounds is not None else 1 if arguments.quick else 3
    if min(*arguments.clients, arguments.rounds, arguments.threads) < 1 or max(arguments.clients) > 256:
        parser.error("--clients, --rounds and --threads must be at least 1, --clients at most 256")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the running server ends, too
    benchmark = Benchmark(arguments)
    if not arguments.report:
        benchmark.run()
    elif not benchmark.data.get("rounds"):
        parser.error("nothing is stored for this machine: run without --report first")
    data = benchmark.data
    print("\n".join(lines(data)), file=sys.stderr if arguments.json else sys.stdout, flush=True)
    if arguments.json:
        print(json.dumps(data))
    print(json.dumps(data["summary"]), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

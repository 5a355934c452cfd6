"""What the load on servers showed: figures of one level, equal work, the best candidate, ratios, the table."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.machine import spread

TIMES = ("first_token_s", "token_s", "gap_s")


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """p50 and p99 of at least one value, interpolated between neighbours."""
    if len(values) == 1:
        return {"p50": values[0], "p99": values[0]}
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return {"p50": cuts[49], "p99": cuts[98]}


def figures(result: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of one load (of `client.load`); ValueError, with the first of them, when a request failed.

    tokens_per_second: all tokens over all seconds. first_token_s: from before the connection is made. token_s: of each
    request, the mean from its first to its last token. gap_s: between neighbouring texts, whatever they hold.
    """
    errors, answers = result["errors"], result["answers"]
    if errors:
        raise ValueError(f"{len(errors)} of {len(answers)} requests failed; {errors[0]}")
    tokens = sum(a["completion_tokens"] for a in answers)
    paces = [(a["last_s"] - a["first_s"]) / (a["completion_tokens"] - 1) for a in answers]
    return {
        "tokens_per_second": tokens / result["seconds"],
        "first_token_s": percentiles([a["first_s"] for a in answers]),
        "token_s": percentiles(paces),
        "gap_s": percentiles([gap for a in answers for gap in a["gaps_s"]] or [0.0]),
        "seconds": result["seconds"],
        "requests": len(answers),
        "prompt_tokens": sum(a["prompt_tokens"] for a in answers),
        "completion_tokens": tokens,
    }


def check_equal_work(sides: Mapping[str, Mapping[str, Any]]) -> None:
    """ValueError where two servers did not read the same prompts or write as many tokens at a level."""
    (first, reference), *others = sides.items()
    for name, levels in others:
        for level, found in levels.items():
            for what in ("requests", "prompt_tokens", "completion_tokens"):
                if found[what] != reference[level][what]:
                    raise ValueError(
                        f"{level} clients: {first} counted {reference[level][what]} {what}, {name} {found[what]}: "
                        "the work is not the same"
                    )


def best(looks: Sequence[Mapping[str, Any]], level: str) -> int:
    """The number of the candidate with the highest throughput at a level; RuntimeError when none finished."""
    ran = [i for i, look in enumerate(looks) if level in look["tokens_per_second"]]
    if not ran:
        raise RuntimeError(f"no candidate ran at {level} clients: {'; '.join(look['error'] for look in looks)}")
    return max(ran, key=lambda i: looks[i]["tokens_per_second"][level])


def over_rounds(rounds: Sequence[Mapping[str, Any]], name: str, level: str) -> dict[str, Any]:
    """A server's figures at a level, each as median and range over the rounds."""
    found = [one[name][level] for one in rounds]
    made: dict[str, Any] = {"tokens_per_second": spread([f["tokens_per_second"] for f in found])}
    for what in TIMES:
        made[what] = {p: spread([f[what][p] for f in found]) for p in ("p50", "p99")}
    return made


def ratio(rounds: Sequence[Mapping[str, Any]], name: str, level: str) -> dict[str, float]:
    """Ours over theirs in tokens a second, paired by round: median and range."""
    pairs = [(one["ours"][level]["tokens_per_second"], one[name][level]["tokens_per_second"]) for one in rounds]
    return spread([ours / theirs for ours, theirs in pairs])


def levels_report(data: Mapping[str, Any]) -> dict[str, Any]:
    """Per level every server's figures, and the ratio to each that ran in every round."""
    rounds, made = data["rounds"], {}
    for level in rounds[0]["ours"]:
        names = [name for name in rounds[0] if all(level in one.get(name, {}) for one in rounds)]
        servers = {name: over_rounds(rounds, name, level) for name in names}
        ratios = {name: ratio(rounds, name, level) for name in names if name != "ours"}
        made[level] = {"servers": servers, "throughput_ratio": ratios}
    return made


def summary(levels: Mapping[str, Any], headline: str) -> dict[str, Any]:
    """The last line: ours against transformers' server, and vLLM's beside; None for what was not measured."""
    found = levels[headline]
    ours, ratios = found["servers"]["ours"], found["throughput_ratio"]

    def of(name: str) -> float | None:
        return round(ratios[name]["median"], 3) if name in ratios else None

    return {
        f"clients_{headline}": {
            "throughput_ratio": of("transformers"),
            "vllm_throughput_ratio": of("vllm"),
            "p99_first_token_s": round(ours["first_token_s"]["p99"]["median"], 4),
            "p99_token_s": round(ours["token_s"]["p99"]["median"], 4),
        }
    }


def table(levels: Mapping[str, Any], missing: Mapping[str, str]) -> list[str]:
    """The figures for people: medians, with the range of the throughput."""
    lines = [
        f"{'clients':>7} {'server':14} {'tokens/s':>22} {'first token, s':>18} {'per token, ms':>18}   ours / theirs",
        f"{'':7} {'':14} {'median [range]':>22} {'p50':>9}{'p99':>9} {'p50':>9}{'p99':>9}",
    ]
    for level, found in levels.items():
        for name, f in found["servers"].items():
            speed, first, token = f["tokens_per_second"], f["first_token_s"], f["token_s"]
            rate = f"{speed['median']:.1f} [{speed['min']:.1f}, {speed['max']:.1f}]"
            times = f"{first['p50']['median']:9.3f}{first['p99']['median']:9.3f} "
            times += f"{1000 * token['p50']['median']:9.1f}{1000 * token['p99']['median']:9.1f}"
            r = found["throughput_ratio"].get(name)
            beside = f"   {r['median']:.2f}x [{r['min']:.2f}, {r['max']:.2f}]" if r else ""
            lines.append(f"{level:>7} {name:14} {rate:>22} {times}{beside}")
    return lines + [f"{name}: no figure ({why})" for name, why in missing.items()]

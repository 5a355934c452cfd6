"""What exactness is worth and what it costs: log-probs in sampling and in training, and the step beside an inexact one.

    python benchmarks/exactness.py --json      SmolLM2-135M: some minutes on two cores
    python benchmarks/exactness.py --quick     a tiny random network, to see that it runs; nothing is saved

Gap: 8 prompts of 16 to 32 tokens x 96 sampled tokens; the log-prob of each token while it was sampled against the
one a full forward pass over the finished sequences gives. transformers: `generate` (prompts padded on the left, its
key/value cache) and its own forward pass over the same padded batch. Ours: the engine and `training.step.score`.

Price: rollout and update of 8 prompts x 8 x 96 tokens with the exact attention and with the forms of
benchmarks/inexact.py in turn (A B C A B C ...), everything else being equal: all go through the decoder's modules, the
exact one too, which sampling otherwise does not. The best inexact step is the fastest rollout plus the fastest update
of any form. Results: benchmarks/results/<machine>/exactness.json.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.counting import seconds_of
from benchmarks.inexact import FORMS, inexact, through_modules
from benchmarks.machine import machine, spread
from benchmarks.roofline import finish, target_line
from benchmarks.workload import MICRO_BATCH_TOKENS, MODEL, Learner, Task, experience, network, spread_lengths
from upslope.functional.logprobs import log_softmax, token_logprobs
from upslope.models.decoder.network import Decoder
from upslope.models.files.sources import resolve
from upslope.models.files.weights import save_folder
from upslope.models.protocol import CausalModel
from upslope.training.experience import Experience
from upslope.training.step import score

PRICE_TARGET = 1.15
CLIP = 0.2


def gap(sampled: Tensor, trained: Tensor) -> dict[str, float]:
    """The largest and the mean |difference| of log-probs, and the share of ratios that PPO's clip range leaves out."""
    difference = (sampled.double() - trained.double()).abs()
    ratio = (trained.double() - sampled.double()).exp()
    return {
        "max": float(difference.max()),
        "mean": float(difference.mean()),
        "differing_tokens": int((difference != 0).sum()),
        "tokens": difference.numel(),
        "outside_clip_range": float(((ratio < 1 - CLIP) | (ratio > 1 + CLIP)).double().mean()),
    }


def their_gap(folder: Path, prompts: list[list[int]], tokens: int, dtype: torch.dtype) -> dict[str, float]:
    """transformers: `generate` against its own forward pass."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=dtype).eval()
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    torch.manual_seed(0)
    with torch.no_grad():
        out = model.generate(
            ids,
            attention_mask=mask,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            min_new_tokens=tokens,
            max_new_tokens=tokens,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
        )
        drawn = out.sequences[:, width:]
        logits = torch.stack([log_softmax(step.float()) for step in out.logits], dim=1)
        sampled = logits.gather(2, drawn[:, :, None])[:, :, 0]
        whole = torch.cat([mask, torch.ones_like(drawn)], dim=1)
        places = (whole.cumsum(1) - 1).clamp(min=0)
        trained = model(out.sequences, attention_mask=whole, position_ids=places).logits[:, width - 1 : -1]
        return gap(sampled, token_logprobs(trained.float(), drawn))


def our_gap(model: CausalModel, task: Task) -> dict[str, float]:
    """The engine against `training.step.score`."""
    held = Experience.of(task.rollout(task.engine(model)))
    return gap(held.policy_logprobs, trainer_logp(model, held))


def trainer_logp(model: CausalModel, held: Experience) -> Tensor:
    """What the trainer says of every token [N], in the experience's order."""
    batches, order = held.batches(range(held.size), MICRO_BATCH_TOKENS, device=model.device)
    logp_N = held.in_order(score(model, batches), order).logp_N
    assert logp_N is not None
    return logp_N


def price(learner: Learner, task: Task, rounds: int) -> dict[str, Any]:
    """Seconds of rollout and update for the exact attention and every inexact form, in turns."""
    forms = ("exact", *FORMS)
    engines = {form: task.engine(learner.model) for form in forms}
    seconds: dict[str, dict[str, list[float]]] = {form: {"rollout": [], "update": [], "step": []} for form in forms}
    gaps: dict[str, dict[str, float]] = {}
    for turn in range(rounds + 1):
        for form in forms:
            with through_modules() if form == "exact" else inexact(form):
                groups: list[Any] = []
                rollout = seconds_of(lambda g=groups, e=engines[form]: g.extend(task.rollout(e)))
                change = seconds_of(lambda g=groups: learner.update(experience(g)))
                if turn == 0:  # the warm-up
                    held = Experience.of(task.rollout(engines[form]))
                    gaps[form] = gap(held.policy_logprobs, trainer_logp(learner.model, held))
                    continue
            for part, value in zip(("rollout", "update", "step"), (rollout, change, rollout + change), strict=True):
                seconds[form][part].append(value)
    found: dict[str, Any] = {
        form: {**{part: spread(values) for part, values in parts.items()}, "gap": gaps[form]}
        for form, parts in seconds.items()
    }
    best = {part: min(FORMS, key=lambda f: found[f][part]["median"]) for part in ("rollout", "update")}
    fastest = {part: found[form][part]["median"] for part, form in best.items()}
    exact = {part: found["exact"][part]["median"] for part in best}
    return {
        "forms": found,
        "best_inexact": {**best, "seconds": sum(fastest.values())},
        "exact_seconds": sum(exact.values()),
        "step_ratio": sum(exact.values()) / sum(fastest.values()),
        "rollout_ratio": exact["rollout"] / fastest["rollout"],
        "update_ratio": exact["update"] / fastest["update"],
    }


def measure(rounds: int, *, quick: bool) -> dict[str, Any]:
    """Everything; progress goes to standard error."""
    tokens = 6 if quick else 96
    float32 = network(quick=quick)
    vocabulary = float32.spec.vocab_size
    lengths = spread_lengths(16, 32, 8)
    sampling = Task.random(vocabulary, lengths, [[tokens]] * 8)
    theirs, ours = {}, {}
    with tempfile.TemporaryDirectory(prefix="upslope-exactness-") as temporary:
        folder = resolve(MODEL) if not quick else _folder(float32, Path(temporary) / "model")
        for dtype in (torch.float32, torch.bfloat16):
            name = str(dtype).removeprefix("torch.")
            _say(f"gap in {name}")
            theirs[name] = their_gap(folder, sampling.prompts, tokens, dtype)
            ours[name] = our_gap(network(quick=quick).to(dtype), sampling)
    _say("price")
    learner = Learner.of(float32)
    task = Task.random(vocabulary, lengths, [[tokens] * 8] * 8)
    cost = price(learner, task, rounds)
    largest = max(g["max"] for g in ours.values())
    ratio = cost["step_ratio"]
    return {
        "machine": machine(),
        "model": "random, tiny" if quick else MODEL,
        "dtype": str(learner.model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "rounds": rounds,
        "gap": {"transformers": theirs, "upslope": ours},
        "price": cost,
        "targets": {
            "gap": {"value": largest, "at_most": 0.0, "met": largest == 0},
            "price": {"value": ratio, "at_most": PRICE_TARGET, "met": ratio <= PRICE_TARGET},
        },
        "summary": {
            "step_exact_vs_inexact": round(ratio, 3),
            "rollout_exact_vs_inexact": round(cost["rollout_ratio"], 3),
            "update_exact_vs_inexact": round(cost["update_ratio"], 3),
            "gap": {name: g["max"] for name, g in ours.items()},
            "gap_transformers": {name: g["max"] for name, g in theirs.items()},
        },
    }


def _folder(model: CausalModel, path: Path) -> Path:
    assert isinstance(model, Decoder)
    tensors = {name: p.detach() for name, p in model.named_parameters()}
    return save_folder(path, model.config.to_hf(), tensors)


def lines(found: dict[str, Any]) -> list[str]:
    """The figures for people."""
    text = [
        f"{who} in {dtype}: log-probs differ by at most {g['max']:.2g}, mean {g['mean']:.2g}; "
        f"{g['differing_tokens']} of {g['tokens']} tokens, {100 * g['outside_clip_range']:.2f}% of ratios outside "
        f"{1 - CLIP:g} to {1 + CLIP:g}"
        for who, by_dtype in found["gap"].items()
        for dtype, g in by_dtype.items()
    ]
    for form, f in found["price"]["forms"].items():
        seconds = ", ".join(f"{part} {f[part]['median']:.2f} s" for part in ("rollout", "update", "step"))
        text.append(f"{form}: {seconds}; log-probs differ by at most {f['gap']['max']:.2g}")
    best = found["price"]["best_inexact"]
    text.append(f"best inexact: rollout {best['rollout']}, update {best['update']}, {best['seconds']:.2f} s")
    if found["price"]["step_ratio"] < 1:
        text.append("the exact step is the faster one: the inexact forms save nothing here")
    return text + [target_line(name, t["value"], t) for name, t in found["targets"].items()]


def _say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="the whole record as one JSON line")
    parser.add_argument("--rounds", type=int, default=3, help="turns after the warm-up; medians count")
    parser.add_argument("--quick", action="store_true", help="a tiny random network; nothing is saved")
    arguments = parser.parse_args()
    found = measure(arguments.rounds, quick=arguments.quick)
    finish("exactness", found, lines(found), as_json=arguments.json, keep=not arguments.quick)
    return 0


if __name__ == "__main__":
    sys.exit(main())

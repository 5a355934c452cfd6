"""A whole GRPO step on a GPU beside TRL with transformers' generation, and how near it comes to what the GPU can do.

    python benchmarks/gpu.py --json                      0.5B parameters; without CUDA: says so and ends
    python benchmarks/gpu.py --json --size 1.5b
    python benchmarks/gpu.py --json --peer-python PATH   TRL from that interpreter instead of an environment made here

The network has the shape of Qwen2.5 0.5B or 1.5B with random weights, in bfloat16; 8 prompts of some 24 tokens x 8
completions of 256 tokens, end of sequence ignored on both sides. TRL runs in its defaults (autocast, checkpointing) and
tuned (bfloat16 weights, no checkpointing, 64 sequences at once); where its environment cannot be made, its figures are
missing and the rest is reported. Shares are of rates measured in the same run (benchmarks/roofline.py). A GPU's
kernels may depend on the batch: the difference of log-probs in rollout and training is reported.
Results: benchmarks/results/<machine>/gpu.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.counting import seconds_of
from benchmarks.environments import peer_python
from benchmarks.exactness import gap, trainer_logp
from benchmarks.harness import ROOT
from benchmarks.machine import machine, spread
from benchmarks.roofline import Rates, decode, decode_figures, finish, share_training, target_line, train
from benchmarks.speed import work
from benchmarks.speed.models import word_tokenizer
from benchmarks.workload import Learner, Task, experience
from upslope.models.decoder.network import Decoder, DecoderConfig
from upslope.models.files.loading import load_model
from upslope.models.files.weights import save_folder

REQUIREMENTS = ["torch", "trl==1.16.0"]
TARGETS = {"train_share_of_matmul": 0.40, "decode_share_of_bandwidth": 0.50}
SIZES: dict[str, dict[str, Any]] = {
    "0.5b": {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "vocab_size": 151936,
    },
    "1.5b": {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "vocab_size": 151936,
    },
}
TRL_OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "tuned": {
        "bf16": True,
        "gradient_checkpointing": False,
        "per_device_train_batch_size": 64,
        "model_init_kwargs": {"dtype": "bfloat16"},
    },
}
WORK = {
    "num_prompts": 8,
    "num_generations": 8,
    "max_completion_length": 256,
    "learning_rate": 1e-6,
    "seed": 0,
    "fixed": True,
    "warmup": 1,
    "steps": 3,
}


def write_model(folder: Path, shape: Mapping[str, Any]) -> Path:
    """A Qwen2 folder with random weights and a tokenizer that knows the words of the prompts."""
    tokenizer = word_tokenizer()
    torch.manual_seed(0)
    config = DecoderConfig(
        model_type="qwen2",
        attention_bias=True,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        rope={"rope_type": "default", "rope_theta": 1e6},
        **shape,
    )
    tensors = {name: p.detach() for name, p in Decoder(config).named_parameters()}
    return save_folder(folder, config.to_hf(), tensors, tokenizer=tokenizer, generation_config={"eos_token_id": 1})


def prompts_of(folder: Path, count: int) -> list[list[int]]:
    """The token ids of the prompts that TRL gets as text."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    return [tokenizer(text)["input_ids"] for text in work.prompts(count)]


def ours(
    folder: Path,
    rates: Rates,
    asked: Mapping[str, Any],
    *,
    device: str,
    micro_batch_tokens: int = 32768,
    batches: tuple[int, ...] = (64, 256),
) -> dict[str, Any]:
    """Whole steps, one update against the matrix rate, decoding against the bandwidth, and the log-prob difference."""
    learner = Learner.of(load_model(folder), device=device, dtype=torch.bfloat16)
    learner.micro_batch_tokens = micro_batch_tokens
    model, prompts = learner.model, prompts_of(folder, asked["num_prompts"])
    task = Task(prompts, [[asked["max_completion_length"]] * asked["num_generations"]] * asked["num_prompts"])
    engine = task.engine(model)
    parts: dict[str, list[float]] = {"rollout": [], "update": [], "step": []}
    difference: dict[str, float] = {}
    for turn in range(asked["warmup"] + asked["steps"]):
        groups: list[Any] = []
        rollout = seconds_of(lambda g=groups: g.extend(task.rollout(engine)), device)
        held = experience(groups)
        difference = gap(held.policy_logprobs, trainer_logp(model, held))
        change = seconds_of(lambda e=held: learner.update(e), device)
        if turn >= asked["warmup"]:
            for part, seconds in zip(parts, (rollout, change, rollout + change), strict=True):
                parts[part].append(seconds)
    training = train(learner, task, asked["steps"])
    rates.measure()
    decoding = {}
    for rows in batches:
        texts = prompts_of(folder, rows)
        decode(model, texts, 4)
        decoding[str(rows)] = decode_figures(
            decode(model, texts, asked["max_completion_length"]), model, rates.matrix(model.dtype), rates.bandwidth
        )
    generated = sum(map(sum, task.lengths))
    return {
        "seconds": {part: spread(values) for part, values in parts.items()},
        "generated_tokens_per_second": generated / statistics.median(parts["rollout"]),
        "step_tokens_per_second": task.tokens / statistics.median(parts["step"]),
        "training": share_training(training, rates.matrix(model.dtype)),
        "decoding": decoding,
        "logprob_gap": difference,
    }


def theirs(folder: Path, asked: Mapping[str, Any], python: Path) -> dict[str, Any]:
    """Seconds of TRL's steps in its defaults and tuned."""
    found = {}
    for name, options in TRL_OPTIONS.items():
        with tempfile.TemporaryDirectory(prefix="upslope-gpu-") as temporary:
            settings, told = Path(temporary) / "settings.json", Path(temporary) / "result.json"
            given = {**asked, "model": str(folder), "folder": str(Path(temporary) / "out"), "options": options}
            settings.write_text(json.dumps({**given, "threads": torch.get_num_threads()}))
            done = subprocess.run(
                [str(python), "-m", "benchmarks.gpu_trl", str(settings), str(told)],
                cwd=ROOT,
                env={**os.environ, "HF_HUB_OFFLINE": "1"},
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode:
                found[name] = {"missing": f"exit code {done.returncode}: {done.stderr.strip()[-2000:]}"}
                continue
            result = json.loads(told.read_text())
        steps = result["steps"][asked["warmup"] :]
        found[name] = {
            "seconds": {
                mine: spread([step[their] for step in steps])
                for mine, their in (("rollout", "rollout"), ("update", "update"), ("step", "seconds"))
            },
            "completion_tokens": sum(steps[-1]["lengths"]),
            "versions": result["versions"],
        }
    return found


def measure(size: str, peer: Path | None) -> dict[str, Any]:
    """Everything, on the first GPU."""
    rates = Rates("cuda")
    rates.measure()
    with tempfile.TemporaryDirectory(prefix="upslope-gpu-") as temporary:
        folder = write_model(Path(temporary) / "model", SIZES[size])
        own = ours(folder, rates, WORK, device="cuda")
        torch.cuda.empty_cache()
        try:
            python = peer or peer_python("trl-gpu", REQUIREMENTS)
            trl = theirs(folder, WORK, python)
        except (subprocess.CalledProcessError, OSError) as error:
            trl = {"missing": f"the environment of TRL could not be made: {error}"}
    return record(size, rates, own, trl)


def record(size: str, rates: Rates, own: dict[str, Any], trl: dict[str, Any]) -> dict[str, Any]:
    """The figures with ratios and targets; a ratio whose peer is missing is None."""
    first = next(iter(own["decoding"].values()))
    summary: dict[str, Any] = {
        f"step_vs_trl_{name}": round(trl[name]["seconds"]["step"]["median"] / own["seconds"]["step"]["median"], 3)
        if "seconds" in trl.get(name, {})
        else None
        for name in TRL_OPTIONS
    }
    summary |= {
        "train_share_of_matmul": round(own["training"]["share_of_matmul"]["median"], 4),
        "decode_share_of_bandwidth": round(first["share_of_bandwidth"]["median"], 4),
        "rollout_tokens_per_second": round(own["generated_tokens_per_second"], 1),
        "logprob_gap_max": own["logprob_gap"]["max"],
        "logprob_gap_mean": own["logprob_gap"]["mean"],
    }
    return {
        "machine": machine(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "model": f"Qwen2, {size}, random",
        "work": WORK,
        "rates": rates.summary(),
        "ours": own,
        "trl": trl,
        "targets": {
            name: {"value": summary[name], "at_least": bound, "met": summary[name] >= bound}
            for name, bound in TARGETS.items()
        },
        "summary": summary,
    }


def lines(found: dict[str, Any]) -> list[str]:
    """The figures for people."""
    own, rates = found["ours"], found["rates"]
    text = [
        f"{found['gpu']}: bfloat16 {rates['bfloat16'] / 1e12:.0f} TFLOP/s, memory {rates['memory'] / 1e12:.2f} TB/s",
        f"{found['model']}: {_seconds(own)}; {own['generated_tokens_per_second']:.0f} tokens/s generated",
    ]
    text += [
        f"TRL {name}: {_seconds(part) if 'seconds' in part else 'missing: ' + part['missing']}"
        for name, part in found["trl"].items()
        if isinstance(part, dict)
    ]
    if "missing" in found["trl"]:
        text.append(f"TRL missing: {found['trl']['missing']}")
    text += [
        f"decoding {rows} rows: {d['ms_per_step']['median']:.2f} ms per token, share of bandwidth "
        f"{d['share_of_bandwidth']['median']:.3f}, of the roofline {d['share_of_roofline']['median']:.3f}"
        for rows, d in own["decoding"].items()
    ]
    difference = own["logprob_gap"]
    text.append(
        f"rollout against trainer: log-probs differ by at most {difference['max']:.2g}, mean {difference['mean']:.2g}"
    )
    return text + [target_line(name, t["value"], t) for name, t in found["targets"].items()]


def _seconds(side: dict[str, Any]) -> str:
    return ", ".join(f"{part} {side['seconds'][part]['median']:.2f} s" for part in ("rollout", "update", "step"))


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="the whole record as one JSON line")
    parser.add_argument("--size", choices=tuple(SIZES), default="0.5b", help="parameters of the network")
    parser.add_argument("--peer-python", type=Path, help="an interpreter that holds TRL and a CUDA build of torch")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print(json.dumps({"skipped": "no CUDA device"}))
        return 0
    found = measure(arguments.size, arguments.peer_python)
    finish("gpu", found, lines(found), as_json=arguments.json, keep=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

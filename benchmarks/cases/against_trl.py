"""The same task, weights, prompts, sampler and learning rate as TRL 1.16's GRPO and RLOO.

A 1.3-million-parameter decoder that has seen a little supervision learns sums by their reward, 100 steps of 16 x 8
completions, five seeds; and SmolLM2-135M learns to answer in digits, 20 steps of 8 x 4, one seed. Neither side clips
gradients or schedules the learning rate. TRL runs in float32 and, for the large model, in its faster bf16 autocast.

Per seed the curves are compared where the numbers of samples are equal; the seconds are those of training alone.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
from pathlib import Path

import torch

from benchmarks.environments import peer_python
from benchmarks.harness import ROOT, Outcome
from upslope.cache import cache_root
from upslope.models.decoder.network import Decoder, DecoderConfig
from upslope.models.files.sources import resolve
from upslope.models.files.weights import save_folder
from upslope.options import GRPOOptions, SFTOptions
from upslope.recipes.grpo import grpo
from upslope.recipes.sft import sft
from upslope.runs.folder import Run

NAME = "against_trl"
LEARNERS = ("grpo_trl", "grpo", "rloo_trl", "rloo", "smollm2_trl", "smollm2")
SEEDS = (0, 1, 2, 3, 4)
SEEDS_OF = {"smollm2_trl": (0,), "smollm2": (0,)}
EXPECTED = {
    "grpo_trl": {"last_reward": None, "seconds": None},
    "grpo": {"reward_gap": ("<=", 0.06), "speed_ratio": (">=", 2.0), "last_reward": None, "seconds": None},
    "rloo_trl": {"last_reward": None, "seconds": None},
    "rloo": {"reward_gap": ("<=", 0.06), "speed_ratio": (">=", 2.0), "last_reward": None, "seconds": None},
    "smollm2_trl": {"last_reward": None, "seconds": None},
    "smollm2": {"reward_gap": ("<=", 0.15), "speed_ratio": (">=", 2.0), "last_reward": None, "seconds": None},
}
TINY = {"num_prompts": 16, "num_generations": 8, "max_completion_length": 5, "learning_rate": 1e-4, "max_steps": 100}
LARGE = {"num_prompts": 8, "num_generations": 4, "max_completion_length": 12, "learning_rate": 1e-5, "max_steps": 20}
START_STEPS = 40
TRAIN_PROMPTS = 77
"""All sums of two digits that are not held out."""
LAST = 10
"""Steps at the end whose mean reward is `last_reward`."""

_seen: dict[tuple[str, int], list[dict[str, float]]] = {}


def run(learner: str, seed: int, folder: Path) -> Outcome:
    """Train once; the peer's run of the same seed must come first."""
    large = learner.startswith("smollm2")
    shape = LARGE if large else TINY
    model = str(resolve("smollm2-135m")) if large else str(start(folder))
    if learner.endswith("_trl"):
        steps = _theirs(learner.removesuffix("_trl"), seed, folder, model, shape, large=large)
    else:
        steps = _ours(learner, seed, folder, model, shape, large=large)
    _seen[learner, seed] = steps
    samples = shape["num_prompts"] * shape["num_generations"]
    last = statistics.fmean(s["reward"] for s in steps[-LAST:])
    metrics = {"last_reward": last, "seconds": steps[-1]["seconds"]}
    peer = _seen.get((f"{learner}_trl", seed))
    if peer is not None:
        metrics["reward_gap"] = abs(last - statistics.fmean(s["reward"] for s in peer[-LAST:]))
        metrics["speed_ratio"] = peer[-1]["seconds"] / steps[-1]["seconds"]
    curve = [((i + 1) * samples, s["seconds"], s["reward"]) for i, s in enumerate(steps)]
    return Outcome(metrics, samples * len(steps), steps[-1]["seconds"], curve)


def start(folder: Path) -> Path:
    """The small model after a little supervision: made once per process and kept for all runs."""
    target = cache_root() / "bench" / f"sums-{os.getpid()}"
    if (target / "config.json").is_file():
        return target
    torch.manual_seed(0)
    shape = DecoderConfig(
        vocab_size=14,
        hidden_size=160,
        intermediate_size=448,
        num_hidden_layers=4,
        num_attention_heads=5,
        num_key_value_heads=5,
        head_dim=32,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    fresh = Decoder(shape)
    tensors = {name: p.detach() for name, p in fresh.named_parameters()}
    untrained = folder / "untrained"
    save_folder(untrained, shape.to_hf(), tensors, tokenizer=_tokenizer(), generation_config={"eos_token_id": 1})
    summary = sft(
        SFTOptions(
            model=str(untrained),
            task=f"{ROOT / 'benchmarks' / 'sums.py'}:Sums",
            output_dir=str(folder / "start"),
            num_examples=TRAIN_PROMPTS,
            batch_size=64,
            max_steps=START_STEPS,
            learning_rate=1e-3,
            dtype="float32",
            eval_every=0,
            eval_samples=0,
            max_completion_length=5,
        )
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    Path(summary["model"]).resolve().rename(target)
    return target


def _tokenizer():  # type: ignore[no-untyped-def]
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = ["<pad>", "<eos>", *"0123456789+="]
    inner = Tokenizer(models.WordLevel({letter: i for i, letter in enumerate(letters)}, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", pad_token="<pad>")


def _prompts() -> list[str]:
    from upslope.tasks.base import load_task

    task = load_task(f"{ROOT / 'benchmarks' / 'sums.py'}:Sums")
    return [p.text or "" for p in task.prompts("train", TRAIN_PROMPTS, seed=0)]


def _ours(learner: str, seed: int, folder: Path, model: str, shape: dict, *, large: bool) -> list[dict[str, float]]:
    options = GRPOOptions(
        model=model,
        task=f"{ROOT / 'benchmarks' / 'sums.py'}:Sums" + (":kind=digits" if large else ""),
        output_dir=str(folder / learner),
        advantage="rloo" if learner == "rloo" else "grpo",
        normalizer="constant" if learner == "rloo" else "token",
        num_train_prompts=TRAIN_PROMPTS,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        eval_every=0,
        eval_samples=0,
        dtype="auto" if large else "float32",
        seed=seed,
        **shape,
    )
    grpo(options)
    with Run.open(folder / learner, read_only=True) as opened:
        lines = opened.metric_lines()
    spent, steps = 0.0, []
    for line in lines:
        spent += line["seconds/rollout"] + line["seconds/reward"] + line["seconds/update"]
        steps.append({"reward": line["reward"], "seconds": spent})
    return steps


def _theirs(trainer: str, seed: int, folder: Path, model: str, shape: dict, *, large: bool) -> list[dict[str, float]]:
    python = peer_python("trl", ["torch==2.13.0", "trl==1.16.0"])
    settings = {
        "trainer": "rloo" if trainer == "rloo" else "grpo",
        "model": model,
        "prompts": _prompts(),
        "reward": "digit_share" if large else "reward",
        "folder": str(folder / "trl"),
        "threads": torch.get_num_threads(),
        "bf16": large,
        "seed": seed,
        **shape,
    }
    asked, told = folder / "settings.json", folder / "result.json"
    asked.write_text(json.dumps(settings))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    command = [str(python), str(ROOT / "benchmarks" / "trl_worker.py"), str(asked), str(told)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"TRL failed: {done.stderr.strip()[-1500:]}")
    return json.loads(told.read_text())["steps"]

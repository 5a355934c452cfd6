"""An LSTM and a small decoder on WikiText-2 by policy gradients, from random weights and from maximum likelihood.

The policy continues the first words of Wikipedia's sentences by 24 tokens. Its reward is the mean log-likelihood of
the continuation under a frozen decoder, which maximum likelihood trained on other articles, plus a penalty on repeated
character 4-grams. gae: REINFORCE with a learned baseline and generalized advantage estimation, one update per batch.
ppo: the same estimator, three passes over each batch.

Everything is measured on validation prompts that no training saw: the reward at the start and at the best checkpoint,
the perplexity of the held-out text, and the share of distinct word pairs. Likelihood under a model is easily had with
few words: what is gained in reward is paid in perplexity and variety, and both are reported beside it.

The text is read from $UPSLOPE_DATA/wikitext2 (else ../shared/data/wikitext2 beside the repository).
"""

from __future__ import annotations

import atexit
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import ROOT, Outcome
from upslope.build import Policy, load_policy, make_engine
from upslope.devices.hardware import device_of_machine
from upslope.errors import DataError
from upslope.evaluation.behaviour import distinct_n
from upslope.options import PPOOptions, ReinforceOptions, RLOptions
from upslope.options.supervised import PretrainOptions
from upslope.recipes.ppo import ppo
from upslope.recipes.pretrain import Pretrain, causal_texts, pretrain
from upslope.recipes.reinforce import reinforce
from upslope.rewards.summands import Surroundings
from upslope.rollout import collect
from upslope.tasks.base import Task, load_task, select_prompts
from upslope.types import Prompt, SamplingParams
from upslope.workers.rewards import make_scorer

NAME = "wikitext"
LEARNERS = tuple(
    f"{net}_{how}_{start}" for net in ("lstm", "decoder") for how in ("gae", "ppo") for start in ("random", "mle")
)
LEARNERS = ("lstm_pretrain", "decoder_pretrain", *LEARNERS)
SEEDS = (1, 2, 3)
_GAIN = {  # nats per token of reward on validation prompts, from the start to the best checkpoint
    "lstm_gae_random": 0.5,
    "lstm_gae_mle": 0.4,
    "lstm_ppo_random": 1.0,
    "lstm_ppo_mle": 0.7,
    "decoder_gae_random": 0.3,
    "decoder_gae_mle": 0.3,
    "decoder_ppo_random": 0.8,
    "decoder_ppo_mle": 0.5,
}
# The supervised starts themselves, as `upslope pretrain` makes them: perplexity per token of the held-out text.
EXPECTED: dict[str, dict[str, tuple[str, float] | None]] = {
    f"{net}_pretrain": {"perplexity": ("<=", 600.0), "perplexity_random": None} for net in ("lstm", "decoder")
}
EXPECTED |= {
    learner: {
        "reward_gain": (">=", gain),
        "distinct_2": (">=", 0.25) if learner.endswith("_mle") else None,
        "perplexity": None,
    }
    for learner, gain in _GAIN.items()
}

WORDS = 8  # of a sentence, as prompt
TOKENS = 24
STEPS = {"lstm": 30, "decoder": 20}
START_STEPS = {"lstm": 50, "decoder": 40}
WIDTH = 128
REPETITION = 5.0


class Continuations(Task):
    """The first words of the long lines of a folder's train.txt or held.txt, to be continued."""

    name = "continuations"
    inline_safe = True

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def prompts(self, split: str, n: int, *, seed: int) -> list[Prompt]:
        """The file decides the split."""
        file = self.folder / ("train.txt" if split == "train" else "held.txt")

        def lines() -> Iterator[Prompt]:
            for line in file.read_text(encoding="utf-8").splitlines():
                words = line.split()
                if len(words) >= 30:
                    yield Prompt(key=0, text=" " + " ".join(words[:WORDS]))

        # half of each file's prompts: `select_prompts` keeps what stands in both files out of one of them
        half = "train" if split == "train" else "eval"
        return select_prompts(lines(), half, n, name=self.name, eval_fraction=0.5)

    def rewards(self, prompts: list[Prompt], completions: list[str]) -> list[float]:
        """Minus the share of character 4-grams that occurred before in the text; -1 for a text without any.

        Words would be too coarse: text without a space has no repeated pair of words.
        """
        return [repetition(text) for text in completions]


def repetition(text: str) -> float:
    """0 where no four characters repeat, towards -1 where all do."""
    grams = [text[i : i + 4] for i in range(len(text) - 3)]
    return len(set(grams)) / len(grams) - 1.0 if grams else -1.0


def wikitext() -> Path:
    """The folder of the data set."""
    folder = Path(os.environ.get("UPSLOPE_DATA", str(ROOT.parent / "shared" / "data"))) / "wikitext2"
    for name in ("valid.txt", "test.txt"):
        if not (folder / name).is_file():
            raise DataError(f"{folder / name}: no such file; UPSLOPE_DATA names the folder that holds wikitext2/")
    return folder


@cache
def base() -> Path:
    """What all runs of this process share: the texts, the tokenizer, the frozen judge. Removed at the end."""
    folder = Path(tempfile.mkdtemp(prefix="upslope-wikitext-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    source = wikitext()
    text = (source / "valid.txt").read_text(encoding="utf-8").replace("<unk>", "unk")
    border = text.find("\n", int(0.9 * len(text))) + 1
    (folder / "train.txt").write_text(text[:border], encoding="utf-8")
    (folder / "held.txt").write_text(text[border:], encoding="utf-8")
    other = (source / "test.txt").read_text(encoding="utf-8").replace("<unk>", "unk")
    (folder / "judge.txt").write_text(other, encoding="utf-8")
    first = _pretrain("decoder", folder, "tokenizer", data="train.txt", tokenizer="bpe", seed=0, max_steps=0)
    shutil.copytree(first, folder / "vocabulary")
    judge = _pretrain("decoder", folder, "judge", data="judge.txt", seed=0, max_steps=120, learning_rate=6e-3)
    shutil.copytree(judge, folder / "frozen")
    return folder


def _options(net: str, folder: Path, name: str, *, data: str = "train.txt", **changes: Any) -> PretrainOptions:
    settings: dict[str, Any] = {
        "data": (str(folder / data),),
        "eval_data": (str(folder / "held.txt"),),
        "output_dir": str(folder / "runs" / name),
        "cache_dir": str(folder / "corpora"),
        "tokenizer": str(folder / "vocabulary"),
        "architecture": net,
        "hidden_size": WIDTH,
        "num_layers": 2,
        "num_heads": None if net == "lstm" else 4,
        "context_length": 64,
        "batch_size": 32,
        "eval_every": 0,
        "eval_samples": 300,
        "warmup_steps": 10,
        "save_every": 10_000,
        "dtype": "float32",
    } | changes
    if settings["tokenizer"] == "bpe":
        settings["vocab_size"] = 2000
    return PretrainOptions(**settings)


def _pretrain(net: str, folder: Path, name: str, **changes: Any) -> str:
    return pretrain(_options(net, folder, name, **changes))["model"]


@cache
def start(net: str, kind: str, seed: int) -> Path:
    """Random weights of a seed, or the same after maximum likelihood on the training part."""
    name = f"{net}-{kind}-{seed}"
    steps, rate = 0 if kind == "random" else START_STEPS[net], {"lstm": 1e-2, "decoder": 6e-3}[net]
    return Path(_pretrain(net, base(), name, seed=seed, max_steps=steps, learning_rate=rate))


def _pretrained(net: str, seed: int) -> Outcome:
    """What maximum likelihood reached from random weights."""
    began = time.perf_counter()
    made = start(net, "mle", seed)
    seconds = time.perf_counter() - began
    found = {
        kind: _perplexity(load_policy(PPOOptions(model=str(model), dtype="float32")))
        for kind, model in (("", made), ("_random", start(net, "random", seed)))
    }
    return Outcome({f"perplexity{kind}": value for kind, value in found.items()}, START_STEPS[net] * 32, seconds)


def run(learner: str, seed: int, folder: Path) -> Outcome:
    """Learn from the frozen judge; only that is timed."""
    if learner.endswith("_pretrain"):
        return _pretrained(learner.removesuffix("_pretrain"), seed)
    net, how, kind = learner.split("_")
    model = start(net, kind, seed)
    options = _learning(net, how, kind, seed, model, folder / "run")
    before = measured(model, options, seed)
    began = time.perf_counter()
    if isinstance(options, PPOOptions):
        ppo(options)
    else:
        assert isinstance(options, ReinforceOptions)
        reinforce(options)
    seconds = time.perf_counter() - began
    after = measured(folder / "run" / "checkpoints" / "best" / "model", options, seed)
    metrics = {
        "reward_gain": after["reward"] - before["reward"],
        "reward": after["reward"],
        "reward_start": before["reward"],
        "perplexity": after["perplexity"],
        "perplexity_start": before["perplexity"],
        "distinct_2": after["distinct_2"],
        "distinct_2_start": before["distinct_2"],
    }
    lines = [
        json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines() if '"eval/' not in line
    ]
    per_step, spent, curve = options.num_prompts * options.num_generations, 0.0, []
    for i, line in enumerate(lines):
        spent += line["seconds/rollout"] + line["seconds/reward"] + line["seconds/update"]
        curve.append(((i + 1) * per_step, spent, line["reward"]))
    return Outcome(metrics, len(lines) * per_step, seconds, curve)


def _learning(net: str, how: str, kind: str, seed: int, model: Path, folder: Path) -> RLOptions:
    common: dict[str, Any] = {
        "model": str(model),
        "task": f"{Path(__file__).resolve()}:Continuations:folder={base()}",
        "reward": (f"likelihood:path={base() / 'frozen'},dtype=float32", f"task@{REPETITION:g}"),
        "output_dir": str(folder),
        "seed": seed,
        "dtype": "float32",
        "num_train_prompts": 500,
        "num_prompts": 24,
        "num_generations": 2,
        "max_completion_length": TOKENS,
        "max_steps": STEPS[net],
        "learning_rate": (2 if how == "gae" else 1) * (1e-3 if kind == "random" else 5e-4),
        "entropy_coef": 0.02,
        "lr_scheduler_type": "constant",
        "eval_every": 10,
        "eval_samples": 64,
        "eval_temperature": 1.0,
        "save_every": 10_000,
        "lam": 0.95,
        "vf_coef": 0.1,
    }
    if how == "ppo":
        return PPOOptions(**common, num_epochs=3)
    return ReinforceOptions(**common, baseline="learned", whiten_advantages=True)


def measured(model: Path, options: RLOptions, seed: int) -> dict[str, float]:
    """Reward and distinct word pairs of sampled continuations of the validation prompts; held-out perplexity."""
    torch.manual_seed(seed)
    policy = load_policy(PPOOptions(model=str(model), dtype="float32"))
    prompts = Continuations(str(base())).prompts("eval", 64, seed=0)
    engine = make_engine(policy, sequences=64, longest=64)
    surroundings = Surroundings(tokenizer=policy.tokenizer, device=device_of_machine(), policy_folder=policy.folder)
    params = SamplingParams(max_tokens=TOKENS, temperature=1.0, seed=1000 + seed)
    with make_scorer(load_task(options.task), options.reward, surroundings=surroundings) as judge, torch.no_grad():
        groups, _ = collect(engine, policy.tokenizer, judge, prompts, params)
    rewards = [r.reward.value for g in groups for r in g.rollouts if r.reward.value is not None]
    texts = [policy.tokenizer.decode(r.tokens, skip_special_tokens=True) for g in groups for r in g.rollouts]
    return {
        "reward": sum(rewards) / len(rewards),
        "distinct_2": distinct_n(texts, 2),
        "perplexity": _perplexity(policy),
    }


def _perplexity(policy: Policy) -> float:
    options = _options("lstm", base(), "unused")
    found = Pretrain(options, policy, causal_texts(options, policy.tokenizer)).evaluate(0)
    assert found is not None
    return found.value

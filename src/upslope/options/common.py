"""What every training verb shares, and what every verb that samples shares."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from upslope.config import OBJECT
from upslope.errors import ConfigError

Dtype = Literal["auto", "float32", "bfloat16"]
if TYPE_CHECKING:
    Named = Any
else:
    Named = str  # a name; in Python also the task or reward itself


def check(options: Any, **bounds: tuple[float | None, float | None]) -> None:
    """Raise ConfigError for a folder that no line can name, and the first option outside its bounds (None: none)."""
    if re.search("[\x00-\x1f\x7f\ud800-\udfff]", folder := str(getattr(options, "output_dir", None) or "")):
        raise ConfigError(f"output_dir is {folder!r}: a control character, or not UTF-8; choose another name")
    for name, (low, high) in bounds.items():
        value = getattr(options, name)
        if value is None:
            continue
        if not math.isfinite(value) or (low is not None and value < low) or (high is not None and value > high):
            wanted = f"at least {low:g}" if high is None else f"between {low:g} and {high:g}"
            raise ConfigError(f"{name} is {value}; it must be {wanted}")


def refuse_dropout(options: Any, remedy: str) -> None:
    """Raise ConfigError for dropout in a network that must be the one that sampled."""
    if options.lora_dropout:
        raise ConfigError(
            f"lora_dropout is {options.lora_dropout:g}, but what is sampled here is trained on by the policy that "
            f"sampled it, and a network with dropout is another one: {remedy}"
        )


COLUMNS = ("prompt", "completion", "chosen", "rejected", "label", "text", "messages", "tools")


def column_names(columns: Sequence[str]) -> dict[str, str]:
    """{name of a record's part: the data's column} of name=column words. ConfigError for others."""
    found: dict[str, str] = {}
    for word in columns:
        name, _, column = word.partition("=")
        if name not in COLUMNS or not column or name in found or column in found.values():
            raise ConfigError(
                f"columns: {word!r} is not NAME=COLUMN, each name and column once, of {', '.join(COLUMNS)}"
            )
        found[name] = column
    return found


@dataclass(frozen=True, kw_only=True)
class ColumnOptions:
    """What verbs that read rows share."""

    columns: tuple[str, ...] = ()
    """What the rows' own columns are, as in prompt=question completion=answer; left out: those names themselves."""


@dataclass(frozen=True, kw_only=True)
class LaunchOptions:
    """What every launch of a training verb is told: the model, the run folder, how it is taken up."""

    model: str = "smollm2-135m"
    """Where training starts: a folder, a hub id, a .gguf file, or the alias smollm2-135m."""
    output_dir: str | None = None
    """The run folder. Left out: a new folder under runs/."""
    resume: bool = False
    """Continue the run in --output-dir from its last checkpoint, bit for bit."""
    allow_changed_data: bool = False
    """With --resume, this once: go on although rows, template, tokenizer, task, rewards or models have changed."""
    dry_run: bool = False
    """Check data, tokenizer, shapes and rewards, show one example, predict memory and time, then stop."""
    json: bool = False
    """Print the summary as one JSON object on standard output."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, Path):
                object.__setattr__(self, name, str(value))

    def validate(self) -> None:
        """Raise ConfigError for a run that is to be taken up and is not named, and for the name of an object."""
        if self.resume and self.output_dir is None:
            raise ConfigError("resume needs output_dir: name the run folder to continue")
        if self.allow_changed_data and not self.resume:
            raise ConfigError("allow_changed_data goes with resume: a new run takes the data as they are")
        for name in ("task", "reward"):
            value = getattr(self, name, None)
            for item in value if isinstance(value, list | tuple) else (value,):
                if isinstance(item, str) and item.startswith(OBJECT):
                    raise ConfigError(
                        f"{name} = {item} is an object of the Python program that began the run: call the recipe there "
                        "with it; a file or the command line cannot make it"
                    )


@dataclass(frozen=True, kw_only=True)
class RunOptions(LaunchOptions):
    """What every training verb shares: the optimizer, the budget, when it looks and saves."""

    seed: int = 0
    """Of data order, sampling and initial values; the same seed repeats the run bit for bit."""
    dtype: Dtype = "auto"
    """Compute dtype; auto is bfloat16 where this processor is faster in it. Master weights are float32."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    lora_rank: int = 0
    """Train adapters of this rank instead of all weights; 0 trains all."""
    lora_alpha: float | None = None
    """Scale of the adapters; left out: twice the rank."""
    lora_dropout: float = 0.0
    """Share of what the adapters read that is dropped in training, by seed, step, layer and text."""
    lora_target_modules: tuple[str, ...] = ()
    """Names of the linear layers that get adapters, as in q_proj v_proj, or all-linear; left out: the usual ones."""
    learning_rate: float = 1e-5
    """Peak learning rate of AdamW."""
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "linear"
    """Shape of the learning rate after the warm-up, over max_steps."""
    warmup_steps: int = 0
    """Optimizer steps over which the learning rate rises from 0."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay; norms and biases are exempt."""
    max_grad_norm: float = 1.0
    """Global gradient norm above which the whole gradient is scaled down."""
    micro_batch_tokens: int = 2048
    """Packed tokens per forward and backward pass; changes memory and speed, not the gradient."""
    max_steps: int = 100
    """Stop after this many steps."""
    max_tokens: int | None = None
    """Stop after this many trained tokens."""
    max_seconds: float | None = None
    """Stop after this many seconds of training."""
    target: float | None = None
    """Stop when the held-out measure reaches this value."""
    patience: int | None = None
    """Stop when this many evaluations in a row brought no improvement."""
    eval_every: int = 10
    """Steps between held-out evaluations; 0 evaluates only at the end."""
    eval_samples: int = 200
    """Held-out problems (or rows) per evaluation."""
    save_every: int = 50
    """Steps between checkpoints; the last step always saves."""
    keep_last: int = 2
    """Checkpoints kept besides the best one."""

    def validate(self) -> None:
        """Raise ConfigError for a value out of range."""
        check(
            self,
            lora_rank=(0, None),
            lora_dropout=(0, 0.99),
            learning_rate=(0, None),
            warmup_steps=(0, None),
            weight_decay=(0, None),
            max_grad_norm=(0, None),
            micro_batch_tokens=(1, None),
            max_steps=(0, None),
            max_tokens=(1, None),
            max_seconds=(0, None),
            patience=(1, None),
            eval_every=(0, None),
            eval_samples=(0, None),
            save_every=(1, None),
            keep_last=(1, None),
        )
        LaunchOptions.validate(self)
        for name in ("lora_alpha", "lora_dropout", "lora_target_modules"):
            if not self.lora_rank and getattr(self, name) not in (None, 0.0, ()):
                raise ConfigError(f"{name} is about adapters: give lora_rank, too, or leave it out")

    @property
    def adapters(self) -> dict[str, Any]:
        """What the adapters are to be, as models.lora.add_adapters takes it."""
        alpha = self.lora_alpha if self.lora_alpha is not None else 2 * self.lora_rank
        targets = [name for word in self.lora_target_modules for name in word.split(",")]
        more = {"targets": targets, "dropout": self.lora_dropout, "seed": self.seed}
        return {"rank": self.lora_rank, "alpha": alpha, **more}


@dataclass(frozen=True, kw_only=True)
class RLOptions(RunOptions):
    """What every recipe that samples shares: the task, the rewards, the sampling."""

    task: Named = "chain_sum:min_terms=2,max_terms=2,min_digits=1,max_digits=2"
    """Name of a task with parameters, or a file: chain_sum:min_terms=2, gsm8k:path=x.jsonl, my_task.py:MyTask."""
    reward: tuple[Named, ...] = ()
    """Rewards instead of the task's own: names or my_rewards.py:fn, each with a weight (length:target=20@0.5)."""
    reward_workers: int = 0
    """Processes that compute rewards; 0 computes them in this process where they are safe, else in one worker."""
    reward_timeout: float = 10.0
    """Seconds after which one reward call is killed and counted as an error."""
    num_train_prompts: int = 2000
    """Different problems drawn from the task; the order begins anew, reshuffled, after each pass."""
    num_prompts: int = 32
    """Prompts per step (P)."""
    num_generations: int = 4
    """Completions per prompt (G)."""
    max_completion_length: int = 32
    """Longest completion in tokens."""
    temperature: float = 1.0
    """Sampling temperature, in the rollout and in the loss."""
    top_k: int = 0
    """Sample from the k likeliest tokens; 0 is off. Needs --rollout-correction."""
    top_p: float = 1.0
    """Sample from the smallest set with this probability; 1 is off. Needs --rollout-correction."""
    min_p: float = 0.0
    """Drop tokens below this share of the likeliest one; 0 is off. Needs --rollout-correction."""
    rollout_correction: Literal["auto", "none", "token", "sequence", "geometric"] = "auto"
    """Importance weights between trainer and sampler, capped; auto: token where the two differ in a bit, else none."""
    rollout_correction_cap: float = 2.0
    """Largest importance weight."""
    rollout_lag: int = 0
    """Train on rollouts sampled this many steps ago, as asynchronous sampling does; 0 is on-policy."""
    activations_gb: float | None = None
    """GB of activations the update may take over from sampling; left out: a third of what is free; 0: none."""
    truncated: Literal["terminate", "bootstrap", "mask"] = "terminate"
    """A completion cut by its budget: ends there, bootstraps from the critic, or is left out of the loss."""
    missing_eos_penalty: float = 0.0
    """Subtracted from the reward of a completion that did not end by itself."""
    overlong_buffer: int = 0
    """Last tokens of the budget over which a penalty grows from 0 to 1 (DAPO); 0 is off."""
    eval_temperature: float = 0.0
    """Temperature of held-out evaluation; 0 is greedy."""

    @property
    def on_policy(self) -> bool:
        """Whether the gradient is that of the policy that sampled."""
        return True

    @property
    def filtered(self) -> bool:
        """Whether what is sampled from is not the policy's own distribution."""
        return bool(self.top_k or self.top_p < 1 or self.min_p > 0)

    def validate(self) -> None:
        """Raise ConfigError for a value out of range or a sampling filter without its correction."""
        RunOptions.validate(self)
        if self.on_policy:
            refuse_dropout(self, "use sft, dpo or expert for it, or leave it out")
        check(
            self,
            reward_workers=(0, None),
            reward_timeout=(0.01, None),
            num_train_prompts=(1, None),
            num_prompts=(1, None),
            num_generations=(1, None),
            max_completion_length=(1, None),
            temperature=(1e-3, 100),
            top_k=(0, None),
            top_p=(1e-6, 1),
            min_p=(0, 1),
            rollout_correction_cap=(1, None),
            rollout_lag=(0, None),
            activations_gb=(0, None),
            missing_eos_penalty=(0, None),
            overlong_buffer=(0, self.max_completion_length),
            eval_temperature=(0, 100),
        )
        if self.filtered and self.rollout_correction in ("auto", "none"):
            raise ConfigError(
                "top_k, top_p or min_p makes the sampled distribution another than the policy's: "
                "name the correction (rollout_correction = token, sequence or geometric) or switch the filter off"
            )

"""What every training verb shares, and what every verb that samples shares.

A class is a heading of `--help`: its docstring's first line, over the options that it is the first to have.
"""

import functools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, dataclass_transform

from upslope.config import OBJECT, PLUGINS, hints_of, metadata_of, names_of, option
from upslope.errors import ConfigError

Dtype = Literal["auto", "float32", "bfloat16"]
if TYPE_CHECKING:
    Named = Any
else:
    Named = str  # a name; in Python also the task, the reward or the function itself


@dataclass_transform(frozen_default=True, kw_only_default=True)
@dataclass(frozen=True, kw_only=True)
class Options:
    """What the options of every verb can do; every class made from it is a frozen dataclass with keywords only."""

    FIRST = ""
    """The options that `--help` shows first."""

    def __init_subclass__(cls) -> None:
        dataclass(frozen=True, kw_only=True)(cls)
        init, names = cls.__init__, names_of(cls)

        @functools.wraps(init)
        def spelled(self: Any, **given: Any) -> None:
            for key in given:
                if names.get(key, key) != key and names[key] in given:
                    raise ConfigError(f"{key} is given twice, also as {names[key]}")
            init(self, **{names.get(key, key): value for key, value in given.items()})

        cls.__init__ = spelled

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, Path):
                object.__setattr__(self, name, str(value))

    def validate(self) -> None:
        """Raise ConfigError for a folder that no line can name, for what `option` says of the fields, and for what a
        class that this one is made of refuses in its `_check`, the nearest first."""
        if re.search("[\x00-\x1f\x7f\ud800-\udfff]", folder := str(getattr(self, "output_dir", None) or "")):
            raise ConfigError(f"output_dir is {folder!r}: a control character, or not UTF-8; choose another name")
        said = {name: metadata_of(type(self), name) for name in hints_of(type(self))}
        for name in said:
            self.within(name, *said[name].get("bounds", ()))
        for name in filter(self.changed, said):
            other, _, values = said[name].get("needs", "").partition("=")
            now = getattr(self, other, None)
            if values and now not in values.split(","):
                wanted = values.replace(",", " or ")
                raise ConfigError(f"{name} belongs to {other} = {wanted}, not {now}: leave it out")
            if other and not values and not now:
                raise ConfigError(f"{name} goes with {other}: give {other}, too, or leave {name} out")
        for kind in type(self).__mro__:
            vars(kind).get("_check", lambda _: None)(self)

    def within(self, name: str, low: float | None = None, high: float = math.inf) -> None:
        """Raise ConfigError for a number outside its bounds (None: there are none), or one that is not finite."""
        value = getattr(self, name)
        if low is None or not isinstance(value, int | float):
            return
        if not low <= value <= high or abs(value) == math.inf:
            wanted = f"at least {low:g}" if high == math.inf else f"between {low:g} and {high:g}"
            raise ConfigError(f"{name} is {value}; it must be {'finite' if low == -math.inf else wanted}")

    def changed(self, name: str) -> bool:
        """Whether an option is not its default."""
        value = getattr(self, name)
        return (tuple(value) if isinstance(value, list) else value) != type(self).__dataclass_fields__[name].default


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


class ColumnOptions(Options):
    """Data."""

    columns: tuple[str, ...] = ()
    """What the rows' own columns are, as in prompt=question completion=answer; default: those names themselves."""

    def _check(self) -> None:
        column_names(self.columns)


class RowOptions(ColumnOptions):
    """Data."""

    columns: tuple[str, ...] = option((), needs="data")
    data: str | None = None
    """Training rows: a .jsonl/.csv/.parquet/.txt file or a hub id. Give this or --task."""
    eval_data: str | None = None
    """Held-out rows in the same forms; default with --data: the last tenth of the data."""
    max_length: int = option(1024, 2)
    """Longest sequence in tokens; longer rows, and those beyond the context, are dropped and counted."""


class RowOrTaskOptions(RowOptions):
    """Data."""

    task: Named | None = None
    """Train on the demonstrations of a task, and measure its accuracy on held-out problems."""

    def _check(self) -> None:
        if (self.data is None) == (self.task is None):
            raise ConfigError("give exactly one of --data and --task")


class BatchOptions(Options):
    """Optimizer."""

    batch_size: int = option(16, 1)
    """Rows (pretrain: windows; seq2seq by minimum risk: sources) per optimizer step."""
    num_epochs: float | None = option(None, 0)
    """Passes over the data; when given it sets max_steps."""


class DtypeOptions(Options):
    """Model."""

    dtype: Dtype = "auto"
    """Compute dtype; auto is bfloat16 where this processor is faster in it."""


class JsonOptions(Options):
    """Launch."""

    json: bool = False
    """Print what comes out as one JSON object on standard output."""


class FolderOptions(JsonOptions):
    """Launch."""

    output_dir: str | None = None
    """The folder of what is run; default: a new folder under runs/."""
    resume: bool = option(False, needs="output_dir")
    """Continue what is in --output-dir: a run from its last checkpoint, bit for bit; a comparison with what is left."""


class LaunchOptions(FolderOptions):
    """Launch."""

    allow_changed_data: bool = option(False, needs="resume")
    """With --resume, this once: go on although rows, template, tokenizer, task, rewards or models have changed."""
    dry_run: bool = False
    """Check data, tokenizer, shapes and rewards, show one example, predict memory and time, then stop."""

    def _check(self) -> None:
        for name in PLUGINS:
            value = getattr(self, name, None)
            for item in value if isinstance(value, list | tuple) else (value,):
                if isinstance(item, str) and item.startswith(OBJECT):
                    raise ConfigError(
                        f"{name} = {item} is an object of the Python program that began the run: call the recipe there "
                        "with it; a file or the command line cannot make it"
                    )


class OptimizerOptions(Options):
    """Optimizer."""

    learning_rate: float = option(1e-5, 0)
    """Peak learning rate of AdamW; whatever the compute dtype, the weights it moves are float32."""
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "linear"
    """Shape of the learning rate after the warm-up, over max_steps."""
    warmup_steps: int = option(0, 0)
    """Optimizer steps over which the learning rate rises from 0."""
    weight_decay: float = option(0.0, 0)
    """AdamW's decoupled weight decay; norms and biases are exempt."""
    max_grad_norm: float = option(1.0, 0)
    """Global gradient norm above which the whole gradient is scaled down."""
    micro_batch_tokens: int = option(2048, 1)
    """Packed tokens per forward and backward pass; changes memory and speed, not the gradient."""


class StopOptions(Options):
    """Stopping, measuring and saving."""

    max_steps: int = option(100, 0)
    """Stop after this many steps."""
    max_tokens: int | None = option(None, 1)
    """Stop after this many trained tokens."""
    max_seconds: float | None = option(None, 0)
    """Stop after this many seconds of training."""
    target: float | None = None
    """Stop when the held-out measure reaches this value."""
    patience: int | None = option(None, 1)
    """Stop when this many evaluations in a row brought no improvement."""
    eval_every: int = option(10, 0)
    """Steps between held-out evaluations; 0 evaluates only at the end."""
    eval_samples: int = option(200, 0)
    """Held-out problems (or rows) per evaluation."""
    save_every: int = option(50, 1)
    """Steps between checkpoints; the last step always saves."""
    keep_last: int = option(2, 1)
    """Checkpoints kept besides the best one."""


class RunOptions(OptimizerOptions, StopOptions, DtypeOptions, LaunchOptions):
    """Model."""

    model: str = "smollm2-135m"
    """Where training starts: a folder, a hub id, a .gguf file, or the alias smollm2-135m."""
    seed: int = 0
    """Of data order, sampling and initial values; the same seed repeats the run bit for bit."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    lora_rank: int = option(0, 0)
    """Train adapters of this rank instead of all weights; 0 trains all."""
    lora_alpha: float | None = option(None, needs="lora_rank")
    """Scale of the adapters; default: twice the rank."""
    lora_dropout: float = option(0.0, 0, 0.99, needs="lora_rank")
    """Share of what the adapters read that is dropped in training, by seed, step, layer and text."""
    lora_target_modules: tuple[str, ...] = option((), needs="lora_rank")
    """Names of the linear layers that get adapters, as in q_proj v_proj, or all-linear; default: the usual ones."""

    def refuse_dropout(self, remedy: str) -> None:
        """Raise ConfigError for dropout in a network that must be the one that sampled."""
        if self.lora_dropout:
            raise ConfigError(
                f"lora_dropout is {self.lora_dropout:g}, but what is sampled here is trained on by the policy that "
                f"sampled it, and a network with dropout is another one: {remedy}"
            )

    @property
    def adapters(self) -> dict[str, Any]:
        """What the adapters are to be, as models.lora.add_adapters takes it."""
        alpha = self.lora_alpha if self.lora_alpha is not None else 2 * self.lora_rank
        targets = [name for word in self.lora_target_modules for name in word.split(",")]
        return dict(rank=self.lora_rank, alpha=alpha, targets=targets, dropout=self.lora_dropout, seed=self.seed)


class RewardedOptions(Options):
    """Task and reward."""

    task: Named = "chain_sum:min_terms=2,max_terms=2,min_digits=1,max_digits=2"
    """Name of a task with parameters, or a file: chain_sum:min_terms=2, gsm8k:path=x.jsonl, my_task.py:MyTask."""
    reward: tuple[Named, ...] = ()
    """Rewards instead of the task's own: names or my_rewards.py:fn, each with a weight (length:target=20@0.5)."""
    reward_workers: int = option(0, 0)
    """Processes that compute rewards; 0 computes them in this process where they are safe, else in one worker."""
    reward_timeout: float = option(10.0, 0.01)
    """Seconds after which one reward call is killed and counted as an error."""
    missing_eos_penalty: float = option(0.0, 0)
    """Subtracted from the reward of a completion that did not end by itself."""
    overlong_buffer: int = option(0, 0)
    """Last tokens of the budget over which a penalty grows from 0 to 1 (DAPO); 0 is off."""


class FilterOptions(Options):
    """Sampling."""

    top_k: int = option(0, 0)
    """Sample from the k likeliest tokens; 0 is off."""
    top_p: float = option(1.0, 1e-6, 1)
    """Sample from the smallest set of tokens with this probability; 1 is off."""
    min_p: float = option(0.0, 0, 1)
    """Drop tokens below this share of the likeliest one; 0 is off."""


class SampledOptions(RunOptions):
    """Sampling."""

    num_train_prompts: int = option(2000, 1)
    """Different problems drawn from the task; the order begins anew, reshuffled, after each pass."""
    num_prompts: int = option(32, 1)
    """Prompts per step (P)."""
    num_generations: int = option(4, 1)
    """Completions per prompt (G)."""
    max_completion_length: int = option(32, 1)
    """Longest completion in tokens."""
    temperature: float = option(1.0, 1e-3, 100)
    """Sampling temperature, in the rollout and in the loss."""


class RLOptions(RewardedOptions, SampledOptions, FilterOptions):
    """Sampling."""

    FIRST = "task model reward learning_rate num_prompts num_generations max_completion_length max_steps output_dir"
    on_policy = True
    """Whether the gradient is that of the policy that sampled."""

    rollout_correction: Literal["auto", "none", "token", "sequence", "geometric"] = "auto"
    """Importance weights between trainer and sampler, capped; auto: token where the two differ in a bit, else none.
    With top_k, top_p or min_p it must be named."""
    rollout_correction_cap: float = option(2.0, 1)
    """Largest importance weight."""
    rollout_lag: int = option(0, 0)
    """Train on rollouts sampled this many steps ago, as asynchronous sampling does; 0 is on-policy."""
    activations_gb: float | None = option(None, 0)
    """GB of activations the update may take over from sampling, 0: none; default: a third of what is free."""
    truncated: Literal["terminate", "bootstrap", "mask"] = "terminate"
    """A completion cut by its budget: ends there, bootstraps from the critic, or is left out of the loss."""
    eval_temperature: float = option(0.0, 0, 100)
    """Temperature of held-out evaluation; 0 is greedy."""

    @property
    def filtered(self) -> bool:
        """Whether what is sampled from is not the policy's own distribution."""
        return bool(self.top_k or self.top_p < 1 or self.min_p > 0)

    def _check(self) -> None:
        self.within("overlong_buffer", 0, self.max_completion_length)
        if self.on_policy:
            self.refuse_dropout("use sft, dpo or expert for it, or leave it out")
        if self.on_policy and self.filtered and self.rollout_correction in ("auto", "none"):
            raise ConfigError(
                "top_k, top_p or min_p makes the sampled distribution another than the policy's: "
                "name the correction (rollout_correction = token, sequence or geometric) or switch the filter off"
            )

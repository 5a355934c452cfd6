"""Options of on-policy distillation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from upslope.errors import ConfigError
from upslope.options.common import Named, RunOptions, check, column_names, refuse_dropout


@dataclass(frozen=True, kw_only=True)
class DistillOptions(RunOptions):
    """On-policy distillation: the student writes, the teacher grades every token's distribution (GKD, MiniLLM)."""

    teacher: str | None = None
    """The model to learn from, with the student's vocabulary: a folder, a hub id, a .gguf file or an alias."""
    task: Named | None = None
    """Prompts (and demonstrations) of a task, which also measures accuracy. Give this or --data."""
    data: str | None = None
    """Rows with prompts, or prompts and completions: a .jsonl/.csv/.parquet/.txt file or a hub id."""
    eval_data: str | None = None
    """Held-out rows in the same forms; left out with --data: the last tenth of the data."""
    columns: tuple[str, ...] = ()
    """What the rows' own columns are, as in prompt=question completion=answer; left out: those names themselves."""
    divergence: Literal["forward", "reverse", "jsd"] = "reverse"
    """Per token: forward KL(teacher || student), reverse KL(student || teacher), or their generalised JSD."""
    jsd_weight: float = 0.5
    """The teacher's share in the mixture of jsd; near 0 it is forward KL, near 1 reverse KL."""
    on_policy_fraction: float = 1.0
    """Share of each step's prompts that the student answers (GKD's lambda); the others take the data's completions."""
    temperature: float = 1.0
    """Of the student's sampling, and of both distributions in the divergence."""
    num_train_prompts: int = 2000
    """Different problems drawn from --task; the order begins anew, reshuffled, after each pass."""
    num_prompts: int = 32
    """Prompts per step."""
    num_generations: int = 1
    """Completions the student samples of each prompt it answers."""
    max_completion_length: int = 32
    """Longest sampled completion in tokens."""
    max_length: int = 1024
    """Longest row of the data in tokens; longer rows, and those beyond the context, are dropped and counted."""

    def validate(self) -> None:
        """Raise ConfigError for a value out of range or a missing teacher."""
        RunOptions.validate(self)
        check(
            self,
            on_policy_fraction=(0, 1),
            temperature=(1e-3, 100),
            num_train_prompts=(1, None),
            num_prompts=(1, None),
            num_generations=(1, None),
            max_completion_length=(1, None),
            max_length=(2, None),
        )
        if self.on_policy_fraction:
            refuse_dropout(self, "set on_policy_fraction to 0, which learns from the data alone, or leave it out")
        if self.teacher is None:
            raise ConfigError("name the teacher: --teacher FOLDER, a model with the student's vocabulary")
        if (self.data is None) == (self.task is None):
            raise ConfigError("give exactly one of --data and --task")
        column_names(self.columns)
        if self.eval_data is not None and self.data is None:
            raise ConfigError("eval_data goes with data; a task has held-out problems of its own")
        if self.columns and self.data is None:
            raise ConfigError("columns is about the rows of data: leave it out with task")
        if not 0 < self.jsd_weight < 1:
            raise ConfigError(f"jsd_weight is {self.jsd_weight}; it must lie between 0 and 1, both excluded")
        if self.jsd_weight != 0.5 and self.divergence != "jsd":
            raise ConfigError(f"jsd_weight belongs to divergence = jsd, not {self.divergence}")

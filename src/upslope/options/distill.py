"""Options of on-policy distillation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from upslope.config import option
from upslope.errors import ConfigError
from upslope.options.common import Named, RowOrTaskOptions, SampledOptions


@dataclass(frozen=True, kw_only=True)
class DistillOptions(SampledOptions, RowOrTaskOptions):
    """On-policy distillation: the student writes, the teacher grades every token's distribution (GKD, MiniLLM)."""

    FIRST = (
        "teacher task data model divergence learning_rate num_prompts max_completion_length max_steps lora_rank "
        "output_dir"
    )

    teacher: str | None = None
    """The model to learn from, with the student's vocabulary: a folder, a hub id, a .gguf file or an alias."""
    task: Named | None = None
    """Prompts (and demonstrations) of a task, which also measures accuracy. Give this or --data."""
    data: str | None = None
    """Rows with prompts, or prompts and completions: a .jsonl/.csv/.parquet/.txt file or a hub id."""
    divergence: Literal["forward", "reverse", "jsd"] = "reverse"
    """Per token: forward KL(teacher || student), reverse KL(student || teacher), or their generalised JSD."""
    jsd_weight: float = 0.5
    """The teacher's share in the mixture of jsd; near 0 it is forward KL, near 1 reverse KL."""
    on_policy_fraction: float = option(1.0, 0, 1)
    """Share of each step's prompts that the student answers (GKD's lambda); the others take the data's completions."""
    temperature: float = 1.0
    """Of the student's sampling, and of both distributions in the divergence."""
    num_generations: int = 1
    """Completions the student samples of each prompt it answers."""

    def validate(self) -> None:
        """Raise ConfigError for a value out of range or a missing teacher."""
        super().validate()
        if self.on_policy_fraction:
            self.refuse_dropout("set on_policy_fraction to 0, which learns from the data alone, or leave it out")
        if self.teacher is None:
            raise ConfigError("name the teacher: --teacher FOLDER, a model with the student's vocabulary")
        if self.eval_data is not None and self.data is None:
            raise ConfigError("eval_data goes with data; a task has held-out problems of its own")
        if not 0 < self.jsd_weight < 1:
            raise ConfigError(f"jsd_weight is {self.jsd_weight}; it must lie between 0 and 1, both excluded")
        if self.jsd_weight != 0.5 and self.divergence != "jsd":
            raise ConfigError(f"jsd_weight belongs to divergence = jsd, not {self.divergence}")

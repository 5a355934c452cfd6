"""Options of the verbs that train nothing by themselves."""

import math
from typing import Literal

from upslope.config import option
from upslope.errors import ConfigError
from upslope.options.common import FolderOptions, JsonOptions


class DemoOptions(JsonOptions):
    """Base model, then supervised learning, then PPO on one verifiable task, with held-out accuracy of each."""

    output_dir: str | None = None
    """Folder of the demo; default: a new folder under runs/."""
    model: str = "smollm2-135m"
    """Where the demo starts."""
    task: str = (
        "chain_sum:min_terms=2,max_terms=2,min_digits=1,max_digits=2,ask={expression} =,system=Calculate.,instruction="
    )
    """A task with demonstrations and a verdict."""
    eval_samples: int = option(512, 1)
    """Held-out problems on which every stage is measured (at least 500 for the intervals to mean something)."""
    sft_steps: int = option(12, 1)
    """Supervised steps of 16 demonstrations."""
    ppo_steps: int = option(28, 1)
    """PPO steps."""
    seed: int = 0
    """Of everything."""


class FetchOptions(JsonOptions):
    """Bring a model into the cache."""

    model: str = "smollm2-135m"
    """A hub id, a .gguf file, or the alias smollm2-135m."""


class DoctorOptions(JsonOptions):
    """What this machine has, what would run on it, and whether the numbers hold here."""

    numerics: bool = False
    """Run the product's own checks: gradients, GAE, invariances, sampler against trainer, resume."""


class ExplainOptions(JsonOptions):
    """Say in words what a configuration would do: batch arithmetic, passes, what is loaded."""

    verb: str = "ppo"
    """Which training verb the configuration is for."""
    config: str | None = None
    """Its TOML file; default: none, the options as they are."""


class RunsOptions(JsonOptions):
    """List runs, or show one."""

    folder: str = "runs"
    """A folder of runs, or one run."""


class CompareOptions(FolderOptions):
    """Run recipes from the same weights on the same budget with several seeds, and write one report."""

    FIRST = "configs max_seconds max_tokens seeds model task output_dir"

    configs: tuple[str, ...] = ()
    """Two or more TOML files called VERB_name.toml, as in `upslope compare sft_a.toml ppo_b.toml`."""
    seeds: int = option(5, 1)
    """Runs per recipe, with seeds counted up from --seed."""
    seed: int = 0
    """The first seed."""
    max_seconds: float | None = option(None, 0)
    """Training seconds that every run may spend. Give this or --max-tokens."""
    max_tokens: int | None = option(None, 1)
    """Trained tokens that every run may spend."""
    model: str | None = None
    """Start weights of all recipes; default: the files must agree on theirs."""
    task: str | None = None
    """Task of all recipes; default: the files must agree on theirs."""
    eval_samples: int = option(200, 1)
    """Held-out problems on which every run is measured at its end."""
    samples_shown: int = option(12, 0)
    """Held-out problems whose replies stand side by side in the report."""

    def _check(self) -> None:
        if len(self.configs) < 2:
            raise ConfigError("compare needs two or more configurations: upslope compare sft_a.toml ppo_b.toml")
        if (self.max_seconds is None) == (self.max_tokens is None):
            raise ConfigError("give exactly one of max_seconds and max_tokens: the budget that all runs share")


class ExportOptions(JsonOptions):
    """Write a model for use elsewhere: adapters merged, cast, in shards, with a model card; or as GGUF."""

    FIRST = "model output format dtype verify"

    model: str = ""
    """What to export: a run folder, a checkpoint, a model folder, adapters, a hub id or a .gguf file."""
    output: str | None = option(None, also="output_dir")
    """The new folder, or the new .gguf file."""
    format: Literal["hf", "gguf"] = "hf"
    """hf: a folder that transformers and vLLM load; gguf: one file for llama.cpp."""
    dtype: Literal["float32", "bfloat16", "float16", "q8_0"] = "bfloat16"
    """Number type of the written weights; q8_0 (8 bits in blocks of 32) only in a gguf."""
    base: str | None = None
    """The model that adapters belong to, where their own folder or run does not say it."""
    max_shard_gb: float = 5.0
    """Largest weight file of a folder, in gigabytes (10^9 bytes)."""
    pre_tokenizer: str | None = option(None, needs="format=gguf")
    """gguf: llama.cpp's name of the way the tokenizer cuts text, where it is not recognised."""
    name: str | None = None
    """The model's name in its card; default: that of the output."""
    license: str | None = None
    """The model's licence in its card, such as apache-2.0; default: the base model's, where its folder says it."""
    verify: bool = False
    """Load what was written with the program it is for and compare; beyond the bound nothing is written."""
    overwrite: bool = False
    """Replace an output that exists."""

    def _check(self) -> None:
        if not self.model:
            raise ConfigError("model is missing: name what to export, as in upslope export runs/a --output DIR")
        if self.output is None:
            raise ConfigError("output is missing: name the folder (or .gguf file) to write, as in --output DIR")
        if self.format == "gguf" and not self.output.endswith(".gguf"):
            raise ConfigError(f"output is {self.output!r}; the name of a GGUF file ends in .gguf")
        if self.format == "hf" and self.output.endswith(".gguf"):
            raise ConfigError(f"output is {self.output!r}; to write a GGUF file say --format gguf")
        if self.format == "hf" and self.dtype == "q8_0":
            raise ConfigError("dtype q8_0 is for --format gguf; a folder takes float32, bfloat16 or float16")
        if not (math.isfinite(self.max_shard_gb) and self.max_shard_gb > 0):
            raise ConfigError(f"max_shard_gb is {self.max_shard_gb}; it must be above 0")

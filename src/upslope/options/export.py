"""Options of `upslope export`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from upslope.config import option
from upslope.errors import ConfigError
from upslope.options.common import JsonOptions


@dataclass(frozen=True, kw_only=True)
class ExportOptions(JsonOptions):
    """Write a model for use elsewhere: adapters merged, cast, in shards, with a model card; or as GGUF."""

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
    pre_tokenizer: str | None = None
    """gguf: llama.cpp's name of the way the tokenizer cuts text, where it is not recognised."""
    name: str | None = None
    """The model's name in its card; default: that of the output."""
    license: str | None = None
    """The model's licence in its card, such as apache-2.0; default: the base model's, where its folder says it."""
    verify: bool = False
    """Load what was written with the program it is for and compare; beyond the bound nothing is written."""
    overwrite: bool = False
    """Replace an output that exists."""

    def validate(self) -> None:
        """Raise ConfigError for a combination that cannot be written."""
        super().validate()
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
        if self.format == "hf" and self.pre_tokenizer is not None:
            raise ConfigError("pre_tokenizer is for --format gguf; a folder has the tokenizer itself")
        if not (math.isfinite(self.max_shard_gb) and self.max_shard_gb > 0):
            raise ConfigError(f"max_shard_gb is {self.max_shard_gb}; it must be above 0")

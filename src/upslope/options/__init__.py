"""Every option of every verb, free of torch, so that --help is instant.

One frozen dataclass per verb. What all training verbs share is in RunOptions, what all verbs that sample share in
RLOptions; a recipe's own class adds what its paper has. The string under a field is its help text. Keys in a TOML
file and options on the command line are these names (on the command line with dashes).
"""

from upslope.options.common import Dtype, RLOptions, RunOptions
from upslope.options.finetune import DistillOptions, DPOOptions, ExpertOptions, RewardOptions, SFTOptions
from upslope.options.inference import ChatOptions, EvalOptions, GenerateOptions, ServeOptions
from upslope.options.policy import GRPOOptions, PPOOptions, ReinforceOptions
from upslope.options.supervised import ClassifyOptions, EncoderOptions, PretrainOptions, Seq2SeqOptions, TagOptions
from upslope.options.tools import (
    CompareOptions,
    DemoOptions,
    DoctorOptions,
    ExplainOptions,
    ExportOptions,
    FetchOptions,
    RunsOptions,
)

__all__ = [
    "ChatOptions",
    "ClassifyOptions",
    "CompareOptions",
    "DPOOptions",
    "DemoOptions",
    "DistillOptions",
    "DoctorOptions",
    "Dtype",
    "EncoderOptions",
    "EvalOptions",
    "ExpertOptions",
    "ExplainOptions",
    "ExportOptions",
    "FetchOptions",
    "GRPOOptions",
    "GenerateOptions",
    "PPOOptions",
    "PretrainOptions",
    "RLOptions",
    "ReinforceOptions",
    "RewardOptions",
    "RunOptions",
    "RunsOptions",
    "SFTOptions",
    "Seq2SeqOptions",
    "ServeOptions",
    "TagOptions",
]

"""upslope: post-training of language models, supervised and by reinforcement, from theory to practice.

The public names, loaded when first used (docs/api.md shows a whole PPO loop written with them).
"""

import importlib
from typing import Any

from upslope.version import __version__

_HOME = {
    "upslope.build": (
        "Policy",
        "ValueNetwork",
        "load_critic",
        "load_inference",
        "load_policy",
        "load_reference",
        "make_engine",
        "make_optimizer",
    ),
    "upslope.data.chat": ("encode_conversation", "encode_prompt", "load_tokenizer"),
    "upslope.data.examples": ("examples_of",),
    "upslope.data.records": ("read_records",),
    "upslope.engine.engine": ("Engine",),
    "upslope.errors": ("ConfigError", "DataError", "ModelError", "RunError", "UpslopeError"),
    "upslope.evaluation.verdicts": ("evaluate",),
    "upslope.evaluation.measurement": ("Figure",),
    "upslope.evaluation.harness": ("UpslopeLM", "run_harness"),
    "upslope.evaluation.scorer": ("Scorer",),
    "upslope.functional.advantages": ("group_centered", "group_normalized", "leave_one_out"),
    "upslope.functional.kl": ("AdaptiveKL",),
    "upslope.functional.logprobs": ("entropy", "linear_token_logprobs", "token_logprobs"),
    "upslope.functional.masking": ("masked_mean", "masked_sum", "masked_var", "whiten"),
    "upslope.functional.policy_losses": ("clipped_surrogate", "importance_weights"),
    "upslope.functional.returns": ("discounted_returns", "gae", "lambda_returns", "vtrace"),
    "upslope.functional.shaping": ("at_last_token",),
    "upslope.functional.supervised_losses": ("bradley_terry", "dpo", "nll", "value_loss"),
    "upslope.loop.objective": ("AdvantageInput", "LossInput"),
    "upslope.models.decoder.fast": ("Activations",),
    "upslope.models.attention.context": ("KVCache", "PackedContext", "PagedContext"),
    "upslope.models.decoder.network": ("Decoder", "DecoderConfig"),
    "upslope.models.encoder.network": ("Encoder", "load_encoder", "new_encoder"),
    "upslope.models.protocol": ("ScalarHead",),
    "upslope.models.files.loading": ("load_model", "save_model"),
    "upslope.models.files.sources": ("resolve",),
    "upslope.options": (
        "ClassifyOptions",
        "DPOOptions",
        "DistillOptions",
        "ExpertOptions",
        "GRPOOptions",
        "PPOOptions",
        "ReinforceOptions",
        "RewardOptions",
        "RunOptions",
        "SFTOptions",
        "Seq2SeqOptions",
        "TagOptions",
    ),
    "upslope.recipes.classify": ("classify",),
    "upslope.recipes.distill": ("distill",),
    "upslope.recipes.expert": ("expert",),
    "upslope.recipes.grpo": ("grpo",),
    "upslope.recipes.ppo": ("ppo",),
    "upslope.recipes.reinforce": ("reinforce",),
    "upslope.recipes.reward": ("reward",),
    "upslope.recipes.seq2seq": ("seq2seq",),
    "upslope.recipes.pretrain": ("pretrain",),
    "upslope.recipes.sft": ("sft",),
    "upslope.recipes.tag": ("tag",),
    "upslope.rollout": ("collect",),
    "upslope.workers.rewards": ("RewardPool", "make_scorer"),
    "upslope.runs.folder": ("Run",),
    "upslope.serving.server": ("create_app",),
    "upslope.serving.service": ("Service",),
    "upslope.tasks.base": ("Task", "chat_prompt", "load_task", "select_prompts"),
    "upslope.rewards.summands": ("load_reward",),
    "upslope.training.experience": ("Experience",),
    "upslope.training.optim": ("Group", "MasterAdamW", "decay_groups"),
    "upslope.training.step": ("Forward", "score", "update"),
    "upslope.types": ("Completion", "Message", "Prompt", "Reward", "Rollout", "RolloutGroup", "SamplingParams"),
}
_NAMES = {name: home for home, names in _HOME.items() for name in names}

__all__ = ["__version__", *sorted(_NAMES)]


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module 'upslope' has no attribute {name!r}")
    return getattr(importlib.import_module(_NAMES[name]), name)


def __dir__() -> list[str]:
    return __all__

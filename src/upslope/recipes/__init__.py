"""One file, one algorithm box. A verb is a module with a `loop.session.Recipe` of its name."""

import importlib
from typing import Any

from upslope import options as kinds
from upslope.options import RunOptions

_NAMES = ("Pretrain", "SFT", "Reinforce", "PPO", "GRPO", "Seq2Seq")
_NAMES += ("Expert", "Distill", "Reward", "DPO", "Classify", "Tag")
CLASSES: dict[str, type[RunOptions]] = {name.lower(): getattr(kinds, f"{name}Options") for name in _NAMES}
"""The options class of every training verb; configs/VERB_*.toml and `upslope explain VERB` go by it."""


def recipe_of(options: RunOptions) -> Any:
    """The `loop.session.Recipe` that takes these options; `recipe.verb` is its name."""
    verb = next(verb for verb, kind in CLASSES.items() if type(options) is kind)
    return getattr(importlib.import_module(f"upslope.recipes.{verb}"), verb)

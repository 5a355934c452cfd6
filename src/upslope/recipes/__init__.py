"""One file, one algorithm box: the training verbs, each a module with a function of its name."""

import importlib
from types import ModuleType

from upslope import options as kinds
from upslope.options import RunOptions

_NAMES = ("Pretrain", "SFT", "Reinforce", "PPO", "GRPO", "Seq2Seq")
_NAMES += ("Expert", "Distill", "Reward", "DPO", "Classify", "Tag")
CLASSES: dict[str, type[RunOptions]] = {name.lower(): getattr(kinds, f"{name}Options") for name in _NAMES}
"""The options class of every training verb; configs/VERB_*.toml and `upslope explain VERB` go by it."""


def verb_of(options: RunOptions) -> str:
    """The verb that takes these options."""
    return next(verb for verb, kind in CLASSES.items() if type(options) is kind)


def recipe_of(verb: str) -> ModuleType:
    """The verb's module: a function of the verb's name, which trains, and `make_learner`, which gives what it trains.

    `with make_learner(options) as learner` leaves the run folder alone.
    """
    return importlib.import_module(f"upslope.recipes.{verb}")

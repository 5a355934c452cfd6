"""`upslope explain`: what a configuration would do, in words. Nothing is loaded."""

from __future__ import annotations

import dataclasses
import json

from upslope import options as all_options
from upslope.config import load
from upslope.options import ExplainOptions
from upslope.recipes.plan import plan_of

_CLASSES = {"sft": all_options.SFTOptions, "ppo": all_options.PPOOptions, "grpo": all_options.GRPOOptions}


def run(options: ExplainOptions) -> int:
    """Print the plan of `--verb` with `--config`."""
    overrides = {"task": all_options.DemoOptions.task} if options.verb == "sft" and options.config is None else {}
    loaded = load(_CLASSES[options.verb], *([options.config] if options.config else []), overrides=overrides)
    plan = plan_of(loaded)
    if options.json:
        print(json.dumps(dataclasses.asdict(plan)))
    else:
        print("\n".join(f"- {line}" for line in plan.words))
    return 0

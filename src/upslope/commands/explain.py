"""`upslope explain`: what a configuration would do, in words. Nothing is loaded."""

import dataclasses
import json

from upslope.config import load
from upslope.errors import ConfigError
from upslope.options import DemoOptions, ExplainOptions
from upslope.preview.plan import plan_of
from upslope.recipes import CLASSES


def run(options: ExplainOptions) -> int:
    """Print the plan of `--verb` with `--config`."""
    if options.verb not in CLASSES:
        raise ConfigError(f"verb is {options.verb!r}; the recipes are {', '.join(CLASSES)}")
    rows = {"data": "pairs.jsonl"}
    needed = {"sft": {"task": DemoOptions.task}} | dict.fromkeys(("dpo", "reward", "classify", "tag", "seq2seq"), rows)
    needed |= {"distill": {"task": DemoOptions.task, "teacher": "teacher"}, "pretrain": {"data": ("texts/",)}}
    overrides = needed.get(options.verb, {}) if options.config is None else {}
    loaded = load(CLASSES[options.verb], *([options.config] if options.config else []), overrides=overrides)
    plan = plan_of(loaded)
    if options.json:
        print(json.dumps(dataclasses.asdict(plan)))
    else:
        print("\n".join(f"- {line}" for line in plan.words))
    return 0

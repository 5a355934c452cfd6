"""`upslope eval`: measure models, or finished answers, and show their figures side by side."""

import json
import re
import sys
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

from upslope.atomic import write_atomic
from upslope.commands.evaluate_inputs import Inputs, check_kind
from upslope.commands.evaluate_model import judge_answers, measure_language_model, measure_reward_model
from upslope.errors import located
from upslope.evaluation.samples import read_hypotheses
from upslope.evaluation.table import Results, as_json, compared, write
from upslope.models.files.config_json import kind_of
from upslope.models.files.folders import is_adapter
from upslope.models.files.sources import resolve
from upslope.options import EvalOptions
from upslope.version import __version__


def run(options: EvalOptions) -> int:
    """The verb `upslope eval`."""
    results = evaluate(options)
    text = json.dumps(
        {**as_json(results), "options": asdict(options), "upslope": __version__}, ensure_ascii=False, allow_nan=False
    )
    if options.output is not None:
        Path(options.output).parent.mkdir(parents=True, exist_ok=True)
        write_atomic(options.output, f"{text}\n")
    if options.json:
        print(text)
    else:
        write(results, sys.stdout)
    return 0


def evaluate(options: EvalOptions) -> list[Results]:
    """The figures of every model or file of answers; an error names the model where there are several."""
    inputs = Inputs(options)
    if options.hypotheses:
        answers = [read_hypotheses(path, inputs.samples) for path in options.hypotheses]
        return compared(options.hypotheses, [judge_answers(texts, inputs) for texts in answers], seed=options.seed)
    folders = [resolve(source, adapters=True) for source in options.models]
    kinds = ["language model" if is_adapter(folder) else kind_of(folder) for folder in folders]
    for source, kind in zip(options.models, kinds, strict=True):
        check_kind(source, kind, options)
    if {"language model", "reward model"} & set(kinds):
        inputs.read_all()
    measured = []
    for place, (source, folder, kind) in enumerate(zip(options.models, folders, kinds, strict=True)):
        with located(source) if len(folders) > 1 else nullcontext():
            if kind == "reward model":
                measured.append(measure_reward_model(folder, inputs))
            elif kind == "language model":
                measured.append(measure_language_model(folder, inputs, _samples_file(options, place)))
            else:
                from upslope.commands.evaluate_encoder import measure_encoder  # seconds of imports that others spare

                measured.append(measure_encoder(kind, folder, inputs))
    return compared(options.models, measured, seed=options.seed)


def _samples_file(options: EvalOptions, place: int) -> Path | None:
    """Where the answers of a model go: --samples itself, or of several models a file of its own in that folder."""
    if options.samples is None:
        return None
    target = Path(options.samples)
    if len(options.models) == 1:
        return target
    name = re.sub(r"[^\w.-]+", "_", Path(options.models[place]).name)
    return target / f"{place + 1}-{name}.jsonl"

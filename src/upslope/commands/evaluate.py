"""`upslope eval`: measure models, or finished answers, and show their figures side by side.

Of a language model whatever is asked, of a reward model its accuracy, of a trained encoder labels of texts, tags of
words, tasks in GLUE form.
"""

import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace

from upslope.atomic import write_atomic
from upslope.build import Policy, load_inference, make_engine
from upslope.commands.evaluate_inputs import Inputs, check_kind, progress
from upslope.data.chat import encode_prompt, load_tokenizer
from upslope.data.labels import read_conll, read_labelled
from upslope.devices.hardware import device_of_machine
from upslope.errors import ConfigError, located
from upslope.evaluation.benchmarks import benchmark_figures
from upslope.evaluation.classification import pearson, spearman
from upslope.evaluation.measurement import Figure, Measurement, noted
from upslope.evaluation.metrics import Texts, measure
from upslope.evaluation.perplexity import perplexity
from upslope.evaluation.preferences import Comparison, PairJudge, reward_accuracy, win_rate
from upslope.evaluation.rescore import rescore
from upslope.evaluation.samples import Sample, encode_samples, generate, read_hypotheses, sample_rows
from upslope.evaluation.scorer import Scorer
from upslope.evaluation.table import Results, as_json, compared, write
from upslope.evaluation.verdicts import verdicts
from upslope.models.encoder.items import load_classifier, tags_of
from upslope.models.files.config_json import ModelKind, kind_of
from upslope.models.files.folders import is_adapter, read_config
from upslope.models.files.sources import resolve
from upslope.options import EvalOptions
from upslope.rewards.networks import load_reward_model
from upslope.rewards.summands import Surroundings
from upslope.rollout import collect
from upslope.tasks.base import SPLITS, Task
from upslope.types import SamplingParams
from upslope.version import __version__
from upslope.workers.rewards import make_scorer

KEY_VARIABLE = "UPSLOPE_JUDGE_API_KEY"
LONGEST_WINDOW = 2048
_LABELS = {"classifier": ("accuracy", "macro_f1"), "tagger": ("entity_f1",)}

Measured = list[Measurement | Figure]
Figures = Iterator[Measurement | Figure]


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


def measure_language_model(folder: Path, inputs: Inputs, samples: Path | None) -> Measured:
    """All figures that the options ask for; answers to --data go to the file `samples`, too."""
    policy = load_inference(folder, dtype=inputs.options.dtype)
    parts = (_perplexity, _rescored, _benchmarks, _tasks, _harness, partial(_answers, target=samples))
    return [figure for part in parts for figure in part(policy, inputs)]


def measure_reward_model(folder: Path, inputs: Inputs) -> Measured:
    """Its accuracy on each file of --preferences."""
    around = Surroundings(load_tokenizer(folder), device_of_machine(), folder)
    model = load_reward_model(str(folder), dtype=inputs.options.dtype, around=around)
    seed = inputs.options.seed
    return [
        figure
        for path, rows in inputs.preferences.items()
        for figure in noted([reward_accuracy(model, rows, dataset=path, seed=seed)], of=inputs.available[path])
    ]


def judge_answers(texts: Sequence[str], inputs: Inputs) -> Measured:
    """The figures of answers to --data: the metrics, and the win rate against the references."""
    o = inputs.options
    found: Measured = [*measure(o.metrics, inputs.texts(texts))] if o.metrics else []
    if o.judge is not None:
        rows = [_comparison(sample, text) for sample, text in zip(inputs.samples, texts, strict=True)]
        name, url = o.judge_at
        with PairJudge(url, name, api_key=os.environ.get(KEY_VARIABLE)) as judge:
            found.append(win_rate(judge, rows, dataset=str(o.data), seed=o.seed))
    return noted(found, of=inputs.available[str(o.data)])


def _comparison(sample: Sample, text: str) -> Comparison:
    prompt = sample.prompt
    if prompt is None:
        raise ConfigError(f"{sample.where}: a judge needs to see what was asked; give rows with prompt")
    asked = prompt.text if prompt.text is not None else "\n\n".join(f"{m.role}: {m.content}" for m in prompt.messages)
    return Comparison(asked, text, sample.references[0], sample.where)


def _perplexity(policy: Policy, inputs: Inputs) -> Figures:
    o = inputs.options
    context = o.context or min(policy.model.spec.max_positions, LONGEST_WINDOW)
    for documents in inputs.documents:
        with progress(f"perplexity {documents.source}", "window") as shown:
            scorer = Scorer(policy.model, policy.tokenizer, progress=shown)
            yield from perplexity(scorer, documents, context=context, stride=o.stride or context)


def _rescored(policy: Policy, inputs: Inputs) -> Figures:
    o = inputs.options
    if o.rescore is None:
        return
    with progress(f"rescore {o.rescore}", "hypothesis") as shown:
        found = rescore(
            Scorer(policy.model, policy.tokenizer, progress=shown),
            inputs.nbest,
            dataset=o.rescore,
            language=inputs.language,
            length_normalized=o.length_normalized,
            weight=o.score_weight,
            seed=o.seed,
        )
    yield from noted(found, of=inputs.available[o.rescore])


def _benchmarks(policy: Policy, inputs: Inputs) -> Figures:
    o = inputs.options
    for spec in o.benchmark:
        with progress(f"benchmark {spec}", "continuation") as shown:
            scorer = Scorer(policy.model, policy.tokenizer, progress=shown)
            yield from benchmark_figures(scorer, spec, limit=o.limit, seed=o.seed)


def _harness(policy: Policy, inputs: Inputs) -> Figures:
    o = inputs.options
    if o.harness:
        from upslope.evaluation.harness import run_harness

        yield from run_harness(policy, o.harness, limit=o.limit, seed=o.seed)


def _tasks(policy: Policy, inputs: Inputs) -> Figures:
    o = inputs.options
    params = SamplingParams(
        max_tokens=o.max_completion_length, n=o.num_generations, temperature=o.sampling_temperature, seed=o.seed
    )
    for spec, task, prompts in inputs.tasks:
        longest = max(len(encode_prompt(policy.tokenizer, prompt)) for prompt in prompts)
        engine = make_engine(
            policy, sequences=len(prompts) * params.n, longest=longest + params.max_tokens, max_batch=64
        )
        with make_scorer(task) as judge, progress(f"task {spec}", "completion") as shown:
            reporting = SimpleNamespace(generate=partial(engine.generate, on_progress=shown))
            groups, _ = collect(reporting, policy.tokenizer, judge, prompts, params)
        yield from _held_out(task, noted(verdicts(groups, spec), of=inputs.available[spec]))


def _held_out(task: Task, found: Sequence[Measurement]) -> list[Measurement]:
    """Of a file that is divided by content, the rows that are held out are a part, too."""
    sizes = [task.size(split) for split in SPLITS]
    return list(found) if not task.divided or None in sizes else noted(found, divided=sum(filter(None, sizes)))


def _answers(policy: Policy, inputs: Inputs, target: Path | None) -> Figures:
    o = inputs.options
    if o.data is None:
        return
    tokens = encode_samples(policy.tokenizer, inputs.samples)
    longest = max(map(len, tokens)) + o.max_completion_length
    engine = make_engine(policy, sequences=len(tokens), longest=longest, max_batch=64)
    params = SamplingParams(max_tokens=o.max_completion_length, temperature=o.temperature or 0.0, seed=o.seed)
    with progress(f"answers to {o.data}", "completion") as shown:
        completions = generate(engine, inputs.samples, tokens, params, on_progress=shown)
    texts = [c.text for c in completions]
    if target is not None:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(target, sample_rows(inputs.samples, texts))
    cut = sum(c.finish_reason == "length" for c in completions)
    yield from noted(judge_answers(texts, inputs), cut=cut, completions=len(texts))


def measure_encoder(kind: ModelKind, folder: Path, inputs: Inputs) -> Measured:
    """Figures of --data (rows {text, label}, or sentences in columns for a tagger) and of --benchmark.

    ConfigError: a metric that is not about labels, or options that need texts.
    """
    o = inputs.options
    found: Measured = []
    if o.data is not None:
        number = kind == "classifier" and len(read_config(folder).get("id2label") or ()) == 1
        names = () if number else _LABELS[kind]
        wrong = [name for name in o.metrics if name not in names]
        if wrong or o.judge is not None or o.samples is not None:
            named = wrong[0] if wrong else "judge" if o.judge is not None else "samples"
            given, about = ("numbers", "labels or texts") if number else ("labels", "texts")
            raise ConfigError(f"{folder.name} is a {kind}, which gives {given}: {named} is about {about}")
        if number:
            found += _numbers(folder, inputs)
        else:
            texts = _labelled(folder, inputs) if kind == "classifier" else _tagged(folder, inputs)
            found += measure(o.metrics or names, texts)
        found = noted(found, of=inputs.available[str(o.data)])
    if o.benchmark:
        classifier = load_classifier(str(folder), dtype=o.dtype)
        for spec in o.benchmark:
            found += benchmark_figures(classifier, spec, limit=o.limit, seed=o.seed)
    return found


def _numbers(folder: Path, inputs: Inputs) -> list[Figure]:
    o = inputs.options
    rows = inputs.first(str(o.data), read_labelled(str(o.data), columns=o.columns, numbers=True))
    said = [z[0] for z in load_classifier(str(folder), dtype=o.dtype).logits(rows)]
    truth = [float(row.label) for row in rows]
    both = {"pearson": pearson(truth, said, seed=o.seed), "spearman": spearman(truth, said, seed=o.seed)}
    return [Figure(name, *interval, len(rows), str(o.data)) for name, interval in both.items()]


def _labelled(folder: Path, inputs: Inputs) -> Texts:
    o = inputs.options
    rows = inputs.first(str(o.data), read_labelled(str(o.data), columns=o.columns))
    classifier = load_classifier(str(folder), dtype=o.dtype)
    said = [classifier.labels[max(range(len(row)), key=row.__getitem__)] for row in classifier.logits(rows)]
    return Texts(str(o.data), said, [(row.label,) for row in rows], [row.where for row in rows])


def _tagged(folder: Path, inputs: Inputs) -> Texts:
    o = inputs.options
    if o.columns:
        raise ConfigError(f"columns: {folder.name} is a tagger, whose files name no columns; leave it out")
    rows = inputs.first(str(o.data), read_conll(str(o.data)))
    said = [" ".join(tags) for tags in tags_of(str(folder), [row.words for row in rows], dtype=o.dtype)]
    return Texts(str(o.data), said, [(" ".join(row.tags),) for row in rows], [row.where for row in rows])

"""What `upslope eval` measures of a trained encoder: labels of texts, tags of words, tasks in GLUE form."""

from pathlib import Path

from upslope.commands.evaluate_inputs import Inputs
from upslope.data.labels import read_conll, read_labelled
from upslope.errors import ConfigError
from upslope.evaluation.benchmark_metrics import pearson, spearman
from upslope.evaluation.benchmarks import benchmark_figures
from upslope.evaluation.measurement import Figure, Measurement, noted
from upslope.evaluation.metrics import Texts, measure
from upslope.models.encoder.items import load_classifier, tags_of
from upslope.models.files.config_json import ModelKind
from upslope.models.files.folders import read_config

_LABELS = {"classifier": ("accuracy", "macro_f1"), "tagger": ("entity_f1",)}


def measure_encoder(kind: ModelKind, folder: Path, inputs: Inputs) -> list[Measurement | Figure]:
    """Figures of --data (rows {text, label}, or sentences in columns for a tagger) and of --benchmark.

    ConfigError: a metric that is not about labels, or options that need texts.
    """
    o = inputs.options
    found: list[Measurement | Figure] = []
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
    logits = classifier.logits(rows)
    said = [classifier.labels[max(range(len(row)), key=row.__getitem__)] for row in logits]
    return Texts(str(o.data), said, [(row.label,) for row in rows], [row.where for row in rows])


def _tagged(folder: Path, inputs: Inputs) -> Texts:
    o = inputs.options
    if o.columns:
        raise ConfigError(f"columns: {folder.name} is a tagger, whose files name no columns; leave it out")
    rows = inputs.first(str(o.data), read_conll(str(o.data)))
    said = [" ".join(tags) for tags in tags_of(str(folder), [row.words for row in rows], dtype=o.dtype)]
    return Texts(str(o.data), said, [(" ".join(row.tags),) for row in rows], [row.where for row in rows])

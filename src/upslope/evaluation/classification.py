"""Measures of labels per text and tags per word, as plain dictionaries and as text. scikit-learn counts the labels.

Accuracy carries Wilson's 95% interval (rows taken as independent). Entities are counted as CoNLL's shared tasks do, in
strict IOB2 (the package seqeval's name for it): an entity is right when its type and both its ends are.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any

from upslope.errors import DataError
from upslope.evaluation.intervals import wilson
from upslope.extras import require

AVERAGES = ("micro", "macro", "weighted")
TOKEN_TITLE = "token level, includes O"


def classification_report(truth: Sequence[str], predicted: Sequence[str], labels: Sequence[str]) -> dict[str, Any]:
    """Accuracy with its interval, precision, recall, F1 and support per label and averaged, and the confusion matrix.

    Averages are over all of `labels`; a measure that would divide by zero is 0. confusion[i][j] counts rows of label i
    that were called label j. With one label per row micro precision, recall and F1 are the accuracy. DataError: no
    rows, or lengths differ.
    """
    _check(truth, predicted)
    metrics = require("eval", "sklearn.metrics")
    names = list(labels)
    scores = partial(metrics.precision_recall_fscore_support, truth, predicted, labels=names, zero_division=0)
    right = sum(t == p for t, p in zip(truth, predicted, strict=True))
    value, low, high = wilson(right, len(truth))
    return {
        "accuracy": {"value": value, "low": low, "high": high, "n": len(truth)},
        "labels": {name: _row(*values) for name, *values in zip(names, *scores(average=None), strict=True)},
        "averages": {average: _row(*scores(average=average)[:3], len(truth)) for average in AVERAGES},
        "confusion": {"labels": names, "counts": metrics.confusion_matrix(truth, predicted, labels=names).tolist()},
    }


def token_report(
    truth: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]], labels: Sequence[str]
) -> dict[str, Any]:
    """`classification_report` over all tokens of all sentences, O like any other tag, so easy O tokens lift it.

    Tokens of one sentence are not independent: the interval is narrower than it should be. Named by TOKEN_TITLE.
    """
    _check_sentences(truth, predicted)
    report = classification_report(list(chain(*truth)), list(chain(*predicted)), labels)
    return {"title": TOKEN_TITLE, **report}


def entities_of(tags: Sequence[str]) -> set[tuple[int, int, str]]:
    """The entities in one sentence's IOB2 tags as (first word, word after the last, type).

    B-X begins one and the I-X right behind it go on with it; an I-X that continues nothing is no entity.
    """
    found = set()
    start = kind = None
    for index, tag in enumerate([*tags, "O"]):
        prefix, _, name = tag.partition("-")
        if start is not None and not (prefix == "I" and name == kind):
            found.add((start, index, kind))
            start = None
        if prefix == "B":
            start, kind = index, name
    return found


def entity_report(truth: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Precision, recall, F1 and support of whole entities, per type and averaged (strict, IOB2).

    In `truth` every I-X follows B-X or I-X; what a model predicts need not: an entity that does not begin with B- is
    no entity. Where there is no entity in a type's denominator the measure is 0.
    """
    _check_sentences(truth, predicted)
    right, said, gold = Counter[str](), Counter[str](), Counter[str]()
    for true_tags, said_tags in zip(truth, predicted, strict=True):
        true_entities, said_entities = entities_of(true_tags), entities_of(said_tags)
        gold.update(kind for *_, kind in true_entities)
        said.update(kind for *_, kind in said_entities)
        right.update(kind for *_, kind in true_entities & said_entities)
    rows = {kind: _counted(right[kind], said[kind], gold[kind]) for kind in sorted(said | gold)}
    averages = {"micro": _counted(right.total(), said.total(), gold.total())}
    for average, weights in (("macro", [1] * len(rows)), ("weighted", [row["support"] for row in rows.values()])):
        parts = [
            sum(row[name] * w for row, w in zip(rows.values(), weights, strict=True)) / (sum(weights) or 1)
            for name in ("precision", "recall", "f1")
        ]
        averages[average] = _row(*parts, gold.total())
    return {"title": "entity level, strict IOB2", "labels": rows, "averages": averages}


def format_report(report: Mapping[str, Any]) -> str:
    """A report as a plain table: label, precision, recall, F1, support, then the averages."""
    rows = [*report["labels"].items(), *((f"{a} average", row) for a, row in report["averages"].items())]
    width = max(len("label"), *(len(str(name)) for name, _ in rows))
    lines = [report.get("title") or "one label per row"]
    if "accuracy" in report:
        a = report["accuracy"]
        lines.append(f"accuracy {a['value']:.4f} [{a['low']:.4f}, {a['high']:.4f}] n={a['n']}")
    lines.append(f"{'label':<{width}}  precision  recall      f1  support")
    lines += [
        f"{name:<{width}}  {row['precision']:>9.4f}  {row['recall']:>6.4f}  {row['f1']:>6.4f}  {row['support']:>7}"
        for name, row in rows
    ]
    return "\n".join(lines)


def _counted(right: int, said: int, gold: int) -> dict[str, Any]:
    """Precision, recall and F1 from counts; 0 where there is nothing to divide by."""
    return _row(right / (said or 1), right / (gold or 1), 2 * right / (said + gold or 1), gold)


def _row(precision: float, recall: float, f1: float, support: int) -> dict[str, Any]:
    values = {"precision": float(precision), "recall": float(recall), "f1": float(f1)}
    return {name: 0.0 if math.isnan(v) else v for name, v in values.items()} | {"support": int(support)}


def _check(truth: Sequence[Any], predicted: Sequence[Any]) -> None:
    if not truth or len(truth) != len(predicted):
        raise DataError(f"need as many predictions as rows, and at least one: {len(predicted)} and {len(truth)}")


def _check_sentences(truth: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> None:
    _check(truth, predicted)
    for index, (a, b) in enumerate(zip(truth, predicted, strict=True)):
        if len(a) != len(b):
            raise DataError(f"sentence {index} has {len(a)} tags and {len(b)} predictions")

"""Tasks in GLUE and SuperGLUE form: a causal model by log-likelihood, a trained classifier by its likeliest label.

A causal model reads the item in plain words and each possible continuation is scored; the likeliest one is its answer
(the first of equally likely ones). The words are those of lm-evaluation-harness, so that figures can be compared;
PROMPTS has them all. Two differ on purpose: multirc offers "no" and "yes" in the order of the labels (the harness has
them the other way round), and stsb, which it does not have, asks for a number from 0 to 5 and takes the mean of the
six numbers under their probabilities. Nothing is shown before the item, and no chat template is applied.
"""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from upslope.data.chat import encode_text
from upslope.data.glue import Form, Item, Items, labelled, read_items
from upslope.data.labels import LabelledText
from upslope.errors import ConfigError, ModelError
from upslope.evaluation import classification as metrics
from upslope.evaluation.measurement import Figure, Interval
from upslope.evaluation.scorer import Request, Scorer


class Classifier(Protocol):
    """A network with a score per label and text, such as `recipes.classify.load_classifier` gives."""

    labels: tuple[str, ...]

    def logits(self, rows: Sequence[LabelledText]) -> list[list[float]]:
        """A score per label for each text or pair; of a regression the one number."""
        ...


@dataclass(frozen=True, slots=True)
class Prompt:
    """How an item is put to a causal model: a text over its fields, and what may follow, in the order of the labels.

    fields: what is made of the item's fields before. choices: of an item whose continuations are its own.
    """

    text: str
    answers: tuple[str, ...] = ()
    fields: Callable[[Item], Mapping[str, str]] = lambda item: item.fields
    choices: Callable[[Item], list[str]] | None = None

    def __call__(self, item: Item) -> tuple[str, list[str]]:
        """(context, continuations)."""
        choices = [f" {answer}" for answer in self.answers] if self.choices is None else self.choices(item)
        return self.text.format(**self.fields(item)), choices


def benchmark_figures(
    model: Scorer | Classifier, spec: str, *, limit: int | None = None, seed: int = 0
) -> list[Figure]:
    """The official figures of one task, the leading one first.

    spec: NAME:SOURCE (see data/glue.py). limit: at most so many items (multirc: questions), chosen by `seed`, which
    also draws the bootstrap. model: a Scorer over a causal model, or a classifier trained on the task's labels.
    DataError: bad rows; ConfigError: no such task, or a classifier on copa or record; ModelError: a classifier with
    other labels.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"limit is {limit}; it must be at least 1")
    read = read_items(spec)
    items = _chosen(read, limit, seed)
    said, detail = _by_likelihood(model, items) if isinstance(model, Scorer) else _by_label(model, items)
    detail["of"] = len({x.group for x in read.items}) if read.items[0].group else len(read.items)
    if items.broken:
        detail["broken_rows"] = len(items.broken)
    return [
        Figure(name, *interval, n, spec, detail=detail)
        for name, interval, n in _measured(items.form, items.items, said, seed)
    ]


def encode_pair(tokenizer: Any, context: str, continuation: str) -> Request:
    """(context tokens, continuation tokens): the whole text's tokens, parted where the context's end.

    White space at the end of the context goes to the continuation, where tokenizers expect it (as the harness does).
    """
    start = encode_text(tokenizer, context.rstrip())
    return start, encode_text(tokenizer, context + continuation)[len(start) :]


def _chosen(items: Items, limit: int | None, seed: int) -> Items:
    """At most `limit` items or groups, by a hash of seed and content, in the order of the file."""
    if limit is None:
        return items
    keys = [item.group or "\0".join([*item.fields.values(), *item.choices]) for item in items.items]
    order = sorted(set(keys), key=lambda key: hashlib.sha256(f"{seed}\0{key}".encode()).digest())
    kept = set(order[:limit])
    chosen = [item for item, key in zip(items.items, keys, strict=True) if key in kept]
    return Items(items.form, chosen if items.items[0].group else chosen[:limit], items.broken)


def _by_likelihood(scorer: Scorer, items: Items) -> tuple[list[Any], dict[str, Any]]:
    """The place of the likeliest continuation of each item (stsb: the expected number)."""
    if scorer.model.whole_prompts:
        raise ModelError("an encoder-decoder has no log-probs of plain text, which the task's prompt asks for")
    prompt = PROMPTS[items.form.name]
    asked = [prompt(item) for item in items.items]
    before = scorer.truncated
    requests = [encode_pair(scorer.tokenizer, text, choice) for text, choices in asked for choice in choices]
    answers = iter(scorer.loglikelihood(requests))
    said: list[Any] = []
    for _, choices in asked:
        logps = [next(answers)[0] for _ in choices]
        if items.form.graded:  # the mean of 0, 1, 2, ... under the softmax of their log-probs
            weights = [math.exp(x - max(logps)) for x in logps]
            said.append(math.fsum(i * w for i, w in enumerate(weights)) / math.fsum(weights))
        else:
            said.append(logps.index(max(logps)))
    detail: dict[str, Any] = {"by": "log-likelihood", "prompt": prompt.text, "answers": list(prompt.answers)}
    if scorer.truncated > before:
        detail["cut_contexts"] = scorer.truncated - before
    return said, detail


def _by_label(classifier: Classifier, items: Items) -> tuple[list[Any], dict[str, Any]]:
    """The place of the likeliest label of each item, called alike or both numbered (stsb: the number)."""
    rows = labelled(items)
    form, labels = items.form, classifier.labels
    if form.graded:
        if len(labels) != 1:
            raise ModelError(f"{form.name} asks for a number; this classifier has {len(labels)} labels")
        return [x[0] for x in classifier.logits(rows)], {"by": "classifier"}
    names = [label.lower() for label in labels]
    known = (form.labels, *([f"{p}{i}" for i in range(len(form.labels))] for p in ("", "label_")))
    order = next((list(each) for each in known if sorted(each) == sorted(names)), None)
    if order is None:
        raise ModelError(
            f"the classifier's labels are {', '.join(labels)}; {form.name} has {', '.join(form.labels)}: train it on "
            f"{form.name}:SOURCE"
        )
    said = [max(range(len(x)), key=x.__getitem__) for x in classifier.logits(rows)]
    return [order.index(names[place]) for place in said], {"by": "classifier"}


def _measured(form: Form, items: Sequence[Item], said: Sequence[Any], seed: int) -> list[tuple[str, Interval, int]]:
    """(metric, value and interval, independent items), the leading metric first."""
    n = len(items)
    if form.name == "record":
        chosen = [item.choices[place] for item, place in zip(items, said, strict=True)]
        answers = [item.answers for item in items]
        return [
            ("f1", metrics.cloze_f1(answers, chosen, seed=seed), n),
            ("exact_match", metrics.cloze_exact(answers, chosen), n),
        ]
    if form.graded:
        scores = [float(item.label) for item in items]
        return [(name, getattr(metrics, name)(scores, said, seed=seed), n) for name in ("pearson", "spearman")]
    truth = [form.labels.index(item.label) for item in items]
    if form.name == "multirc":
        groups = [item.group for item in items]
        questions = len(set(groups))
        return [
            ("f1a", metrics.grouped_f1(truth, said, groups, seed=seed), questions),
            ("exact_match", metrics.grouped_exact(truth, said, groups), questions),
        ]
    leading = [(name, measure(truth, said, seed=seed), n) for name, measure in _LEADING.get(form.name, ())]
    return [*leading, ("accuracy", metrics.accuracy(truth, said), n)]


_LEADING: Mapping[str, tuple[tuple[str, Callable[..., Interval]], ...]] = {
    "cola": (("matthews_correlation", metrics.matthews),),
    "mrpc": (("f1", metrics.binary_f1),),
    "qqp": (("f1", metrics.binary_f1),),
    "cb": (("macro_f1", partial(metrics.macro_f1, classes=3)),),
}
"""The official metric of a task by classes where it is not the accuracy, which stands beside it."""


def _with_stop(item: Item) -> dict[str, str]:
    """The hypothesis as a sentence that ends."""
    hypothesis = item.fields["hypothesis"].strip()
    return {**item.fields, "hypothesis": hypothesis if hypothesis.endswith(".") else f"{hypothesis}."}


def _because(item: Item) -> dict[str, str]:
    """The premise without its full stop, and the word that asks for its cause or its effect."""
    word = {"cause": "because", "effect": "therefore"}[item.fields["question"]]
    return {"premise": item.fields["premise"].strip()[:-1], "word": word}


def _highlights(item: Item) -> dict[str, str]:
    """A news passage and its summary's points as a list; the query will be one more of them."""
    text, *points = item.fields["passage"].strip().split("\n@highlight\n")
    return {"passage": text + "\n\n" + "".join(f"  - {point}.\n" for point in points)}


_MNLI = Prompt(
    "{premise}\nQuestion: {hypothesis} True, False or Neither?\nAnswer:", ("True", "Neither", "False"), _with_stop
)
PROMPTS: dict[str, Prompt] = {
    "cola": Prompt("{sentence}\nQuestion: Does this sentence make sense?\nAnswer:", ("no", "yes")),
    "sst2": Prompt("{sentence}\nQuestion: Is this sentence positive or negative?\nAnswer:", ("negative", "positive")),
    "mrpc": Prompt(
        "Sentence 1: {sentence1}\nSentence 2: {sentence2}\nQuestion: Do both sentences mean the same thing?\nAnswer:",
        ("no", "yes"),
    ),
    "qqp": Prompt(
        "Question 1: {question1}\nQuestion 2: {question2}\nQuestion: Do both questions ask the same thing?\nAnswer:",
        ("no", "yes"),
    ),
    "stsb": Prompt(
        "Sentence 1: {sentence1}\nSentence 2: {sentence2}\nQuestion: From 0 (unrelated) to 5 (the same), how similar "
        "are the two sentences?\nAnswer:",
        tuple("012345"),
    ),
    "mnli": _MNLI,
    "mnli_mismatched": _MNLI,
    "qnli": Prompt("{question}\n{sentence}\nQuestion: Does this response answer the question?\nAnswer:", ("yes", "no")),
    "rte": Prompt("{premise}\nQuestion: {hypothesis} True or False?\nAnswer:", ("True", "False")),
    "wnli": Prompt("{premise}\nQuestion: {hypothesis} True or False?\nAnswer:", ("False", "True")),
    "boolq": Prompt("{passage}\nQuestion: {question}?\nAnswer:", ("no", "yes")),
    "cb": Prompt("{premise}\nQuestion: {hypothesis}. True, False, or Neither?\nAnswer:", ("True", "False", "Neither")),
    "copa": Prompt(
        "{premise} {word}",
        fields=_because,
        choices=lambda item: [f" {choice[0].lower()}{choice[1:]}" for choice in item.choices],
    ),
    "multirc": Prompt(
        "{paragraph}\nQuestion: {question}\nAnswer:",
        choices=lambda item: [f" {item.fields['answer']}\nIs the answer correct? {word}" for word in ("no", "yes")],
    ),
    "record": Prompt(
        "{passage}",
        fields=_highlights,
        choices=lambda item: [f"  - {item.fields['query']}".replace("@placeholder", entity) for entity in item.choices],
    ),
    "wic": Prompt(
        "Sentence 1: {sentence1}\nSentence 2: {sentence2}\nQuestion: Is the word '{word}' used in the same way in the "
        "two sentences above?\nAnswer:",
        ("no", "yes"),
    ),
    "wsc": Prompt(
        'Passage: {text}\nQuestion: In the passage above, does the pronoun "*{pronoun}*" refer to "*{noun}*"?\nAnswer:',
        ("no", "yes"),
    ),
}
"""What a causal model is asked, by task."""

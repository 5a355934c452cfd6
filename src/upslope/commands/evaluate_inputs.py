"""What `upslope eval` reads before any model is loaded, so that a mistake in a file costs seconds."""

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from itertools import count
from typing import TypeVar

from upslope.data.records import Record, read_records
from upslope.errors import ConfigError
from upslope.evaluation.metrics import Texts, bleu_metric, check_metrics
from upslope.evaluation.perplexity import Documents, read_documents
from upslope.evaluation.rescore import NBest, read_nbest
from upslope.evaluation.samples import Sample, read_samples
from upslope.models.files.config_json import ModelKind
from upslope.options import EvalOptions
from upslope.runs.progress import Progress
from upslope.tasks.base import Task, load_task, prompts_of
from upslope.types import Prompt

TASK_PROBLEMS = 200
Row = TypeVar("Row")

_MEASURED: dict[ModelKind, tuple[str, ...]] = {
    "language model": ("perplexity", "data", "task", "rescore", "benchmark", "harness"),
    "classifier": ("data", "benchmark"),
    "tagger": ("data",),
    "reward model": ("preferences",),
    "encoder": (),
}


class Inputs:
    """The files that the options name; each is read when first asked for.

    `available` says how many rows each of them holds, of which --limit may take a part.
    """

    def __init__(self, options: EvalOptions) -> None:
        self.options = options
        self.available: dict[str, int] = {}
        self.language = re.split("[-_]", options.language.lower())[0]
        check_metrics(options.metrics, self.language)
        if options.rescore:
            bleu_metric(self.language)

    def read_all(self) -> None:
        """Read everything that a language or reward model is measured on."""
        _ = self.documents, self.nbest, self.preferences, self.tasks
        if self.options.data is not None:
            _ = self.samples

    @cached_property
    def documents(self) -> list[Documents]:
        """Of --perplexity."""
        return [read_documents(spec, limit=self.options.limit) for spec in self.options.perplexity]

    @cached_property
    def samples(self) -> list[Sample]:
        """Of --data."""
        return self.first(str(self.options.data), read_samples(str(self.options.data), columns=self.options.columns))

    @cached_property
    def nbest(self) -> list[NBest]:
        """Of --rescore."""
        path = self.options.rescore
        return self.first(path, read_nbest(path)) if path else []

    @cached_property
    def tasks(self) -> list[tuple[str, Task, list[Prompt]]]:
        """Of --task: its spec, the task, its held-out problems: all there are, where the task can say."""
        limit, found = self.options.limit, []
        for spec in self.options.task:
            task = load_task(spec)
            size = task.size("eval")
            for line in task.remarks():
                print(line, file=sys.stderr)
            n = (limit or TASK_PROBLEMS) if size is None else max(1, min(limit or size, size))
            prompts = prompts_of(task, "eval", n, seed=self.options.seed)
            self.available[spec] = len(prompts) if size is None else size
            found.append((spec, task, prompts))
        return found

    @cached_property
    def preferences(self) -> dict[str, list[Record]]:
        """Of --preferences, by file."""
        o = self.options
        return {path: self.first(path, read_records(path, columns=o.columns)) for path in o.preferences}

    def first(self, source: str, rows: Sequence[Row]) -> list[Row]:
        """The rows that --limit lets through."""
        self.available[source] = len(rows)
        return list(rows[: self.options.limit])

    def texts(self, hypotheses: Sequence[str]) -> Texts:
        """Answers to --data, ready to be judged."""
        references, where = [s.references for s in self.samples], [s.where for s in self.samples]
        return Texts(str(self.options.data), hypotheses, references, where, self.language)


def check_kind(source: str, kind: ModelKind, options: EvalOptions) -> None:
    """ConfigError where the options ask something of a model that its kind has no answer to."""
    asked = [*options.needs_model, *(["data"] if options.data is not None else [])]
    wrong = [name for name in asked if name not in _MEASURED[kind]]
    if wrong:
        able = ", ".join(f"--{name}" for name in _MEASURED[kind])
        instead = f"but {able}" if able else "nor anything else: it has no head yet (upslope classify, tag)"
        raise ConfigError(f"{source} is a {kind}: --{wrong[0]} cannot be asked of it, {instead}")
    if kind == "language model" and options.data is not None and not options.metrics and options.judge is None:
        raise ConfigError("data needs to be judged: name metrics (as in --metrics bleu chrf) or a judge")


@contextmanager
def progress(label: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on standard error for a callback (done, total); nothing is shown before its first call."""
    with ExitStack() as stack:
        bar: list[Progress] = []
        steps = count(1)

        def advance(done: int, total: int) -> None:
            if not bar:
                bar.append(stack.enter_context(Progress(total, label, unit=unit)))
            bar[0].advance(done - bar[0].done, {"decoding_steps": next(steps)} if unit == "completion" else None)

        yield advance

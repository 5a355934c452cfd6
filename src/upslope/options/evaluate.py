"""Options of `upslope eval`."""

from typing import Literal

from upslope.config import option
from upslope.errors import ConfigError
from upslope.options.common import ColumnOptions, DtypeOptions, JsonOptions


class PerplexityOptions(DtypeOptions):
    """Perplexity."""

    perplexity: tuple[str, ...] = ()
    """Rows with the key text, or text files; file:, line: or wikitext: before a path says what a document is."""
    context: int | None = option(None, 1, also="context_length", needs="perplexity")
    """Tokens a window reads; default: as many as the model has positions, at most 2048."""
    stride: int | None = option(None, 1, also="eval_stride", needs="perplexity")
    """New tokens each window predicts; default: all of it (disjoint windows, as lm-evaluation-harness)."""


class AnswerOptions(ColumnOptions):
    """Answers to rows."""

    data: str | None = None
    """Rows to answer: prompt or messages, and completion, reference or references; a .txt of references to compare."""
    metrics: tuple[str, ...] = option((), needs="data")
    """Of bleu chrf chrf++ ter rouge1 rouge2 rougeL exact_match token_f1 accuracy macro_f1 entity_f1 wer cer;
    default: accuracy and macro_f1 of a classifier, the correlations of one of numbers, entity_f1 of a tagger."""
    language: str = "en"
    """Language of the references (zh, ja, ko, de, ...): chooses the tokenizer of BLEU, TER, ROUGE and error rates."""
    judge: str | None = option(None, needs="data")
    """MODEL@URL of an OpenAI-compatible server: does an answer to --data beat its reference? (UPSLOPE_JUDGE_API_KEY)"""
    samples: str | None = option(None, needs="data")
    """Write the answers to --data to this JSONL file, which --hypotheses reads; of several models to this folder."""


class TaskOptions(DtypeOptions):
    """Tasks."""

    task: tuple[str, ...] = ()
    """Held-out problems of tasks: gsm8k:eval_path=test.jsonl, chain_sum:min_terms=2,max_terms=2, my_task.py:MyTask."""
    num_generations: int = option(1, 1, needs="task")
    """Completions per problem of a task; above 1 gives pass@k for k = 1, 2, 4, ... up to it."""
    max_completion_length: int = option(256, 1)
    """Longest answer in tokens."""
    temperature: float | None = option(None, 0, 100)
    """Sampling temperature; default: 0 (greedy) for one completion, 1 for several."""


class EvalOptions(PerplexityOptions, AnswerOptions, TaskOptions, JsonOptions):
    """Measure one or several models; every figure comes with a 95% interval and its n.

    Name what to measure: --perplexity, --data with --metrics or --judge, --task, --rescore, --benchmark, --preferences,
    --harness; several at once if you like. Several models give one table, with each one's paired difference to the
    first.
    """

    FIRST = "models perplexity data metrics task benchmark limit output json"

    models: tuple[str, ...] = option((), also="model")
    """What to measure, as in `upslope eval runs/a runs/b`: folders, runs, hub ids, .gguf files, the alias."""
    hypotheses: tuple[str, ...] = ()
    """Finished answers to --data in place of models: .txt with one a line, or rows with the key completion."""
    rescore: str | None = None
    """N-best lists to put into the model's order: rows {reference, hypotheses: [{text, score}], source}."""
    length_normalized: bool = option(False, needs="rescore")
    """Rescoring divides a log-prob by its number of tokens."""
    score_weight: float | Literal["tuned"] = option(0.0, 0, needs="rescore")
    """Weight of the lists' own scores beside the log-prob; tuned: chosen on one half, measured on the other."""
    benchmark: tuple[str, ...] = ()
    """Tasks in GLUE or SuperGLUE form from files or a hub, each with its official metric."""
    preferences: tuple[str, ...] = ()
    """Rows {prompt, chosen, rejected}: how often a reward model puts chosen first."""
    harness: tuple[str, ...] = ()
    """Tasks of lm-evaluation-harness, by name or as a file.yaml."""
    limit: int | None = option(None, 1, also="eval_samples")
    """At most so many documents, rows or problems of each; default: all, but 200 of a task that generates problems."""
    seed: int = 0
    """Of sampling, of drawn problems and of the bootstrap."""
    output: str | None = None
    """Write all figures as JSON to this file."""

    @property
    def sampling_temperature(self) -> float:
        """The temperature in force."""
        default = 0.0 if self.num_generations == 1 else 1.0
        return default if self.temperature is None else self.temperature

    @property
    def judge_at(self) -> tuple[str, str]:
        """The judge's name on its server, and the server's URL; each empty where it is missing."""
        name, at, address = (self.judge or "").partition("@http")
        return name, f"http{address}" if at else ""

    @property
    def needs_model(self) -> tuple[str, ...]:
        """The options in force that only a model can answer."""
        names = ("perplexity", "task", "rescore", "benchmark", "preferences", "harness")
        return tuple(name for name in names if getattr(self, name))

    def _check(self) -> None:
        if self.models and self.hypotheses:
            raise ConfigError("models and hypotheses are both given: measure models, or the answers in the files")
        if not self.models and not self.hypotheses:
            raise ConfigError("nothing to measure: name a model, as in upslope eval runs/a, or --hypotheses FILE")
        if not self.needs_model and self.data is None:
            raise ConfigError(
                "say what to measure: --perplexity, --data, --task, --rescore, --benchmark, --preferences or --harness"
            )
        if self.columns and self.data is None and not self.preferences:
            raise ConfigError("columns is about the rows of data or preferences, which are not given")
        self._check_pairs()

    def _check_pairs(self) -> None:
        if self.hypotheses and self.needs_model:
            raise ConfigError(f"{self.needs_model[0]} needs a model, and hypotheses are finished answers: name models")
        if self.hypotheses and self.data is not None and not self.metrics and self.judge is None:
            raise ConfigError("data needs to be judged: name metrics (as in --metrics bleu chrf) or a judge")
        if self.judge is not None and not all(self.judge_at):
            raise ConfigError(f"judge is {self.judge!r}; it must be MODEL@URL, as in judge-7b@http://127.0.0.1:8000/v1")
        if self.samples is not None and self.hypotheses:
            raise ConfigError("samples writes what a model answers, and hypotheses are finished answers: leave one out")
        if self.num_generations > 1 and self.temperature == 0:
            raise ConfigError("num_generations above 1 at temperature 0 would repeat one answer: raise the temperature")
        if self.context is not None and self.stride is not None and self.stride > self.context:
            raise ConfigError(f"stride is {self.stride} but a window reads only {self.context} tokens (context)")

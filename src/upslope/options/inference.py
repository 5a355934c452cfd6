"""Options of what uses a trained model: `upslope generate`, `chat`, `serve` and `eval`."""

import ipaddress
import math
import os
from typing import Literal

from upslope.config import option
from upslope.errors import ConfigError
from upslope.options.common import ColumnOptions, DtypeOptions, FilterOptions, JsonOptions


class EngineOptions(DtypeOptions):
    """Model."""

    model: str = "smollm2-135m"
    """A model folder, a run folder, adapters, a hub id, a .gguf file, or the alias smollm2-135m."""
    kv_cache_gb: float = option(1.0, 1e-3)
    """GiB that keys and values may take; what does not fit waits its turn."""


class DecodingOptions(EngineOptions, FilterOptions):
    """Sampling."""

    FIRST = "model system max_tokens temperature top_p seed"

    system: str | None = None
    """A system turn before the conversation."""
    max_tokens: int = option(256, 1, also="max_completion_length")
    """Tokens a reply may have."""
    temperature: float = option(0.7, 0)
    """0 is greedy."""
    repetition_penalty: float = option(1.0, 1e-3)
    """Above 1: tokens that occurred become less likely."""
    stop: tuple[str, ...] = ()
    """Texts at which a reply ends."""
    seed: int = 0
    """The same seed gives the same replies."""

    def _check(self) -> None:
        if "" in self.stop:
            raise ConfigError("stop holds an empty text, which every reply contains: leave it out")


class GenerateOptions(DecodingOptions, ColumnOptions, JsonOptions):
    """Complete one prompt, or a file of prompts to JSONL that `upslope sft` reads; standard output is replies alone."""

    FIRST = "model prompt prompts output max_tokens temperature num_return_sequences system json"

    prompt: str | None = None
    """The prompt, a user turn where the model has a chat template; default: --prompts, else standard input."""
    prompts: str | None = None
    """A file of prompts: rows with prompt, messages or text in .jsonl, .json, .csv, .parquet, or lines of a .txt."""
    columns: tuple[str, ...] = option((), needs="prompts")
    output: str | None = None
    """Where the replies go as JSONL, one row per prompt in the order of the input; default: standard output."""
    resume: bool = False
    """Go on with --output where a run was stopped or killed; rows that are in it are not made again."""
    raw: bool = False
    """Take the prompt as it stands, without the model's chat template."""
    stream: bool = False
    """Print the reply while it comes, also where standard output is no terminal."""
    temperature: float | None = None
    """0 is greedy; default: 0.7, in beam search 1."""
    num_return_sequences: int = option(1, 1, also="num_generations")
    """Replies per prompt; in beam search the best ones."""
    num_beams: int = option(1, 1, also="beam_width")
    """Above 1: beam search of this width instead of drawing."""
    length_penalty: float = option(1.0, -math.inf)
    """Beams are ranked by their log-prob divided by length ** this: above 0 helps long replies."""
    logprobs: int | None = option(None, 0)
    """JSON: the tokens of each reply with their log-probs at this temperature, and so many alternatives per token."""
    max_batch: int = option(64, 1)
    """Sequences decoded together; changes speed, not the replies."""
    json: bool = False
    """Print one JSON object instead of the text of a single prompt's reply."""

    @property
    def policy_temperature(self) -> float:
        """The temperature in force."""
        return (0.7 if self.num_beams == 1 else 1.0) if self.temperature is None else self.temperature

    def _check(self) -> None:
        if self.prompt is not None and self.prompts is not None:
            raise ConfigError("prompt and prompts are both given: one text, or a file of them")
        if self.resume and (self.prompts is None or self.output is None):
            raise ConfigError("resume goes on with a file of prompts: give prompts and output, too")
        if self.raw and self.system is not None:
            raise ConfigError("system is a turn of the chat template, which raw leaves out: give one of the two")
        rows = self.prompts is not None or self.output is not None or self.json
        if self.logprobs is not None and not rows:
            raise ConfigError("logprobs are written as JSON: add --json or --output FILE.jsonl")
        if self.stream and (rows or self.num_return_sequences > 1 or self.num_beams > 1):
            raise ConfigError("stream prints one reply as text: it goes with one prompt, one drawn reply and no JSON")
        if self.num_beams == 1:
            if self.length_penalty != 1.0:
                raise ConfigError("length_penalty ranks beams: it needs num_beams above 1")
            if self.num_return_sequences > 1 and self.policy_temperature == 0:
                raise ConfigError("num_return_sequences above 1 at temperature 0 would repeat one reply: raise either")
            return
        if self.num_return_sequences > self.num_beams:
            raise ConfigError(f"num_return_sequences is at most num_beams, which is {self.num_beams}")
        idle = {"top_k": self.top_k, "top_p": self.top_p < 1, "min_p": self.min_p, "stop": self.stop}
        for name, given in (idle | {"logprobs": bool(self.logprobs)}).items():
            if given:
                hint = "; 0 gives the tokens' own log-probs" if name == "logprobs" else ""
                raise ConfigError(f"{name} has no meaning in beam search (num_beams above 1): leave it out{hint}")


class ChatOptions(DecodingOptions):
    """Talk to a model in the terminal, or line by line through a pipe; /help lists the commands."""


KEY_VARIABLE = "UPSLOPE_API_KEY"


class ServeOptions(EngineOptions):
    """An OpenAI-compatible server and a chat page on loopback, over the engine that training samples with."""

    FIRST = "model host port api_key"

    served_model_name: str | None = None
    """The model's name in requests and in /v1/models; default: the last part of --model."""
    compare: str | None = None
    """A second model, served beside the first under its own name; the chat page then offers blind A/B."""
    host: str = "127.0.0.1"
    """Address to listen on; another than loopback needs an API key."""
    port: int = option(8000, 0, 65535)
    """Port to listen on; 0 takes a free one and prints it."""
    api_key: str | None = None
    """Key that every route but /health asks for; default: the environment variable UPSLOPE_API_KEY, else none."""
    max_batch: int = option(64, 1)
    """Sequences decoded together."""
    kv_cache_gb: float = option(1.0, 0)
    max_queue: int = option(256, 0)
    """Requests that may wait; one more is answered 429 with Retry-After."""
    max_body_mb: float = option(4.0, 0.001)
    """MiB that a request's body may have; a larger one is answered 413."""
    drain_seconds: float = option(30.0, 0)
    """How long running requests may take to finish after SIGTERM."""
    feedback: str = "feedback"
    """Folder to which the chat page saves thumbs, edits and A/B votes, as rows that sft and dpo read."""

    @property
    def key(self) -> str | None:
        """The API key: the option's, else the environment's."""
        return self.api_key if self.api_key is not None else os.environ.get(KEY_VARIABLE)

    @property
    def on_loopback(self) -> bool:
        """Whether nobody but this machine can connect."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    def _check(self) -> None:
        if self.key is not None and not self.key.strip():
            raise ConfigError(f"the API key is empty: set --api-key (or {KEY_VARIABLE}) to a secret, or leave it out")
        if not self.on_loopback and self.key is None:
            raise ConfigError(
                f"host = {self.host} can be reached from other machines: set --api-key (or {KEY_VARIABLE}), "
                "or listen on 127.0.0.1"
            )


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
        return (0.0 if self.num_generations == 1 else 1.0) if self.temperature is None else self.temperature

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

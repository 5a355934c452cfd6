"""lm-evaluation-harness on our models: in process by our scorer and engine, or over HTTP against `upslope serve`.

    run_harness(UpslopeLM(policy), ["arc_easy"], limit=200)
    run_harness(remote_model("http://127.0.0.1:8000/v1", folder), ["arc_easy"], limit=200)

Prompts, metrics and data are the harness's own (Gao et al. 2021, doi 10.5281/zenodo.5371628); so are its definitions of
what a token of the context is, how a long text is cut into windows, and where a generation ends, which makes the
figures those of its `hf` model. Its own standard errors are not used: the intervals are ours. Importing this module
needs the extra `harness`.
"""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from upslope.config import suggestion
from upslope.data.chat import encode_text
from upslope.engine.engine import Engine
from upslope.errors import ConfigError, DataError, ModelError, RunError, UpslopeError, one_line
from upslope.evaluation.measurement import Figure, Interval, bootstrap, share
from upslope.evaluation.scorer import Scorer
from upslope.extras import require
from upslope.models.attention.context import BLOCK
from upslope.models.protocol import CausalModel
from upslope.types import SamplingParams

require("harness", "lm_eval.models")  # it fills the registry with the harness's own models, but only an empty one
TemplateLM = require("harness", "lm_eval.api.model").TemplateLM
register_model = require("harness", "lm_eval.api.registry").register_model


_PASSED = ("top_p", "top_k", "min_p", "repetition_penalty", "length_penalty")


class Loaded(Protocol):
    """A model that can be asked: `build.Policy` is one."""

    model: CausalModel
    tokenizer: Any

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The ids that end a completion."""
        ...


@register_model("upslope")
class UpslopeLM(TemplateLM):  # type: ignore[misc, valid-type]
    """A loaded model as the harness sees one: simple_evaluate("upslope", {"policy": policy}) or an instance of it.

    engine: for tasks that generate; made for them if not given. batch_tokens: of one forward pass. max_length: tokens
    that are read at most, by default the model's positions (a client over HTTP reads two less, see `remote_model`).
    max_gen_toks: where a task does not say how many tokens may be generated. seed: of sampled generations. batch_size,
    max_batch_size and device, which the harness hands to every model it makes, change nothing: batches are packed by
    tokens, and the model is where it was loaded. ModelError for an encoder-decoder: it has no log-probs of plain text.
    """

    def __init__(
        self,
        policy: Loaded,
        *,
        engine: Engine | None = None,
        batch_tokens: int = 4096,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        seed: int = 0,
        progress: Callable[[int, int], None] | None = None,
        **unused: Any,
    ) -> None:
        super().__init__()
        wrong = [name for name in unused if name not in ("batch_size", "max_batch_size", "device")]
        if wrong:
            raise ConfigError(f"upslope's harness model has no option {wrong[0]!r}")
        if policy.model.whole_prompts:
            raise ModelError("an encoder-decoder has no log-probs of plain text, which the harness's tasks ask for")
        self.policy, self.tokenizer = policy, policy.tokenizer
        self.scorer = Scorer(policy.model, policy.tokenizer, batch_tokens=batch_tokens, progress=progress)
        positions = policy.model.spec.max_positions
        self.max_length = max_length if max_length is not None else positions
        if not 1 <= self.max_length <= positions:
            raise ConfigError(f"max_length is {max_length}; it must be from 1 to the model's {positions} positions")
        self.max_gen_toks, self.seed = max_gen_toks, seed
        self._engine = engine

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self.policy.eos_token_ids[0] if self.tokenizer.eos_token_id is None else self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The token that stands for an empty context."""
        return self.scorer.prefix

    @property
    def tokenizer_name(self) -> str:
        """Only names the harness's own caches."""
        return str(getattr(self.tokenizer, "name_or_path", "")).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Tokens of a text; None: behind BOS if the tokenizer puts one there and the text does not have it."""
        if add_special_tokens is None:
            return encode_text(self.tokenizer, string)
        return list(self.tokenizer(string, add_special_tokens=add_special_tokens)["input_ids"])

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as the model's own chat template writes it. ModelError where there is none or it refuses."""
        try:
            return self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        except Exception as error:  # jinja2's errors and transformers' ValueError; what they say is passed on
            raise ModelError(f"the chat template cannot write the conversation: {one_line(error)}") from error

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        room = self.max_length + 1  # what is left of the context is at least a token: the scorer says so otherwise
        answers = self.scorer.loglikelihood(
            [(context[-max(1, room - len(continuation)) :], continuation) for _, context, continuation in requests]
        )
        for (texts, _context, _continuation), answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-prob of every whole text, in nats: disjoint windows of the model's context, the last one filled up."""
        texts = [request.args[0] for request in requests]
        width = self.max_length
        found = self.scorer.rolling([self.tok_encode(text) for text in texts], stride=width, context=width)
        totals = [math.fsum(logprobs) for logprobs in found]
        for text, total in zip(texts, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The reply to every context, up to the first of its stop texts; greedy unless the task samples."""
        prompts, params = [], []
        for request in requests:
            context, asked = request.args[:2]
            wanted = self._params(asked)
            room = self.max_length - wanted.max_tokens
            if room < 1:
                raise ConfigError(
                    f"a task asks for {wanted.max_tokens} generated tokens, the model has {self.max_length} positions: "
                    "lower max_gen_toks in its generation_kwargs"
                )
            prompts.append((self.tok_encode(context) or [self.prefix_token_id])[-room:])
            params.append(wanted)
        engine = self._engine
        if engine is None:
            longest = max(len(p) + s.max_tokens for p, s in zip(prompts, params, strict=True)) + 1
            width = max(s.beam_width for s in params)
            blocks = min(len(prompts) * width, 64) * -(-longest // BLOCK) + width
            eos = self.policy.eos_token_ids
            engine = Engine(self.policy.model, self.tokenizer, eos_token_ids=eos, num_blocks=blocks)
        done = engine.generate(prompts, params)
        texts = [completions[0].text for completions in done]
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def _params(self, asked: Mapping[str, Any]) -> SamplingParams:
        """The task's generation_kwargs. ConfigError for one that we do not have."""
        known = require("harness", "lm_eval.models.utils").normalize_gen_kwargs(dict(asked), self.max_gen_toks)
        sampled = bool(known.pop("do_sample"))
        stops, ids = [], []
        for stop in filter(None, known.pop("until")):
            special = self.tokenizer.convert_tokens_to_ids(stop) if stop in self.tokenizer.all_special_tokens else None
            ids.append(special) if special is not None else stops.append(stop)
        values = {name: known.pop(name) for name in _PASSED if name in known}
        made = SamplingParams(
            max_tokens=known.pop("max_gen_toks"),
            temperature=float(known.pop("temperature")) if sampled else 0.0,
            stop=tuple(dict.fromkeys(stops)),
            stop_token_ids=tuple(dict.fromkeys(ids)),
            beam_width=known.pop("num_beams", 1),
            seed=self.seed,
            **(values if sampled else {k: v for k, v in values.items() if k.endswith("penalty")}),
        )
        known.pop("temperature", None)
        if known:
            raise ConfigError(f"a task's generation_kwargs name {', '.join(map(repr, known))}, which we do not have")
        return made


def remote_model(
    base_url: str,
    folder: str | Path,
    *,
    model: str | None = None,
    max_length: int,
    chat: bool = False,
    api_key: str | None = None,
    num_concurrent: int = 8,
) -> Any:
    """lm-eval's own client of a served model: local-completions, or with `chat` local-chat-completions.

    base_url: up to and with /v1. folder: whose tokenizer makes the tokens that are sent (the served model's). model:
    its name at the server, by default the folder's. max_length: the positions of the model; of these the client keeps
    one for a token that it asks for and throws away, and cuts whole texts into windows one shorter still. A chat model
    generates only: the API gives no log-probs of what was asked.
    """
    module = require("harness", "lm_eval.models.openai_completions")
    kind = module.LocalChatCompletion if chat else module.LocalCompletionsAPI
    path = "chat/completions" if chat else "completions"
    return kind(
        base_url=f"{base_url.rstrip('/')}/{path}",
        model=model or Path(folder).name,
        tokenizer=str(folder),
        tokenizer_backend="huggingface",
        max_length=max_length,
        num_concurrent=num_concurrent,
        header={"Authorization": f"Bearer {api_key}"} if api_key else None,
        **({"tokenized_requests": False} if chat else {}),
    )


def run_harness(
    model: Any,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    seed: int = 0,
    include_path: str | Path | None = None,
    num_fewshot: int | None = None,
    apply_chat_template: bool = False,
) -> list[Figure]:
    """The figures of some tasks or groups of lm-evaluation-harness, one per metric and filter.

    model: a policy, an UpslopeLM, or any model of the harness. limit: the first documents of each task. seed: of the
    few-shot examples and the bootstrap. include_path: a folder of task files besides the harness's own. Values are the
    harness's own; intervals are Wilson's for what is 0 or 1 per document, else from the bootstrap over documents; for
    a group they follow from its tasks'. ConfigError: an unknown task; DataError: its data cannot be loaded.
    """
    lm = UpslopeLM(model, seed=seed) if hasattr(model, "model") and hasattr(model, "eos_token_ids") else model
    random.seed(seed)
    np.random.seed(seed % 2**32)
    loaded = _load(tasks, include_path)
    for task in loaded["tasks"].values():
        fixed = task.get_config("num_fewshot")
        if num_fewshot is not None and fixed != 0:
            task.set_config(key="num_fewshot", value=num_fewshot)
        elif fixed is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=seed)
    try:
        results = require("harness", "lm_eval.evaluator").evaluate(
            lm=lm,
            task_dict=loaded,
            limit=limit,
            bootstrap_iters=0,
            apply_chat_template=apply_chat_template,
            fewshot_as_multiturn=apply_chat_template,
        )
    except UpslopeError:
        raise
    except Exception as error:  # tasks are code and clients of many kinds; what they raise is passed on in one line
        raise RunError(f"lm-evaluation-harness stopped: {type(error).__name__}: {one_line(error)}") from error
    figures = [x for name, task in loaded["tasks"].items() for x in task_figures(name, task, results, seed)]
    return figures + group_figures(results, figures)


def _load(tasks: Sequence[str], include_path: str | Path | None) -> dict[str, Any]:
    """Reading the names of the harness's own 14,000 tasks takes some ten seconds: only where they are needed."""
    if include_path is not None and not Path(include_path).is_dir():
        raise ConfigError(f"include_path {include_path}: no such folder of task files")
    if not tasks:
        raise ConfigError("no task of lm-evaluation-harness is named")
    module = require("harness", "lm_eval.tasks")
    path = None if include_path is None else str(include_path)
    own = module.TaskManager(include_path=path, include_defaults=False)
    if all(name in own.task_index or Path(name).is_file() for name in tasks):
        with suppress(ConfigError):  # a group of the user's with a task of the harness in it
            return _loaded(own, tasks)
    manager = module.TaskManager(include_path=path)
    for name in tasks:
        if name not in manager.task_index and not Path(name).is_file():
            hint = suggestion(name, manager.task_index)
            raise ConfigError(f"lm-evaluation-harness has no task {name!r}{hint} (see `lm-eval ls tasks`)")
    return _loaded(manager, tasks)


def _loaded(manager: Any, tasks: Sequence[str]) -> dict[str, Any]:
    try:
        return manager.load(list(tasks))
    except KeyError as error:
        raise ConfigError(
            f"{', '.join(tasks)}: lm-evaluation-harness has no task {error}, which a group names"
        ) from error
    except Exception as error:  # the loader and `datasets` raise a dozen unrelated kinds
        raise DataError(
            f"{', '.join(tasks)} cannot be loaded: {one_line(error)}; offline, name local data_files in the task's "
            "dataset_kwargs"
        ) from error


def task_figures(name: str, task: Any, results: Mapping[str, Any], seed: int) -> list[Figure]:
    """One figure per metric and filter of a task, from what `lm_eval.evaluator.evaluate` returned with its samples."""
    made = []
    version = results["versions"].get(name)
    for key, value in results["results"][name].items():
        metric, comma, kind = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float | np.number):
            continue
        rows = [s[metric] for s in results["samples"][name] if s["filter"] == kind and metric in s]
        interval = _interval(rows, float(value), task.aggregation().get(metric), seed)
        better = "lower" if results["higher_is_better"].get(name, {}).get(metric) is False else "higher"
        detail = {"filter": kind, "num_fewshot": results["n-shot"].get(name, 0), "version": version}
        detail["of"] = results["n-samples"][name]["original"]
        made.append(Figure(metric, float(value), interval.low, interval.high, len(rows), name, better, detail))
    return made


def _interval(rows: Sequence[Any], value: float, aggregate: Callable[[Any], float] | None, seed: int) -> Interval:
    """From the documents' own values, by the harness's own way of putting them together."""
    numbers = all(isinstance(x, int | float | np.number) for x in rows)
    if numbers and rows and math.isclose(math.fsum(map(float, rows)) / len(rows), value, rel_tol=1e-9, abs_tol=1e-12):
        return share([float(x) for x in rows], seed)
    if aggregate is None or not rows:
        return Interval(value, math.nan, math.nan)
    return bootstrap(lambda places: float(aggregate([rows[i] for i in places])), len(rows), seed=seed)


def group_figures(results: Mapping[str, Any], figures: Sequence[Figure]) -> list[Figure]:
    """A group's value is a mean of its tasks'; tasks are independent, so their half widths add in quadrature."""
    made = []
    for group in results.get("groups", {}):
        leaves = _leaves(group, results["group_subtasks"])
        for key, value in results["results"][group].items():
            metric, comma, kind = key.partition(",")
            parts = [f for f in figures if f.dataset in leaves and (f.name, f.detail["filter"]) == (metric, kind)]
            if not comma or not parts or not isinstance(value, int | float | np.number):
                continue
            n = sum(f.n for f in parts)
            half = math.nan
            for weights in ([f.n / n for f in parts], [1 / len(parts)] * len(parts)):
                mean = math.fsum(w * f.value for w, f in zip(weights, parts, strict=True))
                if math.isclose(mean, value, rel_tol=1e-9, abs_tol=1e-12):
                    half = math.hypot(*(w * (f.high - f.low) / 2 for w, f in zip(weights, parts, strict=True)))
                    break
            detail = {"filter": kind, "tasks": len(parts), "of": sum(f.detail["of"] for f in parts)}
            made.append(Figure(metric, value, value - half, value + half, n, group, parts[0].better, detail))
    return made


def _leaves(group: str, children: Mapping[str, Sequence[str]]) -> set[str]:
    found = {name for child in children.get(group, ()) for name in _leaves(child, children)}
    return found or {group}

"""From the text on the command line to a task or a reward function, with an error that says what to change."""

from __future__ import annotations

import inspect
import itertools
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from upslope.errors import ConfigError, DataError, UpslopeError
from upslope.plugins import (
    Spec,
    check_file,
    check_params,
    ending_forks,
    find,
    first_line,
    format_spec,
    line_in,
    load,
    parse_spec,
    suggest,
)
from upslope.tasks.base import Split, Task
from upslope.types import Prompt

TASKS: dict[str, str] = {
    "reasoning": "upslope.tasks.reasoning:ReasoningTask",
    "gsm8k": "upslope.tasks.gsm8k:GSM8K",
    "sentiment": "upslope.tasks.sentiment:Sentiment",
    "strict_json": "upslope.tasks.strict_json:StrictJson",
    "random_walks": "upslope.tasks.random_walks:RandomWalks",
    "key_door": "upslope.tasks.key_door:KeyDoor",
    "pairs": "upslope.tasks.pairs:Pairs",
    "phonemes": "upslope.tasks.phonemes:Phonemes",
}
REWARDS: dict[str, str] = {
    **{
        name: f"upslope.tasks.rewards:{name}"
        for name in ["length", "format", "json_object", "repetition", "exact_match"]
    },
    **{
        name: f"upslope.tasks.overlap:{name}"
        for name in ["edit_similarity", "ngram_overlap", "token_f1", "bleu", "chrf", "rouge"]
    },
}
"""Where every built-in reward function is."""
TASK_REWARD = "task"
MODEL_REWARDS: dict[str, str] = {
    "reward_model": "upslope.rollout.reward_model:load_reward_model",
    "likelihood": "upslope.rollout.model_rewards:load_likelihood",
    "fluency": "upslope.rollout.model_rewards:load_fluency",
    "coherence": "upslope.rollout.model_rewards:load_coherence",
    "similarity": "upslope.rollout.model_rewards:load_similarity",
    "relevance": "upslope.rollout.model_rewards:load_relevance",
}
"""Rewards that are networks, computed in the trainer's process (rollout/in_process.py): name -> "module:factory"."""
# What the judge fills in, one value per completion, where a reward asks for it by name.
FILLED = ("num_tokens", "finish_reasons")

_MADE: dict[str, Task] = {}
_WEIGHT = re.compile(r"""(?P<spec>.*)@(?P<weight>[^@:,='"]*)""", re.DOTALL)


@dataclass(frozen=True, slots=True)
class RewardFunction:
    """A reward ready to call: `function(prompts, completions)`, with its parameters bound."""

    name: str
    function: Callable[..., Any]
    inline_safe: bool = False
    whole_group: bool = False


def load_task(spec: str | Task, **params: Any) -> Task:
    """The task that `spec` names; keyword arguments go over the parameters in the text.

    spec: a built-in ("gsm8k:path=train.jsonl"), a reasoning-gym data set ("chain_sum:min_terms=2,max_terms=2", the
    same as "reasoning:name=chain_sum,..."), or a class of a file ("my_task.py:MyTask:level=3"). The task remembers
    the full text in `.spec`, from which a worker process builds its equal. A task is given back as it is.

    Raises ConfigError: unknown name or parameter (with the nearest known one), or a file that does not load.
    """
    if isinstance(spec, Task):
        spec.name = type(spec).__name__ if spec.name == Task.name else spec.name
        return spec
    if not params and spec in _MADE:
        return _MADE.pop(spec)
    parsed = parse_spec(spec)
    parsed = replace(parsed, params={**parsed.params, **params})
    if parsed.path is None and parsed.name not in TASKS:
        task = _reasoning_alias(parsed)
    else:
        task = _construct(_task_class(parsed), parsed)
    task.spec = format_spec(parsed.absolute)
    return task


@contextmanager
def made_first(spec: Any) -> Iterator[None]:
    """Within it the next `load_task` of this spec gives the task made here, before what takes long is loaded."""
    if isinstance(spec, str):
        _MADE[spec] = load_task(spec)
    try:
        yield
    finally:
        _MADE.pop(spec, None)


def prompts_of(task: Task, split: Split, n: int, *, seed: int) -> list[Prompt]:
    """The task's prompts, checked; of an endless stream the first `n`.

    Raises DataError that names the task's file and class: `prompts` is missing, fails, or gives none or other things.
    """
    cls = type(task)
    file = getattr(sys.modules.get(cls.__module__), "__file__", None) or cls.__module__
    where = f"{file}: {cls.__name__}.prompts"
    if cls.prompts is Task.prompts:
        raise DataError(f"{where} is not written: give it prompts(self, split, n, *, seed) -> list[Prompt]")
    try:
        with ending_forks():
            given = task.prompts(split, n, seed=seed)
            found = list(itertools.islice(given, n)) if isinstance(given, Iterator) else given
    except UpslopeError:
        raise
    except Exception as error:
        line = line_in(error, Path(file))
        raise DataError(f"{where}, line {line}: {type(error).__name__}: {first_line(error)}") from error
    if not isinstance(found, list | tuple):
        raise DataError(f"{where} must give a list of upslope.Prompt objects; it gave a {type(found).__name__}")
    if n and not found:
        raise DataError(f"{where}({split!r}, {n}) gave no prompt: it must give {n}")
    wrong = next((i for i, prompt in enumerate(found) if not isinstance(prompt, Prompt)), None)
    if wrong is not None:
        got = f"number {wrong + 1} is a {type(found[wrong]).__name__}"
        raise DataError(f"{where} must give upslope.Prompt objects, as chat_prompt makes them; {got}")
    return list(found)


def load_reward(spec: str | Callable[..., Any]) -> RewardFunction:
    """The reward function that `spec` names: a built-in ("length:target=20") or one of a file ("my_rewards.py:fn").

    A function itself is judged with in this process.

    Raises ConfigError: unknown name or parameter, a file that does not load, or something that cannot be called with
    (prompts, completions).
    """
    if isinstance(spec, str) and (parsed := parse_spec(spec)).path is None and parsed.name in MODEL_REWARDS:
        raise ConfigError(
            f"reward '{parsed.name}' is a network: it runs beside the policy in a recipe that samples (--reward), "
            "not in a reward worker and not without a policy"
        )
    known = (*MODEL_REWARDS, TASK_REWARD)
    loaded = load(spec, REWARDS, kind="reward", takes=("prompts", "completions"), filled=FILLED, known=known)
    quick = bool(getattr(loaded.plain, "inline_safe", False)) and not loaded.own
    return RewardFunction(
        loaded.name,
        loaded.function,
        inline_safe=quick or not isinstance(spec, str),
        whole_group=bool(getattr(loaded.plain, "whole_group", False)),
    )


def parse_rewards(specs: Iterable[Any]) -> list[tuple[Any, float]]:
    """(spec, weight) pairs from texts such as "length:target=20@0.5", functions and such pairs; the weight is 1 unless
    given.

    "task" stands for the task's own reward. Raises ConfigError for a weight that is not a finite number.
    """
    pairs = []
    for item in specs:
        spec, weight = item if isinstance(item, tuple) else _split_weight(item)
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
            raise ConfigError(f"reward '{spec}': the weight must be a finite number, got {weight!r}")
        pairs.append((spec, float(weight)))
    return pairs


def check_reward(parsed: Spec) -> None:
    """ConfigError where a reward cannot be loaded. A file is read and not run: that is for a reward worker."""
    if parsed.path is not None:
        check_file(parsed)
    elif parsed.name not in (TASK_REWARD, *MODEL_REWARDS):
        load_reward(format_spec(parsed))


def _task_class(parsed: Spec) -> type[Task]:
    found = find(parsed, TASKS, kind="task")
    if not (inspect.isclass(found) and issubclass(found, Task)):
        raise ConfigError(f"'{parsed.label}' must be a class that extends upslope.tasks.Task, got {found!r:.80}")
    return found


def _construct(cls: type[Task], parsed: Spec) -> Task:
    check_params(cls, parsed.params, parsed.label)
    try:
        with ending_forks():
            task = cls(**parsed.params)
    except UpslopeError:
        raise
    except Exception as error:
        raise ConfigError(f"'{parsed.label}' could not be made: {type(error).__name__}: {first_line(error)}") from error
    if task.name == Task.name:
        task.name = cls.__name__
    return task


def _reasoning_alias(parsed: Spec) -> Task:
    """A bare reasoning-gym name. Only an installed reasoning-gym knows all names, so that the error says so."""
    from upslope.tasks import reasoning

    hint = f"no task is called '{parsed.name}'"
    try:
        names = reasoning.dataset_names()
    except ConfigError as error:
        near = suggest(parsed.name, TASKS)
        raise ConfigError(
            f"task '{parsed.name}' is not built in{near}; if it is one of reasoning-gym's: {error}"
        ) from None
    if parsed.name not in names:
        near = suggest(parsed.name, (*TASKS, *names))
        raise ConfigError(
            f"{hint}{near} (built in: {', '.join(TASKS)}; any reasoning-gym data set; your own: my_task.py:MyTask)"
        )
    if "name" in parsed.params:
        raise ConfigError(f"'{parsed.name}' is the data set's name already; leave name=... out")
    return _construct(reasoning.ReasoningTask, replace(parsed, params={"name": parsed.name, **parsed.params}))


def _split_weight(text: str) -> tuple[str, float]:
    match = _WEIGHT.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        return text, 1.0
    try:
        return match["spec"], float(match["weight"])
    except ValueError:
        raise ConfigError(f"reward '{text}': '{match['weight']}' after @ is not a number") from None

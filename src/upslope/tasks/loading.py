"""From the text on the command line to a task, with an error that says what to change."""

import inspect
import itertools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from upslope.config import suggestion
from upslope.errors import ConfigError, DataError, UpslopeError
from upslope.plugins import (
    Spec,
    check_params,
    ending_forks,
    find,
    first_line,
    format_spec,
    line_in,
    parse_spec,
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
_MADE: dict[str, Task] = {}


def load_task(spec: str | Task, **params: Any) -> Task:
    """The task that `spec` names; keyword arguments go over the parameters in the text.

    spec: a built-in ("gsm8k:path=train.jsonl"), a reasoning-gym data set ("chain_sum:min_terms=2,max_terms=2", the
    same as "reasoning:name=chain_sum,..."), or a class of a file ("my_task.py:MyTask:level=3"). The task remembers
    the full text in `.spec`, from which a worker process builds its equal. A task is given back as it is.

    Raises ConfigError: unknown name or parameter (with the nearest known one), or a file that does not load.
    """
    if isinstance(spec, Task):
        return _named(spec)
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
    return _named(task)


def _named(task: Task) -> Task:
    task.name = type(task).__name__ if task.name == Task.name else task.name
    return task


def _reasoning_alias(parsed: Spec) -> Task:
    """A bare reasoning-gym name. Only an installed reasoning-gym knows all names, so that the error says so."""
    from upslope.tasks import reasoning

    try:
        names = reasoning.dataset_names()
    except ConfigError as error:
        hint = f"task '{parsed.name}' is not built in{suggestion(parsed.name, TASKS)}"
        raise ConfigError(f"{hint}; if it is one of reasoning-gym's: {error}") from None
    if parsed.name not in names:
        hint = f"no task is called '{parsed.name}'{suggestion(parsed.name, (*TASKS, *names))}"
        raise ConfigError(
            f"{hint} (built in: {', '.join(TASKS)}; any reasoning-gym data set; your own: my_task.py:MyTask)"
        )
    if "name" in parsed.params:
        raise ConfigError(f"'{parsed.name}' is the data set's name already; leave name=... out")
    return _construct(reasoning.ReasoningTask, replace(parsed, params={"name": parsed.name, **parsed.params}))

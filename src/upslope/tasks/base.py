"""What a task is: prompts, the reward of a reply, and the reply that supervised learning imitates.

One object serves supervised learning, reinforcement learning and evaluation, so that the three agree on the problem,
the wording and the verdict. Free of torch: reward workers import this module.

`load_task` goes from the text on the command line to a task, with an error that says what to change.
"""

import hashlib
import importlib
import inspect
import itertools
import json
import random
import sys
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

from upslope.config import suggestion
from upslope.errors import ConfigError, DataError, UpslopeError
from upslope.plugins import Spec, check_params, ending_forks, find, first_line, format_spec, line_in, parse_spec
from upslope.types import Message, Prompt, Reward

T = TypeVar("T")
Split = Literal["train", "eval"]
RewardLike = float | Mapping[str, float] | Reward | None
RewardResult = Sequence[RewardLike]

SPLITS: tuple[Split, ...] = ("train", "eval")
KEY_BITS = 48
_BUCKETS = 10_000
FEWER = "ask for fewer (--num-train-prompts; of sft and seq2seq --num-examples; --eval-samples)"


class Task:
    """Base class of every task; a user's own task subclasses it (docs/tasks.md).

    `name` is what logs and error messages call it. `spec` is the text that rebuilds it in another process (set by
    `load_task`). `inline_safe` says that grading any text is quick and runs none of it, so no worker process is
    needed. `whole_group` says that a reward compares the completions of one group, so that they are never judged
    one by one. `divided` says that one named file is divided by content, so that its eval split is a part of it
    (`eval_fraction` of its content); `open_ended` that replies have no end of their own, so that a reply cut at its
    longest length is a whole one.
    """

    name: str = "task"
    spec: str | None = None
    inline_safe: bool = False
    whole_group: ClassVar[bool] = False
    divided: bool = False
    open_ended: bool = False
    eval_fraction: float = 0.2

    def prompts(self, split: Split, n: int, *, seed: int) -> list[Prompt]:
        """`n` distinct prompts; a pure function of (task parameters, split, n, seed).

        No eval prompt is ever a train prompt, whatever the two seeds: `select_prompts` gives this by content.
        """
        raise NotImplementedError(f"{type(self).__name__}.prompts is not written")

    def size(self, split: Split) -> int | None:
        """How many distinct prompts the split has; None where that is not counted, as with generated problems."""
        return None

    def remarks(self) -> list[str]:
        """Lines about the task's files that everybody who measures or trains with it is shown: rows left out, say."""
        return []

    def rewards(self, prompts: list[Prompt], completions: list[str]) -> RewardResult | Awaitable[RewardResult]:
        """One judgement per completion: a number, a dict of named summands, a Reward, or None (no verdict).

        May be `async def`. It must give the same judgement in any batch and order, and must never run model text.
        Unless written, it asks `judge` about each.
        """
        return [self.judge(prompt, text) for prompt, text in zip(prompts, completions, strict=True)]

    def judge(self, prompt: Prompt, text: str) -> RewardLike:
        """The judgement of one completion: as in `rewards`, which a task may write instead."""
        raise DataError(f"task '{self.name}' has no reward of its own; name one with --reward")

    def demonstration(self, prompt: Prompt) -> tuple[Message, ...]:
        """The whole conversation that supervised learning trains on, ending with the assistant's good reply."""
        raise DataError(f"task '{self.name}' has no demonstrations to imitate; train it with rewards, or use own data")

    @property
    def has_reward(self) -> bool:
        """Whether the task judges replies itself."""
        return type(self).rewards is not Task.rewards or type(self).judge is not Task.judge

    def count(self, texts: Iterable[str], split: Split) -> int:
        """How many different texts belong to the split by their content."""
        return sum(split_of(key, self.eval_fraction) == split for key in {content_key(text) for text in texts})

    def select(self, candidates: Iterable[Prompt], split: Split, n: int, **how: Any) -> list[Prompt]:
        """`select_prompts` under the task's name, with its eval_fraction."""
        return select_prompts(candidates, split, n, name=self.name, eval_fraction=self.eval_fraction, **how)


def prompt_text(prompt: Prompt) -> str:
    """The content of a prompt as one string: two prompts with the same text are the same prompt."""
    if prompt.text is not None:
        return prompt.text
    return json.dumps([[m.role, m.content] for m in prompt.messages], ensure_ascii=False)


def text_key(text: str) -> int:
    """A stable 48-bit number for exactly this text."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=KEY_BITS // 8).digest())


def content_key(text: str) -> int:
    """A stable 48-bit number for a text; letter case and white space do not matter."""
    return text_key(" ".join(text.split()).casefold())


def split_of(key: int, eval_fraction: float) -> Split:
    """The split a content key belongs to: the key's bucket decides, so that no content is in both."""
    return "eval" if key % _BUCKETS < round(eval_fraction * _BUCKETS) else "train"


def repeats_lines(counts: Mapping[str, tuple[int, int]], what: str) -> list[str]:
    """The remarks on files some of whose rows repeat others: path -> (how many, of how many rows)."""
    return [
        f"{path}: {repeats:,} of {rows:,} rows repeat{'s' if repeats == 1 else ''} a {what} and "
        f"{'is' if repeats == 1 else 'are'} left out"
        for path, (repeats, rows) in counts.items()
        if repeats
    ]


def check_split(split: str, n: int) -> None:
    """Refuse an unknown split and a negative count."""
    if split not in SPLITS:
        raise ConfigError(f"split must be 'train' or 'eval', not {split!r}")
    if n < 0:
        raise ConfigError(f"the number of prompts must not be negative, got {n}")


def checked_fraction(eval_fraction: float) -> float:
    """The share of the content that is held out, refused outside (0, 1)."""
    if not 1 / _BUCKETS <= eval_fraction <= 1 - 1 / _BUCKETS:
        raise ConfigError(f"eval_fraction must lie between 0 and 1, got {eval_fraction}")
    return eval_fraction


def derive_seed(*parts: object) -> int:
    """A 31-bit seed from any values; different values give unrelated seeds (adjacent integers too)."""
    return int.from_bytes(hashlib.blake2b("\x1f".join(map(repr, parts)).encode(), digest_size=8).digest()) >> 33


def shuffled(items: Iterable[T], *parts: object) -> list[T]:
    """The items in an order that `parts` decide, as in `derive_seed`."""
    order = list(items)
    random.Random(derive_seed(*parts)).shuffle(order)
    return order


def select_prompts(
    candidates: Iterable[Prompt],
    split: Split,
    n: int,
    *,
    name: str,
    eval_fraction: float = 0.2,
    identity: Callable[[Prompt], str] = prompt_text,
    patience: int = 2000,
) -> list[Prompt]:
    """The first `n` distinct candidates whose content belongs to `split`, keyed by their content.

    candidates: a deterministic stream, finite or endless. identity: the text that makes two prompts the same (the
    question without its instructions, say). patience: how many candidates in a row may bring nothing new before the
    problem space counts as exhausted.

    Raises DataError when fewer than `n` distinct prompts are found.
    """
    check_split(split, n)
    checked_fraction(eval_fraction)
    chosen: dict[int, Prompt] = {}
    if n == 0:
        return []
    stale = 0
    for prompt in candidates:
        key = content_key(identity(prompt))
        if key in chosen or split_of(key, eval_fraction) != split:
            stale += 1
            if stale >= patience:
                break
            continue
        stale = 0
        chosen[key] = replace(prompt, key=key)
        if len(chosen) == n:
            return list(chosen.values())
    raise DataError(
        f"task '{name}': only {len(chosen)} distinct {split} prompts exist where {n} were asked for; {FEWER}, "
        f"widen the task's parameters, or change eval_fraction (now {eval_fraction})"
    )


def answered(prompt: Prompt, reply: str) -> tuple[Message, ...]:
    """The conversation that ends with `reply`; a plain text is the user's turn."""
    asked = prompt.messages if prompt.text is None else (Message("user", prompt.text),)
    return (*asked, Message("assistant", reply))


def chat_prompt(question: str, *, system: str = "", instruction: str = "", key: int = 0, **fields: Any) -> Prompt:
    """A prompt of one user turn: the question, then the instruction on a line of its own; `system` goes first."""
    content = f"{question}\n{instruction}" if instruction else question
    turns = (Message("system", system),) if system else ()
    return Prompt(key, messages=(*turns, Message("user", content)), **fields)


TASKS: dict[str, str] = {
    "reasoning": "upslope.tasks.reasoning:ReasoningTask",
    "gsm8k": "upslope.tasks.gsm8k:GSM8K",
    "sentiment": "upslope.tasks.style:Sentiment",
    "strict_json": "upslope.tasks.style:StrictJson",
    "random_walks": "upslope.tasks.toys:RandomWalks",
    "key_door": "upslope.tasks.toys:KeyDoor",
    "pairs": "upslope.tasks.pairs:Pairs",
    "phonemes": "upslope.tasks.pairs:Phonemes",
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
        cls = find(parsed, TASKS, kind="task")
        if not (inspect.isclass(cls) and issubclass(cls, Task)):
            raise ConfigError(f"'{parsed.label}' must be a class that extends upslope.tasks.Task, got {cls!r:.80}")
        task = _construct(cls, parsed)
    path = parsed.path and str(Path(parsed.path).expanduser().resolve())
    task.spec = format_spec(replace(parsed, path=path))
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
    for number, prompt in enumerate(found, 1):
        if not isinstance(prompt, Prompt):
            got = f"number {number} is a {type(prompt).__name__}"
            raise DataError(f"{where} must give upslope.Prompt objects, as chat_prompt makes them; {got}")
    return list(found)


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
    reasoning = importlib.import_module("upslope.tasks.reasoning")
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

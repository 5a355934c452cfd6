"""What is distilled on: prompts for the student to answer, and completions where the data has them."""

from dataclasses import dataclass, replace
from typing import Any

from upslope.build import Policy
from upslope.data.chat import TooLongError
from upslope.data.examples import example_of
from upslope.data.records import Content, Record, read_records
from upslope.data.template import Tools
from upslope.errors import ConfigError
from upslope.loop.kept import DataAccount, Kept, shared_out, tell_task, too_long
from upslope.loop.prompts import demonstrations, fitting
from upslope.options import DistillOptions
from upslope.runs.progress import counted
from upslope.tasks.base import Task, prompts_of
from upslope.types import Example, Prompt


@dataclass(frozen=True, slots=True)
class Item:
    """A prompt to answer (None: a document), the answer as a training sequence (None: none), and the row's tools."""

    key: int
    prompt: Prompt | None
    example: Example | None
    tools: Tools = ()


def load_items(
    options: DistillOptions, tokenizer: Any, task: Task | None
) -> tuple[list[Item], list[Item], DataAccount]:
    """Training and held-out items of a task or of data files, and what became of every row.

    A task's held-out problems are its own affair. Raises ConfigError, DataError: on_policy_fraction asks for prompts or
    completions that the source does not have.
    """
    o = options
    if task is not None:
        prompts = prompts_of(task, "train", o.num_train_prompts, seed=o.seed)
        tell_task(task, o.eval_samples)
        if o.on_policy_fraction == 1:
            found = Kept(f"task {task.name}", [Item(p.key, p, None) for p in prompts])
        else:
            shown = demonstrations(tokenizer, task, prompts, o.max_length)
            found = replace(shown, rows=[Item(p.key, p, example) for p, example in shown.rows])
        return found.rows, [], DataAccount({"train": found.split})
    assert o.data is not None
    data = _items(o, tokenizer, o.data)
    given = _items(o, tokenizer, o.eval_data) if o.eval_data is not None else None
    # whatever eval_samples is: a resumed run may change that, not what it trains on
    items, held_out, account = shared_out(data, given, held=len(data.rows) // 10, samples=o.eval_samples)
    _check(o, o.data, items)
    return items, held_out, account


def with_room(
    options: DistillOptions, policy: Policy, items: list[Item], held_out: list[Item], account: DataAccount
) -> tuple[list[Item], list[Item], DataAccount, int]:
    """The items whose prompt, where the student may have to answer it, leaves room for the reply; the longest's tokens.

    The held-out ones come second, as in `load_items`; the account tells of those left out.
    """
    o, splits, kept, longest = options, dict(account.splits), [], 1

    def asked(item: Item) -> tuple[Prompt | None, Tools]:
        return (item.prompt if o.on_policy_fraction or item.example is None else None), item.tools

    for name, some in (("train", items), ("eval", held_out)):
        if some:
            found, length = fitting(policy, splits[name].source, some, o.max_completion_length, asked)
            longest, some, split = max(longest, length), found.rows, splits[name]
            lost, notes = {**split.dropped, **found.dropped}, {**split.notes, **found.notes}
            splits[name] = replace(split, rows=len(some), dropped=lost, notes=notes)
        kept.append(some)
    return kept[0], kept[1], DataAccount(splits, account.further), longest


def _items(options: DistillOptions, tokenizer: Any, source: str) -> Kept[Item]:
    found, lengths = [], []
    for key, record in enumerate(counted(read_records(source, columns=options.columns), f"encoding {source}")):
        try:
            example = None if record.kind == "prompt" else example_of(record, tokenizer, max_length=options.max_length)
        except TooLongError as error:
            lengths.append(error.length)
            continue
        found.append(Item(key, _prompt(record, key), example, record.tools))
    return Kept(source, found, *too_long(lengths, options.max_length))


def _prompt(record: Record, key: int) -> Prompt | None:
    """What comes before the answer: the prompt, or the conversation before its last assistant turn."""
    if record.prompt is not None:
        return _as_prompt(record.prompt, key)
    turns = list(record.messages)
    while turns and turns[-1].role != "assistant":
        turns.pop()
    return Prompt(key, messages=tuple(turns[:-1])) if len(turns) > 1 else None


def _as_prompt(content: Content, key: int) -> Prompt:
    return Prompt(key, text=content) if isinstance(content, str) else Prompt(key, messages=content)


def _check(options: DistillOptions, source: str, items: list[Item]) -> None:
    share = options.on_policy_fraction
    if share > 0 and any(item.prompt is None for item in items):
        raise ConfigError(
            f"{source}: rows without a prompt give the student nothing to answer; set on_policy_fraction = 0, or give "
            "rows with prompts"
        )
    if share < 1 and any(item.example is None for item in items):
        raise ConfigError(
            f"{source}: rows without a completion cannot fill the off-policy share; set on_policy_fraction = 1, or "
            "give rows with prompt and completion"
        )

"""A run's prompts, all of them encoded before its first step: those that leave no room for the reply are left out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from upslope.build import Policy, make_engine
from upslope.data.chat import TooLongError, encode_completion, encode_conversation, encode_prompt
from upslope.data.examples import examples_of
from upslope.data.records import read_records
from upslope.data.template import Tools
from upslope.engine.request import check_prompt
from upslope.errors import ConfigError, DataError
from upslope.loop.kept import DataAccount, Kept, tell_plain, tell_task, too_long
from upslope.options import RLOptions
from upslope.rollout import collect
from upslope.runs.progress import counted, told
from upslope.tasks.base import Task, prompts_of
from upslope.types import Example, Prompt, RolloutGroup, SamplingParams
from upslope.workers.rewards import make_scorer

NO_ROOM = "too long for the context"
Row = TypeVar("Row")


@dataclass(frozen=True, slots=True)
class Asked:
    """The problems of a run, those to train on and those held out, with the tokens of the longest of all."""

    train: list[Prompt]
    held_out: list[Prompt]
    longest: int
    account: DataAccount


def ask(options: RLOptions, policy: Policy, task: Task) -> Asked:
    """All the prompts that a run asks its task for. DataError: fewer exist, one cannot be encoded, or none fits."""
    o, source = options, f"task {task.name}"
    found = prompts_of(task, "train", o.num_train_prompts, seed=o.seed)
    train, longest = fitting(policy, source, found, o.max_completion_length)
    held_out, longest_held_out = held_out_of(task, policy, o.eval_samples, o.max_completion_length)
    tell_task(task, o.eval_samples)
    account = DataAccount({"train": train.split}).and_held_out(held_out)
    rows = held_out.rows if held_out is not None else []
    return Asked(train.rows, rows, max(longest, longest_held_out), account)


def held_out_of(task: Task, policy: Policy, samples: int, max_tokens: int) -> tuple[Kept[Prompt] | None, int]:
    """A task's held-out problems that fit, and the tokens of the longest; none where none are asked for."""
    if not samples:
        return None, 0
    found = prompts_of(task, "eval", samples, seed=0)
    return fitting(policy, f"task {task.name}, held out", found, max_tokens)


def fitting(
    policy: Policy,
    source: str,
    rows: Sequence[Row],
    max_tokens: int,
    prompt_of: Callable[[Any], tuple[Prompt | None, Tools]] = lambda prompt: (prompt, ()),
) -> tuple[Kept[Row], int]:
    """The rows whose prompt leaves `max_tokens` of the model's context, and the tokens of the longest of them.

    prompt_of: a row's prompt (None: it has none and fits) and the tools offered in it. DataError: a prompt that cannot
    be encoded, by number and beginning; no row fits. ConfigError: no prompt at all could.
    """
    model, spec = policy.model, policy.model.spec
    # an encoder-decoder's source leaves the target its whole room
    limit = spec.max_positions - (1 if model.whole_prompts else max_tokens)
    if limit < 1:
        raise ConfigError(
            f"max_completion_length {max_tokens} leaves no room for a prompt in the model's context of "
            f"{spec.max_positions} tokens: lower it"
        )
    kept: list[Row] = []
    longest, lost, worst, most = 0, 0, 0, 0
    for number, row in enumerate(counted(rows, f"encoding {source}", unit="prompt"), 1):
        prompt, tools = prompt_of(row)
        if prompt is not None:
            try:
                tokens = encode_prompt(policy.tokenizer, prompt, tools=tools)
                if len(tokens) > limit:
                    lost += 1
                    worst, most = max((worst, most), (len(tokens), prompt.key))
                    continue
                model.check_prompt(check_prompt(tokens, spec.input_vocab_size, spec.max_positions))
            except DataError as error:
                asked = prompt.text if prompt.text is not None else "".join(m.content for m in prompt.messages[-1:])
                raise DataError(f"{source}, prompt {number} of {len(rows)} ({asked[:40]!r}): {error}") from error
            longest = max(longest, len(tokens))
        kept.append(row)
    note = f"{limit:,} tokens beside max_completion_length {max_tokens:,}; the longest, prompt {most}, has {worst:,}"
    dropped, notes = ({NO_ROOM: lost}, {NO_ROOM: note}) if lost else ({}, {})
    return Kept(source, kept, dropped, notes), longest


def demonstrations(tokenizer: Any, task: Task, prompts: list[Prompt], max_length: int) -> Kept[tuple[Prompt, Example]]:
    """Each prompt with the training sequence of its demonstration: a conversation, or a text and its continuation.

    Those that are too long are left out and counted.
    """
    found, lengths = [], []
    for prompt in prompts:
        turns = task.demonstration(prompt)
        try:
            if prompt.text is not None:
                example = encode_completion(tokenizer, prompt.text, turns[-1].content, max_length=max_length)
            else:
                example = encode_conversation(tokenizer, turns, max_length=max_length)
        except TooLongError as error:
            lengths.append(error.length)
            continue
        found.append((prompt, example))
    return Kept(f"task {task.name}", found, *too_long(lengths, max_length))


def encoded(source: str, tokenizer: Any, max_length: int, columns: Sequence[str] = ()) -> Kept[Example]:
    """The training sequences of a file's rows; those that are too long are left out and counted."""
    with told(f"reading {source}"):
        records = read_records(source, columns=columns)
    tell_plain(records, tokenizer, source)
    found = examples_of(counted(records, f"encoding {source}"), tokenizer, max_length=max_length)
    return Kept(source, found.examples, *too_long([length for _, length in found.too_long], max_length))


def held_out_groups(policy: Policy, task: Task, samples: int, max_tokens: int) -> list[RolloutGroup]:
    """Greedy, judged replies to the task's held-out problems."""
    found, longest = held_out_of(task, policy, samples, max_tokens)
    prompts = found.rows if found is not None else []
    engine = make_engine(policy, sequences=samples, longest=longest + max_tokens)
    policy.model.eval()
    with make_scorer(task) as judge, torch.no_grad():
        groups, _ = collect(
            engine, policy.tokenizer, judge, prompts, SamplingParams(max_tokens=max_tokens, temperature=0.0)
        )
    return groups

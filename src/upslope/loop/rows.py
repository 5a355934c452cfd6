"""Training sequences of demonstrations and of files, and greedy replies to held-out problems."""

from collections.abc import Sequence
from typing import Any

import torch

from upslope.build import Policy, make_engine
from upslope.data.chat import TooLongError, encode_completion, encode_conversation
from upslope.data.examples import examples_of
from upslope.data.records import read_records
from upslope.loop.kept import Kept, tell_plain, too_long
from upslope.loop.prompts import held_out_of
from upslope.rollout import collect
from upslope.runs.progress import counted, told
from upslope.tasks.base import Task
from upslope.types import Example, Prompt, RolloutGroup, SamplingParams
from upslope.workers.rewards import make_scorer


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

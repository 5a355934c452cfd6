"""The rows of `upslope generate`: what was asked, what came, and the file in which a killed run goes on."""

import fcntl
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from upslope.atomic import refuse_other_than_file, saving, write_atomic
from upslope.config import dump, load
from upslope.data.records import Record, read_records
from upslope.data.template import Tools
from upslope.errors import DataError, RunError
from upslope.options import GenerateOptions
from upslope.runs.lines import MetricLines, read_lines
from upslope.runs.lock import granted
from upslope.types import Completion, Message, Prompt

OWN = ("prompt", "completion", "completions", "reference", "finish_reason", "tokens", "logprobs", "top_logprobs")
# What may differ between the two halves of a resumed file: it changes no reply, or (prompts) each row is compared.
_FREE = {"prompts", "output", "resume", "max_batch", "kv_cache_gb", "json", "stream"}


@dataclass(frozen=True, slots=True)
class Asked:
    """One prompt and where it stands; `columns` of its row go into the answer's."""

    where: str
    prompt: Prompt
    tools: Tools = ()
    columns: Mapping[str, Any] = field(default_factory=dict)

    @property
    def content(self) -> str | list[dict[str, Any]]:
        """As the model was asked: a text as it stands, or the messages that went through its chat template."""
        return self.prompt.text if self.prompt.text is not None else [m.as_mapping() for m in self.prompt.messages]


def ask_file(path: str, *, templated: bool, system: str | None, columns: Sequence[str] = ()) -> list[Asked]:
    """The prompts of a file, in order.

    Raises DataError naming the row: of a kind without a prompt, a conversation that ends with the reply or brings a
    system turn besides `system`, messages for a model without a template, a column that the answer needs itself.
    """
    records = read_records(path, columns=columns)
    return [_ask_record(record, templated, system, key) for key, record in enumerate(records)]


def _ask_record(record: Record, templated: bool, system: str | None, key: int) -> Asked:
    where, content = record.where, record.text if record.kind == "text" else record.messages or record.prompt
    if record.kind not in ("prompt", "completion", "text", "messages") or content is None:
        raise DataError(f"{where}: a row of kind {record.kind!r} is no prompt; give prompt, messages or text")
    if clash := sorted(set(OWN) & set(record.extra)):
        raise DataError(f"{where}: the column {clash[0]!r} would be written over by the reply's: rename it")
    columns = dict(record.extra)
    if record.completion is not None:
        given = record.completion
        columns["reference"] = given if isinstance(given, str) else [m.as_mapping() for m in given]
    if record.tools:
        columns["tools"] = list(record.tools)
    prompt = prompt_of(content, where=where, templated=templated, system=system, key=key)
    return Asked(where, prompt, record.tools, columns)


def prompt_of(
    content: str | tuple[Message, ...], *, where: str, templated: bool, system: str | None, key: int = 0
) -> Prompt:
    """A text, or a conversation: a user turn of the chat template, or as it stands. DataError: see `ask_file`."""
    if not templated:
        if isinstance(content, str):
            return Prompt(key, text=content)
        raise DataError(f"{where}: messages need a chat template; give the text as it is to be continued")
    turns = (Message("user", content),) if isinstance(content, str) else content
    if turns[-1].role == "assistant":
        raise DataError(
            f"{where}: the conversation ends with the assistant's reply: end it with what is to be answered"
        )
    if system is not None:
        if turns[0].role == "system":
            raise DataError(f"{where}: the conversation has a system turn of its own, and --system gives another")
        turns = (Message("system", system), *turns)
    return Prompt(key, messages=turns)


def row_of(asked: Asked, completions: Sequence[Completion], options: GenerateOptions, tokenizer: Any) -> dict[str, Any]:
    """{prompt, completion, finish_reason, ...}; several replies lie in a list `completions`."""
    replies = [_reply(completion, options.logprobs, tokenizer) for completion in completions]
    answer = replies[0] if options.num_return_sequences == 1 else {"completions": replies}
    return {"prompt": asked.content, **answer, **asked.columns}


def _reply(completion: Completion, logprobs: int | None, tokenizer: Any) -> dict[str, Any]:
    reply: dict[str, Any] = {"completion": completion.text, "finish_reason": completion.finish_reason}
    if logprobs is None:
        return reply
    reply |= {"tokens": completion.tokens, "logprobs": completion.policy_logprobs}
    if logprobs:
        reply["top_logprobs"] = [
            [
                {"id": i, "token": tokenizer.decode([i], skip_special_tokens=False), "logprob": logprob}
                for i, logprob in list(alternatives.items())[:logprobs]
            ]
            for alternatives in completion.top_logprobs or []
        ]
    return reply


@contextmanager
def opened_rows(options: GenerateOptions, asked: Sequence[Asked]) -> Iterator[tuple[MetricLines, int]]:
    """--output: whole rows only, each durable once `flush` returned, beside them the options they were made with.

    Yields the lines, and how many rows were there before. Only one process writes at a time: the lock is the kernel's
    and ends with it. Raises RunError: the file exists and is not to be resumed, another process writes it, or what is
    in it was made with other options or from other prompts.
    """
    assert options.output is not None
    path = Path(options.output)
    made_with = path.with_name(f"{path.name}.toml")
    with saving(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not options.resume:
            raise RunError(f"{path}: exists; go on with it by --resume, or choose another --output")
        refuse_other_than_file(path)
        lock = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        if not granted(fcntl.flock, lock, fcntl.LOCK_EX):
            raise RunError(f"{path}: another process is writing it; wait until it ends, or stop it")
        with closing(MetricLines(path)) as lines:
            done = _check_rows(path, asked)
            if done:
                _check_options(options, made_with)
            else:
                write_atomic(made_with, dump(replace(options, resume=False)))
            yield lines, done
    finally:
        os.close(lock)


def _check_rows(path: Path, asked: Sequence[Asked]) -> int:
    """How many of the prompts are answered in the file, whose rows must be theirs."""
    done = 0
    for number, row in enumerate(read_lines(path), 1):
        if number > len(asked):
            raise RunError(f"{path}:{number}: more rows than the {len(asked)} prompts; choose another --output")
        if row.get("prompt") != asked[number - 1].content:
            raise RunError(f"{path}:{number}: not the prompt of {asked[number - 1].where}; choose another --output")
        done = number
    return done


def _check_options(options: GenerateOptions, made_with: Path) -> None:
    if not made_with.is_file():
        raise RunError(f"{made_with}: gone, and with it what the rows were made with; choose another --output")
    before = load(GenerateOptions, made_with)
    for name in (f.name for f in fields(options) if f.name not in _FREE):
        then, now = getattr(before, name), getattr(options, name)
        if then != now:
            raise RunError(
                f"{made_with}: the rows there were made with {name} = {then!r}, now it is {now!r}: "
                f"say the same again (--config {made_with} --resume), or choose another --output"
            )

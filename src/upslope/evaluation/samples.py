"""What is judged: rows with their references, and the texts that answer them, generated now or read from a file."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from upslope.data.chat import encode_prompt
from upslope.data.readers import json_of, rows_of, text_of
from upslope.data.records import record_of
from upslope.data.template import Tools
from upslope.engine.engine import Engine
from upslope.errors import DataError, located
from upslope.types import Completion, Message, Prompt, SamplingParams


@dataclass(frozen=True, slots=True)
class Sample:
    """A prompt (None where the file gave references only) and the texts that would be right."""

    where: str
    references: tuple[str, ...]
    prompt: Prompt | None = None
    tools: Tools = ()


def read_samples(path: str, *, columns: Sequence[str] = ()) -> list[Sample]:
    """The rows of a file.

    A row has a prompt (`prompt`, a text taken as it stands or messages) and what is right: `references` (a list of
    texts), `reference`, `completion` or `answer`, the first of these it has; or it is a conversation `messages` whose
    last turn is the right reply. A .txt file holds one reference per line and no prompts. DataError naming file, row,
    key and remedy.
    """
    if not columns and (lines := _lines(path)) is not None:
        return [Sample(where, (line,)) for where, line in lines]
    found = [_sample(i, where, row) for i, (where, row) in enumerate(rows_of(path, columns=columns))]
    if not found:
        raise DataError(f"{path}: holds no rows")
    return found


def _sample(key: int, where: str, row: Mapping[str, Any]) -> Sample:
    rest = {name: value for name, value in row.items() if name not in ("references", "reference")}
    record = record_of(rest, where)
    if record.messages:
        *asked, reply = record.messages
        if reply.role != "assistant" or not asked:
            raise DataError(f"{where}: 'messages' must be a question and end with the assistant's right reply")
        if reply.tool_calls:
            raise DataError(f"{where}: the right reply has tool_calls, which are not compared; give one that is a text")
        return Sample(where, (reply.content,), Prompt(key, tuple(asked)), record.tools)
    if record.prompt is None:
        raise DataError(
            f"{where}: a row of kind {record.kind!r} asks nothing; give prompt, and completion or references"
        )
    prompt = record.as_prompt(key)
    references = _references(where, row, record.completion)
    return Sample(where, references, replace(prompt, answer=references[0], metadata={}), record.tools)


def _references(where: str, row: Mapping[str, Any], completion: str | tuple[Message, ...] | None) -> tuple[str, ...]:
    if "references" in row:
        listed = row["references"]
        if isinstance(listed, str) and listed.lstrip().startswith("["):  # a CSV cell
            listed = json_of(listed, where)
        if not isinstance(listed, (list, tuple)) or not listed or not all(isinstance(x, str) for x in listed):
            raise DataError(f"{where}: 'references' must be a list of at least one text")
        return tuple(listed)
    for key in ("reference", "completion", "answer"):
        if (value := completion if key == "completion" else row.get(key)) is not None:
            return (_text(where, key, value),)
    raise DataError(f"{where}: nothing says what is right; add completion, reference, references or answer")


def _text(where: str, key: str, value: Any) -> str:
    """A text, or the one turn of a conversation that is a text."""
    if isinstance(value, str):
        return value
    if isinstance(value, (list, tuple)) and len(value) == 1:
        turn = value[0]
        turn = turn.as_mapping() if isinstance(turn, Message) else turn
        content = turn.get("content") if isinstance(turn, dict) and not turn.get("tool_calls") else None
        if isinstance(content, str):
            return content
    raise DataError(f"{where}: {key!r} must be a text or one message with a text")


def read_hypotheses(path: str, samples: Sequence[Sample]) -> list[str]:
    """One text per sample, in their order: the lines of a .txt file, or rows with `completion`.

    Such rows are what `upslope generate --output` and `upslope eval --samples` write. Where both sides have a text as
    prompt it must be the same. DataError naming file and row: too few or too many, a missing key, another prompt.
    """
    lines = _lines(path)
    rows = rows_of(path) if lines is None else ((where, {"completion": line}) for where, line in lines)
    found: list[tuple[str, Any, str]] = []
    for where, row in rows:
        if "completion" not in row:
            have = ", ".join(map(repr, row)) or "none"
            raise DataError(f"{where}: no 'completion' to judge (keys: {have}); name the text's column completion")
        found.append((where, row.get("prompt"), _text(where, "completion", row["completion"])))
    if len(found) != len(samples):
        raise DataError(
            f"{path}: holds {len(found)} hypotheses for {len(samples)} references; give one each, in the same order"
        )
    for (where, prompt, _), sample in zip(found, samples, strict=True):
        asked = None if sample.prompt is None else sample.prompt.text
        if isinstance(prompt, str) and asked is not None and prompt != asked:
            raise DataError(f"{where}: 'prompt' is not that of {sample.where}: put the rows in the same order")
    return [text for _, _, text in found]


def _lines(path: str) -> list[tuple[str, str]] | None:
    """(where, line) of every line of a .txt file; None where the name is that of another."""
    if not Path(path).name.lower().removesuffix(".gz").endswith(".txt"):
        return None
    file = Path(path).expanduser()
    if not file.is_file():
        raise DataError(f"{path}: no such file")
    lines = text_of(file).removesuffix("\n").split("\n")
    return [(f"{path}:{i}", line.removesuffix("\r")) for i, line in enumerate(lines, 1)]


def encode_samples(tokenizer: Any, samples: Sequence[Sample]) -> list[list[int]]:
    """The prompt's tokens of each sample. DataError naming the row: it has no prompt, or the template refuses it."""
    tokens = []
    for sample in samples:
        if sample.prompt is None:
            raise DataError(f"{sample.where}: has no prompt to answer; give rows with prompt, or --hypotheses")
        with located(sample.where, DataError):
            tokens.append(encode_prompt(tokenizer, sample.prompt, tools=sample.tools))
    return tokens


def generate(
    engine: Engine,
    samples: Sequence[Sample],
    tokens: Sequence[Sequence[int]],
    params: SamplingParams,
    *,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Completion]:
    """One completion per sample. DataError naming the row whose prompt does not fit the model."""
    spec = engine.model.spec
    for sample, prompt in zip(samples, tokens, strict=True):
        if len(prompt) >= spec.max_positions:
            raise DataError(
                f"{sample.where}: a prompt of {len(prompt)} tokens leaves no room in the model's {spec.max_positions} "
                "positions; shorten it"
            )
        with located(sample.where, DataError):
            engine.model.check_prompt(prompt)
    keys = [sample.prompt.key for sample in samples if sample.prompt is not None]
    return [found[0] for found in engine.generate(tokens, params, keys=keys, on_progress=on_progress)]


def sample_rows(samples: Iterable[Sample], texts: Iterable[str]) -> str:
    """JSONL: {prompt, completion, references} of each sample, which `read_samples` and `read_hypotheses` read."""
    lines = []
    for sample, text in zip(samples, texts, strict=True):
        row: dict[str, Any] = {}
        if sample.prompt is not None:
            turns = [m.as_mapping() for m in sample.prompt.messages]
            row["prompt"] = sample.prompt.text if sample.prompt.text is not None else turns
        lines.append(json.dumps({**row, "completion": text, "references": list(sample.references)}, ensure_ascii=False))
    return "".join(f"{line}\n" for line in lines)

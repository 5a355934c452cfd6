"""GSM8K: grade-school word problems with a worked solution that ends in `#### answer` (2110.14168, MIT).

The data are given by path, one JSON object per line with `question` and `answer`; any file in this form will do.
"""

import logging
import re
from fractions import Fraction
from pathlib import Path
from typing import Any

from upslope.data.readers import json_of, lines_of
from upslope.errors import ConfigError, DataError
from upslope.extras import require
from upslope.tasks.base import (
    FEWER,
    Split,
    Task,
    answered,
    chat_prompt,
    check_split,
    checked_fraction,
    content_key,
    repeats_lines,
    shuffled,
    split_of,
)
from upslope.types import Message, Prompt, Reward

INSTRUCTION = 'Solve the problem step by step. End with "#### " and the final number.'
MAX_ANSWER_CHARACTERS = 80

_MARKED = re.compile(r"####[ \t]*([^\n]+)")
_STATED = re.compile(r"(?i:\banswer\s*(?:is|:|=))\s*([^\n]+)")
_NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?(?:\s*/\s*\d+)?|-?\$?\.\d+")
_PLAIN = re.compile(r"(-?)\s*\$?\s*(-?)(\d+(?:,\d{3})*|\d*)(\.\d*)?(?:\s*/\s*(\d+))?\s*%?")
_CALCULATOR = re.compile(r"<<[^<>]*>>")
_LONG_POWER = re.compile(r"(\^|\*\*)\s*[{(]?\s*-?\d{3,}|!|(\^|\*\*)[^\^*]*(\^|\*\*)|\d{25,}")


class GSM8K(Task):
    """Word problems graded by their final number.

    path: the training file; eval_path: the held-out file, all of which is eval. Rows of `path` that are in `eval_path`
    too are never trained on. With `path` alone its rows are divided by content (eval_fraction of them are eval); with
    `eval_path` alone there is nothing to train on.
    strict: only `#### x` or a box counts as an answer; otherwise "the answer is x" and the last number do too.
    instruction, system: the wording around the question.

    A question is the same in other letter case and white space; rows that repeat one are left out and counted, and a
    DataError where their answers differ.

    Plain numbers are compared exactly; everything else (LaTeX, units) by math-verify.
    """

    name = "gsm8k"

    def __init__(
        self,
        path: str = "",
        *,
        eval_path: str = "",
        strict: bool = False,
        instruction: str = INSTRUCTION,
        system: str = "",
        eval_fraction: float = 0.2,
    ) -> None:
        self.eval_fraction = checked_fraction(eval_fraction)
        if not path and not eval_path:
            raise ConfigError("'gsm8k' needs its data: gsm8k:path=train.jsonl, and eval_path=test.jsonl if you have it")
        require("tasks", "math_verify")
        self.path, self.eval_path = path, eval_path
        self.strict = strict
        self.instruction, self.system = instruction, system
        self.divided = not eval_path
        self._rows: dict[str, list[Prompt]] = {}

    def size(self, split: Split) -> int:
        """How many different questions the split has."""
        return len({prompt.key for prompt in self._candidates(split) if self._belongs(prompt, split)})

    def remarks(self) -> list[str]:
        """How many rows of each file repeat a question."""
        read = {path: self._read(path) for path in (self.path, self.eval_path) if path}
        counts = {path: (len(rows) - len({prompt.key for prompt in rows}), len(rows)) for path, rows in read.items()}
        return repeats_lines(counts, "question")

    def prompts(self, split: Split, n: int, *, seed: int) -> list[Prompt]:
        """`n` different questions of the split in an order given by `seed`. DataError: it has fewer."""
        check_split(split, n)
        if n and split == "train" and not self.path:
            raise DataError(
                f"gsm8k: eval_path={self.eval_path} is held out and there is no path to train on; add path=train.jsonl"
            )
        different: dict[int, Prompt] = {}
        for prompt in shuffled(self._candidates(split), "gsm8k", split, seed):
            if self._belongs(prompt, split):
                different.setdefault(prompt.key, prompt)
        if len(different) < n:
            hint = f", or change eval_fraction (now {self.eval_fraction})" if self.divided else ""
            raise DataError(
                f"gsm8k: {len(different)} distinct {split} rows exist where {n} were asked for; {FEWER}{hint}"
            )
        return list(different.values())[:n]

    def demonstration(self, prompt: Prompt) -> tuple[Message, ...]:
        """The worked solution without the calculator marks (<<48/2=24>>)."""
        return answered(prompt, prompt.metadata["solution"])

    def judge(self, prompt: Prompt, text: str) -> Reward:
        """1 and correct if the final number is right, else 0; `answered` says whether one was found."""
        found = extract_answer(text, strict=self.strict)
        correct = found is not None and same_number(found, prompt.answer or "")
        return Reward(float(correct), {"correct": float(correct), "answered": float(found is not None)}, correct)

    def _candidates(self, split: Split) -> list[Prompt]:
        """The rows that a split is taken from, in the order of their file."""
        if self.eval_path and split == "eval":
            return self._read(self.eval_path)
        held_out = {prompt.key for prompt in self._read(self.eval_path)} if self.eval_path else set()
        return [prompt for prompt in self._read(self.path) if prompt.key not in held_out] if self.path else []

    def _belongs(self, prompt: Prompt, split: Split) -> bool:
        return not self.divided or split_of(prompt.key, self.eval_fraction) == split

    def _read(self, path: str) -> list[Prompt]:
        """A file's rows. DataError names file and line, also where two rows ask the same and have different answers:
        which one counted would be chance."""
        if path not in self._rows:
            rows = {f"{path}:{number}": line for number, line in lines_of(Path(path).expanduser())}
            prompts = {where: self._prompt(json_of(line, where), where) for where, line in rows.items()}
            first: dict[int, str] = {}
            for where, prompt in prompts.items():
                other = first.setdefault(prompt.key, where)
                mine, theirs = str(prompt.answer), str(prompts[other].answer)
                if mine != theirs and not same_number(mine, theirs):
                    raise DataError(
                        f"{where}: asks what {other} asks and answers {mine[:40]!r}, not {theirs[:40]!r}: "
                        "correct one, or remove it"
                    )
            self._rows[path] = list(prompts.values())
        return self._rows[path]

    def _prompt(self, record: Any, where: str) -> Prompt:
        for key in ("question", "answer"):
            if not isinstance(record, dict) or not isinstance(record.get(key), str):
                raise DataError(f"{where}: the key '{key}' with a text is missing")
        marked = _MARKED.findall(record["answer"])
        if not marked:
            raise DataError(f"{where}: 'answer' has no '#### ' line with the final number")
        return chat_prompt(
            record["question"],
            system=self.system,
            instruction=self.instruction,
            key=content_key(record["question"]),
            answer=marked[-1].strip().replace(",", ""),
            metadata={"question": record["question"], "solution": _CALCULATOR.sub("", record["answer"])},
        )


def extract_answer(text: str, *, strict: bool) -> str | None:
    """The final answer in a reply: the last `#### x`, else the last box, else (not strict) a stated or last number."""
    marked = _MARKED.findall(text)
    if marked:
        number = None if "\\" in marked[-1] else _NUMBER.search(marked[-1])
        return number[0] if number else marked[-1].strip()
    boxed = last_box(text)
    if boxed is not None or strict:
        return boxed
    stated = _STATED.findall(text)
    numbers = _NUMBER.findall(stated[-1])[:1] if stated else []
    return next(reversed(numbers or _NUMBER.findall(text)), None)


def last_box(text: str) -> str | None:
    """The content of the last complete \\boxed{...}, braces matched; None if there is none."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth = 0
    for position in range(start + 6, len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[start + 7 : position].strip()
    return None


def plain_number(text: str) -> Fraction | None:
    """The exact value of "1,234", "$12.50", "-3/4" or "20%" (the number before the sign); None for anything else."""
    match = _PLAIN.fullmatch(text.strip().rstrip("."))
    if match is None or not (match[3] or (match[4] or ".") != ".") or int(match[5] or 1) == 0:
        return None
    value = Fraction(f"{match[3].replace(',', '') or '0'}{match[4] or ''}".rstrip(".")) / int(match[5] or 1)
    return -value if bool(match[1]) != bool(match[2]) else value


def same_number(found: str, gold: str) -> bool:
    """Whether a reply's answer equals the gold one. Total: long texts and towers of powers are wrong, not slow."""
    if len(found) > MAX_ANSWER_CHARACTERS:
        return False
    ours, theirs = plain_number(found), plain_number(gold)
    if ours is not None and theirs is not None:
        return ours == theirs
    if _LONG_POWER.search(found):
        return False
    # Without its alarm clock, which is swallowed as 'wrong' and works in the main thread only: the judge's time limit
    # kills what takes too long, and counts it as an error.
    from math_verify import parse, verify

    for name in ("math_verify.parser", "math_verify.grader", "math_verify.utils"):
        logging.getLogger(name).setLevel(logging.ERROR)
    read = parse(f"${found.strip().strip('$')}$", parsing_timeout=None)  # pyright: ignore[reportArgumentType]
    return bool(read) and verify(parse(gold, parsing_timeout=None), read, timeout_seconds=None)  # pyright: ignore

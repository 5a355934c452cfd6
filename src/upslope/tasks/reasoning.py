"""Any data set of reasoning-gym as a task: endless problems with a verifier, split by the content of the question.

Its verifiers are made total: no model text is ever run, and no text makes a judgement fail.
Some of its verifiers (release 0.1.25) pass the reply to `eval` or to SymPy's `parse_expr`, which evaluates it too:
"9**9**9**9" would hang them and worse text would run. Here a reply reaches such a verifier only if it is inert: a
Python literal, or algebra of a small grammar. countdown and puzzle24 are judged by this module alone, exactly and
over fractions. Verifiers that accept wrong replies are closed too: puzzle24 takes any four numbers in range,
game_of_life_halting any text, coin_flip any prefix of the number ("0"), complex_arithmetic "nan".
"""

import ast
import contextlib
import dataclasses
import itertools
import json
import operator
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

from upslope.config import suggestion
from upslope.errors import ConfigError, DataError
from upslope.extras import require
from upslope.plugins import parse_value
from upslope.tasks.base import Split, Task, chat_prompt, checked_fraction, derive_seed
from upslope.types import Message, Prompt, Reward

CHUNK = 64
INSTRUCTION = "Reply with only the final answer."

# Their generators iterate over sets of strings, whose order changes from process to process: the problems are
# written by a process of their own with a fixed hash seed, or a resumed run would train on other problems.
HASH_DEPENDENT = frozenset({"isomorphic_strings", "knight_swap", "polynomial_multiplication", "ransom_note"})
NEEDS_SPEC = frozenset({"composite"})


def _gym() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return require("tasks", "reasoning_gym")


def dataset_names() -> list[str]:
    """Every data set that can be named here. ConfigError: reasoning-gym is not installed."""
    _gym()
    from reasoning_gym.factory import DATASETS

    return sorted(set(DATASETS) - NEEDS_SPEC)


class ReasoningTask(Task):
    """A reasoning-gym data set (github.com/open-thought/reasoning-gym, Apache-2.0) as a task.

    name: the data set. ask: how a problem is put, over {question} and the entry's metadata ("{expression} =").
    chat: whether it is a conversation (then instruction is the line after the question, "Reply with only the final
    answer." unless given, and system a system turn, left out when empty) or plain text that the reply continues.
    strict: the reward is 1 for a full score and else 0 (some verifiers give part marks for any text: countdown 0.01,
    propositional_logic up to 0.25); False passes the verifier's own score on. eval_fraction: the share of problems that
    belongs to the eval split. Every other parameter is the data set's own; lists are written a|b|c.

    The whole reply, stripped, is the answer: "7" is right where "The answer is 7" is not. Verifiers of reasoning-gym
    that would run model text as Python are never given any (`score`).
    """

    def __init__(
        self,
        name: str,
        *,
        ask: str = "{question}",
        chat: bool = True,
        instruction: str | None = None,
        system: str = "",
        strict: bool = True,
        eval_fraction: float = 0.2,
        **config: Any,
    ) -> None:
        names = dataset_names()
        if name not in names:
            raise ConfigError(f"reasoning-gym has no data set '{name}'{suggestion(str(name), names)}")
        checked_fraction(eval_fraction)
        self.name = name
        self.ask = ask
        self.chat = chat
        self.instruction = (INSTRUCTION if chat else "") if instruction is None else instruction
        self.system = system
        if system and not chat:
            raise ConfigError(f"task '{name}': system is a turn of a conversation; it needs chat=true")
        self.strict = strict
        self.eval_fraction = eval_fraction
        self.config = _checked_config(name, config)
        self._verifier = self._dataset(0)
        plain = _gym().dataset.ProceduralDataset.score_answer
        self.inline_safe = name in _QUICK or type(self._verifier).score_answer is plain

    def prompts(self, split: Split, n: int, *, seed: int) -> list[Prompt]:
        """`n` distinct problems. DataError: the parameters allow fewer (two one-digit terms give 200 sums in all)."""
        identity = lambda prompt: prompt.metadata["question"]  # noqa: E731
        return self.select(self._candidates(split, seed), split, n, identity=identity)

    def judge(self, prompt: Prompt, text: str) -> Reward:
        """1 and correct for a full score; below that 0 if strict, else the verifier's score."""
        known = prompt.metadata
        entry = {"question": known["question"], "answer": prompt.answer, "metadata": known["entry"]}
        given = score(self._verifier, self.name, entry, text.strip())
        correct = given >= 1.0
        return Reward(value=float(correct) if self.strict else given, correct=correct)

    def demonstration(self, prompt: Prompt) -> tuple[Message, ...]:
        """The question and the gold answer. DataError: the data set gives none (boxnet, graph_color, ...)."""
        if prompt.answer is None:
            raise DataError(f"reasoning-gym's '{self.name}' gives no gold answers, so there is nothing to imitate")
        gap = "" if prompt.text is None or prompt.text[-1:].isspace() else " "
        return (*prompt.messages, Message("assistant", gap + prompt.answer))

    def _candidates(self, split: Split, seed: int) -> Iterator[Prompt]:
        for chunk in itertools.count():
            own, apart = derive_seed(self.name, split, seed, chunk), self.name in HASH_DEPENDENT
            size = 16 * 4 ** min(chunk, 3)
            made = _entries_apart(self.name, self.config, own, size) if apart else self._dataset(own)
            yield from map(self._prompt, made)

    def _prompt(self, entry: dict[str, Any]) -> Prompt:
        known = {**entry["metadata"], "question": entry["question"]}
        try:
            asked = self.ask.format_map(known)
        except (KeyError, IndexError, ValueError, AttributeError) as error:
            raise ConfigError(
                f"task '{self.name}': ask={self.ask!r} cannot be filled in ({error}); there are {', '.join(known)}"
            ) from error
        fields = {"answer": entry["answer"], "metadata": {"question": entry["question"], "entry": entry["metadata"]}}
        if self.chat:
            return chat_prompt(asked, system=self.system, instruction=self.instruction, **fields)
        return Prompt(key=0, text=f"{asked}\n{self.instruction}" if self.instruction else asked, **fields)

    def _dataset(self, seed: int) -> Any:
        try:
            return _gym().create_dataset(self.name, seed=seed, size=CHUNK, **self.config)
        except (AssertionError, TypeError, ValueError) as error:
            detail = str(error) or "a value out of range"
            raise ConfigError(f"task '{self.name}': reasoning-gym refuses {self.config}: {detail}") from error


def _checked_config(name: str, config: dict[str, Any]) -> dict[str, Any]:
    from reasoning_gym.factory import DATASETS

    fields = {f.name: f for f in dataclasses.fields(DATASETS[name][1]) if f.name not in ("seed", "size")}
    checked = {}
    for key, value in config.items():
        if key not in fields:
            own = ("instruction", "system", "strict", "eval_fraction")
            listed = ", ".join((*own, *fields))
            raise ConfigError(
                f"'{name}' has no parameter '{key}'{suggestion(key, (*own, *fields))} (it takes: {listed})"
            )
        made = fields[key].default_factory
        default = made() if callable(made) else fields[key].default
        several = isinstance(default, list | tuple) and not isinstance(value, list | tuple)
        checked[key] = type(default)(map(parse_value, str(value).split("|"))) if several else value
    return checked


_APART = """
import json, sys, warnings
warnings.simplefilter("ignore")
answer, sys.stdout = sys.stdout, sys.stderr  # what a library prints is no problem of the task
path, name, config, seed, size = json.loads(sys.argv[1])
sys.path[:] = path
from upslope.extras import require
dataset = require("tasks", "reasoning_gym").create_dataset(name, seed=seed, size=size, **config)
json.dump([dataset[index] for index in range(size)], answer)
"""


def _entries_apart(name: str, config: dict[str, Any], seed: int, size: int) -> list[dict[str, Any]]:
    fixed = {**os.environ, "PYTHONHASHSEED": "0"}
    call = [sys.executable, "-c", _APART, json.dumps([sys.path, name, config, seed, size])]
    done = subprocess.run(call, capture_output=True, text=True, env=fixed, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise DataError(f"task '{name}': writing its problems failed: {last}")
    return json.loads(done.stdout)


MAX_CHARACTERS = 4000
# Judged here, or by a verifier that was read and only compares texts and bounded numbers.
_QUICK = frozenset(
    {"chain_sum", "products", "decimal_chain_sum", "spell_backward", "family_relationships", "gsm_symbolic"}
    | {"countdown", "puzzle24", "game_of_life_halting"}
)
_LITERAL = frozenset({"binary_matrix", "n_queens", "spiral_matrix", "string_insertion"})
_NUMERIC = frozenset({"coin_flip", "complex_arithmetic"})
_PLAIN_NUMBER = re.compile(r"[-+0-9.,/*ij() ]{1,80}")
_ALGEBRA = frozenset({"intermediate_integration", "polynomial_multiplication", "simple_integration"})
_OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
# What reasoning-gym itself gives to a wrong expression and to any other text.
_MAKE_NUMBER = {"countdown": (0.05, 0.01), "puzzle24": (0.01, 0.01)}

_POWER = r"\*\*\s*(?:-?\d{1,2}|[A-Za-z]|\(\s*-?\d{1,2}(?:\s*/\s*\d{1,2})?\s*\))(?![A-Za-z0-9.])(?!\s*\*\*)"
_FUNCTION = r"(?:sin|cos|tan|sec|csc|cot|asin|acos|atan|sinh|cosh|tanh|exp|log|ln|sqrt|pi|[A-Za-z])(?![A-Za-z0-9_])"
_ALGEBRA_TOKEN = rf"\s+|\d{{1,40}}(?:\.\d{{1,40}})?(?![A-Za-z0-9_.])|{_FUNCTION}|{_POWER}|\*(?!\*)|[-+/()]"
_ALGEBRA_TEXT = re.compile(rf"(?:{_ALGEBRA_TOKEN})++")  # possessive: token by token, no other division is tried


def score(verifier: Any, name: str, entry: dict[str, Any], text: str) -> float:
    """The verifier's score of a reply in [0, 1]; a text it cannot read is a wrong answer and scores 0.

    Raises DataError if the verifier fails on its own gold answer too: then nothing can be said. Where there is no
    gold answer (boxnet), a wrong shape in the reply is taken for the reply's fault.
    """
    if len(text) > MAX_CHARACTERS + len(entry["answer"] or ""):
        return 0.0
    if name in _MAKE_NUMBER:
        return _score_number(name, entry["metadata"], text)
    readable = name not in _LITERAL or is_literal(text)
    if not readable and text not in (entry["answer"], *entry["metadata"].get("valid_answers", ())):
        return 0.0
    if (name in _ALGEBRA and not is_algebra(text)) or (name in _NUMERIC and not _PLAIN_NUMBER.fullmatch(text)):
        return 0.0
    if name == "game_of_life_halting":
        return float(text.casefold() == entry["answer"].casefold())
    try:
        given = _bounded(verifier.score_answer(text, entry))
        return 0.0 if given == 1.0 and name == "coin_flip" and not _close(text, entry["answer"]) else given
    except Exception as error:
        _check_on_gold(verifier, name, entry, error)
        return 0.0


def _close(text: str, answer: str) -> bool:
    """Whether two plain numbers or fractions agree to 1e-4, coin_flip's own tolerance."""
    return abs(Fraction(text.replace(",", "")) - Fraction(answer.replace(",", ""))) <= Fraction(1, 10_000)


def _check_on_gold(verifier: Any, name: str, entry: dict[str, Any], error: Exception) -> None:
    """A verifier that stumbled over a reply must at least accept its gold answer, or it is the verifier's fault."""
    broken = DataError(f"reasoning-gym's verifier of '{name}' failed: {type(error).__name__}: {str(error)[:200]}")
    gold, excused = entry["answer"], isinstance(error, TypeError | AttributeError | ValueError | LookupError)
    if gold is not None:
        excused = False
        with contextlib.suppress(Exception):
            excused = _bounded(verifier.score_answer(gold, entry)) == 1.0
    if not excused:
        raise broken from error


def _bounded(value: Any) -> float:
    number = float(value)
    if not 0.0 <= number <= 1.0:
        raise ValueError(f"score {number} outside [0, 1]")
    return number


def is_literal(text: str) -> bool:
    """True for a Python literal (numbers, texts, lists of them): evaluating it runs nothing."""
    try:
        ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return False
    return True


def is_algebra(text: str) -> bool:
    """True for sums, products, small powers and elementary functions of one-letter variables, and nothing else."""
    return len(text) <= 500 and text.count("(") <= 40 and _ALGEBRA_TEXT.fullmatch(text) is not None


def _score_number(name: str, metadata: dict[str, Any], text: str) -> float:
    """Whether an arithmetic expression uses the given numbers, each once, and makes the target exactly."""
    wrong, unreadable = _MAKE_NUMBER[name]
    try:
        tree = ast.parse(text, mode="eval").body if len(text) <= 200 else None
        value, used = _evaluate(tree)
    except (ValueError, SyntaxError, ZeroDivisionError, MemoryError, RecursionError):
        return unreadable
    target = metadata["target"] if name == "countdown" else 24
    return 1.0 if value == target and sorted(used) == sorted(metadata["numbers"]) else wrong


def _evaluate(node: ast.AST | None) -> tuple[Fraction, list[int]]:
    """Value and used integers of + - * / over non-negative integers; ValueError for anything else."""
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return Fraction(node.value), [node.value]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value, used = _evaluate(node.operand)
        return -value, used
    if not isinstance(node, ast.BinOp) or type(node.op) not in _OPERATORS:
        raise ValueError("not arithmetic")
    left, left_used = _evaluate(node.left)
    right, right_used = _evaluate(node.right)
    return _OPERATORS[type(node.op)](left, right), left_used + right_used

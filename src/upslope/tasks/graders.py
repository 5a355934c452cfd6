"""reasoning-gym's verifiers, made total: no model text is ever run, and no text makes a judgement fail.

Some of its verifiers (release 0.1.25) pass the reply to `eval` or to SymPy's `parse_expr`, which evaluates it too:
"9**9**9**9" would hang them and worse text would run. Here a reply reaches such a verifier only if it is inert: a
Python literal, or algebra of a small grammar. countdown and puzzle24 are judged by this module alone, exactly and
over fractions. Verifiers that accept wrong replies are closed too: puzzle24 takes any four numbers in range,
game_of_life_halting any text, coin_flip any prefix of the number ("0"), complex_arithmetic "nan".
"""

import ast
import operator
import re
from fractions import Fraction
from typing import Any

from upslope.errors import DataError

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
_ALGEBRA_TOKEN = re.compile(rf"\s+|\d{{1,40}}(?:\.\d{{1,40}})?(?![A-Za-z0-9_.])|{_FUNCTION}|{_POWER}|\*(?!\*)|[-+/()]")


def is_quick(verifier: Any, name: str) -> bool:
    """Whether judging any text is quick and runs none of it, so that the trainer's own process may do it."""
    from reasoning_gym.dataset import ProceduralDataset

    return name in _QUICK or type(verifier).score_answer is ProceduralDataset.score_answer


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
    if name in _ALGEBRA and not is_algebra(text):
        return 0.0
    if name in _NUMERIC and not _PLAIN_NUMBER.fullmatch(text):
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
    if entry["answer"] is None:
        if isinstance(error, TypeError | AttributeError | ValueError | LookupError):
            return
        raise broken from error
    try:
        accepted = _bounded(verifier.score_answer(entry["answer"], entry)) == 1.0
    except Exception:
        raise broken from error
    if not accepted:
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
    if len(text) > 500 or text.count("(") > 40:
        return False
    position = 0
    while position < len(text):
        token = _ALGEBRA_TOKEN.match(text, position)
        if token is None:
            return False
        position = token.end()
    return position > 0


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
    if not isinstance(node, ast.BinOp):
        raise ValueError("not arithmetic")
    left, left_used = _evaluate(node.left)
    right, right_used = _evaluate(node.right)
    if type(node.op) not in _OPERATORS:
        raise ValueError("not arithmetic")
    return _OPERATORS[type(node.op)](left, right), left_used + right_used

"""The reasoning-gym adapter: pure prompts, splits that cannot meet, and verifiers that no text can fool or run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("reasoning_gym", reason="the extra `tasks` brings it")

from upslope.errors import DataError
from upslope.tasks import load_task
from upslope.tasks import reasoning as graders
from upslope.tasks.base import Task, content_key, split_of
from upslope.tasks.reasoning import HASH_DEPENDENT, _entries_apart, dataset_names
from upslope.types import Prompt

SUMS = "chain_sum:min_terms=2,max_terms=2,min_digits=1,max_digits=2"
# One of each way of grading: plain, literal, algebra, own arithmetic, numbers, part marks, no gold answer.
KINDS = [
    "gcd", "spiral_matrix", "n_queens:n=4,min_remove=1,max_remove=3", "simple_integration", "countdown",
    "puzzle24", "coin_flip",
    "complex_arithmetic", "propositional_logic", "game_of_life_halting", "boxnet", "string_insertion", "number_sorting",
    "letter_counting", "syllogism",
]  # fmt: skip
RUBBISH = [
    "", " ", "None", "[", "[[1],", "{}", '{"a": 1}', '[{"a": [1]}]', "(((", "9**9**9**9", "1/0", "nan", "inf",
    "1e999999999",
    "\x00\ud800", "x" * 6000, "[" * 500, "lambda: 0", "__import__('os')._exit(9)", "exit()", "a.b", "-", "True", "0x",
    "' ",
    "9" * 5000, "x**x**x", "factorial(10**8)", "()", "1,2,3", "A", "yes", "{'a': {1: 2}}",
]  # fmt: skip


def questions(prompts: list[Prompt]) -> set[str]:
    return {" ".join(prompt.metadata["question"].split()).casefold() for prompt in prompts}


def test_prompts_are_a_pure_function_and_grow_from_the_front() -> None:
    task, again = load_task(SUMS), load_task(SUMS)
    long = task.prompts("train", 50, seed=3)
    assert long == again.prompts("train", 50, seed=3)
    assert long[:20] == again.prompts("train", 20, seed=3)
    assert long != task.prompts("train", 50, seed=4)
    assert len(questions(long)) == 50
    assert len({prompt.key for prompt in long}) == 50


@pytest.mark.parametrize(
    "spec", [SUMS, "chain_sum:min_terms=2,max_terms=2,min_digits=1,max_digits=1", "letter_counting"]
)
def test_train_and_eval_never_meet(spec: str) -> None:
    task = load_task(spec)
    train = set().union(*(questions(task.prompts("train", 60, seed=seed)) for seed in range(3)))
    held_out = set().union(*(questions(task.prompts("eval", 20, seed=seed)) for seed in range(3)))
    assert len(train) > 60
    assert not train & held_out


def test_the_split_does_not_depend_on_the_instruction() -> None:
    task, other = load_task(SUMS), load_task(SUMS, instruction="Answer.", system="You add.")
    train, held_out = task.prompts("train", 100, seed=0), other.prompts("eval", 100, seed=0)
    assert not questions(train) & questions(held_out)
    assert [m.role for m in held_out[0].messages] == ["system", "user"]
    assert held_out[0].messages[1].content.endswith("\nAnswer.")


def test_a_small_space_is_used_up_and_then_an_error() -> None:
    task = load_task("chain_sum:min_terms=2,max_terms=2,min_digits=1,max_digits=1")
    with pytest.raises(DataError, match=r"only \d+ distinct train prompts exist where 400"):
        task.prompts("train", 400, seed=0)
    with pytest.raises(DataError, match=r"only \d+ distinct eval prompts"):
        task.prompts("eval", 200, seed=0)


@given(st.text(), st.floats(0.01, 0.99))
def test_split_ignores_case_and_space(text: str, fraction: float) -> None:
    assert split_of(content_key(text), fraction) == split_of(content_key(f"  {text}\n"), fraction)


def test_eval_fraction_is_a_share() -> None:
    keys = [content_key(str(i)) for i in range(5000)]
    assert sum(split_of(key, 0.2) == "eval" for key in keys) / 5000 == pytest.approx(0.2, abs=0.02)


def test_strict_scoring_wants_only_the_answer() -> None:
    strict, lenient = load_task(SUMS), load_task(SUMS, strict=False)
    (prompt,) = strict.prompts("train", 1, seed=0)
    answer = str(prompt.answer)
    texts = [answer, f" {answer}\n", f"The answer is {answer}", ""]
    rewards = strict.rewards([prompt] * 4, texts)
    assert [reward.value for reward in rewards] == [1.0, 1.0, 0.0, 0.0]
    assert [reward.correct for reward in rewards] == [True, True, False, False]
    partly = lenient.rewards([prompt], [texts[2]])[0]
    assert 0 < partly.value < 1
    assert partly.correct is False


def test_strict_gives_nothing_where_verifiers_give_part_marks_to_rubbish() -> None:
    for spec in ("countdown", "propositional_logic"):
        (prompt,) = load_task(spec).prompts("train", 1, seed=0)
        assert load_task(spec, strict=False).rewards([prompt], ["rubbish"])[0].value > 0.0
        assert load_task(spec).rewards([prompt], ["rubbish"])[0].value == 0.0


@pytest.mark.parametrize("spec", KINDS)
def test_gold_is_right_and_rubbish_is_wrong_and_never_run(spec: str) -> None:
    task = load_task(spec)
    for prompt in task.prompts("train", 3, seed=1):
        if prompt.answer is not None:
            assert task.rewards([prompt], [prompt.answer])[0].correct, prompt.answer
        for text in RUBBISH:
            if text.strip().casefold() == (prompt.answer or "").casefold():
                continue
            reward = task.rewards([prompt], [text])[0]
            assert reward.value == 0.0, (text, prompt.answer)
            assert reward.correct is False


@pytest.mark.parametrize(
    "spec", ["gcd", "spiral_matrix", "simple_integration", "countdown", "coin_flip", "number_sorting"]
)
def test_graders_are_total(spec: str) -> None:
    task = load_task(spec, strict=False)
    (prompt,) = task.prompts("train", 1, seed=2)
    alphabet = st.one_of(st.text(), st.text("0123456789+-*/() .,[]x", max_size=30))

    @given(alphabet)
    def judge(text: str) -> None:
        reward = task.rewards([prompt], [text])[0]
        assert reward.value is not None
        assert 0.0 <= reward.value <= 1.0

    judge()


@pytest.mark.parametrize("spec", [SUMS, "countdown", "products", "gsm_symbolic", "spell_backward"])
@pytest.mark.parametrize(
    "text", ["9" * 4000, "1e999999999", "-" * 4000, "1," * 2000, "((((" * 500, "+1" * 2000, "0" * 3999 + "1"]
)
def test_what_may_be_judged_inline_is_quick(spec: str, text: str) -> None:
    task = load_task(spec)
    assert task.inline_safe
    (prompt,) = task.prompts("train", 1, seed=0)
    start = time.perf_counter()
    assert task.rewards([prompt], [text])[0].value in (0.0, 1.0)
    assert time.perf_counter() - start < 1.0


@pytest.mark.parametrize(
    ("numbers", "target", "text", "right"),
    [
        ([1, 2, 3], 7, "1+2*3", True),
        ([1, 2, 3], 7, "2 * 3 + 1", True),
        ([1, 2, 3], 7, "1+2*3+0", False),
        ([1, 2, 3], 7, "7", False),
        ([1, 2, 3], 7, "1+2*3 = 7", False),
        ([1, 5], 7, "1.5", False),
        ([3, 2], 9, "3**2", False),
        ([1, 3, 3], 1, "3/3*1", True),
        ([8, 3, 3, 8], 24, "8/(3-8/3)", True),
    ],
)
def test_countdown_is_exact(numbers: list[int], target: int, text: str, right: bool) -> None:
    entry = {"question": "", "answer": "", "metadata": {"numbers": numbers, "target": target}}
    assert (graders.score(None, "countdown", entry, text) == 1.0) is right


def test_puzzle24_uses_its_own_numbers() -> None:
    entry = {"question": "", "answer": "9*3*8/9", "metadata": {"numbers": [9, 9, 3, 8]}}
    assert graders.score(None, "puzzle24", entry, "9*3*8/9") == 1.0
    assert graders.score(None, "puzzle24", entry, "6*4*1*1") < 1.0


def test_the_beginning_of_a_number_is_another_number() -> None:
    """reasoning-gym's own verifier of coin_flip takes it for right."""
    task = load_task("coin_flip")
    for prompt in task.prompts("train", 4, seed=1):
        assert prompt.answer is not None
        rewards = task.rewards([prompt] * 3, [prompt.answer, prompt.answer[:1], prompt.answer[:3]])
        assert [reward.correct for reward in rewards] == [True, False, False], prompt.answer


@pytest.mark.parametrize("text", ["x**2 + C", "-6*x**3/5 + sin(2*x)*exp(x) + C", "x**(1/2)", "E**x", "2.5*x"])
def test_algebra_is_let_through(text: str) -> None:
    assert graders.is_algebra(text)


@pytest.mark.parametrize(
    "text", ["", "9**9**9", "x**999", "x.y", "factorial(9)", "x=1", "a_b", "'x'", "x;y", "[x]", "xy", "1e9", "2**x**x"]
)
def test_anything_else_is_not(text: str) -> None:
    assert not graders.is_algebra(text)


class _Broken:
    def score_answer(self, text: str, entry: dict) -> float:
        raise RuntimeError("always")


def test_a_broken_verifier_is_an_error_and_not_a_zero() -> None:
    with pytest.raises(DataError, match="verifier of 'gcd' failed: RuntimeError: always"):
        graders.score(_Broken(), "gcd", {"answer": "1", "metadata": {}}, "2")


def test_demonstration_ends_with_the_gold_answer() -> None:
    task = load_task(SUMS)
    (prompt,) = task.prompts("train", 1, seed=0)
    *before, last = task.demonstration(prompt)
    assert tuple(before) == prompt.messages
    assert (last.role, last.content) == ("assistant", prompt.answer)


def test_no_gold_answer_no_demonstration() -> None:
    task = load_task("boxnet")
    (prompt,) = task.prompts("train", 1, seed=0)
    with pytest.raises(DataError, match="nothing to imitate"):
        task.demonstration(prompt)


def test_lists_are_written_with_bars() -> None:
    task = load_task("basic_arithmetic:operators=+,min_terms=2,max_terms=2")
    for prompt in task.prompts("train", 5, seed=0):
        assert "+" in prompt.metadata["question"]
    assert load_task("basic_arithmetic:operators=+|-").config == {"operators": ("+", "-")}  # type: ignore[attr-defined]


def test_prompts_are_the_same_in_every_process(root: Path) -> None:
    """Also where the generator iterates over a set of strings, whose order is each process's own."""
    program = (
        "import json, sys; sys.path.insert(0, sys.argv[1]); from upslope.tasks import load_task;"
        "print(json.dumps([p.metadata['question'] for p in load_task('ransom_note').prompts('train', 3, seed=0)]))"
    )
    call = [sys.executable, "-c", program, str(root / "src")]
    elsewhere = subprocess.run(call, env={**os.environ, "PYTHONHASHSEED": "1"}, capture_output=True, check=True)
    here = [prompt.metadata["question"] for prompt in load_task("ransom_note").prompts("train", 3, seed=0)]
    assert json.loads(elsewhere.stdout) == here


def test_what_a_library_prints_is_no_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Problems are written by another interpreter, which answers on its standard output."""
    (tmp_path / "reasoning_gym.py").write_text(
        "print('[1, 2]')\ndef create_dataset(name, seed, size):\n    print('loading')\n    return [name] * size\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert _entries_apart("ransom_note", {}, 0, 2) == ["ransom_note"] * 2


@pytest.mark.slow
def test_every_data_set_gives_prompts_and_accepts_its_gold() -> None:
    for name in set(dataset_names()) - HASH_DEPENDENT:
        task: Task = load_task(name)
        for prompt in task.prompts("train", 2, seed=0):
            if prompt.answer is not None:
                assert task.rewards([prompt], [prompt.answer])[0].correct, (name, prompt.answer)
            for text in RUBBISH[:24]:
                reward = task.rewards([prompt], [text])[0]
                assert reward.value is not None
                assert 0.0 <= reward.value <= 1.0


def test_ask_puts_the_problem_in_other_words() -> None:
    task = load_task(f"{SUMS},ask={{expression}} =,instruction=,system=Calculate.")
    for prompt in task.prompts("train", 5, seed=0):
        assert [m.role for m in prompt.messages] == ["system", "user"]
        asked = prompt.messages[-1].content
        assert asked.endswith(" =")
        assert eval(asked.removesuffix("=")) == int(prompt.answer or "")


def test_a_problem_as_plain_text() -> None:
    task = load_task(f"{SUMS},chat=false,ask={{expression}} =")
    prompt = task.prompts("eval", 1, seed=0)[0]
    assert not prompt.messages
    assert prompt.text is not None
    assert prompt.text.endswith(" =")
    (turn,) = task.demonstration(prompt)
    assert turn.content == f" {prompt.answer}"
    assert task.rewards([prompt], [turn.content])[0].correct


def test_the_wording_does_not_move_a_problem_to_the_other_split() -> None:
    plain, asked = (load_task(spec) for spec in (SUMS, f"{SUMS},ask={{expression}} =,instruction="))
    keys = {p.key for p in plain.prompts("train", 50, seed=0)}
    assert keys == {p.key for p in asked.prompts("train", 50, seed=0)}


@pytest.mark.parametrize(
    ("params", "said"), [("ask={expresion}", "expression"), ("chat=false,system=Be.", "chat=true")]
)
def test_bad_wording_is_refused(params: str, said: str) -> None:
    from upslope.errors import ConfigError

    with pytest.raises(ConfigError, match=said):
        load_task(f"{SUMS},{params}").prompts("train", 1, seed=0)

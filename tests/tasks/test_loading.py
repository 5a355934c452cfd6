"""Naming tasks and rewards: built in, of reasoning-gym, of a file; and the errors for each."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from upslope.errors import ConfigError
from upslope.rewards.summands import load_reward, parse_rewards
from upslope.tasks import load_task
from upslope.tasks.reasoning import ReasoningTask
from upslope.types import Prompt

GOOD = """
from upslope.tasks import Task, chat_prompt
from helper_of_user import WORD
class Mine(Task):
    def __init__(self, level: int = 1) -> None:
        self.level = level
    def prompts(self, split, n, *, seed):
        return [chat_prompt(f"{WORD} {i}", answer=str(i)) for i in range(n)]
    def rewards(self, prompts, completions):
        return [float(p.answer == c) * self.level for p, c in zip(prompts, completions)]
def reward(prompts, completions, *, scale: float = 1.0):
    return [scale] * len(completions)
def one_argument(prompts):
    return []
NOT_CALLABLE = 3
"""


@pytest.fixture
def user_file(tmp_path: Path) -> Path:
    (tmp_path / "helper_of_user.py").write_text("WORD = 'number'\n")
    (tmp_path / "mine.py").write_text(GOOD)
    return tmp_path / "mine.py"


def test_alias_and_full_name_are_the_same_task() -> None:
    alias = load_task("chain_sum:min_terms=2,max_terms=2")
    full = load_task("reasoning:name=chain_sum,min_terms=2", max_terms=2)
    assert alias.prompts("train", 3, seed=1) == full.prompts("train", 3, seed=1)


def test_spec_rebuilds_an_equal_task(user_file: Path) -> None:
    for text in ("chain_sum:max_digits=2,instruction='Number only, please'", f"{user_file}:Mine:level=3"):
        task = load_task(text)
        again = load_task(str(task.spec))
        assert again.prompts("eval", 2, seed=0) == task.prompts("eval", 2, seed=0)
        assert vars(again).get("level") == vars(task).get("level")


def test_keywords_go_over_the_text() -> None:
    task = load_task("chain_sum:max_digits=2,strict=true", strict=False)
    assert isinstance(task, ReasoningTask)
    assert task.strict is False
    assert "strict=false" in str(task.spec)


def test_user_file_imports_its_neighbour_and_has_a_name(user_file: Path) -> None:
    task = load_task(f"{user_file}:Mine")
    assert task.name == "Mine"
    assert task.prompts("train", 1, seed=0)[0].messages[0].content == "number 0"


@pytest.mark.parametrize(
    ("text", "needle"),
    [
        ("chain_sun", "did you mean 'chain_sum'"),
        ("gsm8kk:path=x", "did you mean 'gsm8k'"),
        ("chain_sum:min_term=2", "did you mean 'min_terms'"),
        ("chain_sum:min_terms=5,max_terms=2", "refuses"),
        ("chain_sum:min_terms=abc", "refuses"),
        ("chain_sum:name=gcd", "leave name=... out"),
        ("chain_sum:eval_fraction=1.5", "between 0 and 1"),
        ("reasoning", "needs the parameter 'name'"),
        ("reasoning:name=chain_sun", "did you mean 'chain_sum'"),
        ("composite", "no task is called"),
        ("sentiment:target=happy", "must be 'positive' or 'negative'"),
        ("sentiment:chat=maybe", "must be bool"),
        ("gsm8k", "needs its data"),
        ("nowhere.py:Task", "no such file"),
    ],
)
def test_wrong_task_names(text: str, needle: str) -> None:
    with pytest.raises(ConfigError, match=needle):
        load_task(text)


@pytest.mark.parametrize(
    ("name", "needle"),
    [
        ("Minee", "did you mean 'Mine'"),
        ("reward", "must be a class"),
        ("Mine:levle=2", "did you mean 'level'"),
        ("Mine:level=x", "must be int"),
    ],
)
def test_wrong_names_in_a_task_file(user_file: Path, name: str, needle: str) -> None:
    with pytest.raises(ConfigError, match=needle):
        load_task(f"{user_file}:{name}")


@pytest.mark.parametrize(
    ("source", "line", "needle"),
    [
        ("x = 1\nclass (:\n", 2, "SyntaxError"),
        ("\n\nimport nothing_of_this_name\n", 3, "ModuleNotFoundError"),
        ("def f():\n    return 1 / 0\nf()\n", 2, "ZeroDivisionError"),
        ("raise SystemExit(3)\n", 1, "SystemExit"),
    ],
)
def test_a_file_that_does_not_load_names_its_line(tmp_path: Path, source: str, line: int, needle: str) -> None:
    file = tmp_path / "broken.py"
    file.write_text(source)
    with pytest.raises(ConfigError, match=rf"broken\.py:{line}: {needle}"):
        load_task(f"{file}:Mine")


def test_a_constructor_that_raises_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text(
        "from upslope.tasks import Task\nclass Bad(Task):\n    def __init__(self):\n        raise KeyError('no')\n"
    )
    with pytest.raises(ConfigError, match="Bad' could not be made: KeyError"):
        load_task(f"{tmp_path / 'bad.py'}:Bad")


def test_rewards_by_name_and_file(user_file: Path) -> None:
    prompts = [Prompt(0, text="q", answer="a")]
    assert load_reward("length:target=2").function(prompts, ["a b"]) == [1.0]
    assert load_reward(f"{user_file}:reward:scale=2").function(prompts, ["x"]) == [2]
    assert load_reward("length:target=2").inline_safe
    assert not load_reward("format:pattern='a'").inline_safe
    assert not load_reward(f"{user_file}:reward").inline_safe


@pytest.mark.parametrize(
    ("text", "needle"),
    [
        ("lenght:target=2", "did you mean 'length'"),
        ("length", "needs the parameter 'target'"),
        ("length:target=x", "must be int"),
        ("length:target=3,unt=words", "did you mean 'unit'"),
    ],
)
def test_wrong_reward_names(text: str, needle: str) -> None:
    with pytest.raises(ConfigError, match=needle):
        load_reward(text)


@pytest.mark.parametrize(
    ("name", "needle"),
    [("NOT_CALLABLE", "is not a function"), ("one_argument", "2 arguments"), ("Mine", "not a function")],
)
def test_wrong_names_in_a_reward_file(user_file: Path, name: str, needle: str) -> None:
    with pytest.raises(ConfigError, match=needle):
        load_reward(f"{user_file}:{name}")


def test_weights() -> None:
    assert parse_rewards(["task", "length:target=20@0.5", ("a.py:f", 2)]) == [
        ("task", 1.0),
        ("length:target=20", 0.5),
        ("a.py:f", 2.0),
    ]
    assert parse_rewards(["format:pattern='a@b'"]) == [("format:pattern='a@b'", 1.0)]
    assert parse_rewards(["format:pattern='a@b'@-1"]) == [("format:pattern='a@b'", -1.0)]


@pytest.mark.parametrize("text", ["length@x", "length@nan", "length@inf", "length@"])
def test_wrong_weights(text: str) -> None:
    with pytest.raises(ConfigError, match="length"):
        parse_rewards([text])


def test_importing_tasks_brings_no_torch(root: Path) -> None:
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); "
        "import upslope.tasks, upslope.rewards.judge, upslope.rollout, upslope.workers.rewards;"
        "heavy = {'torch', 'transformers', 'numpy', 'sympy'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", program, str(root / "src")], check=True)


def test_a_missing_extra_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ConfigError, match=r"if it is one of reasoning-gym's: .*pip install 'upslope\[tasks\]'"):
        load_task("chain_sum")
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(ConfigError, match=r"math_verify is not installed; run: pip install 'upslope\[tasks\]'"):
        load_task("gsm8k:path=x.jsonl")

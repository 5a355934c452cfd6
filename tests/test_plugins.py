"""The text that names tasks and rewards: it round-trips, and every mistake in it is one clear line."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from upslope.errors import ConfigError
from upslope.plugins import Spec, check_file, check_params, format_spec, load, parse_spec, parse_value

NAMES = st.from_regex(r"[a-z][a-z0-9_]{0,8}", fullmatch=True)
VALUES = st.one_of(
    st.integers(),
    st.booleans(),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
    st.sampled_from(["1", "1.0", "true", "a,b", "a=b", "a:b", '"', "'", "\\", " x ", "", "a|b", "/data/x.jsonl", "\n"]),
)


@given(NAMES, st.dictionaries(NAMES, VALUES, max_size=4), st.sampled_from([None, "my task.py", "/a/b-c.py"]))
def test_format_and_parse_are_inverse(name: str, params: dict[str, object], path: str | None) -> None:
    spec = Spec(name, params, path)  # pyright: ignore[reportArgumentType]
    parsed = parse_spec(format_spec(spec))
    assert parsed == spec
    assert [type(v) for v in parsed.params.values()] == [type(v) for v in params.values()]


@given(st.text(max_size=40))
def test_parsing_is_total(text: str) -> None:
    with contextlib.suppress(ConfigError):  # the only error a text may cause
        parse_spec(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("-3", -3),
        ("0.5", 0.5),
        ("1e-3", 1e-3),
        ("TRUE", True),
        ("false", False),
        ("nan", "nan"),
        ("a b", "a b"),
    ],
)
def test_values_become_what_they_look_like(text: str, value: object) -> None:
    assert parse_value(text) == value
    assert type(parse_value(text)) is type(value)


def test_quotes_keep_commas_and_digits() -> None:
    spec = parse_spec("format:pattern='[0-9]{1,3}',other=\"7\", last = 8 ")
    assert spec.params == {"pattern": "[0-9]{1,3}", "other": "7", "last": 8}


@pytest.mark.parametrize(
    ("text", "needle"),
    [
        ("", "needs a name"),
        ("a:b", "key=value"),
        ("a:b=1,b=2", "twice"),
        ("a:b='x", "never closed"),
        ("a:b='x'y=1", "unexpected"),
        ("task.py", "which name in the file"),
        ("task.py:", "must be a name"),
        ("task.py:1x", "must be a name"),
    ],
)
def test_mistakes_are_named(text: str, needle: str) -> None:
    with pytest.raises(ConfigError, match=needle):
        parse_spec(text)


def takes(prompts: list, completions: list, *, target: int, unit: str = "words", share: float = 0.5) -> None:
    """Stands for a reward function."""


@pytest.mark.parametrize(
    ("params", "needle"),
    [
        ({"tagret": 3}, "did you mean 'target'"),
        ({"target": "x"}, "must be int, got 'x'"),
        ({"target": True}, "must be int, got True"),
        ({"target": 1.5}, "must be int"),
        ({"target": 1, "unit": 3}, "must be str"),
        ({"unit": "x"}, "needs the parameter 'target'"),
    ],
)
def test_parameters_are_checked(params: dict, needle: str) -> None:
    with pytest.raises(ConfigError, match=needle):
        check_params(takes, params, "takes", skip=2)


def test_whole_numbers_serve_as_decimal_ones() -> None:
    check_params(takes, {"target": 1, "share": 1}, "takes", skip=2)


TABLE = {"fast": "upslope.rewards.functions:length", "dump": "json:dumps"}
OWN = """
def loss(logp, advantage, *, scale: float = 1.0, seen=None):
    return logp * advantage * scale
def narrow(logp):
    return logp
class Kind:
    pass
"""


def test_a_function_comes_from_a_table_a_file_or_itself(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(OWN)
    how = {"kind": "loss", "takes": ("logp", "advantage"), "filled": ("seen",)}
    own = load(f"{tmp_path}/mine.py:loss:scale=3", TABLE, **how)
    assert (own.name, own.own, own.function(2, 5), own.plain(2, 5)) == ("loss", True, 30, 10)
    built_in = load("dump", TABLE, kind="text", takes=("obj",))
    assert (built_in.name, built_in.own, built_in.function([1])) == ("dump", False, "[1]")
    given = load(takes, TABLE, kind="loss", takes=("prompts",))
    assert (given.name, given.own, given.function) == ("takes", False, takes)
    for text, needle in (
        ("fats", r"no loss is called 'fats'; did you mean 'fast'\? \(built in: fast, dump; your own: my_loss.py:func"),
        (f"{tmp_path}/mine.py:los", "has nothing called 'los'; did you mean 'loss'"),
        (f"{tmp_path}/mine.py:narrow", r"must take \(logp, advantage\) as its first 2 arguments"),
        (f"{tmp_path}/mine.py:Kind", r"is not a function of \(logp, advantage\)"),
        (f"{tmp_path}/mine.py:loss:seen=1", r"no parameter 'seen' \(it takes: scale\)"),
    ):
        with pytest.raises(ConfigError, match=needle):
            load(text, TABLE, **how)


def test_a_file_is_checked_without_being_run(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def loss(): ...\nraise SystemExit\n")
    check_file(Spec("loss", path=f"{tmp_path}/mine.py"))
    with pytest.raises(ConfigError, match="nothing called 'los'; did you mean 'loss'"):
        check_file(Spec("los", path=f"{tmp_path}/mine.py"))
    (tmp_path / "mine.py").write_text("def loss(:\n")
    with pytest.raises(ConfigError, match=r"mine\.py:1: SyntaxError"):
        check_file(Spec("loss", path=f"{tmp_path}/mine.py"))

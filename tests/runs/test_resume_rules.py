from __future__ import annotations

import math
from pathlib import Path

import pytest

from upslope.errors import ConfigError
from upslope.runs.resume import check_resume

MAY = frozenset({"max_steps", "save_every", "logging"})
OLD = {"learning_rate": 1e-5, "max_steps": 10, "stop": ("a", "b"), "optim": {"betas": [0.9, 0.95]}, "logging": {"n": 1}}


def test_every_refused_key_is_named_with_both_values() -> None:
    new = {**OLD, "learning_rate": 2e-5, "optim": {"betas": [0.9, 0.99]}, "gamma": 1.0, "max_steps": 20}
    with pytest.raises(ConfigError) as caught:
        check_resume(OLD, new, MAY)
    message = str(caught.value)
    assert "learning_rate (1e-05 -> 2e-05)" in message
    assert "optim.betas ([0.9, 0.95] -> [0.9, 0.99])" in message
    assert "gamma (not set -> 1.0)" in message
    assert "max_steps (" not in message
    assert "\n" not in message
    assert "what may change: logging, max_steps, save_every" in message


def test_what_toml_cannot_tell_apart_is_equal() -> None:
    check_resume(OLD, {**OLD, "stop": ["a", "b"], "learning_rate": 1e-05}, MAY)
    check_resume({"a": 1, "p": "x/y", "n": math.nan}, {"a": 1.0, "p": Path("x/y"), "n": math.nan, "b": None}, MAY)


def test_tables_can_be_freed_and_types_matter() -> None:
    check_resume(OLD, {**OLD, "logging": {"n": 5, "m": 2}}, MAY)
    for old, new in [({"a": True}, {"a": 1}), ({"a": 1}, {"a": "1"}), ({"a": 1}, {}), ({"loggings": 1}, {})]:
        with pytest.raises(ConfigError):
            check_resume(old, new, MAY)

"""Optional parts: a missing one says what to install; a missing compiled one costs only what needs it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from upslope import extras
from upslope.errors import ConfigError


def test_missing_module_says_what_to_install() -> None:
    with pytest.raises(ConfigError, match=r"no_such_module is not installed; run: pip install 'upslope\[tasks\]'"):
        extras.require("tasks", "no_such_module")


def test_present_module_is_imported() -> None:
    import json

    assert extras.require("tasks", "json") is json


def test_a_part_of_a_part_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "half_there.py").write_text("import surely_missing_module\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match="half_there is installed but needs surely_missing_module"):
        extras.require("tasks", "half_there")


WITHOUT_COMPILER = """
import sys
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name == "pycosat":
            raise ModuleNotFoundError("No module named 'pycosat'", name="pycosat")
sys.meta_path.insert(0, Hide())
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "pycosat" else find(name, package)
from upslope import extras
from upslope.errors import ConfigError
gym = extras.require("tasks", "reasoning_gym")
assert "pycosat" not in sys.modules
item = gym.create_dataset("chain_sum", size=1, seed=0)[0]
assert item["answer"]
try:
    gym.create_dataset("zebra_puzzles", size=1, seed=0)[0]
except ConfigError as error:
    assert "C compiler" in str(error), error
else:
    raise SystemExit("zebra puzzles ran without pycosat")
"""


def test_reasoning_gym_without_its_compiled_part(root: Path) -> None:
    if not extras.installed("reasoning_gym"):
        pytest.skip("the tasks extra is not installed")
    environment = {**os.environ, "PYTHONPATH": str(root / "src")}
    command = [sys.executable, "-c", WITHOUT_COMPILER]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]

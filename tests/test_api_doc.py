"""The PPO loop of docs/api.md runs as printed, with only public names, in at most forty lines."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tiny_model import tiny_folder

import upslope


def loop_of(root: Path) -> str:
    block = re.search(r"```python\n(.*?)```", (root / "docs/api.md").read_text(), re.DOTALL)
    assert block is not None
    return block.group(1)


def test_the_documented_loop_runs(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = loop_of(root)
    exec(compile(code, "docs/api.md", "exec"), {"MODEL": str(tiny_folder(tmp_path / "tiny")), "STEPS": 2})
    printed = capsys.readouterr().out
    assert printed.count("sampler against trainer: 0.0") == 2


def test_the_documented_loop_is_short_and_public(root: Path) -> None:
    code = loop_of(root)
    lines = [line for line in code.splitlines() if line.strip()]
    assert len(lines) <= 40
    used = set(re.findall(r"\bup\.(\w+)", code))
    assert used <= set(upslope.__all__)


@pytest.mark.parametrize("name", [n for n in upslope.__all__ if n != "__version__"])
def test_every_public_name_exists_and_is_documented(name: str) -> None:
    thing = getattr(upslope, name)
    assert thing.__doc__, name

"""A tiny model folder, made once for the recipes' tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_model import tiny_folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer model with a byte tokenizer."""
    return tiny_folder(tmp_path_factory.mktemp("models") / "tiny")

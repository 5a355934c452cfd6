"""Model folders, made once for the recipes' tests, and exact arithmetic."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from exact_kit import float64, table_folder
from tiny_model import tiny_folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer model with a byte tokenizer."""
    return tiny_folder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def in_float64() -> Iterator[None]:
    """New tensors are float64 for the length of a test."""
    with float64():
        yield


@pytest.fixture(scope="session")
def table_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the policy in exact_kit.py, before it is given its table."""
    return table_folder(tmp_path_factory.mktemp("models") / "table")


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of one narrow layer and two heads, for plain forward passes one sequence at a time."""
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return tiny_folder(tmp_path_factory.mktemp("models") / "small", **shape, num_key_value_heads=1)

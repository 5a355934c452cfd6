"""Tokenizers as fixtures; they are built in tokenizer_kit."""

from __future__ import annotations

from typing import Any

import pytest
import tokenizer_kit as kit


@pytest.fixture(scope="session")
def chatml() -> Any:
    return kit.byte_level(kit.CHATML)


@pytest.fixture(scope="session")
def llama3() -> Any:
    return kit.byte_level(kit.LLAMA3, eos="<|eot_id|>", bos="<|begin_of_text|>", adds_bos=True)


@pytest.fixture(scope="session")
def llama2() -> Any:
    return kit.sentencepiece(kit.LLAMA2)


@pytest.fixture(scope="session")
def marked() -> Any:
    return kit.byte_level(kit.MARKED)

"""A model that says what a test wants: the real engine and server, with a token mask that leaves one choice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from upslope.serving.service import Service

EOS = 1


def script(monkeypatch: pytest.MonkeyPatch, service: Service, *texts: str) -> list[dict[str, Any]]:
    """Make `service` answer its requests with these texts, in turn, the last one ever after.

    Returns the list to which what each request asked is added: its prompt's tokens and the other arguments.
    """
    submit = service.submit
    asked: list[dict[str, Any]] = []

    async def scripted(prompt_tokens: Sequence[int], params: Any, **options: Any) -> Any:
        text = texts[min(len(asked), len(texts) - 1)]
        asked.append({"prompt": list(prompt_tokens), "params": params, **options})
        tokens = [*service.tokenizer(text, add_special_tokens=False)["input_ids"], EOS]
        return await submit(prompt_tokens, params, **{**options, "token_mask": only(tokens)})

    monkeypatch.setattr(service, "submit", scripted)
    return asked


def only(tokens: Sequence[int]) -> Callable[[list[int], list[int]], list[int]]:
    """The mask that allows the next of these tokens alone."""
    return lambda prompt, generated: [tokens[len(generated)]]

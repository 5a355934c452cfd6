"""Every option of how `upslope generate` and `upslope chat` draw: each reply is the engine's own with that option."""

from __future__ import annotations

from typing import Any

import pytest
from letters_model import letters_folder

from upslope.build import Policy, load_inference, make_engine
from upslope.cli import main
from upslope.commands.chat_session import ChatSession
from upslope.data.chat import encode_prompt
from upslope.options import ChatOptions
from upslope.types import Message, Prompt, SamplingParams

DRAWN: dict[str, Any] = {"max_tokens": 16, "temperature": 1.5, "seed": 3}
CHANGES: list[dict[str, Any]] = [
    {"temperature": 0.3},
    {"seed": 4},
    {"top_k": 2},
    {"top_p": 0.3},
    {"min_p": 0.7},
    {"repetition_penalty": 5.0},
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(letters_folder(tmp_path_factory.mktemp("models") / "tiny", seed=2))


@pytest.fixture(scope="module")
def policy(tiny: str) -> Policy:
    return load_inference(tiny, dtype="float32")


def drawn(policy: Policy, key: int, changes: dict[str, Any]) -> str:
    """What the engine, fresh and alone, replies to "Tell." """
    engine = make_engine(policy, sequences=1, longest=64)
    tokens = encode_prompt(policy.tokenizer, Prompt(0, messages=(Message("user", "Tell."),)))
    return engine.generate([tokens], SamplingParams(**{**DRAWN, **changes}), keys=[key])[0][0].text


def test_each_option_makes_another_reply(policy: Policy) -> None:
    """Else the tests below could not tell whether it is heeded."""
    plain = drawn(policy, 0, {})
    assert all(drawn(policy, 0, changes) != plain for changes in CHANGES)


@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_generate_draws_as_it_is_told(
    tiny: str, policy: Policy, changes: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    options = [x for name, value in {**DRAWN, **changes}.items() for x in (f"--{name.replace('_', '-')}", str(value))]
    assert main(["generate", tiny, "--prompt", "Tell.", "--dtype", "float32", *options]) == 0
    assert capsys.readouterr().out == drawn(policy, 0, changes) + "\n"


@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_chat_draws_as_it_is_told(tiny: str, policy: Policy, changes: dict[str, Any]) -> None:
    session = ChatSession(ChatOptions(model=tiny, dtype="float32", **{**DRAWN, **changes}))
    reply = session.say("Tell.", lambda text: None, lambda: False)
    assert reply.completion.text == drawn(policy, 1, changes)

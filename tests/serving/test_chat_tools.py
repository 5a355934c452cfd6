"""Tools of /v1/chat/completions: into the template, out of the reply, offered, required and refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from upslope.data.chat import encode_conversation, encode_prompt
from upslope.data.records import record_of
from upslope.options import ServeOptions
from upslope.serving.server import create_app
from upslope.types import Message, Prompt

from .conftest import NAME, make_service
from .scripted import script
from .test_chat import ASK, CALL, HERMES, NOW, WEATHER, ask, hermes, hermes_folder, refused

__all__ = ["hermes", "hermes_folder"]


def test_calls_are_read(hermes: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reply in the template's form becomes tool_calls; what is said beside it stays content."""
    service = hermes.app.state.services[NAME]
    asked = script(monkeypatch, service, f"Let me look.\n{CALL}\n{CALL}", CALL, "Sunny, <tool_call>no</tool_call>.")
    choice = ask(hermes, tools=[WEATHER, NOW], max_tokens=None)["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "Let me look."
    calls = choice["message"]["tool_calls"]
    assert [call["function"] for call in calls] == [{"name": "weather", "arguments": '{"city": "Rome"}'}] * 2
    assert len({call["id"] for call in calls}) == 2
    assert {call["type"] for call in calls} == {"function"}
    prompt = service.tokenizer.decode(asked[0]["prompt"])
    assert json.dumps(WEATHER) in prompt
    assert json.dumps(NOW) in prompt
    assert asked[0]["token_mask"] is None

    message = ask(hermes, tools=[WEATHER], max_tokens=None)["choices"][0]["message"]
    assert message["content"] is None
    history = [*ASK, message, {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": "sunny"}]
    last = ask(hermes, tools=[WEATHER], messages=history, max_tokens=None)["choices"][0]
    prompt = service.tokenizer.decode(asked[-1]["prompt"])
    assert f"assistant\n{CALL}<|im_end|>\n<|im_start|>tool\nsunny<|im_end|>" in prompt
    assert last["message"] == {"role": "assistant", "content": "Sunny, <tool_call>no</tool_call>.", "refusal": None}
    assert last["finish_reason"] == "stop"


def test_a_call_that_the_budget_cuts(hermes: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    script(monkeypatch, hermes.app.state.services[NAME], CALL)
    choice = ask(hermes, tools=[WEATHER], max_tokens=20)["choices"][0]
    assert (choice["finish_reason"], choice["message"]["content"]) == ("length", CALL[:20])
    assert "tool_calls" not in choice["message"]


def test_one_call_at_most(hermes: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    script(monkeypatch, hermes.app.state.services[NAME], f"{CALL}\n{CALL}")
    choice = ask(hermes, tools=[WEATHER], max_tokens=None, parallel_tool_calls=False)["choices"][0]
    assert len(choice["message"]["tool_calls"]) == 1
    assert choice["finish_reason"] == "tool_calls"


def test_no_tools_where_none_may_be_called(hermes: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    service = hermes.app.state.services[NAME]
    asked = script(monkeypatch, service, CALL)
    choice = ask(hermes, tools=[WEATHER], tool_choice="none", max_tokens=None)["choices"][0]
    assert choice["message"]["content"] == CALL
    assert "Of a city" not in service.tokenizer.decode(asked[0]["prompt"])


@pytest.mark.parametrize("parallel", [True, False])
def test_a_call_is_required(hermes: TestClient, parallel: bool) -> None:
    """A model that knows nothing calls one of the functions, with arguments that validate."""
    body = {"tools": [WEATHER, NOW], "tool_choice": "required", "n": 8, "seed": 0, "max_tokens": 400}
    choices = ask(hermes, **body, parallel_tool_calls=parallel)["choices"]
    names = set()
    for choice in choices:
        assert (choice["finish_reason"], choice["message"]["content"]) == ("tool_calls", None)
        for call in choice["message"]["tool_calls"]:
            names.add(call["function"]["name"])
            arguments = json.loads(call["function"]["arguments"])
            assert arguments == {} if call["function"]["name"] == "now" else arguments["city"] in ("Rome", "Oslo")
        assert parallel or len(choice["message"]["tool_calls"]) == 1
    assert names == {"weather", "now"}


def test_the_named_function_is_called(hermes: TestClient) -> None:
    named = {"type": "function", "function": {"name": "weather"}}
    choices = ask(hermes, tools=[WEATHER, NOW], tool_choice=named, n=8, seed=0, max_tokens=200)["choices"]
    assert {call["function"]["name"] for c in choices for call in c["message"]["tool_calls"]} == {"weather"}
    assert {len(choice["message"]["tool_calls"]) for choice in choices} == {1}


def test_strict_functions_that_need_not_be_called(hermes: TestClient) -> None:
    """Text where the model writes text; a tag that it opens (here it can write nothing else) leads to a valid call."""
    service = hermes.app.state.services[NAME]
    strict = [{"type": "function", "function": {**tool["function"], "strict": True}} for tool in (WEATHER, NOW)]
    text = ask(hermes, tools=strict, max_tokens=16, seed=0)["choices"][0]
    assert "tool_calls" not in text["message"]
    opening = "<tool_call>"
    tokens = service.tokenizer(opening)["input_ids"]
    submit = service.submit

    async def opened(prompt: Any, params: Any, *, token_mask: Any, **options: Any) -> Any:
        """The request, its first tokens given."""

        def mask(prompt: list[int], generated: list[int]) -> Any:
            given = len(generated)
            allowed = token_mask(prompt, generated)
            if given >= len(tokens):
                return allowed
            assert allowed[tokens[given]]
            return [tokens[given]]

        return await submit(prompt, params, token_mask=mask, **options)

    service.submit = opened
    answer = ask(hermes, tools=strict, n=6, seed=0, max_tokens=300, logit_bias={"1": 8})
    for choice in answer["choices"]:
        (call,) = choice["message"]["tool_calls"]
        arguments = json.loads(call["function"]["arguments"])
        assert call["function"]["name"] == "now" or arguments["city"] in ("Rome", "Oslo")


def test_templates_without_tools(client: TestClient) -> None:
    """What the template would leave out in silence is refused by name."""
    error = refused(client, tools=[WEATHER])
    assert error["param"] == "tools"
    assert "template" in error["message"]
    call = {"id": "c", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
    error = refused(client, messages=[*ASK, {"role": "assistant", "content": "", "tool_calls": [call]}])
    assert "tool_calls" in error["message"]


def test_calls_that_text_does_not_show(hermes_folder: Path) -> None:
    service = make_service(hermes_folder)
    service.tokenizer.add_tokens(["<tool_call>"], special_tokens=True)
    with TestClient(create_app({NAME: service}, ServeOptions()), base_url="http://127.0.0.1") as client:
        assert refused(client, tools=[WEATHER])["param"] == "tools"


def test_wrong_calls_of_earlier_turns(hermes: TestClient) -> None:
    for arguments in ("no json", "[1]", '{"a": NaN}', "[" * 10_000, '{"a": "\\ud800"}'):
        call = {"id": "c7", "type": "function", "function": {"name": "weather", "arguments": arguments}}
        error = refused(hermes, messages=[*ASK, {"role": "assistant", "tool_calls": [call]}])
        assert error["param"] == "messages"
        assert "c7" in error["message"] or "surrogate" in error["message"]


def test_tools_that_cannot_be_enforced(hermes: TestClient) -> None:
    bad = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "not": {}}}}
    error = refused(hermes, tools=[bad], tool_choice="required")
    assert (error["param"], error["code"]) == ("tools", "unsupported_schema")


@pytest.mark.parametrize("arguments", ['{"city": "Rome"}', '{"city":"Rome"}'])
def test_the_prompt_is_the_one_that_training_writes(
    hermes: TestClient, monkeypatch: pytest.MonkeyPatch, arguments: str
) -> None:
    """The server's tokens, and those of a row of data with the same turns, calls as text or as objects: all equal."""
    service = hermes.app.state.services[NAME]
    service.tokenizer.chat_template = HERMES.replace("{{ m.content }}", "{{ m.tool_call_id or '' }}{{ m.content }}")
    asked = script(monkeypatch, service, "Sunny.")
    turns = [
        {"role": "developer", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]},
        *ASK,
        {"role": "assistant", "content": "I look.", "tool_calls": [call_of(arguments)]},
        {"role": "tool", "content": "sunny", "tool_call_id": "call_7"},
    ]
    strict = {"function": {**WEATHER["function"], "strict": True}, "type": "function"}
    ask(hermes, messages=turns, tools=[strict, NOW], tool_choice="auto")
    as_objects = [{**t, "tool_calls": [call_of({"city": "Rome"})]} if "tool_calls" in t else t for t in turns]
    for messages in (turns, as_objects):
        row = record_of({"messages": messages, "tools": [strict, NOW]}, "chats.jsonl:1")
        prompt = encode_prompt(service.tokenizer, Prompt(0, row.messages), tools=row.tools)
        assert prompt == asked[0]["prompt"]
        whole = (*row.messages, Message("assistant", "Sunny."))
        trained = encode_conversation(service.tokenizer, whole, tools=row.tools)
        assert trained.tokens[: len(prompt)] == prompt
    text = service.tokenizer.decode(asked[0]["prompt"])
    assert '"arguments": {"city": "Rome"}}' in text
    assert "tool\ncall_7sunny<|im_end|>" in text
    assert "system\nBe brief.<|im_end|>" in text


def call_of(arguments: Any) -> dict[str, Any]:
    return {"id": "call_7", "type": "function", "function": {"name": "weather", "arguments": arguments}}


def test_turns_that_the_template_has_no_place_for(hermes: TestClient) -> None:
    """A tool's answer, or what was said beside a call, that the model would never see is a 400 and not left out."""
    service = hermes.app.state.services[NAME]
    service.tokenizer.chat_template = HERMES.replace("{{ m.content }}", "{{ '' if m.role == 'tool' else m.content }}")
    history = [
        *ASK,
        {"role": "assistant", "content": None, "tool_calls": [call_of("{}")]},
        {"role": "tool", "content": "sunny", "tool_call_id": "call_7"},
    ]
    error = refused(hermes, messages=history)
    assert error["param"] == "messages"
    assert "message 3 of 3 (tool): the chat template has no place for its content" in error["message"]
    service.tokenizer.chat_template = HERMES.replace("{{ m.content }}", "{{ '' if m.tool_calls else m.content }}")
    history[1]["content"] = "I look."
    assert "no place for its content beside tool_calls" in refused(hermes, messages=history)["message"]

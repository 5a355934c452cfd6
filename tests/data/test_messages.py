"""The door for messages: OpenAI's form in, what templates want out; what a template has no place for is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import tokenizer_kit as kit
from hypothesis import given, settings
from hypothesis import strategies as st

from upslope.data.chat import encode_completion, encode_conversation, encode_document, encode_prompt
from upslope.data.examples import example_of, examples_of
from upslope.data.messages import message_of, tools_of
from upslope.data.records import Record, record_of
from upslope.errors import DataError
from upslope.types import Message, Prompt

ARGUMENTS = {"a": 12, "b": 7}
FUNCTION = {"name": "add", "arguments": ARGUMENTS}
ASK = {"role": "user", "content": "What is the sum?"}
ANSWER = {"role": "tool", "content": "19", "tool_call_id": "call_1"}
LAST = {"role": "assistant", "content": "The answer is 19."}
TOOL = {"type": "function", "function": {"name": "add", "description": "A sum.", "parameters": {"type": "object"}}}


def call(arguments: Any, **more: Any) -> dict[str, Any]:
    return {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": arguments}, **more}


def row(*calls: dict[str, Any], content: str | None = None, tools: Any = None) -> dict[str, Any]:
    turns = [ASK, {"role": "assistant", "content": content, "tool_calls": list(calls)}, ANSWER, LAST]
    return {"messages": turns, "tools": tools}


def conversation(*calls: dict[str, Any], content: str | None = None, tools: Any = None) -> Record:
    return record_of(row(*calls, content=content, tools=tools), "chats.jsonl:3")


# Templates that leave something out, and what of it.
NO_CALLS = kit.CHATML.replace("message.tool_calls or []", "[]")
ONE_CALL = kit.CHATML.replace("message.tool_calls or []", "(message.tool_calls or [])[:1]")
NO_ARGUMENTS = kit.CHATML.replace("(call | tojson)", "call.function.name")
NO_TOOL_TURNS = kit.CHATML.replace(
    "{{ '<|im_start|>' +", "{% if message.role == 'tool' %}{% continue %}{% endif %}{{ '<|im_start|>' +"
)
NO_CONTENT_BESIDE_CALLS = kit.CHATML.replace(
    "+ message['content'] }}", "+ ('' if message.tool_calls else message['content']) }}"
)
NO_SYSTEM = kit.CHATML.replace(
    "{{ '<|im_start|>' +", "{% if message.role == 'system' %}{% continue %}{% endif %}{{ '<|im_start|>' +"
)
WITH_TOOLS = "{% if tools %}{{ tools | tojson }}{% endif %}" + kit.CHATML
SHOWS_IDS = kit.CHATML.replace(
    "message['role'] + '\n'", "message['role'] + (' ' + message.tool_call_id if message.tool_call_id else '') + '\n'"
)


def test_arguments_as_text_and_as_object_are_one_thing(chatml: Any) -> None:
    """OpenAI's own form is JSON in a text; it is not encoded a second time."""
    as_text, as_object = conversation(call(json.dumps(ARGUMENTS))), conversation(call(ARGUMENTS))
    assert as_text.messages == as_object.messages
    assert as_text.messages[1].tool_calls == (call(ARGUMENTS),)
    example = example_of(as_text, chatml, max_length=None)
    assert example == example_of(as_object, chatml, max_length=None)
    assert '"arguments": {"a": 12, "b": 7}' in chatml.decode(example.tokens)
    bare = {"name": "add", "arguments": ARGUMENTS, "id": "call_1"}
    assert conversation(bare).messages == as_object.messages
    by_hand = (Message("user", "What is the sum?"), Message("assistant", "", tool_calls=(call('{"a": 12, "b": 7}'),)))
    assert encode_conversation(chatml, by_hand) == encode_conversation(chatml, as_object.messages[:2])


def test_the_id_that_a_tool_answers_reaches_the_template() -> None:
    tokenizer = kit.byte_level(SHOWS_IDS)
    record = conversation(call(ARGUMENTS))
    assert record.messages[2] == Message("tool", "19", tool_call_id="call_1")
    assert "<|im_start|>tool call_1\n19" in tokenizer.decode(example_of(record, tokenizer, max_length=None).tokens)
    assert "<|im_start|>tool call_1\n19" in tokenizer.decode(encode_prompt(tokenizer, Prompt(0, record.messages[:3])))


def test_a_message_and_its_mapping() -> None:
    """What is written back (rollouts, rows of generate and chat) is read as the same message."""
    for entry in (*row(call(ARGUMENTS), content="I add.")["messages"], {**LAST, "train": False, "name": "adder"}):
        message = message_of(entry, "messages[0]", "here")
        assert message_of(message.as_mapping(), "messages[0]", "here") == message
        assert {k: v for k, v in entry.items() if v is not None} == message.as_mapping()


def test_developer_is_system_and_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief.", "image": None}]
    assert message_of({"role": "developer", "content": parts}, "m", "here") == Message("system", "Be brief.")


def test_tools_in_one_form() -> None:
    shuffled = {
        "parameters": {"type": "object"},
        "strict": True,
        "name": "add",
        "description": "A sum.",
        "return": None,
    }
    for given_tool in (TOOL, {"function": shuffled, "type": "function"}, shuffled):
        (tool,) = tools_of([given_tool], "here")
        assert json.dumps(tool) == json.dumps(TOOL)
    assert tools_of(json.dumps([TOOL]), "here") == (TOOL,)
    assert tools_of(None, "here") == ()


BAD: list[tuple[dict[str, Any], str]] = [
    (row(call("{")), r"'messages\[1\].tool_calls\[0\].function.arguments of call call_1' is not valid JSON"),
    (row(call('{"a": NaN}')), "is not valid JSON: NaN is not JSON"),
    (row(call({"a": float("inf")})), "is not JSON"),
    (row(call('{"a": 1e999}')), "is not JSON"),
    (row(call("[1]")), "must be a JSON object, is list"),
    (row(call('{"a": "\\ud800"}')), "half a surrogate pair"),
    (row(call(ARGUMENTS, index=0)), r"'messages\[1\].tool_calls\[0\]' has the unknown key 'index'"),
    (row(call(ARGUMENTS, type="custom")), r"tool_calls\[0\].type' must be 'function', is str 'custom'"),
    (row({"id": "x"}), r"tool_calls\[0\].function' must be an object with name and arguments, is null"),
    (row({"function": {"arguments": {}}}), r"function.name' must be a text, is null"),
    ({"messages": [dict(LAST, reasoning_content="Hm.")]}, "unknown key 'reasoning_content'"),
    ({"messages": [dict(LAST, function_call=FUNCTION)]}, "unknown key 'function_call'"),
    ({"messages": [dict(LAST, tool_call_id="x")]}, r"messages\[0\].tool_call_id' belongs to a tool's message"),
    ({"messages": [dict(ASK, tool_calls=[call({})])]}, r"messages\[0\].tool_calls' belong to an assistant message"),
    ({"messages": [dict(LAST, train=True, weight=0)]}, "says train and weight, and they differ"),
    ({"messages": [ASK, LAST], "system": "Be brief."}, "'system' beside 'messages' would not be read; make it the"),
    ({"prompt": "a", "completion": "b", "history": [["a", "b"]]}, "'history' beside 'prompt' would not be read"),
    ({"messages": [ASK, LAST], "functions": [TOOL]}, "'functions' beside 'messages' .* name the column tools"),
    ({"messages": [ASK, LAST], "tools": [{"type": "web_search"}]}, r"'tools\[0\].type' must be 'function'"),
    ({"messages": [ASK, LAST], "tools": [dict(TOOL, type="x")]}, r"'tools\[0\].type' must be 'function'"),
    ({"messages": [ASK, LAST], "tools": [{"name": ""}]}, r"'tools\[0\].function.name' is empty"),
    ({"conversations": [{"from": "gpt", "value": "a", "tool_calls": []}]}, r"conversations\[0\]' has the unknown key"),
]


@pytest.mark.parametrize(("bad", "says"), BAD)
def test_what_has_no_place_is_refused_by_name(bad: dict[str, Any], says: str) -> None:
    with pytest.raises(DataError, match=r"^chats.jsonl:3: .*" + says) as caught:
        record_of(bad, "chats.jsonl:3")
    assert "\n" not in str(caught.value)


LOST: list[tuple[str, Record, str]] = [
    (NO_CALLS, conversation(call(ARGUMENTS)), r"message 2 of 4 \(assistant\): .* has no place for tool_calls"),
    (ONE_CALL, conversation(call({"a": 1}), call({"a": 2})), r"message 2 of 4 .* no place for tool_calls"),
    (NO_ARGUMENTS, conversation(call(ARGUMENTS)), r"message 2 of 4 .*'add'\): the arguments are not shown"),
    (NO_TOOL_TURNS, conversation(call(ARGUMENTS)), r"message 3 of 4 \(tool\): .* no place for its content"),
    (NO_CONTENT_BESIDE_CALLS, conversation(call({}), content="I add."), "no place for its content beside tool_calls"),
    (kit.CHATML, conversation(call(ARGUMENTS), tools=[TOOL]), r"no place for tools \('add' is not shown\)"),
    (
        NO_SYSTEM,
        record_of({"messages": [{"role": "system", "content": "Rhyme."}, ASK, LAST]}, "chats.jsonl:3"),
        "1 of 3",
    ),
]


@pytest.mark.parametrize(("template", "record", "says"), LOST)
def test_a_template_that_leaves_something_out(template: str, record: Record, says: str) -> None:
    """Training and prompting refuse it, naming the row; nothing is trained on less than was given."""
    tokenizer = kit.byte_level(template)
    with pytest.raises(DataError, match="^chats.jsonl:3: .*" + says):
        examples_of([record], tokenizer, max_length=None)
    with pytest.raises(DataError, match=says.replace("of 4", "of 3").replace("1 of 3", "1 of 2")):
        encode_prompt(tokenizer, Prompt(0, record.messages[:-1]), tools=record.tools)


def test_what_shows_is_not_refused() -> None:
    """Names and arguments in another form, thoughts that a template takes out of earlier turns, another order."""
    shouted = kit.CHATML.replace("(call | tojson)", "(call.function.name | upper) + (call.function.arguments | tojson)")
    assert example_of(conversation(call(ARGUMENTS)), kit.byte_level(shouted), max_length=None)
    thoughts = kit.CHATML.replace("message['content'] }}", "message['content'].split('</think>')[-1] }}")
    talk = (Message("user", "Hello?"), Message("assistant", "<think>Hm.</think>Hello"), Message("user", "And?"))
    assert "Hm." not in (tokenizer := kit.byte_level(thoughts)).decode(encode_prompt(tokenizer, Prompt(0, talk)))
    backwards = kit.byte_level("{% for m in messages | reverse %}{{ m.content }}{% endfor %}")
    assert encode_prompt(backwards, Prompt(0, talk))
    assert encode_prompt(kit.byte_level(WITH_TOOLS), Prompt(0, talk), tools=[TOOL])


def test_a_call_outside_the_generation_block_is_not_trained_as_an_empty_reply() -> None:
    outside = "{% for c in message.tool_calls or [] %}{{ c | tojson }}{% endfor %}{% generation %}"
    tokenizer = kit.byte_level(kit.MARKED.replace("{% generation %}", outside))
    with pytest.raises(DataError, match=r"^chats.jsonl:3: message 2 of 4 .*call of 'add' does not stand in the part"):
        example_of(conversation(call(ARGUMENTS)), tokenizer, max_length=None)


CONTENT = "message['content'] }}"
R1 = kit.CHATML.replace(CONTENT, "(message['content'].split('</think>')[-1]) }}")
R1_MARKED = kit.MARKED.replace(
    "message['content'] + '<|im_end|>' }}{% end", "message['content'][-1:] + '<|im_end|>' }}{% end"
)
ANSWERS_CUT = kit.CHATML.replace(CONTENT, "message['content'][:12] }}")
VALUES_CUT = kit.CHATML.replace("(call | tojson)", "call.function.name + (call.function.arguments.values() | join)[:9]")
THOUGHT = "<think>First I take 1 and\n\n1, and add.</think>2"
LONG = "How much is one and one? Take your time."

CUT: list[tuple[str, list[Message], str]] = [
    (
        R1,
        [Message("user", "1 + 1?"), Message("assistant", THOUGHT)],
        r"2 of 2 \(assistant\): .*'<think>First I take 1 and",
    ),
    (R1_MARKED, [Message("user", "1 + 1?"), Message("assistant", THOUGHT)], r"2 of 2 \(assistant\): .*'<think>First"),
    (
        ANSWERS_CUT,
        [Message("user", "1?"), Message("assistant", LONG)],
        r"2 of 2 \(assistant\): .*'one and one\? Take",
    ),
    (
        ANSWERS_CUT,
        [Message("user", LONG), Message("assistant", "2")],
        r"1 of 2 \(user\): .*'one and one\? Take your time",
    ),
    (
        ANSWERS_CUT,
        [Message("system", "Be brief, and do not rhyme"), Message("user", "and, brief"), Message("assistant", "2")],
        r"1 of 3 \(system\): .*'and do not rhyme'",
    ),
    (
        ANSWERS_CUT,
        [Message("user", "1?"), Message("assistant", "2"), Message("tool", LONG), Message("assistant", "3")],
        r"3 of 4 \(tool\): .*'one and",
    ),
]


@pytest.mark.parametrize(("template", "talk", "says"), CUT)
def test_a_template_that_cuts_a_content_is_refused(template: str, talk: list[Message], says: str) -> None:
    with pytest.raises(
        DataError, match=r"^a:1: message " + says + ".*use a template that keeps it, or data without it"
    ):
        examples_of([Record("messages", "a:1", messages=tuple(talk))], kit.byte_level(template), max_length=None)


def test_a_template_that_cuts_an_argument_is_refused() -> None:
    record = conversation(call({"path": "a.py", "text": "print(1)"}))
    with pytest.raises(
        DataError, match=r"message 2 of 4 .*argument 'text' of its call of 'add'.*\('print\(1\)' is missing"
    ):
        example_of(record, kit.byte_level(VALUES_CUT), max_length=None)
    whole = kit.byte_level(VALUES_CUT.replace("[:9]", ""))
    assert example_of(record, whole, max_length=None)
    nested = conversation(call({"a": {"b": [1.5, True, None, "Grüße \U0001f600"]}, "c": '"<1>"\n'}))
    assert example_of(nested, kit.byte_level(kit.CHATML), max_length=None)
    spoken = kit.CHATML.replace("(call | tojson)", "call.function.name + (call.function.arguments | string)")
    assert example_of(nested, kit.byte_level(spoken), max_length=None)


@pytest.mark.parametrize(
    "written",
    [
        "message['content'] | trim }}",
        "message['content'] | e }}",
        "message['content'] | tojson(ensure_ascii=True) }}",
        "message['content'] | replace('<think>', '<think>\n') | replace('</think>', '\n</think>\n\n') }}",
        "message['content'] | upper }}",
        "(message['content'] | replace('/no_think', '') if message['role'] == 'user' else message['content']) }}",
    ],
)
def test_a_content_written_otherwise_is_whole(written: str) -> None:
    written = kit.CHATML.replace("+ message['content'] }}", "}}{{ " + written)
    talk = (
        Message("user", " 1 < 2 & Größe\n? /no_think "),
        Message("assistant", ' <think> "ΟΔΟΣ" </think> ja, Größe '),
    )
    assert example_of(Record("messages", "a:1", messages=talk), kit.byte_level(written), max_length=None)


def test_a_reply_that_begins_in_the_generation_prompt_is_whole() -> None:
    """As where the prompt opens <think>: what is sampled, and trained, begins behind it."""
    opened = kit.CHATML.replace("assistant\n' }}{% endif %}", "assistant\n<think>\n' }}{% endif %}")
    talk = (Message("user", "1 + 1?"), Message("assistant", "<think>\nHm.</think>2"))
    tokenizer = kit.byte_level(opened)
    example = example_of(Record("messages", "a:1", messages=talk), tokenizer, max_length=None)
    trained = [token for token, on in zip(example.tokens, example.mask, strict=True) if on]
    assert tokenizer.decode(trained) == "Hm.</think>2<|im_end|>"


def test_tools_beside_a_text_are_refused(chatml: Any) -> None:
    for encode in (
        lambda: encode_prompt(chatml, Prompt(0, text="a"), tools=[TOOL]),
        lambda: encode_completion(chatml, "a", "b", tools=[TOOL]),
        lambda: encode_document(chatml, "a", tools=[TOOL]),
        lambda: example_of(record_of({"text": "a", "tools": [TOOL]}, "here"), chatml, max_length=None),
    ):
        with pytest.raises(DataError, match="'tools' have no place beside a text"):
            encode()
    alpaca = record_of({"instruction": "a", "output": "b", "tools": [TOOL]}, "here")
    assert alpaca.tools == (TOOL,)


KEYS = ["role", "content", "name", "tool_calls", "tool_call_id", "train", "weight", "id", "type", "function",
        "arguments", "text", "parameters", "strict", "reasoning_content"]  # fmt: skip
WORDS = st.sampled_from(
    ["user", "assistant", "tool", "text", "function", "{}", "[", '{"a": NaN}', "\ud800", "", "1e999"]
)
RUBBISH = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | WORDS | st.binary(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS) | st.integers(), inner, max_size=5)
    ),
    max_leaves=12,
)


def accepted(call: Callable[[], Any]) -> Any:
    """What a door gives, None where it refuses in one line that says where; any other exception fails the test."""
    complaint = ""
    try:
        return call()
    except DataError as error:
        complaint = str(error)
    assert complaint.startswith("file:1: ")
    assert "\n" not in complaint
    return None


@settings(max_examples=300, deadline=None)
@given(entry=RUBBISH | st.fixed_dictionaries({"role": WORDS, "content": RUBBISH, "tool_calls": RUBBISH}))
def test_rubbish_is_a_message_or_one_clear_line(entry: Any) -> None:
    message = accepted(lambda: message_of(entry, "messages[0]", "file:1"))
    if message is not None:
        json.dumps(message.as_mapping(), ensure_ascii=False, allow_nan=False).encode()
        assert message_of(message.as_mapping(), "messages[0]", "file:1") == message


@settings(max_examples=200, deadline=None)
@given(value=RUBBISH | st.lists(st.fixed_dictionaries({"function": RUBBISH})))
def test_rubbish_is_tools_or_one_clear_line(value: Any) -> None:
    tools = accepted(lambda: tools_of(value, "file:1"))
    if tools is not None:
        json.dumps(tools, ensure_ascii=False, allow_nan=False).encode()
        assert tools_of(list(tools), "file:1") == tools

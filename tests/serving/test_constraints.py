"""Constrained decoding: what is sampled always parses and validates, whatever is sampled, interrupted or recomputed."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.tiny_model import tiny_folder, tiny_tokenizer
from upslope.build import load_inference
from upslope.data.chat import load_tokenizer
from upslope.data.messages import ToolCall, ToolReader
from upslope.engine.engine import Engine
from upslope.errors import ConfigError, DataError
from upslope.serving.vocabulary import Constraint, Grammars, calls_grammar, offered_grammar
from upslope.types import Completion, SamplingParams

EOS = 1
VOCAB = 258
CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Oslo"]}, "days": {"type": "integer", "minimum": 1, "maximum": 14}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
SHOPPING = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "items": {"type": "array", "items": {"$ref": "#/$defs/item"}, "minItems": 1, "maxItems": 2},
        "paid": {"type": "boolean"},
        "note": {"anyOf": [{"type": "null"}, {"type": "string", "pattern": "^[a-z]{2,4}$"}]},
    },
    "required": ["name", "items", "paid", "note"],
    "additionalProperties": False,
    "$defs": {
        "item": {
            "type": "object",
            "properties": {"kind": {"const": "apple"}, "count": {"type": "integer", "minimum": 0, "maximum": 99}},
            "required": ["kind", "count"],
            "additionalProperties": False,
        }
    },
}


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return Grammars(tiny_tokenizer(), VOCAB, frozenset({EOS}))


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    policy = load_inference(tiny_folder(tmp_path_factory.mktemp("model")), dtype="float32")
    return Engine(policy.model, policy.tokenizer, eos_token_ids=policy.eos_token_ids, num_blocks=64)


def run(engine: Engine, params: SamplingParams, mask: Any, *, key: int = 0) -> list[Completion]:
    request = engine.add([5, 6, 7], params, key=key, token_mask=mask)
    return finished(engine, {request})[request]


def finished(engine: Engine, requests: set[int]) -> dict[int, list[Completion]]:
    found: dict[int, dict[int, Completion]] = {request: {} for request in requests}
    while engine.busy:
        for event in engine.step():
            if event.error is not None:
                raise event.error
            if event.completion is not None:
                found[event.request_id][event.sample] = event.completion
    return {request: [some[i] for i in sorted(some)] for request, some in found.items()}


def is_city(value: Any) -> bool:
    days = value["days"]
    return set(value) == {"city", "days"} and value["city"] in ("Rome", "Oslo") and type(days) is int and 0 < days < 15


def is_shopping(value: Any) -> bool:
    items = value["items"]
    return (
        set(value) == {"name", "items", "paid", "note"}
        and isinstance(value["name"], str)
        and len(value["name"]) <= 12
        and len(items) in (1, 2)
        and all(set(item) == {"kind", "count"} and item["kind"] == "apple" for item in items)
        and all(type(item["count"]) is int and 0 <= item["count"] <= 99 for item in items)
        and type(value["paid"]) is bool
        and (value["note"] is None or re.fullmatch("[a-z]{2,4}", value["note"]) is not None)
    )


def test_every_sample_validates(engine: Engine, grammars: Grammars) -> None:
    """Temperature 1 of a model that knows nothing: 64 samples, all valid, all ended by the model itself."""
    for schema, valid, budget in ((CITY, is_city, 64), (SHOPPING, is_shopping, 250)):
        for seed in range(8):
            params = SamplingParams(max_tokens=budget, n=4, seed=seed)
            for completion in run(engine, params, grammars.schema(schema, samples=4)):
                assert completion.finish_reason == "stop"
                assert valid(json.loads(completion.text)), completion.text


def test_the_samples_differ(engine: Engine, grammars: Grammars) -> None:
    texts = {c.text for c in run(engine, SamplingParams(max_tokens=64, n=16), grammars.schema(CITY, samples=16))}
    assert {json.loads(text)["city"] for text in texts} == {"Rome", "Oslo"}
    assert len({json.loads(text)["days"] for text in texts}) > 4


def test_a_budget_that_cuts(engine: Engine, grammars: Grammars) -> None:
    """The beginning of a valid document, and the reason says that it was cut."""
    whole = run(engine, SamplingParams(max_tokens=64, seed=3), grammars.schema(CITY, samples=1))[0]
    cut = run(engine, SamplingParams(max_tokens=9, seed=3), grammars.schema(CITY, samples=1))[0]
    assert (whole.finish_reason, cut.finish_reason) == ("stop", "length")
    assert whole.text.startswith(cut.text)
    assert len(cut.tokens) == 9


def test_any_object(engine: Engine, grammars: Grammars) -> None:
    for seed in range(8):
        bias = {tiny_tokenizer().convert_tokens_to_ids(c): 12.0 for c in '"}'}
        params = SamplingParams(max_tokens=200, seed=seed, logit_bias=bias)
        completion = run(engine, params, grammars.schema({"type": "object"}, samples=1))[0]
        assert completion.finish_reason == "stop"
        assert isinstance(json.loads(completion.text), dict)


def test_eos_exactly_where_the_grammar_accepts(grammars: Grammars) -> None:
    """Of the prefixes of a document only the whole is accepted; of a number every one is, and it may go on."""
    constraint = grammars.schema(CITY, samples=1)
    tokens = tiny_tokenizer()('{"city": "Rome", "days": 1')["input_ids"]
    for end in range(len(tokens) + 1):
        assert not constraint([], tokens[:end])[EOS]
    closed = [*tokens, *tiny_tokenizer()("}")["input_ids"]]
    assert np.flatnonzero(constraint([], closed)).tolist() == [EOS]
    number = grammars.schema({"type": "integer"}, samples=1)
    mask = number([], tiny_tokenizer()("12")["input_ids"])
    assert mask[EOS]
    assert mask.sum() == 11


def test_every_end_token_counts() -> None:
    """A model may have several: all are allowed at the end, none before."""
    constraint = Grammars(tiny_tokenizer(), VOCAB, frozenset({0, 1})).schema({"const": "a"}, samples=1)
    tokens = tiny_tokenizer()('"a"')["input_ids"]
    assert np.flatnonzero(constraint([], tokens)).tolist() == [0, 1]
    assert not constraint([], tokens[:-1])[[0, 1]].any()


def test_more_logits_than_tokens() -> None:
    """Rows that pad the embedding can never be drawn."""
    constraint = Grammars(tiny_tokenizer(), 300, frozenset({EOS})).schema({"type": "string"}, samples=1)
    mask = constraint([], tiny_tokenizer()('"')["input_ids"])
    assert mask.shape == (300,)
    assert not mask[258:].any()
    assert mask.sum() > 100


def samples_of(constraint: Constraint, count: int) -> list[list[int]]:
    """`count` documents of tokens, one token of each in turn, drawn uniformly."""
    rng = np.random.default_rng(0)
    rows: list[list[int]] = [[] for _ in range(count)]
    open_rows = set(range(count))
    while open_rows:
        for i in sorted(open_rows):
            token = int(rng.choice(np.flatnonzero(constraint([], rows[i]))))
            if token == EOS:
                open_rows.remove(i)
            else:
                rows[i].append(token)
    return rows


@pytest.mark.parametrize("held", [1, 3, 8])
def test_any_order_of_calls(grammars: Grammars, held: int) -> None:
    """Interleaved samples, repeated and rewound calls give the masks of a fresh constraint, however few are held."""
    shared = grammars.schema(SHOPPING, samples=held)
    rows = samples_of(shared, 5)
    for row in rows:
        jump = [0, len(row), len(row) // 2, len(row) // 2, len(row) - 1, 3]
        for end in jump:
            assert (shared([], row[:end]) == grammars.schema(SHOPPING, samples=1)([], row[:end])).all()
        assert shared([], row)[EOS]


def test_preemption_changes_nothing(grammars: Grammars, tmp_path: Path) -> None:
    """Too few blocks: samples are sent back and recomputed, and still say what they say alone."""
    policy = load_inference(tiny_folder(tmp_path / "m"), dtype="float32")
    small = Engine(policy.model, policy.tokenizer, eos_token_ids=policy.eos_token_ids, num_blocks=4)
    params = SamplingParams(max_tokens=180, seed=1)
    requests = [small.add([5] * 30, params, key=k, token_mask=grammars.schema(SHOPPING, samples=1)) for k in range(6)]
    together = finished(small, set(requests))
    assert small.stats.preemptions > 0
    for key, request in enumerate(requests):
        alone = small.add([5] * 30, params, key=key, token_mask=grammars.schema(SHOPPING, samples=1))
        assert finished(small, {alone})[alone][0].tokens == together[request][0].tokens


def test_new_weights_in_the_middle(engine: Engine, grammars: Grammars) -> None:
    """What is running is recomputed after a swap; the document goes on where it was."""
    request = engine.add([5, 6], SamplingParams(max_tokens=64), token_mask=grammars.schema(CITY, samples=1))
    for _ in range(9):
        assert not [event for event in engine.step() if event.completion]
    engine.set_version(engine.version + 1)
    completion = finished(engine, {request})[request][0]
    assert completion.mixed_versions
    assert is_city(json.loads(completion.text))


UNUSABLE = [
    ({"type": "strin"}, "strin"),
    ({"type": "object", "not": {}}, "not"),
    ({"type": "string", "pattern": "("}, "unclosed group"),
    ({"$ref": "https://example.org/s"}, "example.org"),
    ({"$ref": "#/nowhere"}, "/nowhere"),
    ({"$ref": "#"}, "nothing satisfies"),
    ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf"),
    ({"not": {}, "x-guidance": {"lenient": True}}, "not"),
    ({"const": float("nan")}, "not JSON"),
    ({"type": "integer", "multipleOf": 0}, "multiple"),
]


@pytest.mark.parametrize(("schema", "named"), UNUSABLE, ids=[named for _, named in UNUSABLE])
def test_schemas_that_cannot_be_enforced(grammars: Grammars, schema: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named) as refused:
        grammars.schema(schema, samples=1)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 600


def test_a_very_deep_schema_is_refused(grammars: Grammars) -> None:
    deep: dict[str, Any] = {}
    for _ in range(100_000):
        deep = {"items": deep}
    with pytest.raises(ConfigError):
        grammars.schema(deep, samples=1)


def test_a_token_that_was_not_allowed(grammars: Grammars) -> None:
    with pytest.raises(DataError, match="grammar"):
        grammars.schema(CITY, samples=1)([], tiny_tokenizer()("[")["input_ids"])


FUNCTIONS = {"weather": CITY, "now": {"type": "object", "properties": {}, "additionalProperties": False}}


def calls_of(text: str) -> list[ToolCall]:
    found = ToolReader().push(text, final=True)
    assert all(isinstance(item, ToolCall) for item in found), found
    return [item for item in found if isinstance(item, ToolCall)]


def test_a_call_is_forced(engine: Engine, grammars: Grammars) -> None:
    """Required: every sample is a call whose arguments validate; both functions are called."""
    seen: dict[str, int] = {}
    grammar = calls_grammar(FUNCTIONS, grammars.marks(), several=False)
    for completion in run(engine, SamplingParams(max_tokens=150, n=16), grammars.lark(grammar, samples=16)):
        assert completion.finish_reason == "stop"
        (call,) = calls_of(completion.text)
        arguments = json.loads(call.arguments)
        assert is_city(arguments) if call.name == "weather" else arguments == {}
        seen[call.name] = seen.get(call.name, 0) + 1
    assert seen.keys() == FUNCTIONS.keys()


def test_several_calls_are_forced(engine: Engine, grammars: Grammars) -> None:
    """The model chooses how many; at least one."""
    newline = tiny_tokenizer().convert_tokens_to_ids("Ċ")
    params = SamplingParams(max_tokens=400, n=8, logit_bias={newline: 1.0})
    done = run(engine, params, grammars.lark(calls_grammar(FUNCTIONS, grammars.marks(), several=True), samples=8))
    counts = [len(calls_of(c.text)) for c in done if c.finish_reason == "stop"]
    assert min(counts) >= 1
    assert max(counts) > 1


def accepted(constraint: Constraint, text: str, tokenizer: Any = None) -> bool:
    """Whether every token of the text is allowed, one by one, and then the end."""
    tokens = (tokenizer or tiny_tokenizer())(text)["input_ids"]
    return all(constraint([], tokens[:i])[token] for i, token in enumerate([*tokens, EOS]))


def test_offered_calls(grammars: Grammars) -> None:
    """Text may be anything, but behind an opening tag stands a valid call."""
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome", "days": 3}}\n</tool_call>'
    for several in (True, False):
        may = grammars.lark(offered_grammar(FUNCTIONS, grammars.marks(), several=several), samples=1)
        assert accepted(may, "Hello.\nNo call <tool_ca here.")
        assert accepted(may, call)
        assert accepted(may, f"Let me look.\n{call}")
        assert accepted(may, f"{call}\n{call}") == several
        assert not accepted(may, call.replace("Rome", "Bonn"))
        assert not accepted(may, call.replace("weather", "whether"))
        assert not accepted(may, "<tool_call>")


def test_tags_that_are_tokens() -> None:
    """As in Qwen's tokenizers: the tags, and others that text shows, are single tokens that are no control tokens."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<tool_call>", "</tool_call>", "<think>", "</think>"])
    grammars = Grammars(tokenizer, len(tokenizer), frozenset({EOS}))
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome", "days": 3}}\n</tool_call>'
    assert tokenizer(call)["input_ids"][0] == 258
    forced = grammars.lark(calls_grammar(FUNCTIONS, grammars.marks(), several=True), samples=1)
    assert np.flatnonzero(forced([], [])).tolist() == [258]
    assert accepted(forced, f"{call}\n{call}", tokenizer)
    may = grammars.lark(offered_grammar(FUNCTIONS, grammars.marks(), several=True), samples=1)
    for text in ("Hello <b>.", "<think>\nWell.\n</think>\n\nHello.", f"<think>a</think>{call}\n{call} ok", call):
        assert accepted(may, text, tokenizer)
    assert not accepted(may, "<tool_call>", tokenizer)
    assert not accepted(may, call.replace("Rome", "Bonn"), tokenizer)
    spelt = tiny_tokenizer()("<tool_call>")["input_ids"]
    assert not may([], spelt[:-1])[spelt[-1]]


def test_a_large_vocabulary(smollm2_folder: Path) -> None:
    """Tokens that span several parts of a document: what is drawn from the mask, whatever is drawn, parses."""
    tokenizer = load_tokenizer(smollm2_folder)
    grammars = Grammars(tokenizer, 49152, frozenset({0, 2}))
    rng = np.random.default_rng(0)
    for _ in range(20):
        constraint, tokens = grammars.schema(SHOPPING, samples=1), []
        while (token := int(rng.choice(np.flatnonzero(constraint([], tokens))))) not in (0, 2):
            tokens.append(token)
        assert is_shopping(json.loads(tokenizer.decode(tokens)))
    natural = '{"name": "bread", "items": [{"kind": "apple", "count": 12}], "paid": true, "note": "two"}'
    tokens = tokenizer(natural)["input_ids"]
    constraint = grammars.schema(SHOPPING, samples=1)
    assert all(constraint([], tokens[:i])[token] for i, token in enumerate(tokens))


def test_masks_and_other_parameters_together(engine: Engine, grammars: Grammars) -> None:
    """Greedy, top-k, top-p, min-p, penalty and bias act within what the grammar allows."""
    base = SamplingParams(max_tokens=64)
    variants = [
        replace(base, temperature=0.0),
        replace(base, top_k=1),
        replace(base, top_p=0.1),
        replace(base, min_p=0.5, temperature=2.0),
        replace(base, repetition_penalty=1.5, logit_bias={EOS: 50.0}),
    ]
    for params in variants:
        completion = run(engine, params, grammars.schema(CITY, samples=1))[0]
        assert completion.finish_reason == "stop"
        assert is_city(json.loads(completion.text))

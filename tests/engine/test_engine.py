"""What the engine promises its callers: stopping, streaming, cancelling, masks, errors, counts."""

from __future__ import annotations

import math

import pytest
import torch

from upslope.engine import Engine, Event
from upslope.errors import ConfigError, DataError, ModelError
from upslope.kernels.products import onednn_bfloat16
from upslope.models.decoder.network import Decoder
from upslope.types import Completion, SamplingParams

from .tiny import assert_exact, byte_tokenizer, ids, prompt, tiny

TOKENIZER = byte_tokenizer()


def collect(engine: Engine) -> dict[int, list[Event]]:
    """Run to the end; every event by request."""
    events: dict[int, list[Event]] = {}
    while engine.busy:
        for event in engine.step():
            events.setdefault(event.request_id, []).append(event)
    return events


def spelling(text: str) -> object:
    """A token mask that forces a reply."""
    tokens = ids(text)
    return lambda _, generated: [tokens[len(generated)]] if len(generated) < len(tokens) else [0]


@pytest.mark.parametrize("length", [1, 63, 64, 65, 127, 128])
def test_one_token_completions_at_block_borders(length: int) -> None:
    model = tiny()
    engine = Engine(model, num_blocks=12)
    groups = engine.generate([prompt(length)], SamplingParams(max_tokens=1, n=3))
    assert [len(c.tokens) for c in groups[0]] == [1, 1, 1]
    assert all(c.finish_reason == "length" for c in groups[0])
    assert_exact(model, [prompt(length)], groups)
    assert engine.pool.free == 12


def test_end_of_sequence_belongs_to_the_completion() -> None:
    model = tiny()
    p = SamplingParams(max_tokens=30, temperature=0.0)
    (free,) = Engine(model, num_blocks=8).generate([prompt(5)], p)[0]
    end = free.tokens[4]
    first = free.tokens.index(end)
    assert free.finish_reason == "length"
    (eos,) = Engine(model, num_blocks=8, eos_token_ids=[end]).generate([prompt(5)], p)[0]
    assert (eos.tokens, eos.finish_reason) == (free.tokens[: first + 1], "stop")
    assert len(eos.policy_logprobs) == len(eos.sampling_logprobs) == first + 1
    own = SamplingParams(max_tokens=30, temperature=0.0, stop_token_ids=(end,), ignore_eos=True)
    (stopped,) = Engine(model, num_blocks=8).generate([prompt(5)], own)[0]
    assert stopped.tokens == eos.tokens
    ignoring = SamplingParams(max_tokens=30, temperature=0.0, ignore_eos=True)
    (ignored,) = Engine(model, num_blocks=8, eos_token_ids=[end]).generate([prompt(5)], ignoring)[0]
    assert ignored.tokens == free.tokens


def test_context_ends_the_completion() -> None:
    engine = Engine(tiny(context=70), num_blocks=8)
    (c,) = engine.generate([prompt(66)], SamplingParams(max_tokens=50))[0]
    assert (len(c.tokens), c.finish_reason) == (4, "length")


def test_stop_string_across_tokens_ends_the_text_and_keeps_the_tokens() -> None:
    engine = Engine(tiny(vocab=257), TOKENIZER, eos_token_ids=[0], num_blocks=8)
    request = engine.add(
        ids("hi"),
        SamplingParams(max_tokens=40, stop=("€END", "never")),
        token_mask=spelling("größe €E €END after"),  # type: ignore[arg-type]
    )
    last = collect(engine)[request][-1].completion
    assert last is not None
    assert last.text == "größe €E "
    assert last.tokens == ids("größe €E €END")
    assert last.finish_reason == "stop"


@pytest.mark.parametrize("text", ["plain", "größer 😀", "a STO then STOP and more", "ends with ST"])
def test_stream_adds_up_to_the_text(text: str) -> None:
    engine = Engine(tiny(vocab=257), TOKENIZER, eos_token_ids=[0], num_blocks=8)
    params = SamplingParams(max_tokens=60, stop=("STOP",), logprobs=1)
    expected = text.split("STOP")[0]
    for _ in range(2):
        events = list(engine.stream(ids("q" * 70), params, token_mask=spelling(text)))  # type: ignore[arg-type]
        final = events[-1].completion
        assert final is not None
        assert "".join(e.text for e in events) == final.text == expected
        assert [e.token for e in events] == final.tokens
        assert [e.policy_logprob for e in events] == final.policy_logprobs
        assert [e.top_logprobs for e in events] == final.top_logprobs
        assert all(e.completion is None for e in events[:-1])
    assert engine.stats.cached_tokens == 64


def test_random_stream_of_many_samples_beside_another() -> None:
    engine = Engine(tiny(vocab=257), TOKENIZER, eos_token_ids=[0], num_blocks=40)
    params = SamplingParams(max_tokens=25, n=3, seed=4)
    one, two = engine.stream(ids("first"), params), engine.stream(ids("second"), params, key=1)
    seen: list[list[Event]] = [[], []]
    for a, b in zip(one, two, strict=False):
        seen[0].append(a)
        seen[1].append(b)
    seen[0] += list(one)
    seen[1] += list(two)
    whole = Engine(tiny(vocab=257), TOKENIZER, eos_token_ids=[0], num_blocks=40).generate(
        [ids("first"), ids("second")], params
    )
    for events, group in zip(seen, whole, strict=True):
        for c, sample in zip(group, range(3), strict=True):
            mine = [e for e in events if e.sample == sample]
            assert [e.token for e in mine] in (c.tokens, c.tokens[1:])  # zip may drop the last it took
            assert c.text == TOKENIZER.decode(c.tokens, skip_special_tokens=True)


def test_closing_a_stream_cancels_and_leaves_nothing() -> None:
    engine = Engine(tiny(vocab=257), TOKENIZER, num_blocks=8)
    stream = engine.stream(ids("hello"), SamplingParams(max_tokens=50))
    next(stream)
    stream.close()
    assert not engine.busy
    assert engine.pool.free == 8


def test_cancel_in_mid_flight_returns_what_there_is() -> None:
    model = tiny()
    engine = Engine(model, num_blocks=30, max_batch=4)
    gone = engine.add(prompt(70), SamplingParams(max_tokens=50, n=3, seed=2))
    kept = engine.add(prompt(20), SamplingParams(max_tokens=20, seed=2))
    for _ in range(6):
        engine.step()
    events = engine.cancel(gone)
    assert [e.sample for e in events] == [0, 1, 2]
    for event in events:
        assert event.completion is not None
        assert event.completion.finish_reason == "cancelled"
        assert len(event.completion.tokens) == 6
    assert_exact(model, [prompt(70)], [[e.completion for e in events if e.completion]])
    assert engine.cancel(gone) == []
    others = collect(engine)
    assert set(others) == {kept}
    alone = Engine(model, num_blocks=30).generate([prompt(20)], SamplingParams(max_tokens=20, seed=2))[0][0]
    assert others[kept][-1].completion == alone
    assert engine.pool.free == 30


@pytest.mark.parametrize("steps", [0, 1])
def test_cancel_before_the_group_is_split(steps: int) -> None:
    engine = Engine(tiny(), num_blocks=8, prefill_tokens=10)
    request = engine.add(prompt(50), SamplingParams(max_tokens=5, n=4))
    for _ in range(steps):
        engine.step()
    events = engine.cancel(request)
    assert [(e.sample, e.completion.tokens) for e in events if e.completion] == [(i, []) for i in range(4)]
    assert not engine.busy
    assert engine.pool.free == 8


def test_token_mask_forms() -> None:
    engine = Engine(tiny(vocab=20), num_blocks=8)
    boolean = [i in (3, 4) for i in range(20)]
    answers = {0: [5], 1: boolean, 2: torch.tensor(boolean), 3: None, 4: torch.tensor([7])}
    seen: list[tuple[list[int], int]] = []

    def mask(given: list[int], generated: list[int]) -> object:
        seen.append((given, len(generated)))
        return answers[len(generated)]

    request = engine.add([1, 2], SamplingParams(max_tokens=5), token_mask=mask)
    done = collect(engine)[request][-1].completion
    assert done is not None
    assert done.tokens[0] == 5
    assert done.tokens[1] in (3, 4)
    assert done.tokens[2] in (3, 4)
    assert done.tokens[4] == 7
    assert done.sampling_logprobs[0] == 0.0
    assert done.policy_logprobs[0] < 0
    assert done.sampling_logprobs[3] == done.policy_logprobs[3]
    assert seen == [([1, 2], i) for i in range(5)]


def raising(_: list[int], generated: list[int]) -> list[int]:
    if len(generated) == 2:
        raise KeyError("grammar")
    return [1]


@pytest.mark.parametrize(
    ("mask", "message"),
    [(raising, "KeyError: 'grammar'"), (lambda *_: [], "allows no token"), (lambda *_: [99], "failed")],
)
def test_failing_token_mask_ends_its_request_alone(mask: object, message: str) -> None:
    engine = Engine(tiny(vocab=20), num_blocks=30)
    bad = engine.add([1], SamplingParams(max_tokens=5, n=2), token_mask=mask)  # type: ignore[arg-type]
    good = engine.add([1], SamplingParams(max_tokens=5))
    events = collect(engine)
    errors = [e.error for e in events[bad] if e.error]
    assert len(errors) == 1
    assert isinstance(errors[0], DataError)
    assert message in str(errors[0])
    assert events[good][-1].completion is not None
    assert engine.pool.free == 30


def poisoned(token: int) -> Decoder:
    """A network whose input embedding of one token is NaN."""
    model = tiny(tie_word_embeddings=False)
    with torch.no_grad():
        model.model.embed_tokens.weight[token] = math.nan
    return model


def test_nan_ends_its_request_alone_and_does_not_stay_in_the_cache() -> None:
    model = poisoned(96)
    engine = Engine(model, num_blocks=4)
    healthy = [t % 96 or 1 for t in prompt(70)]
    for _ in range(2):
        bad = engine.add([*healthy[:69], 96], SamplingParams(max_tokens=5, n=2))
        events = collect(engine)
        assert [type(e.error) for e in events[bad]] == [ModelError]
        assert engine.pool.free == 4
    worse = [engine.add([96, *healthy, *healthy[:57]], SamplingParams(max_tokens=1)) for _ in range(2)]
    events = collect(engine)  # now every slot of every block has held NaN
    assert [type(events[request][0].error) for request in worse] == [ModelError] * 2
    never = {96: -math.inf}
    groups = engine.generate([healthy, healthy[:3]], SamplingParams(max_tokens=60, logit_bias=never))
    assert_exact(model, [healthy, healthy[:3]], groups)
    with pytest.raises(ModelError, match="NaN"):
        engine.generate([healthy, [96], healthy], SamplingParams(max_tokens=50))
    assert not engine.busy
    assert engine.pool.free == 4


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_p": math.nan}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"min_p": 1.01}, "min_p"),
        ({"n": 0}, "n = 0"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"logit_bias": {97: 1.0}}, "logit_bias"),
        ({"logit_bias": {1: math.nan}}, "logit_bias"),
        ({"logprobs": -1}, "logprobs"),
        ({"prompt_logprobs": 98}, "prompt_logprobs"),
        ({"beam_width": 0}, "beam_width"),
        ({"stop": ("",)}, "stop"),
        ({"stop": "word"}, "stop"),
        ({"stop": ("a",)}, "needs an engine with a tokenizer"),
        ({"max_tokens": 300}, "blocks of 64"),
    ],
)
def test_bad_parameters_are_refused_in_one_line(wrong: dict[str, object], named: str) -> None:
    engine = Engine(tiny(), num_blocks=4)
    with pytest.raises(ConfigError, match=named) as caught:
        engine.add([1], SamplingParams(**wrong))  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    assert not engine.busy


@pytest.mark.parametrize(
    ("tokens", "named"), [([], "empty"), ([1] * 512, "context holds 512"), ([1, 97], "97"), ([-1], "-1")]
)
def test_bad_prompts_are_refused(tokens: list[int], named: str) -> None:
    with pytest.raises(DataError, match=named):
        Engine(tiny(), num_blocks=20).add(tokens, SamplingParams(max_tokens=1))


def test_generate_checks_its_lists_and_leaves_nothing_behind() -> None:
    engine = Engine(tiny(), num_blocks=8)
    with pytest.raises(ConfigError, match="2 prompts but 1"):
        engine.generate([[1], [2]], [SamplingParams()])
    with pytest.raises(DataError):
        engine.generate([[1], []], SamplingParams(max_tokens=3))
    assert not engine.busy
    assert engine.generate([], SamplingParams()) == []


@pytest.mark.parametrize("options", [{"max_batch": 0}, {"kv_cache_gb": 1e-9}, {"prefill_tokens": 0}])
def test_bad_engine_options(options: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="must be at least 1"):
        Engine(tiny(), **options)  # type: ignore[arg-type]


def test_prompt_can_be_scored_without_generating() -> None:
    engine = Engine(tiny(), num_blocks=8)
    (c,) = engine.generate([prompt(70)], SamplingParams(max_tokens=0, prompt_logprobs=0))[0]
    assert (c.tokens, c.finish_reason) == ([], "length")
    assert c.prompt_logprobs is not None
    assert len(c.prompt_logprobs) == 70
    assert c.prompt_top_logprobs is None
    assert engine.pool.free == 8


def test_repetition_penalty_and_bias_reach_the_draw() -> None:
    engine = Engine(tiny(vocab=30), num_blocks=8)
    once = SamplingParams(max_tokens=20, temperature=0.0, repetition_penalty=1e6)
    (c,) = engine.generate([[1]], once)[0]
    positive = [t for t in c.tokens[:5] if c.tokens.count(t) > 1]
    assert not positive
    (c,) = engine.generate([[1]], SamplingParams(max_tokens=20, temperature=0.0, logit_bias={9: 1e4}))[0]
    assert c.tokens == [9] * 20
    assert all(lp < 0 for lp in c.policy_logprobs)


def test_progress_and_counts() -> None:
    engine, calls = Engine(tiny(), num_blocks=40), []
    groups: list[list[Completion]] = engine.generate(
        [prompt(30), prompt(40)], SamplingParams(max_tokens=6, n=2), on_progress=lambda d, t: calls.append((d, t))
    )
    assert calls[-1] == (4, 4)
    assert calls == sorted(calls)
    stats = engine.stats
    assert stats.generated_tokens == sum(len(c.tokens) for group in groups for c in group) == 24
    assert stats.prefill_tokens == 70
    assert stats.steps == 6
    assert min(stats.prefill_seconds, stats.decode_seconds, stats.sample_seconds) > 0
    for group in groups:
        for c in group:
            assert c.cumulative_logprob == pytest.approx(sum(c.policy_logprobs))


def test_a_sleeping_engine_holds_no_cache_and_wakes_with_the_same_bits() -> None:
    model = tiny("grouped", torch.bfloat16)
    engine, params = Engine(model, num_blocks=20), SamplingParams(max_tokens=6, n=2)
    before = engine.generate([prompt(70)], params)
    assert (engine.runner.packed.bytes > 0) == onednn_bfloat16()
    engine.sleep()
    assert engine.runner.packed.bytes == 0
    assert "cache" not in vars(engine.runner)
    after = engine.generate([prompt(70)], params)
    assert [c.policy_logprobs for c in after[0]] == [c.policy_logprobs for c in before[0]]
    assert engine.stats.cached_tokens == 0
    engine.add(prompt(5), params)
    with pytest.raises(RuntimeError, match="1 requests are unfinished"):
        engine.sleep()

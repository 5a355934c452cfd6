"""Each request gets its own random numbers and its own answers back, and the weights that are there now."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from upslope.engine import Engine
from upslope.engine.sampling import uniforms
from upslope.models.attention.context import PackedContext
from upslope.models.decoder.network import Decoder
from upslope.types import Completion, SamplingParams

from .tiny import byte_tokenizer, ids, prompt, tiny, trainer_logprobs


def drawn_by_hand(model: Decoder, before: list[int], u: float, temperature: float) -> int:
    """The first token whose cumulative probability exceeds u, in float64."""
    with torch.no_grad():
        hidden = model(torch.tensor(before), PackedContext([len(before)]))[-1:]
        probabilities = (model.logits(hidden)[0].double() / temperature).softmax(-1)
    return int(np.searchsorted(probabilities.cumsum(0).numpy(), u, side="right"))


def test_seed_key_sample_and_position_of_its_own_draw_every_token() -> None:
    model = tiny()
    prompts = [prompt(3), prompt(3), prompt(70), prompt(9)]  # the first two are the same one
    params = [
        SamplingParams(max_tokens=4, n=2, seed=3),
        SamplingParams(max_tokens=4, n=2, seed=3),
        SamplingParams(max_tokens=5, n=1, seed=3, temperature=0.7),
        SamplingParams(max_tokens=3, n=3, seed=8),
    ]
    keys = [40, 41, 41, 40]
    groups = Engine(model, num_blocks=40).generate(prompts, params, keys=keys)
    for p, asked, key, group in zip(prompts, params, keys, groups, strict=True):
        for sample, c in enumerate(group):
            for t, token in enumerate(c.tokens):
                (u,) = uniforms([asked.seed], [key], [sample], [t]).tolist()
                assert token == drawn_by_hand(model, p + c.tokens[:t], u, asked.temperature), (key, sample, t)
    assert [c.tokens for c in groups[0]] != [c.tokens for c in groups[1]]


def test_without_keys_a_prompts_place_seeds_it() -> None:
    model, same = tiny(), [prompt(6)] * 3
    params = SamplingParams(max_tokens=8)
    found = Engine(model, num_blocks=9).generate(same, params)
    assert found == Engine(model, num_blocks=9).generate(same, params, keys=[0, 1, 2])
    assert len({tuple(c.tokens) for (c,) in found}) == 3


def test_samples_stand_in_their_order_whichever_ends_first() -> None:
    model, ends = tiny(), range(0, 97, 6)
    params = SamplingParams(max_tokens=30, n=6, seed=2)
    (group,) = Engine(model, num_blocks=30, eos_token_ids=ends).generate([prompt(8)], params, keys=[5])
    lengths = [len(c.tokens) for c in group]
    assert lengths != sorted(lengths), "they must not end in their order"
    engine = Engine(model, num_blocks=30, eos_token_ids=ends)
    one = SamplingParams(max_tokens=30, seed=2)
    alone = {engine.add(prompt(8), one, key=5, sample=i): i for i in range(6)}
    while engine.busy:
        for event in engine.step():
            if event.completion:
                assert event.completion.tokens == group[alone[event.request_id]].tokens


@pytest.fixture
def models() -> tuple[Decoder, dict[str, torch.Tensor]]:
    """A network and the weights that it will have."""
    later = {name: x * 1.05 for name, x in tiny().state_dict().items()}
    return tiny(), later


def finished(engine: Engine) -> Completion:
    """The one completion that the engine still owes."""
    (made,) = [
        event.completion for _ in iter(lambda: engine.busy, False) for event in engine.step() if event.completion
    ]
    return made


def test_a_prompt_scored_in_part_is_scored_anew_by_new_weights(models: tuple[Decoder, dict[str, torch.Tensor]]) -> None:
    model, later = models
    engine = Engine(model, num_blocks=8, prefill_tokens=20)
    asked = prompt(50)
    engine.add(asked, SamplingParams(max_tokens=2, prompt_logprobs=1))
    engine.step()  # 20 of the 50 tokens
    old = trainer_logprobs(model, [(asked[:1], asked[1:])])[0]
    model.load_state_dict(later)
    engine.set_version(1)
    c = finished(engine)
    new = trainer_logprobs(model, [(asked[:1], asked[1:])])[0]
    assert c.prompt_logprobs is not None
    assert c.prompt_top_logprobs is not None
    assert c.prompt_logprobs[1:] == new
    assert all(a != b for a, b in zip(old[:18], new[:18], strict=True)), "the weights must matter"
    for token, value, top in zip(asked[1:], new, c.prompt_top_logprobs[1:], strict=True):
        assert top is not None
        assert top[token] == value


def test_beams_say_that_their_weights_changed(models: tuple[Decoder, dict[str, torch.Tensor]]) -> None:
    model, later = models
    engine = Engine(model, num_blocks=20)
    engine.add(prompt(9), SamplingParams(max_tokens=8, beam_width=3))
    for _ in range(3):
        engine.step()
    model.load_state_dict(later)
    engine.set_version(6)
    c = finished(engine)
    assert len(c.tokens) == 8
    assert c.mixed_versions
    assert c.version == 0


def logits_after(model: Decoder, tokens: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model.logits(model(torch.tensor(tokens), PackedContext([len(tokens)]))[-1:])[0].double()


def test_the_repetition_penalty_knows_prompt_and_completion() -> None:
    """Greedy, by the definition: a positive logit of a token that occurred is divided, a negative one multiplied."""
    model, asked = tiny(), prompt(40)

    def by_hand(seen: list[int]) -> int:
        logits = logits_after(model, [*asked, *made])
        old = logits[seen]
        logits[seen] = torch.where(old > 0, old / 3.0, old * 3.0)
        return int(logits.argmax())

    params = SamplingParams(max_tokens=10, temperature=0.0, repetition_penalty=3.0)
    ((c,),) = Engine(model, num_blocks=4).generate([asked], params)
    made: list[int] = []
    forgetful = 0
    for token in c.tokens:
        assert token == by_hand([*asked, *made])
        forgetful += token != by_hand(made) if made else 0
        made.append(token)
    assert forgetful, "the prompt must matter"


def test_beams_are_ranked_by_what_they_are_drawn_from() -> None:
    """A bias turns the two likeliest tokens round; the policy's own log-probs stay beside them."""
    model, asked = tiny(), prompt(5)
    logits = logits_after(model, asked)
    first, second = logits.topk(2).indices.tolist()
    bias = {second: float(logits[first] - logits[second]) + 1.0}
    params = SamplingParams(max_tokens=1, beam_width=2, n=2, logit_bias=bias)
    (group,) = Engine(model, num_blocks=4).generate([asked], params)
    assert [c.tokens for c in group] == [[second], [first]]
    logp = logits.log_softmax(-1)
    assert [c.policy_logprobs[0] for c in group] == pytest.approx([float(logp[second]), float(logp[first])], abs=1e-5)
    assert group[0].sampling_logprobs[0] > group[1].sampling_logprobs[0]


def test_a_requests_own_stop_token_ends_the_text_before_it() -> None:
    tokens = ids("hello!")
    params = SamplingParams(max_tokens=9, stop_token_ids=(tokens[-1],))
    engine = Engine(tiny(vocab=257), byte_tokenizer(), num_blocks=4)
    engine.add(ids("hi"), params, token_mask=lambda _, generated: [tokens[len(generated)]])
    c = finished(engine)
    assert (c.tokens, c.text, c.finish_reason) == (tokens, "hello", "stop")


def test_scores_are_of_the_policy_at_its_temperature_whatever_the_filter() -> None:
    """The prompt's log-probs and the completion's sum: a filter changes what is drawn, not what the policy says."""
    model, asked = tiny(), prompt(12)
    params = SamplingParams(max_tokens=6, temperature=0.6, top_k=3, prompt_logprobs=0)
    ((c,),) = Engine(model, num_blocks=4).generate([asked], params)
    (scores,) = trainer_logprobs(model, [(asked[:1], asked[1:] + c.tokens)], temperature=0.6)
    assert c.prompt_logprobs is not None
    assert c.prompt_logprobs[1:] + c.policy_logprobs == scores
    assert c.cumulative_logprob == pytest.approx(sum(scores[len(asked) - 1 :]), abs=1e-5)
    assert sum(c.sampling_logprobs) > c.cumulative_logprob + 0.01

"""What seeds the sampling of a step's prompts."""

from __future__ import annotations

from collections.abc import Sequence

from tiny_model import tiny_tokenizer

from upslope.rewards.judge import InlineJudge, WeightedSum
from upslope.rollout import collect, sampling_keys
from upslope.types import Completion, Prompt, Reward, SamplingParams


def test_a_prompt_alone_is_seeded_by_its_key() -> None:
    assert sampling_keys([Prompt(key=7, text="a"), Prompt(key=9, text="b")]) == [7, 9]


def test_a_prompt_given_again_draws_anew() -> None:
    twice = [Prompt(key=7, text="a"), Prompt(key=9, text="b"), Prompt(key=7, text="a"), Prompt(key=7, text="a")]
    keys = sampling_keys(twice)
    assert len(set(keys)) == 4
    assert keys[:2] == sampling_keys(twice[:2]), "what comes later changes nothing before it"
    largest = 2**48 - 1
    assert len(set(sampling_keys([Prompt(key=largest, text="a")] * 3 + [Prompt(key=0, text="c")]))) == 4


class Scripted:
    """Answers every prompt with its first letter, its own numbers and the version of its weights."""

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, *, keys: Sequence[int] | None = None
    ) -> list[list[Completion]]:
        assert keys is not None

        def one(p: int, i: int) -> Completion:
            reason = "length" if i else "stop"
            own = [float(-keys[p] - i), -2.0]
            return Completion([prompts[p][0], i], [x / 2 for x in own], own, reason, version=10 * p + i, text=f"{p}{i}")

        return [[one(p, i) for i in range(params.n)] for p in range(len(prompts))]


def test_a_rollout_has_all_that_its_completion_said_beside_its_own_prompt() -> None:
    prompts = [Prompt(key=7, text="a"), Prompt(key=9, text="bc")]
    tokenizer = tiny_tokenizer()
    scorer = InlineJudge(WeightedSum(None, [("length:target=2", 1.0)]))
    groups, judged = collect(Scripted(), tokenizer, scorer, prompts, SamplingParams(n=2))
    assert judged["reward/errors"] == 0
    for p, (asked, group) in enumerate(zip(prompts, groups, strict=True)):
        assert group.prompt is asked
        tokens = tokenizer(asked.text)["input_ids"]
        for i, rollout in enumerate(group.rollouts):
            assert rollout.prompt_tokens == tokens
            assert (rollout.tokens, rollout.mask, rollout.text) == ([tokens[0], i], [True, True], f"{p}{i}")
            assert rollout.policy_logprobs == [-asked.key - i, -2.0]
            assert rollout.sampling_logprobs == [(-asked.key - i) / 2, -1.0]
            assert (rollout.sample, rollout.version) == (i, 10 * p + i)
            assert rollout.finish_reason == ("length" if i else "stop")
            assert isinstance(rollout.reward, Reward)
            assert rollout.reward.value is not None

"""How often a reward model prefers the answer that people preferred."""

from collections.abc import Sequence
from typing import Any

from upslope.data.examples import pairs_of
from upslope.data.records import Record
from upslope.errors import DataError
from upslope.evaluation.intervals import share
from upslope.evaluation.measurement import Figure
from upslope.rewards.summands import NetworkReward
from upslope.types import Example, Prompt, Rollout, RolloutGroup


def reward_accuracy(
    reward_model: NetworkReward, records: Sequence[Record], *, dataset: str = "", seed: int = 0, batch: int = 64
) -> Figure:
    """Share of the pairs {prompt, chosen, rejected} whose chosen answer scores higher; equal scores count half.

    Answers are read in the model's own tokens, up to the token that ends the turn. detail: `ties`, and `errors` with
    `first_error` for pairs that could not be scored (longer than the model's context), which are not in n. Interval:
    Wilson's where there is no tie, else the bootstrap over pairs. DataError: rows of another kind, or nothing scored.
    """
    pairs = pairs_of(records, reward_model.tokenizer, max_length=None).rows
    values: list[float] = []
    ties, errors = 0, []
    for start in range(0, len(pairs), batch):
        part = pairs[start : start + batch]
        groups = [
            RolloutGroup(Prompt(key=i), [_rollout(pair.chosen, 0), _rollout(pair.rejected, 1)])
            for i, pair in enumerate(part, start)
        ]
        found = reward_model.rewards(groups)
        for pair, chosen, rejected in zip(part, found[::2], found[1::2], strict=True):
            if chosen.value is None or rejected.value is None:
                errors.append(f"{pair.where}: {chosen.error or rejected.error or 'not scored'}")
                continue
            ties += chosen.value == rejected.value
            values.append(0.5 if chosen.value == rejected.value else float(chosen.value > rejected.value))
    if not values:
        raise DataError(f"no pair could be scored; the first: {errors[0]}")
    detail: dict[str, Any] = {"of": len(pairs), "ties": ties, "errors": len(errors)}
    if errors:
        detail["first_error"] = errors[0]
    return Figure("reward_accuracy", *share(values, seed), len(values), dataset, detail=detail)


def _rollout(example: Example, sample: int) -> Rollout:
    """The answer as if it had been sampled: the tokens from the first one that is trained on."""
    first = example.mask.index(True)
    tokens = example.tokens[first:]
    return Rollout(
        prompt_tokens=example.tokens[:first],
        tokens=tokens,
        mask=[True] * len(tokens),
        sampling_logprobs=[],
        policy_logprobs=[],
        finish_reason="stop",
        text="",
        sample=sample,
    )

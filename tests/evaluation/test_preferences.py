"""Accuracy of reward models on preference pairs: by hand, with a real folder, ties and what cannot be scored."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from tiny_model import tiny_folder, tiny_tokenizer

from upslope.data.chat import load_tokenizer
from upslope.data.examples import answer
from upslope.data.records import Record
from upslope.errors import DataError
from upslope.evaluation.preferences import reward_accuracy
from upslope.models.decoder.network import Decoder
from upslope.models.files.loading import RewardSettings, load_model, load_reward_folder, save_reward_folder
from upslope.rewards.networks import RewardModel
from upslope.types import Reward, RolloutGroup


def pair(chosen: str, rejected: str, number: int = 1) -> Record:
    return Record("preference", f"p.jsonl:{number}", prompt="ask ", chosen=chosen, rejected=rejected)


class Lengths:
    """Scores an answer by its number of tokens, at most `most`; longer than `limit` cannot be scored."""

    tokenizer = tiny_tokenizer()

    def __init__(self, most: int = 99, limit: int = 99) -> None:
        self.most, self.limit = most, limit

    def rewards(self, groups: Sequence[RolloutGroup]) -> list[Reward]:
        sizes = [len(rollout.tokens) for group in groups for rollout in group.rollouts]
        return [
            Reward(value=None, error=f"{n} tokens are too many") if n > self.limit else Reward(float(min(n, self.most)))
            for n in sizes
        ]


ROWS = [
    pair("long answer", "short", 1),
    pair("no", "a longer one", 2),
    pair("four", "five", 3),
    pair("abcdef", "abc", 4),
]


def test_by_hand_ties_count_half() -> None:
    figure = reward_accuracy(Lengths(), ROWS, dataset="d", batch=3)
    assert figure.value == pytest.approx((1 + 0 + 0.5 + 1) / 4)
    assert (figure.n, figure.detail["ties"], figure.detail["errors"]) == (4, 1, 0)
    assert figure.low < figure.value < figure.high
    assert reward_accuracy(Lengths(most=1), ROWS).value == 0.5


def test_without_ties_the_interval_is_wilsons() -> None:
    figure = reward_accuracy(Lengths(), [ROWS[0], ROWS[1], ROWS[3]] * 2)
    # p = 4/6, z = 1.96: (p + z^2/12 -+ z sqrt(p (1-p) / 6 + z^2/144)) / (1 + z^2/6)
    assert (figure.low, figure.high) == (pytest.approx(0.3000, abs=1e-4), pytest.approx(0.9032, abs=1e-4))


def test_what_cannot_be_scored_is_counted_and_named() -> None:
    figure = reward_accuracy(Lengths(limit=8), ROWS)
    assert (figure.n, figure.detail["errors"]) == (2, 2)
    assert figure.detail["first_error"] == "p.jsonl:1: 12 tokens are too many"
    with pytest.raises(DataError, match=r"no pair could be scored; the first: p.jsonl:1: 12 tokens"):
        reward_accuracy(Lengths(limit=1), ROWS)
    with pytest.raises(
        DataError, match=r"p.jsonl:9: a record of kind 'text'; this needs the keys chosen and rejected \(prompt may"
    ):
        reward_accuracy(Lengths(), [Record("text", "p.jsonl:9", text="x")])


@pytest.mark.parametrize("kind", ["outcome", "process"])
def test_a_reward_models_folder_against_its_own_head(kind: str, tmp_path: Path) -> None:
    source = tiny_folder(tmp_path / "m")
    model = load_model(source)
    assert isinstance(model, Decoder)
    tensors = {name: p.detach() for name, p in model.named_parameters() if name != "lm_head.weight"}
    tensors["score.weight"] = torch.randn(1, 32, generator=torch.Generator().manual_seed(3))
    folder = save_reward_folder(
        model,
        tensors,
        tmp_path / "rm",
        RewardSettings(kind, "mean"),  # type: ignore[arg-type]
        source_folder=source,
        pad_token_id=None,
    )
    trunk, head, settings = load_reward_folder(folder)
    judge = RewardModel(trunk, head, settings, tokenizer=load_tokenizer(folder))
    rows = [pair(f"answer {i}", f"another {i}\nin two lines", i) for i in range(12)]
    figure = reward_accuracy(judge, rows)
    right = 0
    for row in rows:
        assert isinstance(row.chosen, str)
        assert isinstance(row.rejected, str)
        scores = [
            judge.scores([answer(judge.tokenizer, "ask ", t, max_length=None)])[0] for t in (row.chosen, row.rejected)
        ]
        if kind == "outcome":
            right += scores[0][0] > scores[1][0]
        else:
            line = len(b"another 0\n") - 1 + (len(row.rejected.encode()) - len(b"another 0\nin two lines"))
            chosen = torch.tensor(scores[0][-1]).sigmoid()
            rejected = torch.tensor([scores[1][line], scores[1][-1]]).sigmoid().mean()
            right += bool(chosen > rejected)
    assert figure.value == pytest.approx(right / 12)
    assert 0 < right < 12 or kind == "process"

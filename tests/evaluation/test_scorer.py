"""The scorer against transformers' own logits in float64, against loops over the definition, and against itself."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from tiny_model import tiny_folder
from transformers import AutoModelForCausalLM

from upslope.build import load_inference
from upslope.errors import ConfigError, DataError, ModelError
from upslope.evaluation.scorer import Scorer, rolling_windows

POSITIONS = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("scorer") / "m", max_position_embeddings=POSITIONS)


@pytest.fixture(scope="module")
def scorer(folder: Path) -> Scorer:
    policy = load_inference(folder, dtype="float32")
    return Scorer(policy.model, policy.tokenizer)


@pytest.fixture(scope="module")
def oracle(folder: Path):
    """tokens read -> float64 log-probs of every next token, by transformers."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()

    @torch.no_grad()
    def logps(tokens: list[int]) -> torch.Tensor:
        return model(torch.tensor([tokens])).logits[0].log_softmax(-1)

    return logps


def random_tokens(n: int, seed: int) -> list[int]:
    return torch.randint(2, 258, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def test_loglikelihood_is_transformers(scorer: Scorer, oracle) -> None:
    shared = random_tokens(7, 0)
    requests = [
        (shared, random_tokens(3, 1)),
        ([], random_tokens(4, 2)),
        (shared, random_tokens(1, 3)),
        (random_tokens(2, 4), random_tokens(20, 5)),
        (shared, random_tokens(5, 6)),
    ]
    for (context, continuation), (value, greedy) in zip(requests, scorer.loglikelihood(requests), strict=True):
        context = context or [scorer.prefix]
        logp = oracle([*context, *continuation][:-1])[len(context) - 1 :]
        expected = sum(float(logp[t, token]) for t, token in enumerate(continuation))
        assert value == pytest.approx(expected, abs=1e-4)
        assert greedy == (logp.argmax(-1).tolist() == continuation)


def test_greedy_is_told(scorer: Scorer, oracle) -> None:
    context = random_tokens(5, 7)
    best = int(oracle(context)[-1].argmax())
    second = int(oracle([*context, best])[-1].argmax())
    assert [greedy for _, greedy in scorer.loglikelihood([(context, [best, second]), (context, [best, 5])])] == [
        True,
        second == 5,
    ]


def test_a_long_context_is_cut_from_the_left_and_counted(folder: Path, oracle) -> None:
    policy = load_inference(folder, dtype="float32")
    scorer = Scorer(policy.model, policy.tokenizer)
    tokens = random_tokens(POSITIONS + 10, 8)
    fits, cut = scorer.score([(tokens[9:-3], tokens[-3:]), (tokens[:-3], tokens[-3:])])
    assert scorer.truncated == 1
    assert fits.logprobs == cut.logprobs
    logp = oracle(tokens[-POSITIONS - 1 : -1])[-3:]
    assert cut.total == pytest.approx(sum(float(logp[t, x]) for t, x in enumerate(tokens[-3:])), abs=1e-4)


@pytest.mark.parametrize(("stride", "context"), [(8, 8), (3, 8), (1, 24), (24, 24), (5, 7)])
def test_rolling_is_the_definition_by_hand(scorer: Scorer, oracle, stride: int, context: int) -> None:
    tokens = random_tokens(31, 9)
    found = scorer.rolling([tokens], stride=stride, context=context)[0]
    whole = [scorer.prefix, *tokens]
    for t in range(len(tokens)):
        # the window that predicts token t ends at the first of context, context + stride, ... beyond t
        end = context
        while end <= t:
            end += stride
        end = min(end, len(tokens))
        start = max(0, end - context)
        logp = oracle(whole[start : t + 1])[-1]
        assert found[t] == pytest.approx(float(logp[tokens[t]]), abs=1e-4)


@pytest.mark.parametrize(("length", "context", "lookback"), [(10, 4, 1), (10, 10, 1), (9, 4, 3), (3, 4, 2), (1, 1, 1)])
def test_windows_are_lm_evals(length: int, context: int, lookback: int) -> None:
    utils = pytest.importorskip("lm_eval.utils")
    whole = [-100, *range(length)]
    found = [
        (whole[start:end], whole[first + 1 : end + 1])
        for start, first, end in rolling_windows(length, stride=context - lookback + 1, context=context)
    ]
    assert found == list(utils.get_rolling_token_windows(list(range(length)), -100, context, lookback))


def test_no_batch_changes_a_bit(folder: Path) -> None:
    policy = load_inference(folder, dtype="float32")
    shared = random_tokens(6, 10)
    requests = [(shared if i % 3 else random_tokens(2 + i, i), random_tokens(1 + i % 5, 100 + i)) for i in range(17)]
    whole = Scorer(policy.model, policy.tokenizer).score(requests)
    small = Scorer(policy.model, policy.tokenizer, batch_tokens=9).score(requests)
    alone = [Scorer(policy.model, policy.tokenizer).score([request])[0] for request in requests]
    assert whole == small == alone


def test_documents_are_scored_as_if_alone(scorer: Scorer) -> None:
    documents = [random_tokens(n, n) for n in (30, 1, 9, 45)]
    together = scorer.rolling(documents, stride=5, context=10)
    assert together == [scorer.rolling([d], stride=5, context=10)[0] for d in documents]
    assert [len(x) for x in together] == [30, 1, 9, 45]
    assert scorer.rolling([[]], stride=5, context=10) == [[]]


def test_progress_counts_every_request(folder: Path) -> None:
    policy = load_inference(folder, dtype="float32")
    done: list[tuple[int, int]] = []
    scorer = Scorer(policy.model, policy.tokenizer, batch_tokens=20, progress=lambda *x: done.append(x))
    scorer.score([([5], random_tokens(9, i)) for i in range(7)])
    assert len(done) > 1
    assert done == sorted(done)
    assert done[-1] == (7, 7)
    scorer.rolling([random_tokens(10, 1)], stride=3, context=4)
    assert done[-1] == (3, 3)


def test_refusals_name_the_request(scorer: Scorer) -> None:
    with pytest.raises(DataError, match="request 1: the continuation has no tokens"):
        scorer.score([([3], [4]), ([3], [])])
    with pytest.raises(DataError, match=r"request 0: a continuation of 25 tokens .* 24 positions"):
        scorer.score([([3], [4] * 25)])
    with pytest.raises(ModelError, match=r"request 0: its context holds token 258"):
        scorer.score([([258], [4])])
    with pytest.raises(ModelError, match=r"request 0: its continuation holds token -1"):
        scorer.score([([3], [4, -1])])
    for stride, context in ((0, 5), (6, 5), (5, POSITIONS + 1)):
        with pytest.raises(ConfigError, match=f"stride {stride} and context {context}"):
            scorer.rolling([[3, 4]], stride=stride, context=context)


def test_weights_that_are_not_numbers_are_an_error(folder: Path) -> None:
    policy = load_inference(folder, dtype="float32")
    next(iter(policy.model.parameters()))[7] = math.nan
    with pytest.raises(ModelError, match="NaN"):
        Scorer(policy.model, policy.tokenizer).score([([7], [8])])


def test_every_context_that_was_cut_is_counted(folder: Path) -> None:
    policy = load_inference(folder, dtype="float32")
    scorer = Scorer(policy.model, policy.tokenizer)
    long, short = random_tokens(POSITIONS + 5, 3), random_tokens(5, 4)
    scorer.score([(long, [3]), (short, [3]), (long, [4])])
    scorer.score([(short, [3]), (long, [3]), (short, [4])])
    assert scorer.truncated == 3

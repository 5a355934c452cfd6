"""Rewards of frozen networks: by the definition on tiny models, across tokenizers, and inside a run."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_model import CHATML, tiny_folder, tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from upslope.cache import cache_root
from upslope.data.chat import encode_prompt
from upslope.errors import ConfigError, ModelError
from upslope.models.attention.context import PackedContext
from upslope.models.encoder.network import Encoder, new_encoder
from upslope.models.files.loading import load_model
from upslope.options import GRPOOptions
from upslope.recipes.grpo import grpo
from upslope.rewards.networks import EmbeddingReward, LikelihoodReward, embeddings
from upslope.rewards.summands import Surroundings, load_networks, split_rewards
from upslope.types import Message, Prompt, Rollout, RolloutGroup


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("models") / "judge", seed=3)


@pytest.fixture(scope="session")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same network with a tokenizer that joins "ab" into one token."""
    folder = tiny_folder(tmp_path_factory.mktemp("models") / "other", seed=3, vocab_size=259)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<|im_start|>": 0, "<|im_end|>": 1, **{letter: i + 2 for i, letter in enumerate(alphabet)}, "ab": 258}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=[("a", "b")]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=inner,
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=CHATML,
    ).save_pretrained(folder)
    return folder


TOKENIZER = tiny_tokenizer()


def group(prompt: Prompt, *texts: str, cut: bool = False) -> RolloutGroup:
    head = encode_prompt(TOKENIZER, prompt)
    rollouts = []
    for i, text in enumerate(texts):
        tokens = [*TOKENIZER.encode(text), *([] if cut else [1])]
        zeros = [0.0] * len(tokens)
        rollouts.append(Rollout(head, tokens, [True] * len(tokens), zeros, zeros, "length" if cut else "stop", text, i))
    return RolloutGroup(prompt, rollouts)


def reward(spec: str) -> Any:
    plain, networks = split_rewards([spec])
    assert not plain
    (loaded,) = load_networks(networks, Surroundings(TOKENIZER, torch.device("cpu"), Path("policy")))
    assert loaded.name == spec.partition(":")[0]
    return loaded.function.__self__


def logp(folder: Path, tokens: list[int], trained: int) -> float:
    """Sum of the log-probs of the last `trained` tokens, from the full logits in float64."""
    model = load_model(folder, dtype=torch.float64)
    with torch.no_grad():
        hidden = model(torch.tensor(tokens), PackedContext([len(tokens)], device="cpu"))
        rows = torch.log_softmax(hidden @ model.head_weight.T, -1)
    return sum(float(rows[t - 1, tokens[t]]) for t in range(len(tokens) - trained, len(tokens)))


CHAT = Prompt(1, messages=(Message("user", "say"),), answer="abab")
PLAIN = Prompt(2, text="one two", answer="three")


def test_likelihood_is_the_mean_over_the_sampled_tokens(tiny: Path) -> None:
    model = reward(f"likelihood:path={tiny},dtype=float32")
    groups = [group(CHAT, "abab", "x"), group(PLAIN, "three", cut=True)]
    values = [r.value for r in model.rewards(groups)]
    for (g, i), value in zip(((0, 0), (0, 1), (1, 0)), values, strict=True):
        r = groups[g].rollouts[i]
        whole = logp(tiny, [*r.prompt_tokens, *r.tokens], len(r.tokens))
        assert value == pytest.approx(whole / len(r.tokens), abs=1e-5)
    assert model.rewards(groups)[2].value == model.rewards(groups[1:])[0].value  # whatever stands beside it


def test_what_a_tool_said_is_read_and_not_judged(tiny: Path) -> None:
    judged = group(PLAIN, "three")
    (r,) = judged.rollouts
    r.mask[2] = False
    own = len(r.tokens)
    whole = logp(tiny, [*r.prompt_tokens, *r.tokens], own)
    observed = logp(tiny, [*r.prompt_tokens, *r.tokens[:3]], 1)
    (made,) = reward(f"likelihood:path={tiny},dtype=float32").rewards([judged])
    assert made.value == pytest.approx((whole - observed) / (own - 1), abs=1e-5)


def test_scales_and_units(tiny: Path) -> None:
    groups = [group(PLAIN, "three")]
    (nats,) = reward(f"likelihood:path={tiny},dtype=float32").rewards(groups)
    (prob,) = reward(f"likelihood:path={tiny},dtype=float32,scale=prob").rewards(groups)
    (per_character,) = reward(f"likelihood:path={tiny},dtype=float32,per=character").rewards(groups)
    (floored,) = reward(f"likelihood:path={tiny},dtype=float32,floor=-0.5").rewards(groups)
    assert prob.value == pytest.approx(math.exp(nats.value))
    assert per_character.value == pytest.approx(nats.value * 6 / 5)  # five letters and the end token
    assert floored.value == -0.5


def test_fluency_is_the_text_alone_times_its_distinct_share(tiny: Path) -> None:
    model = reward(f"fluency:path={tiny},dtype=float32,ngram=1")
    text = "la la lo"
    ids = TOKENIZER.encode(text)
    alone = logp(tiny, [1, *ids], len(ids)) / len(ids)  # without a first token of its own it begins after the last one
    (one,) = model.rewards([group(CHAT, text)])
    (elsewhere,) = model.rewards([group(PLAIN, text, cut=True)])
    assert one.value == pytest.approx(math.exp(alone) * 2 / 3, rel=1e-4)
    assert elsewhere.value == pytest.approx(one.value, rel=1e-5)  # neither prompt nor end token matter
    (off,) = reward(f"fluency:path={tiny},dtype=float32,ngram=0").rewards([group(CHAT, text)])
    assert off.value == pytest.approx(math.exp(alone), rel=1e-4)


def test_coherence_is_conditional_minus_unconditional(tiny: Path) -> None:
    (value,) = reward(f"coherence:path={tiny},dtype=float32").rewards([group(CHAT, "abab")])
    ids, head = TOKENIZER.encode("abab"), encode_prompt(TOKENIZER, CHAT)
    expected = (logp(tiny, [*head, *ids], 4) - logp(tiny, [1, *ids], 4)) / 4
    assert value.value == pytest.approx(expected, abs=1e-5)


def test_another_tokenizer_reads_the_text_again(other: Path) -> None:
    ids = encode_prompt(TOKENIZER, PLAIN)  # the letters have the same ids in both
    tokens = [258, 258, TOKENIZER.encode("c")[0], 1]
    (stopped,) = reward(f"likelihood:path={other},dtype=float32").rewards([group(PLAIN, "ababc")])
    assert stopped.value == pytest.approx(logp(other, [*ids, *tokens], 4) / 4, abs=1e-5)
    (cut,) = reward(f"likelihood:path={other},dtype=float32").rewards([group(PLAIN, "ababc", cut=True)])
    assert cut.value == pytest.approx(logp(other, [*ids, *tokens[:-1]], 3) / 3, abs=1e-5)
    (chat,) = reward(f"likelihood:path={other},dtype=float32,per=character").rewards([group(CHAT, "ababc")])
    head = encode_prompt(TOKENIZER, CHAT)
    assert chat.value == pytest.approx(logp(other, [*head, *tokens], 4) / 5, abs=1e-5)


def test_nothing_said_and_too_much_said(tiny: Path) -> None:
    for spec, value in (
        ("likelihood", None),
        ("fluency", math.exp(-20.0)),
        ("coherence", 0.0),
    ):
        model = reward(f"{spec}:path={tiny},dtype=float32")
        empty, long, fine = model.rewards([group(PLAIN, "", "x" * 600, "ok")])
        if value is None:
            assert empty.value < 0  # the end token alone
        else:
            assert empty.value == pytest.approx(value)
        assert long.value is None
        assert "context of 512" in long.error
        assert fine.value is not None
    (nothing,) = reward(f"likelihood:path={tiny},dtype=float32").rewards([group(PLAIN, "", cut=True)])
    assert nothing.value == -20.0


def test_same_tokenizer_is_noticed(tiny: Path, other: Path) -> None:
    assert reward(f"likelihood:path={tiny},dtype=float32").same_tokenizer
    assert not reward(f"likelihood:path={other},dtype=float32").same_tokenizer


@pytest.mark.parametrize(
    ("spec", "error", "said"),
    [
        ("likelihood:path=/absent", ModelError, "absent"),
        ("likelihood:path={tiny},scale=linear", ConfigError, "log or prob"),
        ("fluency:path={tiny},per=word", ConfigError, "token or character"),
        ("fluency:path={tiny},ngram=-1", ConfigError, "ngram"),
        ("coherence:path={tiny},floor=-1", ConfigError, "floor"),
        ("likelihood", ConfigError, "path"),
        ("relevance:path={tiny}", ModelError, "encoder"),
    ],
)
def test_wrong_specs_are_one_clear_line(spec: str, error: type[Exception], said: str, tiny: Path) -> None:
    with pytest.raises(error, match=said) as caught:
        reward(spec.replace("{tiny}", str(tiny)))
    assert "\n" not in str(caught.value)


# Embeddings


@pytest.fixture(scope="session")
def encoder() -> Encoder:
    return new_encoder(
        "classify", vocab_size=258, hidden_size=16, num_layers=2, num_heads=2, intermediate_size=24, max_positions=32,
        labels=("0", "1"), seed=1,
    )  # fmt: skip


def test_embeddings_are_means_over_the_texts_own_tokens(encoder: Encoder) -> None:
    texts = ["ab", "a longer text", "ab ba", "x" * 100]
    vectors = embeddings(encoder, TOKENIZER, texts)
    for text, vector in zip(texts, vectors, strict=True):
        ids = torch.tensor([TOKENIZER.encode(text)[:32]])
        with torch.no_grad():
            hidden = encoder.network.base_model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
        mean = hidden[0].mean(0)
        torch.testing.assert_close(vector, mean / mean.norm(), atol=1e-5, rtol=1e-5)
    assert embeddings(encoder, TOKENIZER, []).shape == (0, 16)


def test_similarity_and_relevance(encoder: Encoder) -> None:
    similarity = EmbeddingReward("similarity", encoder, TOKENIZER)
    same, less, empty = similarity.rewards([group(CHAT, "abab", "xyz", " ")])
    assert same.value == pytest.approx(1.0, abs=1e-5)
    assert less.value < 1.0
    assert empty.value == 0.0
    (unknown,) = similarity.rewards([group(replace(CHAT, answer=None), "abab")])
    assert unknown.value is None
    assert "no answer" in unknown.error
    relevance = EmbeddingReward("relevance", encoder, TOKENIZER)
    assert relevance.rewards([group(CHAT, "say")])[0].value == pytest.approx(1.0, abs=1e-5)
    assert relevance.rewards([group(PLAIN, "one two")])[0].value == pytest.approx(1.0, abs=1e-5)


@pytest.mark.oracle
@pytest.mark.skipif(not (cache_root() / "models" / "minilm").is_dir(), reason="minilm is not in the cache")
def test_minilm_knows_what_is_alike() -> None:
    model = reward("similarity:path=minilm")
    prompt = Prompt(1, text="How do I pay?", answer="You can pay with a credit card.")
    near, far = model.rewards([group(prompt, "Payment by credit card is possible.", "The cat sleeps on the sofa.")])
    assert near.value > 0.7
    assert far.value < 0.3


# In a run


def test_grpo_learns_from_a_frozen_model_beside_other_rewards(tiny: Path, tmp_path: Path) -> None:
    policy = tiny_folder(tmp_path / "policy", seed=5)
    options = GRPOOptions(
        model=str(policy),
        task="chain_sum",
        reward=(f"likelihood:path={tiny},dtype=float32@0.5", "length:target=2@0.1"),
        output_dir=str(tmp_path / "run"),
        num_train_prompts=8,
        num_prompts=4,
        num_generations=4,
        max_completion_length=4,
        max_steps=2,
        eval_samples=2,
        eval_every=0,
        dtype="float32",
    )
    options.validate()
    grpo(options)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    for row in (json.loads(line) for line in lines if '"eval/' not in line):
        expected = 0.5 * row["rewards/likelihood/mean"] + 0.1 * row["rewards/length/mean"]
        assert row["reward"] == pytest.approx(expected, abs=1e-6)


def test_values_do_not_depend_on_the_batch(tiny: Path) -> None:
    model = reward(f"coherence:path={tiny},dtype=float32")
    assert isinstance(model, LikelihoodReward)
    groups = [group(CHAT, "abab", "cd", "efghijkl"), group(PLAIN, "a", "bc")]
    whole = [r.value for r in model.rewards(groups)]
    model.batch_tokens = 20
    assert [r.value for r in model.rewards(groups)] == whole

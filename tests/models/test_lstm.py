"""The LSTM: torch's own numbers, the same bits in training and decoding, its folder, and learning by PPO."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_model import tiny_tokenizer
from torch import Tensor, nn

from upslope.engine import Engine
from upslope.errors import ModelError
from upslope.functional.logprobs import linear_token_logprobs
from upslope.models.attention.context import BLOCK, KVCache, PackedContext, PagedContext
from upslope.models.files.loading import load_model, save_model
from upslope.models.lstm import LSTM, LSTMConfig
from upslope.models.protocol import ScalarHead
from upslope.options import PPOOptions
from upslope.types import Completion, SamplingParams

DTYPES = [torch.float32, torch.bfloat16]


def model_of(
    dtype: torch.dtype = torch.float32, *, width: int = 24, layers: int = 2, tied: bool = True, context: int = 512
) -> LSTM:
    """A small model whose distributions are far from uniform."""
    torch.manual_seed(3)
    config = LSTMConfig(
        vocab_size=97,
        hidden_size=width,
        num_hidden_layers=layers,
        tie_word_embeddings=tied,
        max_position_embeddings=context,
    )
    model = LSTM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.5)
    return model.to(dtype)


def torchs(model: LSTM) -> nn.LSTM:
    """torch's module with the same weights, copied name by name."""
    width, layers = model.config.hidden_size, model.config.num_hidden_layers
    theirs = nn.LSTM(width, width, layers).to(model.dtype)
    theirs.load_state_dict(model.model.lstm.state_dict())
    return theirs


def tokens_of(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(1000 * seed + length)
    return torch.randint(1, 97, (length,), generator=generator).tolist()


def test_values_and_gradients_are_those_of_torch() -> None:
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.float64, 1e-12)):
        model = model_of(width=16, layers=3).to(dtype)
        theirs = torchs(model)
        lengths = [5, 1, 9, 9, 3]
        tokens = [torch.tensor(tokens_of(n, i)) for i, n in enumerate(lengths)]
        ours = model(torch.cat(tokens), PackedContext(lengths))
        expected = torch.cat([theirs(nn.functional.embedding(t, model.model.embed_tokens.weight))[0] for t in tokens])
        torch.testing.assert_close(ours, expected, rtol=0, atol=tolerance)
        weight = torch.randn(ours.shape, dtype=dtype)
        (ours * weight).sum().backward()
        embedding = model.model.embed_tokens.weight.grad.clone()
        model.zero_grad()
        (expected * weight).sum().backward()
        torch.testing.assert_close(embedding, model.model.embed_tokens.weight.grad, rtol=0, atol=60 * tolerance)
        model.zero_grad()
        (model(torch.cat(tokens), PackedContext(lengths)) * weight).sum().backward()
        for name, parameter in model.model.lstm.named_parameters():
            torch.testing.assert_close(parameter.grad, getattr(theirs, name).grad, rtol=0, atol=60 * tolerance)


def test_a_shared_prompt_gives_the_same_values_and_the_sum_of_the_gradients() -> None:
    model = model_of(width=12).double()
    prompt, tails = tokens_of(7), [tokens_of(4, 1), tokens_of(1, 2), tokens_of(6, 3)]
    alone = torch.tensor([t for tail in tails for t in (*prompt, *tail)])
    shared = torch.tensor([*tails[0], *prompt, *tails[1], *tails[2]])
    weight = torch.randn(11, 12, dtype=torch.float64)

    def run(tokens: Tensor, context: PackedContext, rows: list[int]) -> tuple[Tensor, list[Tensor]]:
        model.zero_grad()
        hidden = model(tokens, context)[torch.tensor(rows)]
        (hidden * weight).sum().backward()
        return hidden.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]

    a = run(alone, PackedContext([11, 8, 13]), [*range(7, 11), 18, *range(26, 32)])
    b = run(shared, PackedContext([4, 7, 1, 6], [1, -1, 1, 1]), [*range(4), 11, *range(12, 18)])
    torch.testing.assert_close(a[0], b[0], rtol=0, atol=1e-14)
    for ours, theirs in zip(a[1], b[1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


def test_gradient_is_that_of_finite_differences() -> None:
    model = model_of(width=4, layers=2).double()
    context = PackedContext([3, 2, 4, 1], [-1, 0, -1, 0])
    tokens = torch.tensor(tokens_of(10))
    named = dict(model.model.lstm.named_parameters())
    inputs = [p.detach().clone().requires_grad_() for p in named.values()]

    def run(*weights: Tensor) -> Tensor:
        values = {f"model.lstm.{name}": w for name, w in zip(named, weights, strict=True)}
        return torch.func.functional_call(model, values, (tokens, context))

    assert torch.autograd.gradcheck(run, inputs)


def test_saturated_gates_have_finite_values_and_gradients() -> None:
    model = model_of(width=8)
    with torch.no_grad():
        for parameter in model.model.lstm.parameters():
            parameter.mul_(1e4)
    hidden = model(torch.tensor(tokens_of(20)), PackedContext([20]))
    hidden.sum().backward()
    assert bool(torch.isfinite(hidden).all())
    assert all(bool(torch.isfinite(p.grad).all()) for p in model.parameters() if p.grad is not None)


def test_recomputing_activations_changes_no_bit() -> None:
    grads = []
    for checkpointing in (False, True):
        model = model_of()
        model.gradient_checkpointing = checkpointing
        model(torch.tensor(tokens_of(12)), PackedContext([5, 7])).square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@settings(max_examples=40)
@given(st.data())
def test_every_split_of_a_call_gives_the_same_bits(data: Any) -> None:
    """Sequences fed to the cache in random chunks, in random company, equal the packed forward."""
    dtype = data.draw(st.sampled_from(DTYPES))
    model = model_of(dtype, width=data.draw(st.sampled_from([8, 20, 33])))
    lengths = data.draw(st.lists(st.integers(1, 80), min_size=1, max_size=15))
    sequences = [tokens_of(n, i) for i, n in enumerate(lengths)]
    with torch.no_grad():
        packed = model(torch.tensor([t for s in sequences for t in s]), PackedContext(lengths)).split(lengths)
        cache = KVCache(model.spec, 2 * len(lengths), dtype=dtype)
        tables = [[2 * i + 1, 2 * i] for i in range(len(lengths))]
        fed, parts = [0] * len(lengths), [[] for _ in lengths]
        while any(f < n for f, n in zip(fed, lengths, strict=True)):
            open_ = [i for i, n in enumerate(lengths) if fed[i] < n]
            chosen = data.draw(st.lists(st.sampled_from(open_), unique=True, min_size=1))
            counts = [data.draw(st.integers(1, lengths[i] - fed[i])) for i in chosen]
            tokens = [t for i, n in zip(chosen, counts, strict=True) for t in sequences[i][fed[i] : fed[i] + n]]
            context = PagedContext(cache, [tables[i] for i in chosen], [fed[i] for i in chosen], counts)
            for i, part in zip(chosen, model(torch.tensor(tokens), context).split(counts), strict=True):
                parts[i].append(part)
                fed[i] += part.shape[0]
    for expected, found in zip(packed, parts, strict=True):
        assert torch.equal(torch.cat(found), expected)


def scored(model: LSTM, prompts: list[list[int]], groups: list[list[Completion]]) -> list[list[float]]:
    """Log-probs of the completions as training computes them, prompts shared in one packed forward."""
    lengths, parents, tokens, rows, targets = [], [], [], [], []
    for prompt, group in zip(prompts, groups, strict=True):
        first, parent = len(tokens), len(lengths)
        lengths.append(len(prompt))
        parents.append(-1)
        tokens += prompt
        for c in group:
            start = len(tokens)
            rows += [first + len(prompt) - 1, *range(start, start + len(c.tokens) - 1)]
            tokens += c.tokens
            targets += c.tokens
            lengths.append(len(c.tokens))
            parents.append(parent)
    with torch.no_grad():
        hidden = model(torch.tensor(tokens), PackedContext(lengths, parents))[torch.tensor(rows)]
        logp = linear_token_logprobs(hidden, model.head_weight, torch.tensor(targets))
    return [part.tolist() for part in logp.split([len(c.tokens) for group in groups for c in group])]


def numbers(groups: list[list[Completion]]) -> list[tuple[list[int], list[float]]]:
    return [(c.tokens, c.policy_logprobs) for group in groups for c in group]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_engine_and_trainer_agree_bit_for_bit(dtype: torch.dtype) -> None:
    model = model_of(dtype)
    prompts = [tokens_of(n) for n in (1, 40, 63, 64, 65, 130)]
    params = SamplingParams(max_tokens=40, n=4, seed=5)
    plain = Engine(model, num_blocks=100, prefix_cache=False)
    expected = plain.generate(prompts, params)
    assert scored(model, prompts, expected) == [logp for _, logp in numbers(expected)]
    assert plain.stats.preemptions == plain.stats.cached_tokens == 0

    chunked = Engine(model, num_blocks=80, prefill_tokens=17, max_batch=5, prefix_cache=False)
    assert numbers(chunked.generate(prompts, params)) == numbers(expected)
    crowded = Engine(model, num_blocks=5, max_batch=7)
    assert numbers(crowded.generate(prompts, params)) == numbers(expected)
    assert crowded.stats.preemptions > 0
    cached = Engine(model, num_blocks=100)
    cached.generate(prompts, params)
    before = cached.stats.cached_tokens
    assert numbers(cached.generate(prompts, params)) == numbers(expected)
    assert cached.stats.cached_tokens - before == 64 + 128


def test_the_state_is_carried_through_generation() -> None:
    """Greedy decoding equals torch's module fed one token at a time with its own state."""
    model = model_of(width=32)
    theirs, prompt = torchs(model), tokens_of(70)
    (completion,) = Engine(model, num_blocks=8).generate([prompt], SamplingParams(max_tokens=80, temperature=0.0))[0]
    state, tokens = None, list(prompt)
    with torch.no_grad():
        for t in range(len(prompt) + 79):
            embedded = model.model.embed_tokens.weight[tokens[t]][None]
            hidden, state = theirs(embedded, state)
            if t >= len(prompt) - 1:
                tokens.append(int((hidden @ model.head_weight.T).argmax()))
    assert tokens[len(prompt) :] == completion.tokens
    assert len(completion.tokens) > BLOCK


@pytest.mark.parametrize("tied", [True, False])
def test_a_folder_comes_back(tied: bool, tmp_path: Path) -> None:
    model = model_of(tied=tied)
    save_model(model, tmp_path / "m", tokenizer=tiny_tokenizer())
    config = json.loads((tmp_path / "m/config.json").read_text())
    assert (config["model_type"], config["dtype"]) == ("upslope_lstm", "float32")
    loaded = load_model(tmp_path / "m")
    assert isinstance(loaded, LSTM)
    assert loaded.config == model.config
    assert loaded.spec == model.spec
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(x, model.state_dict()[name]) for name, x in loaded.state_dict().items())
    assert {"model.lstm.weight_ih_l0", "model.lstm.bias_hh_l1"} <= loaded.state_dict().keys()


def test_bad_folders_are_named(tmp_path: Path) -> None:
    save_model(model_of(), tmp_path / "m")
    path = tmp_path / "m/config.json"
    good = json.loads(path.read_text())
    for change, said in (({"hidden_size": 0}, "hidden_size = 0"), ({"num_hidden_layers": 3}, "weight_ih_l2")):
        path.write_text(json.dumps({**good, **change}))
        with pytest.raises(ModelError, match=said) as caught:
            load_model(tmp_path / "m")
        assert "\n" not in str(caught.value)


def test_a_fresh_cell_remembers() -> None:
    lstm = LSTM(LSTMConfig(vocab_size=9, hidden_size=6, num_hidden_layers=2)).model.lstm
    for layer in range(2):
        bias = getattr(lstm, f"bias_ih_l{layer}") + getattr(lstm, f"bias_hh_l{layer}")
        assert bias.tolist() == [0.0] * 6 + [1.0] * 6 + [0.0] * 12


def test_a_value_head_trains_the_trunk() -> None:
    model, head = model_of(), ScalarHead(24)
    with torch.no_grad():
        head.score.weight.fill_(0.1)
    head(model(torch.tensor(tokens_of(9)), PackedContext([4, 5]))).sum().backward()
    assert model.model.lstm.weight_hh_l0.grad.abs().sum() > 0


TASK = """
from upslope.tasks.base import Task, chat_prompt, select_prompts
from upslope.types import Reward


class Letter(Task):
    name = "letter"

    def prompts(self, split, n, *, seed):
        return select_prompts((chat_prompt(f"Say {i}", answer="a") for i in range(500)), split, n, name=self.name)

    def rewards(self, prompts, completions):
        return [Reward(text.count("a") / 4, {"a": text.count("a") / 4}, correct="a" in text) for text in completions]
"""


def folder(path: Path) -> Path:
    torch.manual_seed(0)
    model = LSTM(LSTMConfig(vocab_size=258, hidden_size=32, num_hidden_layers=2, tie_word_embeddings=True))
    return save_model(model, path, tokenizer=tiny_tokenizer())


@pytest.mark.parametrize("changes", [{}, {"critic": "separate", "num_epochs": 1}], ids=["ppo", "a2c"])
def test_ppo_learns_on_an_lstm(changes: dict[str, Any], tmp_path: Path) -> None:
    from upslope.recipes.ppo import ppo

    (tmp_path / "letter.py").write_text(TASK)
    options = PPOOptions(
        model=str(folder(tmp_path / "m")),
        task=f"{tmp_path}/letter.py:Letter",
        output_dir=str(tmp_path / "run"),
        num_train_prompts=40,
        num_prompts=8,
        num_generations=8,
        max_completion_length=6,
        max_steps=30,
        eval_samples=8,
        eval_every=0,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        dtype="float32",
        lam=0.95,
        **changes,
    )
    ppo(options)
    lines = [
        json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines() if '"eval/' not in line
    ]
    assert all(line["rollout/max_logprob_diff"] == 0.0 for line in lines)
    rewards = [line["reward"] for line in lines]
    assert sum(rewards[:3]) / 3 < 0.2
    assert sum(rewards[-5:]) / 5 > 0.5, rewards

"""The decoder against transformers' own classes, and its exactness: the same bits however a token is computed."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from upslope.errors import ModelError
from upslope.functional.logprobs import linear_token_logprobs, token_logprobs
from upslope.kernels.products import padded_row_count
from upslope.models.attention.context import BLOCK, KVCache, PackedContext, PagedContext
from upslope.models.decoder.network import Decoder, DecoderConfig, rope_frequencies

SHAPE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILIES = {
    "llama": LlamaConfig(**SHAPE),
    "llama-bias": LlamaConfig(**SHAPE, attention_bias=True),
    "llama-tied": LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "llama-eps": LlamaConfig(**SHAPE, rms_norm_eps=0.2),
    "llama3-rope": LlamaConfig(**SHAPE, rope_parameters=LLAMA3),
    "linear-rope": LlamaConfig(**SHAPE, rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}),
    "mistral": MistralConfig(**SHAPE, sliding_window=None),
    "qwen2": Qwen2Config(**SHAPE),
    "qwen3": Qwen3Config(**SHAPE, head_dim=16, rms_norm_eps=0.2),
}


def decoder_like(theirs: Any) -> Decoder:
    ours = Decoder(DecoderConfig.from_hf(theirs.config.to_dict()))
    weights = theirs.state_dict()
    if ours.config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    ours.load_state_dict(weights)
    return ours


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_equal_those_of_transformers(family: str) -> None:
    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(FAMILIES[family], attn_implementation="eager").float().eval()
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.2)
    ours = decoder_like(theirs)
    lengths = [7, 70, 130]
    tokens = [torch.randint(0, SHAPE["vocab_size"], (n,)) for n in lengths]
    expected = torch.cat([theirs(t[None]).logits[0] for t in tokens])
    found = ours.logits(ours(torch.cat(tokens), PackedContext(lengths)))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.detach().abs().max()))

    weight = torch.randn_like(expected)
    (expected * weight).sum().backward()
    (found * weight).sum().backward()
    theirs_by_name = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        reference = theirs_by_name[name].grad
        assert reference is not None
        torch.testing.assert_close(p.grad, reference, rtol=0, atol=2e-5 * float(reference.abs().max()))


@pytest.mark.parametrize("family", FAMILIES)
def test_config_survives_the_way_to_hugging_face_and_back(family: str) -> None:
    config = DecoderConfig.from_hf(FAMILIES[family].to_dict())
    again = DecoderConfig.from_hf(config.to_hf())
    assert again == config


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "gpt2"}, "gpt2"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "yarn"),
    ],
)
def test_what_would_compute_something_else_is_refused_by_name(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelError, match=said):
        DecoderConfig.from_hf({**FAMILIES["llama"].to_dict(), **change})


def test_rope_frequencies_by_hand() -> None:
    plain = rope_frequencies({"rope_type": "default", "rope_theta": 100.0}, 4)
    torch.testing.assert_close(plain, torch.tensor([1.0, 0.1], dtype=torch.float64))
    halved = rope_frequencies({"rope_type": "linear", "rope_theta": 100.0, "factor": 2.0}, 4)
    torch.testing.assert_close(halved, torch.tensor([0.5, 0.05], dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_cast_leaves_the_rotary_angles_as_exact_as_they_were(dtype: torch.dtype) -> None:
    """cos and sin of position / theta^(2i / d), also far from the start, where a rounded frequency is another angle."""
    config = DecoderConfig.from_hf(LlamaConfig(**SHAPE).to_dict())
    cos, sin = Decoder(config).to(dtype).angles(torch.tensor([0, 1, 250, 100_000]))
    for row, position in enumerate((0, 1, 250, 100_000)):
        for i in range(config.head_dim // 2):
            angle = position / 10000.0 ** (2 * i / config.head_dim)
            assert float(cos[row, i]) == pytest.approx(math.cos(angle), abs=1e-6)
            assert float(sin[row, i]) == pytest.approx(math.sin(angle), abs=1e-6)


@pytest.mark.parametrize("rows", range(1, 40))
def test_padded_row_count_is_the_next_safe_count(rows: int) -> None:
    found = padded_row_count(rows)
    assert found >= rows
    assert found in (4, 8) or found >= 12
    assert found - rows < 4


SHAPES = [(64, 4, 2, 16, 100, 97), (96, 9, 3, 32, 200, 301), (48, 6, 1, 8, 130, 50), (80, 2, 2, 40, 33, 1000)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[1]}x{s[3]}over{s[2]}")
def test_decode_equals_every_packing_bit_for_bit(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    width, heads, kv_heads, head_dim, inner, vocab = shape
    torch.manual_seed(0)
    model = Decoder(
        DecoderConfig(
            vocab_size=vocab,
            hidden_size=width,
            intermediate_size=inner,
            num_hidden_layers=2,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            initializer_range=0.15,
        )
    ).to(dtype)
    prompts, steps = [5, BLOCK - 1, BLOCK, BLOCK + 1, 1, 2 * BLOCK + 2, 20], BLOCK + 6
    blocks = 5
    cache = KVCache(model.spec, blocks * len(prompts), dtype=dtype)
    tables = [list(range(blocks * i, blocks * i + blocks)) for i in range(len(prompts))]
    tokens = [torch.randint(0, vocab, (n + steps,)) for n in prompts]
    with torch.no_grad():
        first = torch.cat([t[:n] for t, n in zip(tokens, prompts, strict=True)])
        hidden = model(first, PagedContext(cache, tables, [0] * len(prompts), prompts)).split(prompts)
        decoded = [[h] for h in hidden]
        for step in range(steps):
            context = PagedContext(cache, tables, [n + step for n in prompts], [1] * len(prompts))
            new = model(torch.stack([t[n + step] for t, n in zip(tokens, prompts, strict=True)]), context)
            for i, row in enumerate(new):
                decoded[i].append(row[None])
        whole = [torch.cat(parts) for parts in decoded]
        for size in (1, 3, len(prompts)):
            for start in range(0, len(prompts), size):
                some = list(range(start, min(start + size, len(prompts))))
                lengths = [len(tokens[i]) for i in some]
                packed = model(torch.cat([tokens[i] for i in some]), PackedContext(lengths)).split(lengths)
                for i, found in zip(some, packed, strict=True):
                    assert torch.equal(found, whole[i]), f"sequence {i} in a pack of {size}"
                    assert torch.equal(_logp(model, found, tokens[i]), _logp_one_by_one(model, whole[i], tokens[i]))


def _logp(model: Decoder, hidden: Tensor, tokens: Tensor) -> Tensor:
    return linear_token_logprobs(hidden[:-1], model.head_weight, tokens[1:])


def _logp_one_by_one(model: Decoder, hidden: Tensor, tokens: Tensor) -> Tensor:
    rows = [token_logprobs(model.logits(hidden[t : t + 1]), tokens[t + 1 : t + 2]) for t in range(len(tokens) - 1)]
    return torch.cat(rows)


def test_chunked_prefill_and_shared_prompt_blocks_change_no_bit() -> None:
    torch.manual_seed(1)
    model = Decoder(DecoderConfig.from_hf({**FAMILIES["llama"].to_dict(), "initializer_range": 0.2}))
    prompt, tails = torch.randint(0, 97, (2 * BLOCK,)), [torch.randint(0, 97, (9,)) for _ in range(3)]
    cache = KVCache(model.spec, 8, dtype=torch.float32)
    with torch.no_grad():
        start = 0
        for count in (50, 1, 60, 17):
            chunk = prompt[start : start + count]
            model(chunk, PagedContext(cache, [[0, 1]], [start], [count]))
            start += count
        assert start == len(prompt)
        tables = [[0, 1, 2 + i] for i in range(3)]
        shared = model(torch.cat(tails), PagedContext(cache, tables, [2 * BLOCK] * 3, [9] * 3)).split(9)
        for tail, found in zip(tails, shared, strict=True):
            alone = model(torch.cat([prompt, tail]), PackedContext([2 * BLOCK + 9]))
            assert torch.equal(found, alone[-9:])


def test_a_fully_masked_block_leaves_every_bit() -> None:
    """A short sequence decoded beside a long one, whose later blocks it does not have."""
    torch.manual_seed(2)
    model = Decoder(DecoderConfig.from_hf(FAMILIES["llama"].to_dict()))
    cache = KVCache(model.spec, 8, dtype=torch.float32)
    cache.keys.normal_()
    cache.values.normal_()
    long, short = torch.randint(0, 97, (3 * BLOCK + 1,)), torch.randint(0, 97, (4,))
    with torch.no_grad():
        model(long[:-1], PagedContext(cache, [[0, 1, 2, 3]], [0], [3 * BLOCK]))
        model(short[:-1], PagedContext(cache, [[4]], [0], [3]))
        both = model(
            torch.stack([short[-1], long[-1]]), PagedContext(cache, [[4], [0, 1, 2, 3]], [3, 3 * BLOCK], [1, 1])
        )
        assert torch.equal(both[0], model(short, PackedContext([4]))[-1])
        assert torch.equal(both[1], model(long, PackedContext([len(long)]))[-1])


def test_gradient_checkpointing_changes_no_gradient() -> None:
    torch.manual_seed(3)
    model = Decoder(DecoderConfig.from_hf(FAMILIES["qwen3"].to_dict()))
    tokens, context = torch.randint(0, 97, (90,)), PackedContext([30, 60])
    grads = []
    for model.gradient_checkpointing in (False, True):
        model.zero_grad()
        model(tokens, context).square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_packed_gradients_equal_those_of_separate_sequences_in_float64() -> None:
    torch.manual_seed(4)
    model = Decoder(DecoderConfig.from_hf(FAMILIES["qwen2"].to_dict())).double()
    lengths = [3, BLOCK, BLOCK + 6, 2 * BLOCK + 2]
    tokens = [torch.randint(0, 97, (n,)) for n in lengths]
    weights = [torch.randn(n, SHAPE["hidden_size"], dtype=torch.float64) for n in lengths]
    (model(torch.cat(tokens), PackedContext(lengths)) * torch.cat(weights)).sum().backward()
    packed = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for t, w in zip(tokens, weights, strict=True):
        (model(t, PackedContext([len(t)])) * w).sum().backward()
    for name, p in model.named_parameters():
        if name in packed:
            torch.testing.assert_close(p.grad, packed[name], rtol=1e-12, atol=1e-12 * float(packed[name].abs().max()))


@pytest.mark.parametrize("prompt", [5, BLOCK - 2, BLOCK, BLOCK + 20])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_shared_prompt_equals_repeated_prompt(prompt: int, dtype: torch.dtype) -> None:
    """Forward bit for bit (float32, bfloat16); gradients to rounding, for continuations of several lengths."""
    torch.manual_seed(4)
    model = Decoder(DecoderConfig.from_hf({**FAMILIES["qwen3"].to_dict(), "initializer_range": 0.2})).to(dtype)
    tails = [1, 3, 4, BLOCK + 3, 9]
    prompts = [torch.randint(0, 97, (prompt,)), torch.randint(0, 97, (prompt + 3,))]
    ends = [torch.randint(0, 97, (n,)) for n in tails]
    owner = [0, 1, 0, 0, 1]
    weights = [torch.randn(n, SHAPE["hidden_size"], dtype=dtype) for n in tails]
    repeated = [len(prompts[owner[i]]) + n for i, n in enumerate(tails)]
    apart = model(
        torch.cat([x for i, end in enumerate(ends) for x in (prompts[owner[i]], end)]), PackedContext(repeated)
    ).split(repeated)
    sum(((a[-n:] * w).sum() for a, n, w in zip(apart, tails, weights, strict=True)), torch.zeros(())).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    lengths = [len(p) for p in prompts] + tails
    context = PackedContext(lengths, [-1, -1, *owner])
    shared = model(torch.cat([*prompts, *ends]), context).split(lengths)[2:]
    sum(((s * w).sum() for s, w in zip(shared, weights, strict=True)), torch.zeros(())).backward()
    if dtype != torch.float64:
        assert all(torch.equal(s, a[-n:]) for s, a, n in zip(shared, apart, tails, strict=True))
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.05}[dtype]
    for name, gradient in expected.items():
        found = dict(model.named_parameters())[name].grad
        assert found is not None
        gap = torch.linalg.vector_norm((found - gradient).double()) / torch.linalg.vector_norm(gradient.double())
        assert float(gap) <= tolerance, name


def test_attention_against_its_equation() -> None:
    """softmax(q k^T scale + causal mask) v in float64, written out, forward and backward."""
    torch.manual_seed(5)
    lengths, heads, kv_heads, d = [5, 70, 65], 6, 2, 8
    total = sum(lengths)
    q, k, v = (torch.randn(total, n, d, dtype=torch.float64, requires_grad=True) for n in (heads, kv_heads, kv_heads))
    found = PackedContext(lengths).attend(0, q, k, v, 0.3)
    parts = []
    for qs, ks, vs in zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True):
        ks, vs = (x.repeat_interleave(heads // kv_heads, dim=1) for x in (ks, vs))
        scores = torch.einsum("thd,shd->hts", qs, ks) * 0.3
        scores = scores.masked_fill(torch.ones(scores.shape[1:]).triu(1).bool(), float("-inf"))
        parts.append(torch.einsum("hts,shd->thd", scores.softmax(-1), vs))
    expected = torch.cat(parts)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    w = torch.randn_like(expected)
    ours = torch.autograd.grad((found * w).sum(), (q, k, v))
    theirs = torch.autograd.grad((expected * w).sum(), (q, k, v))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_contexts_refuse_impossible_layouts() -> None:
    with pytest.raises(ValueError, match="at least one token"):
        PackedContext([3, 0])
    with pytest.raises(ValueError, match="continues none"):
        PackedContext([3, 2, 2], [-1, 0, 1])
    cache = KVCache(Decoder(DecoderConfig.from_hf(FAMILIES["llama"].to_dict())).spec, 2, dtype=torch.float32)
    with pytest.raises(ValueError, match="cannot hold"):
        PagedContext(cache, [[0]], [BLOCK], [1])


def test_bundled_model_equals_transformers(smollm2_folder: Any) -> None:
    """Float32 log-probs of a real text to 2e-5; of every other token, however unlikely, to 1e-4."""
    from transformers import AutoTokenizer

    from upslope.models.files.loading import load_model

    text = "The policy gradient theorem says that the gradient of the expected return is an expectation."
    ids = AutoTokenizer.from_pretrained(smollm2_folder)(text, return_tensors="pt").input_ids[0]
    theirs = AutoModelForCausalLM.from_pretrained(smollm2_folder, dtype=torch.float32).eval()
    ours = load_model(smollm2_folder, dtype=torch.float32)
    with torch.no_grad():
        expected = theirs(ids[None]).logits[0].log_softmax(-1)
        found = ours.logits(ours(ids, PackedContext([len(ids)]))).log_softmax(-1)
    gap = (found - expected).abs()
    assert float(gap.max()) <= 1e-4
    assert float(gap[:-1].gather(1, ids[1:, None]).max()) <= 2e-5

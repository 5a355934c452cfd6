"""The encoder-decoder against its equations, torch's own layers, transformers' Marian and Pegasus, and itself."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_seq2seq import EOS, PAD, SHAPES, prompt, tiny, tiny_config
from torch import Tensor, nn

from upslope.data.batching import collate
from upslope.errors import ConfigError, DataError, ModelError
from upslope.functional.returns import gae
from upslope.models.attention.context import BLOCK, KVCache, PackedContext, PagedContext
from upslope.models.files.loading import load_model, save_model
from upslope.models.protocol import ScalarHead
from upslope.models.seq2seq.layers import Attention, EncoderLayer, LayerNorm, sinusoids
from upslope.models.seq2seq.network import Seq2Seq, load_seq2seq
from upslope.training.optim import Group, MasterAdamW, decay_groups
from upslope.training.step import Forward, Outputs, score, update
from upslope.types import Batch, Example

DTYPES = [torch.float32, torch.bfloat16]


def sequence(model: Seq2Seq, source: int, target: int, seed: int = 0) -> Tensor:
    """A source of `source` tokens, decoder_start, `target` target tokens."""
    generator = torch.Generator().manual_seed(seed + 31 * target)
    tail = torch.randint(2, model.config.vocab_size, (target,), generator=generator)
    return torch.cat([torch.tensor(prompt(model, source, seed)), tail])


def example(model: Seq2Seq, source: int, target: int, seed: int = 0, **fields: Any) -> Example:
    tokens = sequence(model, source, target, seed).tolist()
    return Example(tokens, [False] * (source + 1) + [True] * target, fields)


# Equations


def test_positions_are_the_papers() -> None:
    """PE(t, 2i) = sin(t / 10000^(2i/D)), PE(t, 2i+1) = cos(the same), even dimensions first."""
    for width in (6, 7):
        found = sinusoids(9, width)
        for t in range(9):
            for j in range(width):
                angle = t / 10000 ** (2 * (j // 2) / width)
                column = j // 2 if j % 2 == 0 else (width + 1) // 2 + j // 2
                assert float(found[t, column]) == pytest.approx(math.sin(angle) if j % 2 == 0 else math.cos(angle))


def test_layer_norm_is_torchs() -> None:
    x = 3 * torch.randn(5, 24, dtype=torch.float64) + 1
    ours, theirs = LayerNorm(24).double(), nn.LayerNorm(24).double()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        nn.init.normal_(p)
        q.data.copy_(p)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-12, atol=1e-12)


def copy_attention(ours: Attention, theirs: nn.MultiheadAttention) -> None:
    projections = [getattr(ours, f"{name}_proj") for name in "qkv"]
    theirs.in_proj_weight.data.copy_(torch.cat([p.weight for p in projections]))
    theirs.in_proj_bias.data.copy_(torch.cat([p.bias for p in projections]))
    theirs.out_proj.load_state_dict(ours.out_proj.state_dict())


def test_attention_is_softmax_of_scaled_products_and_torchs() -> None:
    """softmax(q k^T / sqrt(d)) v per head, all to all, for sources packed end to end."""
    torch.manual_seed(3)
    attention = Attention(tiny_config()).double()
    for p in attention.parameters():
        nn.init.normal_(p, std=0.3)
    lengths = [1, 5, 64, 70]
    x = torch.randn(sum(lengths), 32, dtype=torch.float64)
    found = attention.encode(x, PackedContext(lengths, causal=False)).split(lengths)
    theirs = nn.MultiheadAttention(32, 4, batch_first=True, dtype=torch.float64)
    copy_attention(attention, theirs)
    for part, own in zip(found, x.split(lengths), strict=True):
        q, k, v = ((getattr(attention, f"{name}_proj")(own)).view(-1, 4, 8).transpose(0, 1) for name in "qkv")
        weights = (q @ k.transpose(1, 2) / math.sqrt(8)).softmax(-1)
        by_hand = attention.out_proj((weights @ v).transpose(0, 1).flatten(1))
        torch.testing.assert_close(part, by_hand, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(part, theirs(own, own, own, need_weights=False)[0], rtol=1e-10, atol=1e-12)


def test_without_causality_everything_is_seen_and_differentiable() -> None:
    lengths = [3, 130, 64, 129, 1]
    q, k, v = (torch.randn(sum(lengths), 2, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    out = PackedContext(lengths, causal=False).attend(0, q, k, v, 0.4)
    weight = torch.randn_like(out)
    found = torch.autograd.grad((out * weight).sum(), (q, k, v))
    parts = []
    for a, b, c in zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True):
        p = (torch.einsum("ihd,jhd->hij", a, b) * 0.4).softmax(-1)
        parts.append(torch.einsum("hij,jhd->ihd", p, c))
    expected = torch.cat(parts)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)
    for mine, other in zip(found, torch.autograd.grad((expected * weight).sum(), (q, k, v)), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-11)
    with pytest.raises(ValueError, match="not causal"):
        PackedContext([3, 2], [-1, 0], causal=False)


@pytest.mark.parametrize("shape", ["post", "pre"])
def test_layers_are_torchs(shape: str) -> None:
    """The whole network against nn.TransformerEncoderLayer and nn.TransformerDecoderLayer with the same weights."""
    model = tiny(shape, torch.float64).eval()
    config, width = model.config, model.config.hidden_size
    options = {
        **{"d_model": width, "nhead": config.num_attention_heads, "dim_feedforward": 52, "dropout": 0.0},
        **{"batch_first": True, "norm_first": shape == "pre", "dtype": torch.float64},
    }
    pairs = {"linear1": "fc1", "linear2": "fc2", "norm1": "self_attn_layer_norm"}

    def filled(layer: nn.Module, ours: nn.Module, names: Mapping[str, str]) -> nn.Module:
        for theirs, mine in names.items():
            getattr(layer, theirs).load_state_dict(getattr(ours, mine).state_dict())
        copy_attention(ours.self_attn, layer.self_attn)
        return layer.eval()

    source, target = sequence(model, 70, 80)[:70], sequence(model, 70, 80)[70:]
    table, scale = sinusoids(256, width), math.sqrt(width)
    memory = (model.model.shared(source) * scale + table[:70])[None]
    for ours in model.model.encoder.layers:
        memory = filled(nn.TransformerEncoderLayer(**options), ours, {**pairs, "norm2": "final_layer_norm"})(memory)
    x = (model.model.shared(target) * scale + table[:81])[None]
    names = {**pairs, "norm2": "encoder_attn_layer_norm", "norm3": "final_layer_norm"}
    if shape == "pre":
        memory = model.model.encoder.layer_norm(memory)
    for ours in model.model.decoder.layers:
        layer = filled(nn.TransformerDecoderLayer(**options), ours, names)
        copy_attention(ours.encoder_attn, layer.multihead_attn)
        mask = nn.Transformer.generate_square_subsequent_mask(81, dtype=torch.float64)
        x = layer(x, memory, tgt_mask=mask, tgt_is_causal=True)
    if shape == "pre":
        x = model.model.decoder.layer_norm(x)
    found = model(torch.cat([source, target]), PackedContext([151]))
    torch.testing.assert_close(found[70:], x[0], rtol=1e-9, atol=1e-9)
    assert not found[:70].any()


# Independence


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_batch_changes_no_bit(shape: str, dtype: torch.dtype) -> None:
    model = tiny(shape, dtype)
    sizes = [(1, 1), (5, 3), (64, 70), (65, 2), (130, 140), (63, 64)]
    tokens = [sequence(model, *size) for size in sizes]
    lengths = [len(t) for t in tokens]
    with torch.no_grad():
        together = model(torch.cat(tokens), PackedContext(lengths)).split(lengths)
        for own, found in zip(tokens, together, strict=True):
            assert torch.equal(model(own, PackedContext([len(own)])), found)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_future_changes_no_bit_and_the_source_every_row(shape: str) -> None:
    model = tiny(shape)
    tokens = sequence(model, 70, 80)
    with torch.no_grad():
        base = model(tokens, PackedContext([151]))
        later = tokens.clone()
        later[120:] = 5
        changed = model(later, PackedContext([151]))
        assert torch.equal(base[:120], changed[:120])
        assert not torch.equal(base[120], changed[120])
        assert torch.equal(base[:120], model(tokens[:120], PackedContext([120])))
        for place in (0, 69):
            other = tokens.clone()
            other[place] = other[place] + 1
            moved = model(other, PackedContext([151]))
            assert all(not torch.equal(a, b) for a, b in zip(base[70:], moved[70:], strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shared_prompts_and_the_block_cache_give_the_same_bits(dtype: torch.dtype) -> None:
    model = tiny("pre", dtype)
    prompts = [torch.tensor(prompt(model, n)) for n in (66, 9)]
    tails = [sequence(model, 3, n, seed=n)[4:] for n in (1, 40, 70)]
    lengths = [67, 10] + [len(t) for t in tails] * 2
    with torch.no_grad():
        packed = torch.cat([*prompts, *tails, *tails])
        shared = model(packed, PackedContext(lengths, [-1, -1, 0, 0, 0, 1, 1, 1])).split(lengths)
        for p, owner in enumerate(prompts):
            for t, tail in enumerate(tails):
                alone = model(torch.cat([owner, tail]), PackedContext([len(owner) + len(tail)]))
                assert torch.equal(alone[: len(owner)], shared[p])
                assert torch.equal(alone[len(owner) :], shared[2 + 3 * p + t])
        turned = torch.cat([tails[1], prompts[1], prompts[0], tails[2]])
        found = model(turned, PackedContext([40, 10, 67, 70], [2, -1, -1, 1])).split([40, 10, 67, 70])
        assert all(torch.equal(found[i], shared[j]) for i, j in enumerate((3, 1, 0, 7))), "any order of segments"
        cache = KVCache(model.spec, 4, dtype=dtype)
        model(prompts[0], PagedContext(cache, [[0, 1, 2]], [0], [67], prompts=[67]))
        pieces = [
            model(tails[2][s:e], PagedContext(cache, [[0, 1, 2]], [67 + s], [e - s], prompts=[67]))
            for s, e in ((0, 1), (1, 2), (2, 60), (60, 70))
        ]
        assert torch.equal(torch.cat(pieces), shared[4])


# Gradients


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_gradient_of_shared_prompts_is_that_of_whole_sequences(
    shape: str, dtype: torch.dtype, tolerance: float
) -> None:
    model = tiny(shape, dtype)
    weights = torch.randn(400, dtype=torch.float64)
    examples = [example(model, s, t, seed=seed) for s, t, seed in ((70, 3, 0), (70, 66, 0), (4, 9, 1), (4, 1, 1))]
    examples = [Example(e.tokens, e.mask, {"w": weights[: sum(e.mask)]}) for e in examples]
    found = []
    for shared, parts in ((False, [[0], [1], [2], [3]]), (False, [[0, 1, 2, 3]]), (True, [[0, 1, 2, 3]])):
        model.zero_grad()
        for part in parts:
            batch = collate([examples[i] for i in part], share_prompts=shared)
            (Forward()(model, batch).logp_N * batch.fields["w"]).sum().backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for other in found[1:]:
        for name, g in found[0].items():
            # a key's bias moves all scores of a query alike: its gradient is nothing but rounding
            beside = found[0][name.replace("bias", "weight")] if name.endswith("k_proj.bias") else g
            assert float((other[name] - g).norm()) <= tolerance * float(beside.norm()), name


def test_gradient_is_the_difference_quotient() -> None:
    model = tiny("separate", torch.float64)
    batch = collate([example(model, 5, 4), example(model, 5, 6), example(model, 66, 3)], share_prompts=True)

    def loss() -> Tensor:
        return Forward()(model, batch).logp_N.sum()

    loss().backward()
    named = dict(model.named_parameters())
    for name in (
        "model.encoder.embed_tokens.weight",
        "model.decoder.embed_tokens.weight",
        "model.encoder.layers.0.self_attn.k_proj.weight",
        "model.encoder.layers.0.self_attn_layer_norm.weight",
        "model.decoder.layers.0.encoder_attn.k_proj.weight",
        "model.decoder.layers.1.encoder_attn.v_proj.bias",
        "model.decoder.layers.1.self_attn.q_proj.weight",
        "model.decoder.layers.0.fc1.weight",
    ):
        p = named[name]
        flat, grad = p.detach().view(-1), p.grad.view(-1)
        i = int(grad.abs().argmax())
        eps, old = 1e-5, float(flat[i])
        values = []
        for x in (old + eps, old - eps):
            flat[i] = x
            values.append(float(loss().detach()))
        flat[i] = old
        assert float(grad[i]) == pytest.approx((values[0] - values[1]) / (2 * eps), rel=1e-5), name


def test_checkpointing_changes_no_bit() -> None:
    model = tiny("post")
    batch = collate([example(model, 9, 12), example(model, 70, 5)])
    Forward()(model, batch).logp_N.sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing = True
    Forward()(model, batch).logp_N.sum().backward()
    assert all(torch.equal(p.grad, expected[name]) for name, p in model.named_parameters())


# Dropout


def test_dropout_needs_the_flag_and_training_mode() -> None:
    model = tiny("post", dropout=0.5)
    tokens, context = sequence(model, 6, 5), PackedContext([12])
    plain = model.eval()(tokens, context)
    assert torch.equal(model.train()(tokens, context), plain), "off by default in training mode"
    model.use_dropout = True
    assert torch.equal(model.eval()(tokens, context), plain)
    with torch.no_grad():  # an engine samples from a network that is being trained
        assert torch.equal(model.train()(tokens, context), plain)
    dropped = [model(tokens, context) for _ in range(2)]
    assert not torch.equal(dropped[0], plain)
    assert not torch.equal(dropped[0], dropped[1])
    torch.manual_seed(1)
    first = model(tokens, context)
    torch.manual_seed(1)
    assert torch.equal(model(tokens, context), first)


# Files and transformers


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_save_and_load_bit_for_bit(tmp_path: Path, shape: str, dtype: torch.dtype) -> None:
    model = tiny(shape, dtype, dropout=0.1, activation="silu")
    save_model(model, tmp_path / "m")
    again = load_model(tmp_path / "m", dtype=dtype, gradient_checkpointing=True)
    assert isinstance(again, Seq2Seq)
    assert again.gradient_checkpointing
    assert {**vars(again.config), "extra": {}} == vars(model.config)
    assert again.spec == model.spec
    state = model.state_dict()
    assert again.state_dict().keys() == state.keys()
    assert all(torch.equal(t, state[name]) for name, t in again.state_dict().items())
    tokens = sequence(model, 70, 9)
    assert torch.equal(model(tokens, PackedContext([80])), again(tokens, PackedContext([80])))
    save_model(again, tmp_path / "n", source_folder=tmp_path / "m")
    for file in ("config.json", "generation_config.json", "model.safetensors"):
        assert (tmp_path / "m" / file).read_bytes() == (tmp_path / "n" / file).read_bytes()


def theirs_of(folder: Path, shape: str) -> Any:
    from transformers import MarianMTModel, PegasusForConditionalGeneration

    kind = PegasusForConditionalGeneration if shape == "pre" else MarianMTModel
    network, report = kind.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    return network.eval()


@pytest.mark.parametrize("activation", ["relu", "gelu", "swish"])
@pytest.mark.parametrize("shape", SHAPES)
def test_transformers_gives_the_same_logits_and_greedy_text(tmp_path: Path, shape: str, activation: str) -> None:
    from upslope.engine import Engine
    from upslope.types import SamplingParams

    model = tiny(shape, activation=activation)
    save_model(model, tmp_path / "m")
    theirs = theirs_of(tmp_path / "m", shape)
    offset = model.config.source_offset
    sources = [prompt(model, n, seed=n)[:-1] for n in (3, 20, 70)]
    completions = Engine(model, num_blocks=40, eos_token_ids=[EOS]).generate(
        [[*s, PAD] for s in sources], SamplingParams(temperature=0, max_tokens=75)
    )
    for source, (completion,) in zip(sources, completions, strict=True):
        tokens = torch.tensor([*source, PAD, *completion.tokens])
        ours = model.logits(model(tokens, PackedContext([len(tokens)])))[len(source) :]
        ids, target = torch.tensor([source]) - offset, tokens[None, len(source) :]
        found = theirs(input_ids=ids, decoder_input_ids=target).logits[0]
        torch.testing.assert_close(ours, found, rtol=1e-5, atol=2e-5)
        greedy = theirs.generate(input_ids=ids, max_new_tokens=75)[0].tolist()
        assert greedy[1:] == completion.tokens


@pytest.mark.parametrize("shape", SHAPES)
def test_a_folder_that_transformers_wrote(tmp_path: Path, shape: str) -> None:
    save_model(tiny(shape), tmp_path / "m")
    theirs = theirs_of(tmp_path / "m", shape)
    theirs.final_logits_bias.normal_()
    theirs.save_pretrained(tmp_path / "hub")
    model = load_model(tmp_path / "hub")
    tokens = sequence(model, 30, 20)
    context = PackedContext([51])
    ours = model.logits(model(tokens, context))[30:]
    source = tokens[None, :30] - model.config.source_offset
    found = theirs(input_ids=source, decoder_input_ids=tokens[None, 30:]).logits[0]
    torch.testing.assert_close(ours, found, rtol=1e-5, atol=2e-5)
    assert model.spec.hidden_size == model.config.hidden_size + 1
    save_model(model, tmp_path / "back")
    again = load_seq2seq(tmp_path / "back", dtype=torch.float32)
    assert torch.equal(again.final_logits_bias, theirs.final_logits_bias)
    logp = score(again, [collate([example(model, 30, 20)])]).logp_N
    expected = found.log_softmax(-1)[:-1].gather(1, tokens[31:, None])[:, 0]
    torch.testing.assert_close(logp, expected, rtol=1e-5, atol=2e-5)


def test_folders_say_what_generation_needs(tmp_path: Path) -> None:
    save_model(tiny("post"), tmp_path / "m")
    generation = json.loads((tmp_path / "m" / "generation_config.json").read_text())
    assert generation["decoder_start_token_id"] == generation["pad_token_id"] == PAD
    assert generation["eos_token_id"] == EOS
    config = theirs_of(tmp_path / "m", "post").generation_config
    assert config.forced_eos_token_id is None
    assert config.max_length == 256
    assert config.bad_words_ids is None


# Learning


def steps(model: Seq2Seq, batches: Callable[[int], list[Example]], count: int, rate: float) -> list[float]:
    optimizer = MasterAdamW(decay_groups(model.named_parameters(), weight_decay=0.0))
    losses = []

    def nll(batch: Batch, out: Outputs) -> tuple[Tensor, Mapping[str, Tensor]]:
        return -out.logp_N, {}

    for i in range(count):
        examples = batches(i)
        total = sum(sum(e.mask) for e in examples)
        for e in examples:
            e.fields["weight"] = [1 / total] * sum(e.mask)
        batch = collate(examples)
        warm = min(1.0, (i + 1) / 20)
        losses.append(update(model, optimizer, [batch], nll, learning_rate=rate * warm, max_grad_norm=1.0)["loss"])
    return losses


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_learns_to_reverse(norm: str) -> None:
    """Strings of 2 to 5 letters reversed, learnt from pairs; unseen strings by greedy decoding."""
    from upslope.engine import Engine
    from upslope.types import SamplingParams

    torch.manual_seed(0)
    size = {"vocab_size": 10, "encoder_layers": 1, "decoder_layers": 1, "num_attention_heads": 2}
    model = Seq2Seq(tiny_config(norm=norm, intermediate_size=64, **size))
    generator = torch.Generator().manual_seed(5)

    def word() -> list[int]:
        length = int(torch.randint(2, 6, (1,), generator=generator))
        return torch.randint(2, 10, (length,), generator=generator).tolist()

    def batch(_: int) -> list[Example]:
        words = [word() for _ in range(32)]
        return [Example([*w, EOS, PAD, *w[::-1], EOS], [False] * (len(w) + 2) + [True] * (len(w) + 1)) for w in words]

    losses = steps(model, batch, 350, 5e-3)
    unseen = [word() for _ in range(40)]
    completions = Engine(model, num_blocks=80, eos_token_ids=[EOS]).generate(
        [[*w, EOS, PAD] for w in unseen], SamplingParams(temperature=0, max_tokens=10)
    )
    right = sum(c.tokens == [*w[::-1], EOS] for w, (c,) in zip(unseen, completions, strict=True))
    assert losses[-1] < 0.3 < 2 < losses[0]
    assert right >= 34, right


def test_values_and_policy_train_together() -> None:
    """A value head on the target rows: GAE on its values, one update that lowers both losses."""
    model, head = tiny("post"), ScalarHead(32)
    optimizer = MasterAdamW(
        [*decay_groups(model.named_parameters(), weight_decay=0.0), Group(dict(head.named_parameters()))]
    )
    examples = [example(model, 9, 4, weight=[1 / 11] * 4), example(model, 9, 7, weight=[1 / 11] * 7)]
    batch = collate(examples, share_prompts=True)
    scored = score(model, [batch], Forward(head=head))
    rewards, mask = torch.zeros(2, 7), torch.ones(2, 7, dtype=torch.bool)
    mask[0, 4:] = False
    rewards[0, 3], rewards[1, 6] = 1.0, -1.0
    values = torch.zeros(2, 7).masked_scatter(mask, scored.values_N)
    advantages = gae(rewards, values, mask, gamma=1.0, lam=1.0)
    torch.testing.assert_close(advantages, torch.tensor([[1.0] * 4 + [0.0] * 3, [-1.0] * 7]))
    batch.fields["advantages"] = advantages[mask]
    old = scored.logp_N

    def loss(batch: Batch, out: Outputs) -> tuple[Tensor, Mapping[str, Tensor]]:
        advantage = batch.fields["advantages"]
        assert torch.equal(out.logp_N.detach(), old) or begun, "the first ratio is exactly 1"
        surrogate = -(out.logp_N - old).exp() * advantage
        value = 0.5 * (out.values_N - advantage).square()
        return surrogate + value, {"surrogate": surrogate, "value": value}

    begun = False
    first = update(model, optimizer, [batch], loss, Forward(head=head), learning_rate=1e-3, max_grad_norm=1.0)
    begun = True
    second = update(model, optimizer, [batch], loss, Forward(head=head), learning_rate=1e-3, max_grad_norm=1.0)
    assert second["surrogate"] < first["surrogate"]
    assert second["value"] < first["value"]


# Bad input


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"norm": "pre", "source_vocab_size": 50}, "one shared vocabulary"),
        ({"norm": "both"}, "post or pre"),
        ({"num_attention_heads": 5}, "no multiple of 5 heads"),
        ({"activation": "tanh"}, "must be one of relu"),
        ({"dropout": 1.0}, r"in \[0, 1\)"),
        ({"decoder_start_token_id": 97}, "a target token, 0..96"),
        ({"pad_token_id": 60, "source_vocab_size": 50}, "also be a source token"),
        ({"encoder_layers": 0}, "at least 1"),
    ],
)
def test_bad_configurations(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        tiny_config(**changes)


def test_bad_sequences() -> None:
    model = tiny("post", max_position_embeddings=8)
    for tokens, words in (
        ([5, 6, 7], "no source followed by decoder_start"),
        ([PAD, 6, 7], "no source followed by"),
        ([*range(2, 11), PAD, 4], "source of 9 tokens is longer"),
        ([5, PAD, *range(2, 10)], "target of 9 tokens is longer"),
    ):
        with pytest.raises(ModelError, match=words):
            model(torch.tensor(tokens), PackedContext([len(tokens)]))
    cache = KVCache(model.spec, 2, dtype=torch.float32)
    with pytest.raises(ModelError, match="whole prompt"):
        model(torch.tensor([5]), PagedContext(cache, [[0]], [3], [1], prompts=[6]))
    with pytest.raises(ModelError, match="whole prompt"):
        model(torch.tensor([5]), PagedContext(cache, [[0]], [3], [1]))
    separate = tiny("separate")
    with pytest.raises(ModelError, match="source ids start at 97"):
        separate(torch.tensor([5, PAD]), PackedContext([2]))
    for bad, words in (([5, 6], "once"), ([PAD], "at least one"), ([5, PAD, PAD], "once"), ([5] * 9 + [PAD], "9 tok")):
        with pytest.raises(DataError, match=words):
            model.check_prompt(bad)
    with pytest.raises(DataError, match="is a target token"):
        separate.check_prompt([5, PAD])


def test_bad_folders(tmp_path: Path) -> None:
    save_model(tiny("pre"), tmp_path / "m")
    good_config = json.loads((tmp_path / "m" / "config.json").read_text())
    good = load_file(tmp_path / "m" / "model.safetensors")

    def attempt(words: str, config: Mapping[str, Any] | None = None, **tensors: Tensor | None) -> None:
        (tmp_path / "m" / "config.json").write_text(json.dumps({**good_config, **(config or {})}))
        named = {name.replace("__", "."): t for name, t in tensors.items()}
        kept = {name: t for name, t in {**good, **named}.items() if t is not None}
        save_file(kept, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ModelError, match=words):
            load_model(tmp_path / "m")

    attempt("1 missing", model__decoder__layer_norm__weight=None)
    attempt("1 unexpected", model__nothing=torch.zeros(2))
    attempt("1 misshapen", model__encoder__layer_norm__weight=torch.zeros(3))
    attempt("table of sinusoids", model__encoder__embed_positions__weight=torch.zeros(256, 42))
    attempt("makes them one matrix|config.json makes them one", lm_head__weight=torch.zeros(97, 42))
    attempt("final_logits_bias is", final_logits_bias=torch.zeros(1, 3))
    attempt("tie_word_embeddings", {"tie_word_embeddings": False})
    attempt("must be one of relu", {"activation_function": "gelu_new"})
    attempt("differs from decoder_ffn_dim", {"decoder_ffn_dim": 7})
    attempt("quantised", {"quantization_config": {"bits": 4}})
    (tmp_path / "m" / "config.json").write_text(json.dumps(good_config))
    copies = {
        name: good["model.shared.weight"].clone() for name in ("lm_head.weight", "model.encoder.embed_tokens.weight")
    }
    save_file({**good, **copies}, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    assert isinstance(load_model(tmp_path / "m"), Seq2Seq)


def test_blocks_of_the_cache_count_both_attentions() -> None:
    model = tiny("separate")
    assert model.spec.num_layers == 4
    assert model.spec.head_dim == 32
    assert model.spec.input_vocab_size == 97 + 53
    assert KVCache.bytes_per_block(model.spec, torch.float32) == 2 * 4 * 2 * BLOCK * 32 * 4
    assert isinstance(model.model.encoder.layers[0], EncoderLayer)

"""Other architectures through the adapter: packed, paged, trained, they say what transformers says; or are refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import TINY, randomise
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from upslope.errors import ModelError
from upslope.models.attention.context import BLOCK, KVCache, PackedContext, PagedContext
from upslope.models.files.folders import read_config
from upslope.models.files.loading import load_model, save_model
from upslope.models.files.weights import load
from upslope.models.transformers_model import TransformersModel

GPT = {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
OPT = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 64}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", GPT),
    "gpt2 scaled by layer": ("gpt2", {**GPT, "scale_attn_by_inverse_layer_idx": True}),
    "gpt_neox": ("gpt_neox", TINY),
    "phi": ("phi", {**TINY, "num_key_value_heads": 4}),
    "opt": ("opt", {**OPT, "word_embed_proj_dim": 16, "max_position_embeddings": 256, "layerdrop": 0.5}),
    "mistral": ("mistral", {**TINY, "sliding_window": 256}),
    "llama with mlp_bias": ("llama", {**TINY, "mlp_bias": True}),
    "granite": ("granite", {**TINY, "logits_scaling": 3.0, "attention_multiplier": 0.3, "residual_multiplier": 0.5}),
    "cohere": ("cohere", {**TINY, "logit_scale": 0.5}),
    "qwen3_moe": ("qwen3_moe", {**TINY, **MOE}),
}
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "bloom": ("bloom", {"vocab_size": 96, "hidden_size": 32, "n_layer": 2, "n_head": 4}, "BloomForCausalLM.*interface"),
    "mamba": ("mamba", {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2}, "MambaForCausalLM.*recurrent"),
    "window": ("mistral", {**TINY, "sliding_window": 16}, "MistralForCausalLM.*sliding window of 16"),
    "gemma2": ("gemma2", {**TINY, "sliding_window": 256}, "Gemma2ForCausalLM.*caps its logits"),
    "falcon": (
        "falcon",
        {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "alibi": True},
        "FalconForCausalLM.*ALiBi",
    ),
    "bert": ("bert", {k: v for k, v in TINY.items() if k != "head_dim"}, "BertLMHeadModel.*not causal"),
    "deepseek": (
        "deepseek_v3",
        {**{k: v for k, v in TINY.items() if k != "head_dim"}, "n_routed_experts": 8, "moe_intermediate_size": 16}
        | {
            "q_lora_rank": 8,
            "kv_lora_rank": 8,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
            "num_key_value_heads": 4,
        },
        "DeepseekV3ForCausalLM.*different widths",
    ),
}
LENGTHS = (67, 1, 5, 130, 33)


def _network(kind: str, settings: dict[str, Any], folder: Path) -> PreTrainedModel:
    network = randomise(AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings)))
    network.save_pretrained(folder)
    return network


def _logp(model: TransformersModel, tokens: torch.Tensor, context: Any) -> torch.Tensor:
    return model.logits(model(tokens, context)).log_softmax(-1)


@torch.no_grad()
def _reference(network: PreTrainedModel, tokens: torch.Tensor, lengths: tuple[int, ...]) -> torch.Tensor:
    return torch.cat([network(input_ids=t[None]).logits[0].log_softmax(-1) for t in tokens.split(lengths)])


@pytest.mark.parametrize("name", RUNS)
def test_packed_and_paged_equal_each_sequence_alone(tmp_path: Path, name: str) -> None:
    kind, settings = RUNS[name]
    network = _network(kind, settings, tmp_path)
    model = load_model(tmp_path)
    assert type(model) is TransformersModel or name == "mistral"
    model = TransformersModel.from_folder(tmp_path).train()
    assert {n for n, _ in model.named_parameters()} == {n for n, _ in network.named_parameters()}
    tokens = torch.randint(96, (sum(LENGTHS),))
    expected = _reference(network, tokens, LENGTHS)
    with torch.no_grad():
        packed = _logp(model, tokens, PackedContext(LENGTHS))
        torch.testing.assert_close(packed, expected, atol=1e-5, rtol=0)
        hidden = model(tokens, PackedContext(LENGTHS))
        torch.testing.assert_close(
            (hidden @ model.head_weight.T).log_softmax(-1), expected, atol=1e-5, rtol=0, msg="head_weight"
        )
        torch.testing.assert_close(_decoded(model, tokens), expected, atol=1e-5, rtol=0)


def _decoded(model: TransformersModel, tokens: torch.Tensor) -> torch.Tensor:
    """Log-probs of every position: all but the last few prefilled at once, those (over block borders) one a step."""
    parts = tokens.split(LENGTHS)
    blocks = [-(-n // BLOCK) for n in LENGTHS]
    starts = [sum(blocks[:i]) for i in range(len(LENGTHS))]
    tables = [list(range(start, start + n)) for start, n in zip(starts, blocks, strict=True)]
    cache = KVCache(model.spec, sum(blocks), dtype=model.dtype)
    done = [max(1, n - 5) for n in LENGTHS]
    first = torch.cat([part[:n] for part, n in zip(parts, done, strict=True)])
    logp = _logp(model, first, PagedContext(cache, tables, [0] * len(parts), done))
    rows = [list(x) for x in logp.split(done)]
    while active := [i for i, n in enumerate(LENGTHS) if done[i] < n]:
        step = torch.stack([parts[i][done[i]] for i in active])
        context = PagedContext(cache, [tables[i] for i in active], [done[i] for i in active], [1] * len(active))
        for i, row in zip(active, _logp(model, step, context), strict=True):
            rows[i].append(row)
            done[i] += 1
    return torch.stack([row for sequence in rows for row in sequence])


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_run_is_refused_by_name(tmp_path: Path, name: str) -> None:
    kind, settings, message = REFUSED[name]
    _network(kind, settings, tmp_path)
    with pytest.raises(ModelError, match=message) as caught:
        load_model(tmp_path)
    assert "\n" not in str(caught.value)


def test_an_encoder_decoder_and_an_unknown_architecture_are_refused(tmp_path: Path) -> None:
    save_file({"shared.weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    AutoConfig.for_model("t5", d_model=32, num_layers=1, num_heads=2).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="t5 cannot run here: it is an encoder-decoder"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "quantum", "architectures": ["QuantumLM"]}')
    with pytest.raises(ModelError, match=r"config.json is not one transformers can run .*quantum"):
        load_model(tmp_path)


def test_the_probe_finds_what_no_configuration_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer that mixes tokens outside attention changes packed numbers; so does a head applied to something else."""
    _network("gpt_neox", TINY, tmp_path)
    model = TransformersModel.from_folder(tmp_path)
    model.check_against_eager()
    mlp = type(model.get_submodule("gpt_neox.layers.0.mlp"))
    plain = mlp.forward
    monkeypatch.setattr(mlp, "forward", lambda self, x: plain(self, x + x.roll(1, dims=1)))
    with pytest.raises(ModelError, match="GPTNeoXForCausalLM cannot run here: packed log-probs differ"):
        TransformersModel.from_folder(tmp_path)


def test_gradients_equal_the_librarys_with_and_without_checkpointing(tmp_path: Path) -> None:
    network = _network("phi", {**TINY, "num_key_value_heads": 4, "resid_pdrop": 0.5, "embd_pdrop": 0.5}, tmp_path)
    lengths = (30, 7)
    tokens = torch.randint(96, (sum(lengths),))
    target = torch.randint(96, (sum(lengths), 1))
    loss = -sum(
        network(input_ids=t[None]).logits[0].log_softmax(-1).gather(1, y).sum()
        for t, y in zip(tokens.split(lengths), target.split(lengths), strict=True)
    )
    loss.backward()
    for checkpointing in (False, True):
        model = TransformersModel.from_folder(tmp_path, gradient_checkpointing=checkpointing).train()
        # Another pack goes through before the backward pass: recomputation must use the first one's context.
        ours = -_logp(model, tokens, PackedContext(lengths)).gather(1, target).sum()
        with torch.no_grad():
            model(tokens[:5], PackedContext([5]))
        ours.backward()
        gradients = dict(model.named_parameters())
        for name, parameter in network.named_parameters():
            scale = parameter.grad.abs().max()
            torch.testing.assert_close(gradients[name].grad, parameter.grad, atol=float(1e-5 * scale), rtol=0, msg=name)


def test_dropout_is_off_in_training(tmp_path: Path) -> None:
    _network("gpt2", {**GPT, "resid_pdrop": 0.5, "attn_pdrop": 0.5, "embd_pdrop": 0.5}, tmp_path)
    model = TransformersModel.from_folder(tmp_path).train()
    tokens = torch.randint(96, (40,))
    assert torch.equal(model(tokens, PackedContext([40])), model(tokens, PackedContext([40])))


def test_copies_stand_alone_and_casts_keep_the_rotary_tables(tmp_path: Path) -> None:
    _network("gpt_neox", TINY, tmp_path)
    model = TransformersModel.from_folder(tmp_path)
    tokens = torch.randint(96, (20,))
    before = model(tokens, PackedContext([20]))
    other = copy.deepcopy(model).to(torch.bfloat16)
    assert other.dtype == torch.bfloat16
    table = other.get_submodule("gpt_neox.rotary_emb").get_buffer("inv_freq")
    assert torch.equal(table, model.get_submodule("gpt_neox.rotary_emb").get_buffer("inv_freq"))
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert torch.equal(model(tokens, PackedContext([20])), before)


def test_missing_and_unexpected_weights_are_errors_not_random_numbers(tmp_path: Path) -> None:
    network = _network("gpt2", GPT, tmp_path)
    state = {n: t for n, t in network.state_dict().items() if n not in ("lm_head.weight", "transformer.ln_f.weight")}
    network.save_pretrained(tmp_path, state_dict={**state, "extra.weight": torch.ones(2)})
    with pytest.raises(ModelError, match=r"1 missing \(transformer.ln_f.weight\); 1 unexpected \(extra.weight\)"):
        load_model(tmp_path)


@pytest.mark.parametrize("name", ["gpt2", "opt", "qwen3_moe"])
def test_saved_folders_load_in_transformers(tmp_path: Path, name: str) -> None:
    kind, settings = RUNS[name]
    network = _network(kind, settings, tmp_path / "m")
    (tmp_path / "m" / "tokenizer.json").write_text("{}")
    model = load_model(tmp_path / "m", dtype=torch.bfloat16)
    masters = {n: p.detach().clone() for n, p in network.named_parameters()}
    folder = save_model(model, tmp_path / "out", tensors=masters, source_folder=tmp_path / "m", max_shard_bytes=40_000)
    assert load(folder).keys() == load(tmp_path / "m").keys()
    assert (folder / "tokenizer.json").is_file()
    assert read_config(folder) == read_config(tmp_path / "m")
    back = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert back.dtype == torch.float32
    tokens = torch.randint(96, (1, 30))
    assert torch.equal(back(tokens).logits, network(tokens).logits)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m", "out"]
    with pytest.raises(ModelError, match="1 missing"):
        save_model(model, tmp_path / "bad", tensors=dict(list(masters.items())[1:]))


def test_spec_comes_from_what_the_layers_ask_for(tmp_path: Path) -> None:
    _network("mistral", {**TINY, "sliding_window": None}, tmp_path)
    spec = TransformersModel.from_folder(tmp_path).spec
    assert spec == load_model(tmp_path).spec
    assert (spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.max_positions) == (4, 2, 8, 256)


def test_rotary_positions_that_depend_on_the_pack_are_kept_within_their_first_context(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 64}
    _network("llama", {**TINY, "rope_parameters": rope}, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["max_position_embeddings"] == 256
    assert load_model(tmp_path).spec.max_positions == 64

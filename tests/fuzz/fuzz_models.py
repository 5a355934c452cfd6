"""Families of damaged model files: each folder that a network comes from, adapters, and GGUF."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from encoder_kit import encoder_folder
from fuzz_kit import Family, damaged, damaged_json, linked
from gguf_kit import decoder_folder
from safetensors.torch import load_file, save_file
from tiny_model import tiny_folder, tiny_tokenizer
from tiny_seq2seq import tiny as tiny_seq2seq
from transformers import AutoConfig, AutoModelForCausalLM

from upslope.build import load_inference
from upslope.data.batching import collate
from upslope.data.chat import load_tokenizer
from upslope.data.pieces import encode_pieces
from upslope.models.encoder.network import load_encoder
from upslope.models.files.adapters import base_source
from upslope.models.files.gguf import convert, read_ends
from upslope.models.files.gguf_writer import write_gguf
from upslope.models.files.loading import decoder_config, load_reward_folder, save_model
from upslope.models.files.weights import load
from upslope.models.lstm import LSTM, LSTMConfig
from upslope.training.step import score
from upslope.types import Example

Model = dict[str, bytes]
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def _decoder(path: Path) -> Path:
    return tiny_folder(path)


def _qwen(path: Path) -> Path:
    return tiny_folder(path, model_type="qwen3", qk_norm=True, rope=LLAMA3, tie_word_embeddings=False)


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def _sharded(path: Path) -> Path:
    """Two files and their index."""
    tiny_folder(path)
    tensors = load_file(path / "model.safetensors")
    names = sorted(tensors)
    parts = (names[::2], names[1::2])
    for file, part in zip(SHARDS, parts, strict=True):
        save_file({name: tensors[name] for name in part}, path / file)
    where = {name: file for file, part in zip(SHARDS, parts, strict=True) for name in part}
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": where}))
    (path / "model.safetensors").unlink()
    return path


def _lstm(path: Path) -> Path:
    torch.manual_seed(0)
    model = LSTM(LSTMConfig(vocab_size=258, hidden_size=24, num_hidden_layers=2))
    return save_model(model, path, tokenizer=tiny_tokenizer())


def _seq2seq(path: Path) -> Path:
    return save_model(tiny_seq2seq(vocab_size=258), path, tokenizer=_source_tokenizer())


def _source_tokenizer() -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    return tokenizer


def _adapted(path: Path) -> Path:
    """An architecture that transformers runs."""
    sizes = {"vocab_size": 258, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 1}
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **sizes, eos_token_id=1))
    network.save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def _bert(path: Path) -> Path:
    return encoder_folder(path)


def _reward(path: Path) -> Path:
    tiny_folder(path)
    tensors = load_file(path / "model.safetensors")
    save_file({**tensors, "score.weight": torch.ones(1, 32)}, path / "model.safetensors")
    config = json.loads((path / "config.json").read_text())
    config |= {"num_labels": 1, "upslope_reward": {"kind": "process", "aggregate": "min"}}
    (path / "config.json").write_text(json.dumps(config))
    return path


def _lora(path: Path) -> Path:
    """Adapters, and beside them the model they belong to."""
    base = tiny_folder(path / "base")
    folder = path / "adapters"
    folder.mkdir()
    stored = {
        f"base_model.model.model.layers.0.self_attn.q_proj.lora_{side}.weight": torch.ones(shape)
        for side, shape in (("A", (3, 32)), ("B", (32, 3)))
    }
    save_file(stored, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": 3,
        "lora_alpha": 6,
        "target_modules": ["q_proj"],
        "base_model_name_or_path": str(base),
        "rank_pattern": {"x": 4},
        "alpha_pattern": {"x": 2},
        "use_rslora": False,
        "init_lora_weights": True,
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def _use(folder: Path) -> None:
    """Load, encode a text, and score it."""
    policy = load_inference(folder, dtype="float32")
    assert policy.eos_token_ids
    ids, _ = encode_pieces(getattr(policy.tokenizer, "target", policy.tokenizer), "some text", ())
    ids = [1, *ids[:5]]
    with torch.no_grad():
        score(policy.model, [collate([Example(ids, [False] + [True] * (len(ids) - 1))])])


def _use_seq2seq(folder: Path) -> None:
    policy = load_inference(folder, dtype="float32")
    prompt = policy.tokenizer.source_ids("some text")
    with torch.no_grad():
        score(policy.model, [collate([Example([*prompt, 5, 1], [False] * len(prompt) + [True, True])])])


def _use_encoder(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    encoder = load_encoder(folder, "classify", labels=["a", "b"])
    encoder.check_tokens(len(tokenizer), folder)
    ids = torch.tensor([[2, 5, 6, 3]])
    with torch.no_grad():
        encoder(ids, torch.ones_like(ids))


def _use_reward(folder: Path) -> None:
    load_tokenizer(folder)
    load_reward_folder(folder)


def _use_adapters(folder: Path) -> None:
    base_source(folder)
    _use(folder)


JSON = (
    *("config.json", "config.json", "config.json", "generation_config.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "tokenizer.json", "adapter_config.json", "adapter_config.json"),
    *("model.safetensors.index.json", "model.safetensors.index.json"),
)


def _read(folder: Path, use: Callable[[Path], None], rng: random.Random, scratch: Path) -> None:
    here = {path.name: path for path in folder.iterdir() if path.is_file()}
    weights = [name for name in here if name.endswith(".safetensors")]
    names = [name for name in JSON if name in here]
    changed: dict[str, bytes | None] = {}
    for _ in range(rng.choice((1, 1, 1, 2))):
        if rng.random() < 0.2:
            name = rng.choice(weights)
            changed[name] = _damaged_weights(rng, here[name].read_bytes())
        else:
            name = rng.choice(names)
            changed[name] = damaged_json(rng, here[name].read_bytes(), [here[rng.choice(names)].read_bytes()])
        if rng.random() < 0.03:
            changed[name] = None
    use(linked(folder, scratch / "model", changed))


def _damaged_weights(rng: random.Random, content: bytes) -> bytes:
    """A safetensors file with its header's tree changed, or its bytes."""
    size = struct.unpack("<Q", content[:8])[0]
    if rng.random() < 0.4:
        head = damaged_json(rng, content[8 : 8 + size])
        return struct.pack("<Q", len(head)) + head + content[8 + size :]
    if rng.random() < 0.3:
        return struct.pack("<Q", rng.choice((0, 1, 2**31, 2**63, size + 8, size - 8))) + content[8:]
    return damaged(rng, content[: 8 + size], [content]) + content[8 + size :]


def _gguf(path: Path) -> bytes:
    folder = decoder_folder(path / "m")
    config = decoder_config(folder)
    assert config is not None
    write_gguf(path / "m.gguf", config, load(folder), load_tokenizer(folder), kind="float32", eos_token_ids=[1])
    return (path / "m.gguf").read_bytes()


def _read_gguf(content: bytes, rng: random.Random, scratch: Path) -> None:
    head = content[:40_000] if rng.random() < 0.5 else content[:900]
    changed = damaged(rng, head, [content]) + content[len(head) :]
    if rng.random() < 0.2:
        changed = damaged(rng, content)
    (scratch / "m.gguf").write_bytes(changed)
    read_ends(scratch / "m.gguf")
    convert(scratch / "m.gguf", scratch / "out")


def _family(name: str, make: Callable[[Path], Path], use: Callable[[Path], None] = _use, share: float = 1.0) -> Family:
    def case(made: Path, rng: random.Random, scratch: Path) -> None:
        _read(made, use, rng, scratch)

    return Family(f"model-{name}", "models", lambda path: make(path / name), case, share=share)


FAMILIES = (
    _family("decoder", _decoder),
    _family("qwen", _qwen),
    _family("sharded", _sharded, share=0.5),
    _family("lstm", _lstm, share=0.5),
    _family("seq2seq", _seq2seq, _use_seq2seq),
    _family("adapted", _adapted, share=0.7),
    _family("encoder", _bert, _use_encoder, share=0.7),
    _family("reward", _reward, _use_reward, share=0.3),
    _family("lora", _lora, _use_adapters),
    Family("model-gguf", "models", _gguf, _read_gguf, share=0.6),
)

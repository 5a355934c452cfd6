"""Folders to GGUF: read back bit for bit, run by llama.cpp as here, and refused where something would be lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from gguf_kit import SPLITS, byte_level, decoder_folder, lacking, sentencepiece
from hypothesis import given
from hypothesis import strategies as st
from tiny_model import tiny_tokenizer
from tokenizers import normalizers, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from upslope.data.chat import load_tokenizer
from upslope.errors import ModelError, RunError
from upslope.models.decoder.network import DecoderConfig
from upslope.models.files.folders import new_file
from upslope.models.files.gguf import convert, read_ends, undo_rope_order
from upslope.models.files.gguf_writer import as_stored, pinned_template, read_vocab, rope_order, write_gguf
from upslope.models.files.loading import decoder_config
from upslope.models.files.weights import load

TEXTS = ("The thing is in there: 12 and 3456  times.", "    a\n\n\tthe THE  ", "Zoë, 工作 🚀 ½²", "it's I'LL")
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
NETWORKS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama with biases": {"model_type": "llama", "attention_bias": True, "output_bias": True},
    "llama untied": {"model_type": "llama", "tie_word_embeddings": False, "num_key_value_heads": 4},
    "llama 3": {"model_type": "llama", "rope": LLAMA3, "rms_norm_eps": 1e-6},
    "mistral": {"model_type": "mistral", "tie_word_embeddings": False, "head_dim": 32},
    "qwen2": {"model_type": "qwen2", "attention_bias": True},
    "qwen3": {"model_type": "qwen3", "qk_norm": True, "tie_word_embeddings": False, "head_dim": 32},
}


def written(folder: Path, path: Path, **settings: Any) -> Path:
    config = decoder_config(folder)
    assert config is not None
    write_gguf(path, config, load(folder), load_tokenizer(folder), **{"kind": "float32", **settings})
    return path


@pytest.mark.parametrize("network", NETWORKS)
def test_it_comes_back_bit_for_bit(tmp_path: Path, network: str) -> None:
    folder = decoder_folder(tmp_path / "m", **NETWORKS[network])
    path = written(folder, tmp_path / "m.gguf", eos_token_ids=(1,))
    back = convert(path, tmp_path / "back")
    before, after = load(folder), load(back)
    assert before.keys() == after.keys()
    assert all(torch.equal(x, after[name]) for name, x in before.items())
    ours, theirs = (decoder_config(f) for f in (folder, back))
    assert isinstance(ours, DecoderConfig)
    assert isinstance(theirs, DecoderConfig)
    for field in ("hidden_size", "head_dim", "num_key_value_heads", "rms_norm_eps", "tie_word_embeddings", "qk_norm"):
        assert getattr(ours, field) == getattr(theirs, field), field
    assert theirs.rope["rope_theta"] == ours.rope["rope_theta"]
    assert theirs.rope["rope_type"] == ours.rope["rope_type"]
    one, other = (AutoTokenizer.from_pretrained(f) for f in (folder, back))
    assert [one(t).input_ids for t in TEXTS] == [other(t).input_ids for t in TEXTS]
    assert one.chat_template == other.chat_template
    assert json.loads((back / "generation_config.json").read_text())["eos_token_id"] == 1


def test_a_file_names_three_ends_and_no_end_is_lost(tmp_path: Path) -> None:
    folder = decoder_folder(tmp_path / "m")
    written(folder, tmp_path / "m.gguf", eos_token_ids=(7, 1, 8))
    assert read_ends(tmp_path / "m.gguf") == [1, 7, 8]
    back = convert(tmp_path / "m.gguf", tmp_path / "back")
    assert json.loads((back / "generation_config.json").read_text())["eos_token_id"] == [1, 7, 8]
    with pytest.raises(ModelError, match=r"ends at any of 4 tokens \(1, 7, 8, 9\), a GGUF file can name three"):
        written(folder, tmp_path / "n.gguf", eos_token_ids=(7, 1, 8, 9))


@pytest.mark.parametrize("kit", [byte_level, lambda: sentencepiece(bos=False)])
@pytest.mark.parametrize("start", ["", "\n", "  "])
def test_a_token_that_the_tokenizer_lacks_is_nothing_in_the_written_template(
    tmp_path: Path, kit: Any, start: str
) -> None:
    """Also after the way back, where the tokenizer lacks it still, and on a second way out."""
    tokenizer = lacking(kit(), "bos_token", start)
    folder = decoder_folder(tmp_path / "m", tokenizer)
    path = written(folder, tmp_path / "m.gguf", eos_token_ids=(tokenizer.eos_token_id,))
    fields = gguf.GGUFReader(path).fields
    template = fields["tokenizer.chat_template"].contents()
    assert template.startswith("{%- set bos_token = '' -%}")
    assert "{%- set pad_token = '<|im_end|>' " in template
    assert template.endswith(tokenizer.chat_template)
    assert fields["tokenizer.ggml.add_bos_token"].contents() is False
    assert "tokenizer.ggml.bos_token_id" not in fields
    again = load_tokenizer(convert(path, tmp_path / "back"))
    assert again.bos_token is None
    messages = [{"role": "user", "content": "hi"}]
    rendered: list[str] = [t.apply_chat_template(messages, tokenize=False) for t in (tokenizer, again)]
    assert rendered[0].strip().startswith("[|<|im_end|>|<|im_end|>|")
    assert rendered[0] == rendered[1]
    assert pinned_template(again.chat_template, again, bos=None, eos=again.eos_token_id) == template


def test_a_template_is_led_by_what_llama_cpp_would_write_otherwise_alone() -> None:
    tokenizer = byte_level()
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    known = "{{ bos_token }}{{ eos_token }}{{ unk_token }}"
    assert pinned_template(known, tokenizer, bos=bos, eos=eos) == known
    assert pinned_template("{{ x }}", tokenizer, bos=None, eos=None) == "{{ x }}"
    assert pinned_template("{{ my_bos_token }}", tokenizer, bos=None, eos=eos) == "{{ my_bos_token }}"
    other = pinned_template("{{ eos_token }}", tokenizer, bos=bos, eos=5)  # the file's first end is another
    assert other == "{%- set eos_token = '<|im_end|>' -%}{{ eos_token }}"
    tokenizer.pad_token = "it's\\"
    assert pinned_template("{{ pad_token }}", tokenizer, bos=bos, eos=eos).startswith(
        "{%- set pad_token = 'it\\'s\\\\' -%}"
    )
    tokenizer.eos_token = None
    assert pinned_template("{{ eos_token }}", tokenizer, bos=bos, eos=1) == "{%- set eos_token = '' -%}{{ eos_token }}"


def test_each_of_several_templates_is_led(tmp_path: Path) -> None:
    tokenizer = lacking(byte_level(), "bos_token")
    tokenizer.chat_template = {"default": "{{ bos_token }}a", "rag": "b"}
    path = written(decoder_folder(tmp_path / "m", tokenizer), tmp_path / "m.gguf")
    fields = gguf.GGUFReader(path).fields
    assert fields["tokenizer.chat_template"].contents() == "{%- set bos_token = '' -%}{{ bos_token }}a"
    assert fields["tokenizer.chat_template.rag"].contents() == "b"


@pytest.mark.parametrize("network", ["llama", "mistral", "qwen2", "qwen3"])
def test_transformers_reads_the_file_itself(tmp_path: Path, network: str) -> None:
    width = {"head_dim": 128} if network == "qwen3" else {}  # it takes the family's usual width, not the file's
    folder = decoder_folder(tmp_path / "m", **{**NETWORKS[network], **width})
    written(folder, tmp_path / "m.gguf")
    tokens = torch.arange(3, 60)[None]
    ours = AutoModelForCausalLM.from_pretrained(folder)(tokens).logits
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf")(tokens).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_the_order_of_rows_by_hand_and_back() -> None:
    assert rope_order(torch.arange(8), 2).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    rows = torch.randn(4 * 6, 5)
    assert torch.equal(undo_rope_order(rope_order(rows, 4), 4), rows)


@given(st.integers(1, 5), st.sampled_from([32, 64, 96]), st.floats(1e-6, 1e4))
def test_what_a_type_keeps(rows: int, width: int, size: float) -> None:
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(rows)) * size
    assert torch.equal(as_stored(x, "float32"), x)
    assert torch.equal(as_stored(x, "bfloat16"), x.bfloat16().float())
    assert torch.equal(as_stored(x, "float16"), x.half().float())
    blocks = x.view(rows, -1, 32)
    step = blocks.abs().amax(-1, keepdim=True) / 127
    error = (as_stored(x, "q8_0").view_as(blocks) - blocks).abs()
    assert bool((error <= step * (0.5 + 127 * 2**-11) + 127 * 2**-25).all())  # half a step, and the step in float16
    assert torch.equal(as_stored(x[0], "q8_0"), x[0])


def test_types_in_the_file(tmp_path: Path) -> None:
    """Vectors stay float32; rows that blocks of 32 do not fill become float16."""
    folder = decoder_folder(tmp_path / "m", intermediate_size=72)
    path = written(folder, tmp_path / "m.gguf", kind="q8_0", about={"name": "tiny"})
    types = {t.name: t.tensor_type.name for t in gguf.GGUFReader(path).tensors}
    assert types["output_norm.weight"] == "F32"
    assert types["blk.0.attn_q.weight"] == types["token_embd.weight"] == types["blk.0.ffn_up.weight"] == "Q8_0"
    assert types["blk.0.ffn_down.weight"] == "F16"
    fields = gguf.GGUFReader(path).fields
    assert fields["general.name"].contents() == "tiny"
    assert fields["general.file_type"].contents() == gguf.LlamaFileType.MOSTLY_Q8_0


@pytest.mark.parametrize("split", SPLITS)
def test_the_split_is_recognised_by_how_it_cuts(split: str) -> None:
    tokenizer = byte_level(split)
    assert read_vocab(tokenizer, len(tokenizer))["tokenizer_pre"] == split


def test_tokens_kinds_and_frame() -> None:
    tokenizer = byte_level(bos=True)
    tokenizer.add_tokens(["<user>"])
    vocab = read_vocab(tokenizer, len(tokenizer) + 2)
    assert vocab["tokenizer_model"] == "gpt2"
    assert vocab["token_types"][:4] == [3, 3, 3, 1]
    assert vocab["token_list"][-3:] == ["<user>", f"[PAD{len(tokenizer)}]", f"[PAD{len(tokenizer) + 1}]"]
    assert vocab["token_types"][-3:] == [4, 5, 5]
    assert (vocab["add_bos_token"], vocab["add_eos_token"]) == (True, False)
    assert vocab["token_merges"][0] == "h e"
    pieces = sentencepiece(prefix=False)
    vocab = read_vocab(pieces, len(pieces))
    assert (vocab["tokenizer_model"], vocab["tokenizer_pre"], vocab["add_space_prefix"]) == ("llama", "default", False)
    assert vocab["token_types"][0] == 2
    assert vocab["token_types"][pieces.convert_tokens_to_ids("<0x41>")] == 6
    score = dict(zip(vocab["token_list"], vocab["token_scores"], strict=True))
    assert score["he"] > score["in"] > score["ing"] > score["a"]


def _spoiled(kind: str) -> Any:
    tokenizer = byte_level()
    inner = tokenizer.backend_tokenizer
    if kind == "normaliser":
        inner.normalizer = normalizers.Lowercase()
    elif kind == "cut":
        inner.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Punctuation(), pre_tokenizers.ByteLevel()])
    elif kind == "frame":
        from tokenizers.processors import TemplateProcessing

        inner.post_processor = TemplateProcessing(single="$A <|im_start|>", special_tokens=[("<|im_start|>", 0)])
    elif kind == "pieces":
        tokenizer = sentencepiece()
        tokenizer.backend_tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    return tokenizer


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("normaliser", "normalises text by Lowercase"),
        ("cut", "give it with --pre-tokenizer and check it with --verify"),
        ("frame", "around a text that are not its BOS and EOS"),
        ("pieces", "prepares text by NFKC, Lowercase"),
    ],
)
def test_tokenizers_that_llama_cpp_cannot_run(kind: str, message: str) -> None:
    tokenizer = _spoiled(kind)
    with pytest.raises(ModelError, match=message):
        read_vocab(tokenizer, len(tokenizer))


def test_more_that_is_refused(tmp_path: Path) -> None:
    from upslope.data.train_tokenizer import train_tokenizer

    words = train_tokenizer(["a b c"], "word", 10)
    with pytest.raises(ModelError, match="is a WordLevel"):
        read_vocab(words, 10)
    with pytest.raises(ModelError, match="no merges"):
        read_vocab(tiny_tokenizer(), 258)
    with pytest.raises(ModelError, match="embedding only 9 rows"):
        read_vocab(byte_level(), 9)
    with pytest.raises(ModelError, match="not cut before its merges"):
        read_vocab(sentencepiece(), 400, split="gpt-2")
    assert read_vocab(_spoiled("cut"), 400, split="falcon")["tokenizer_pre"] == "falcon"
    folder = decoder_folder(tmp_path / "m")
    config, tokenizer = decoder_config(folder), load_tokenizer(folder)
    assert config is not None
    tensors = load(folder)
    name = "model.layers.0.mlp.up_proj.weight"
    for value, kind, message in (
        (float("nan"), "float32", "holds nan"),
        (1e5, "float16", "100000, which F16 cannot hold"),
        (float("inf"), "q8_0", "holds inf"),
    ):
        wrong = tensors[name].clone()
        wrong[3, 4] = value
        with pytest.raises(ModelError, match=message):
            write_gguf(tmp_path / "x.gguf", config, {**tensors, name: wrong}, tokenizer, kind=kind)
    with pytest.raises(ModelError, match="1 missing"):
        write_gguf(tmp_path / "x.gguf", config, {n: x for n, x in tensors.items() if n != name}, tokenizer)
    qwen = decoder_folder(tmp_path / "q", model_type="qwen3", qk_norm=True, attention_bias=True, output_bias=True)
    with pytest.raises(ModelError, match="qwen3 network with attention_bias"):
        written(qwen, tmp_path / "x.gguf")
    qwen = decoder_folder(tmp_path / "r", model_type="qwen2", attention_bias=True, rope=LLAMA3)
    with pytest.raises(ModelError, match="llama3 rotary scaling"):
        written(qwen, tmp_path / "x.gguf")


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "m.gguf"

    def broken_off() -> None:
        with new_file(path) as temp:
            temp.write_bytes(b"half")
            raise ModelError("no")

    with pytest.raises(ModelError):
        broken_off()
    assert list(path.parent.iterdir()) == []
    with new_file(path) as temp:
        temp.write_bytes(b"one")
        assert not path.exists()
    with pytest.raises(RunError, match="already exists"), new_file(path):
        pass
    with new_file(path, overwrite=True) as temp:
        temp.write_bytes(b"two")
        assert path.read_bytes() == b"one"
    assert path.read_bytes() == b"two"
    with pytest.raises(RunError, match="already exists"), new_file(path.parent, overwrite=True):
        pass
    if os.geteuid():
        path.parent.chmod(0o500)
        with pytest.raises(RunError, match="cannot write"), new_file(path, overwrite=True):
            pass


def test_a_killed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"old")
    code = (
        "import os, signal, sys\n"
        "from upslope.models.files.folders import new_file\n"
        "with new_file(sys.argv[1], overwrite=True) as temp:\n"
        "    temp.write_bytes(b'new')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", code, str(path)], check=False).returncode == -9
    assert path.read_bytes() == b"old"

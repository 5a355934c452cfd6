"""Exports loaded by the program they are for: the same bits, the same tokens, and nothing published that differs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from encoder_kit import encoder_folder, tiny_encoder, tokenizer_for
from ends_kit import END, EOS, PLAIN, folder_ending
from gguf_kit import SPLITS, byte_level, decoder_folder, lacking, sentencepiece
from safetensors.torch import load_file, save_file
from tiny_seq2seq import tiny as tiny_seq2seq
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from upslope.cli import main
from upslope.commands import export_verify, llama_cpp
from upslope.data.chat import load_tokenizer
from upslope.models.files import gguf_writer
from upslope.models.files.loading import load_model, save_model
from upslope.models.files.weights import load
from upslope.models.lstm import LSTM, LSTMConfig

TOKENS = torch.arange(4, 64)[None]
MESSAGES = [{"role": "user", "content": "hi  there"}, {"role": "assistant", "content": "42"}]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return decoder_folder(tmp_path_factory.mktemp("tiny") / "m")


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """A cache of its own for converted files, where the real model is not wanted from the usual one."""
    if "smollm2_folder" not in request.fixturenames:
        monkeypatch.setenv("UPSLOPE_HOME", str(tmp_path / "home"))


@pytest.fixture(autouse=True)
def _short(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer positions than a user's comparison has, where the model is tiny."""
    if request.node.get_closest_marker("slow") is None:
        monkeypatch.setattr(export_verify, "_LONGEST", 12)
        monkeypatch.setattr(export_verify, "_GENERATED", 4)


def export(source: Path | str, output: Path, *more: str) -> int:
    return main(["export", str(source), "--output", str(output), *more])


def failed(capsys: pytest.CaptureFixture[str], code: int, found: int) -> str:
    """The one line of a refused export."""
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("upslope: error:")]
    assert found == code
    assert len(lines) == 1
    return lines[0]


@torch.no_grad()
def logits(folder: Path, tokens: torch.Tensor = TOKENS, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)(tokens).logits


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_folder_is_the_same_model_in_transformers(tiny: Path, tmp_path: Path, dtype: str) -> None:
    """Bit for bit: float32 as it was, narrower types as the rounded source."""
    assert export(tiny, tmp_path / "out", "--dtype", dtype, "--verify") == 0
    torch_dtype = getattr(torch, dtype)
    source = AutoModelForCausalLM.from_pretrained(tiny)
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.copy_(parameter.to(torch_dtype))
        assert torch.equal(source(TOKENS).logits, logits(tmp_path / "out"))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == dtype
    assert {x.dtype for x in load(tmp_path / "out").values()} == {torch_dtype}
    ours, theirs = (AutoTokenizer.from_pretrained(f) for f in (tiny, tmp_path / "out"))
    assert ours("the 12  ones\n🚀").input_ids == theirs("the 12  ones\n🚀").input_ids
    rendered = [t.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True) for t in (ours, theirs)]
    assert rendered[0] == rendered[1]
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == {"eos_token_id": 1}


def test_shards(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export(tiny, tmp_path / "out", "--dtype", "float32", "--max-shard-gb", "0.00005", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    shards = sorted((tmp_path / "out").glob("model-*.safetensors"))
    assert len(shards) > 2
    assert all(path.stat().st_size < 110_000 for path in shards)  # one tensor (the embedding) may be larger alone
    assert report["bytes"] == sum(p.stat().st_size for p in (tmp_path / "out").rglob("*") if p.is_file())
    assert torch.equal(logits(tiny), logits(tmp_path / "out"))


def test_adapters_are_merged(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny), LoraConfig(r=2, target_modules=["q_proj", "up_proj"])
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.2)
        model.save_pretrained(tmp_path / "adapter")
        adapted = model.eval()(TOKENS).logits
    assert export(tmp_path / "adapter", tmp_path / "out", "--dtype", "float32", "--verify") == 0
    torch.testing.assert_close(logits(tmp_path / "out"), adapted, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(tmp_path / "out"), logits(tiny), atol=0.1)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| adapters | rank 2, alpha 8, merged in float32 |" in card
    assert export(tmp_path / "adapter", tmp_path / "m.gguf", "--format", "gguf", "--dtype", "float32", "--verify") == 0
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"xx")
    capsys.readouterr()
    line = failed(capsys, 4, export(tmp_path / "adapter", tmp_path / "again"))
    assert "damaged or cut short" in line


GGUF: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama with biases": {"attention_bias": True, "output_bias": True, "tie_word_embeddings": False},
    "llama 3": {
        "rope": {
            **{"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0},
            **{"high_freq_factor": 4.0, "original_max_position_embeddings": 64},
        }
    },
    "linear": {"rope": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    "mistral": {"model_type": "mistral", "tie_word_embeddings": False},
    "qwen2": {"model_type": "qwen2", "attention_bias": True},
    "qwen3": {"model_type": "qwen3", "qk_norm": True, "tie_word_embeddings": False, "head_dim": 32},
}


@pytest.mark.parametrize("network", GGUF)
def test_llama_cpp_computes_the_same(
    tmp_path: Path, network: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens, chat, ends and log-probs; at a third of the bound that stops a user's export."""
    pytest.importorskip("xllamacpp")
    largest, mean = export_verify._BOUNDS["llama.cpp, float32"]
    monkeypatch.setitem(export_verify._BOUNDS, "llama.cpp, float32", (largest / 3, mean / 3))
    folder = decoder_folder(tmp_path / "m", **GGUF[network])
    out = tmp_path / "m.gguf"
    assert export(folder, out, "--format", "gguf", "--dtype", "float32", "--verify", "--json") == 0
    gap = json.loads(capsys.readouterr().out)["verified"][0]
    assert gap["n"] == 4 * 16 * 20
    assert 0 < gap["largest"] <= largest / 3
    agreed, total = _greedy(gap["also"])
    assert agreed == total


def _greedy(words: str) -> tuple[int, int]:
    """The two numbers of "the same greedy token at 5 of 6 positions"."""
    agreed, _, total = words.removeprefix("the same greedy token at ").split(" positions")[0].split()
    return int(agreed), int(total)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "q8_0"])
def test_llama_cpp_in_narrow_types(tiny: Path, tmp_path: Path, dtype: str) -> None:
    pytest.importorskip("xllamacpp")
    assert export(tiny, tmp_path / "m.gguf", "--format", "gguf", "--dtype", dtype, "--verify") == 0


TOKENIZERS: dict[str, Any] = {
    **{split: lambda split=split: byte_level(split, bos=split == "llama-bpe") for split in SPLITS},
    "sentencepiece": sentencepiece,
    "sentencepiece without a space": lambda: sentencepiece(prefix=False, bos=False),
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_llama_cpp_splits_the_same(tmp_path: Path, kind: str) -> None:
    pytest.importorskip("xllamacpp")
    folder = decoder_folder(tmp_path / "m", TOKENIZERS[kind]())
    assert export(folder, tmp_path / "m.gguf", "--format", "gguf", "--dtype", "float32", "--verify") == 0


@pytest.mark.parametrize("name", ["bos_token", "eos_token", "pad_token"])
@pytest.mark.parametrize("kit", [byte_level, lambda: sentencepiece(bos=False)])
@pytest.mark.parametrize("start", ["", "\n  ", "  {% if true %}\n"])
def test_llama_cpp_writes_nothing_for_a_token_that_the_tokenizer_lacks(
    tmp_path: Path, name: str, kit: Any, start: str
) -> None:
    pytest.importorskip("xllamacpp")
    tokenizer = lacking(kit(), name, start)
    tokenizer.chat_template += "{% endif %}" * start.count("{% if")
    folder = decoder_folder(tmp_path / "m", tokenizer, num_hidden_layers=1)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7]}))
    assert export(folder, tmp_path / "m.gguf", "--format", "gguf", "--dtype", "float32", "--verify") == 0


@pytest.mark.parametrize("positions", [18, 64, 65])
def test_a_short_context_is_no_difference(tmp_path: Path, positions: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many tokens as a user's comparison has, of a model that holds about as many."""
    pytest.importorskip("xllamacpp")
    monkeypatch.setattr(export_verify, "_LONGEST", 48)
    monkeypatch.setattr(export_verify, "_GENERATED", 16)
    folder = decoder_folder(tmp_path / "m", max_position_embeddings=positions, num_hidden_layers=1)
    assert export(folder, tmp_path / "m.gguf", "--format", "gguf", "--dtype", "float32", "--verify") == 0


def test_a_refusal_of_llama_cpp_is_one_line_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("xllamacpp")
    token_lists = export_verify._token_lists
    monkeypatch.setattr(export_verify, "_token_lists", lambda policy, **_: [token_lists(policy, room=4)[0] * 5])
    folder = decoder_folder(tmp_path / "m", max_position_embeddings=16, num_hidden_layers=1)
    line = failed(capsys, 5, export(folder, tmp_path / "m.gguf", "--format", "gguf", "--verify"))
    assert "llama.cpp refuses /completion: request (" in line
    assert "exceeds the available context size" in line
    assert not {"{", '"', "\\n"} & set(line)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b'{"error": {"code": 400, "message": "too\\n long"}}', "too long"),
        (b'{"error": "odd"}', '{"error": "odd"}'),
        (b"<html>\n no</html>", "<html> no</html>"),
        (b"[3]", "[3]"),
        (b"", "it gives no reason"),
    ],
)
def test_what_a_refusal_says(body: bytes, words: str) -> None:
    assert llama_cpp._said(body) == words


def _wrong_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_writer, "rope_order", lambda rows, heads: rows)


def _wrong_split(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("upslope.models.files.gguf_writer._split_name", lambda state: "gpt-2")


def _wrong_template(monkeypatch: pytest.MonkeyPatch) -> None:
    from gguf import GGUFWriter

    add = GGUFWriter.add_chat_template
    monkeypatch.setattr(GGUFWriter, "add_chat_template", lambda self, text: add(self, text.replace("\n", " ")))


def _wrong_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("upslope.models.files.gguf_writer._frame", lambda tokenizer: (True, False))


def _wrong_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    from upslope.build import Policy

    monkeypatch.setattr(Policy, "eos_token_ids", (1, 5))  # what is compared with
    write = gguf_writer.write_gguf
    monkeypatch.setattr("upslope.commands.export.write_gguf", lambda *a, **k: write(*a, **{**k, "eos_token_ids": (1,)}))


def _wrong_end_of_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """A letter takes the place of the end of a turn, which llama.cpp knows by its name all the same."""
    write = gguf_writer.write_gguf
    monkeypatch.setattr("upslope.commands.export.write_gguf", lambda *a, **k: write(*a, **{**k, "eos_token_ids": (5,)}))


MISTAKES = {
    "rows": (_wrong_rows, "the export differs from the model"),
    "split": (_wrong_split, "differently from token"),
    "frame": (_wrong_frame, "differently from token 0"),
    "template": (_wrong_template, "llama.cpp renders a chat as"),
    "ends": (_wrong_ends, "does not stop at token 5"),
    "end of turn": (_wrong_end_of_turn, "llama.cpp would stop at token 5, which ends no turn of this model"),
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_a_wrong_file_is_found_and_not_published(
    tiny: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("xllamacpp")
    spoil, message = MISTAKES[kind]
    spoil(monkeypatch)
    code = export(tiny, tmp_path / "out" / "m.gguf", "--format", "gguf", "--dtype", "float32", "--verify")
    assert message in failed(capsys, 5, code)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_wrong_folder_is_found_and_the_old_one_stays(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("old")
    from upslope.commands import export as command

    original = command.save_folder

    def spoiled(path: Path, config: Any, tensors: dict[str, torch.Tensor], **more: Any) -> Path:
        name = "model.layers.1.self_attn.k_proj.weight"
        return original(path, config, {**tensors, name: tensors[name].flip(0)}, **more)

    monkeypatch.setattr(command, "save_folder", spoiled)
    code = export(tiny, tmp_path / "out", "--verify", "--overwrite")
    assert "the export differs from the model" in failed(capsys, 5, code)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["config.json"]


def test_the_ends_of_a_turn_are_carried(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """EOS, what closes the template's turns, and a third: all in generation_config.json and in the file's keys."""
    from gguf import GGUFReader

    folder = folder_ending(tmp_path / "m", PLAIN.replace(END, "<|over|>"), "<|over|>")
    eos, over, third = load_tokenizer(folder).convert_tokens_to_ids([EOS, "<|over|>", END])
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [eos, third]}))
    assert export(folder, tmp_path / "out", "--verify") == 0
    ends = [eos, third, over]
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == ends
    assert export(folder, tmp_path / "m.gguf", "--format", "gguf", "--dtype", "float32") == 0
    fields = GGUFReader(tmp_path / "m.gguf").fields
    assert [fields[f"tokenizer.ggml.{kind}_token_id"].contents() for kind in ("eos", "eot", "eom")] == ends
    pytest.importorskip("xllamacpp")
    capsys.readouterr()
    assert export(folder, tmp_path / "n.gguf", "--format", "gguf", "--dtype", "float32", "--verify") == 0
    assert (
        "3 end tokens the same; llama.cpp also stops at <|im_end|>, which it knows by name" in capsys.readouterr().out
    )


def test_adapters_end_where_their_base_does(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    folder = folder_ending(tmp_path / "m")
    model = AutoModelForCausalLM.from_pretrained(folder)
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    assert export(tmp_path / "adapter", tmp_path / "out", "--base", str(folder)) == 0
    ends = load_tokenizer(folder).convert_tokens_to_ids([EOS, END])
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == ends


def test_a_folder_with_other_ends_is_not_published(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("upslope.commands.export.write_ends", lambda folder, ends: None)
    folder = folder_ending(tmp_path / "m")
    assert "transformers would stop at tokens [" in failed(capsys, 5, export(folder, tmp_path / "out", "--verify"))
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(export_verify, "_same_ends", lambda policy, written: None)
    assert "transformers does not stop at token" in failed(capsys, 5, export(folder, tmp_path / "out", "--verify"))


def test_an_lstm_is_a_folder_for_upslope_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    tokenizer = byte_level()
    model = LSTM(LSTMConfig(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, tie_word_embeddings=True))
    save_model(model, tmp_path / "m", tokenizer=tokenizer)
    assert export(tmp_path / "m", tmp_path / "out", "--dtype", "float16", "--verify") == 0
    assert "upslope itself, which alone has this network" in capsys.readouterr().out
    assert "library_name: upslope" in (tmp_path / "out" / "README.md").read_text()
    for name, tensor in load_model(tmp_path / "out").state_dict().items():
        assert torch.equal(tensor, load_model(tmp_path / "m").state_dict()[name].half().float())
    line = failed(capsys, 4, export(tmp_path / "m", tmp_path / "m.gguf", "--format", "gguf"))
    assert "LSTM cannot be written as GGUF" in line


def test_encoder_decoders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tiny_model import tiny_tokenizer

    tokenizer = tiny_tokenizer()
    network = tiny_seq2seq("post", vocab_size=len(tokenizer))
    save_model(network, tmp_path / "m", tokenizer=tokenizer)
    assert export(tmp_path / "m", tmp_path / "out", "--dtype", "float32", "--verify") == 0
    batch = {"input_ids": TOKENS[:, :20], "decoder_input_ids": TOKENS[:, 30:38]}
    with torch.no_grad():
        ours, theirs = (AutoModelForSeq2SeqLM.from_pretrained(tmp_path / name)(**batch).logits for name in ("m", "out"))
    assert torch.equal(ours, theirs)
    line = failed(capsys, 4, export(tmp_path / "m", tmp_path / "m.gguf", "--format", "gguf"))
    assert "cannot be written as GGUF; language models of the llama" in line


@pytest.mark.parametrize("kind", ["classify", "masked", "trunk"])
def test_encoders(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    if kind != "classify":
        encoder_folder(tmp_path / "m")
        if kind == "trunk":
            AutoModel.from_pretrained(tmp_path / "m").save_pretrained(tmp_path / "m")
    else:
        tiny_encoder("classify", labels=["bad", "good"]).save(tmp_path / "m", tokenizer=tokenizer_for("bert"))
    assert export(tmp_path / "m", tmp_path / "out", "--dtype", "bfloat16", "--verify") == 0
    if kind == "classify":
        network = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", dtype=torch.float32)
        assert network.config.id2label == {0: "bad", 1: "good"}
        assert "pipeline_tag: text-classification" in (tmp_path / "out" / "README.md").read_text()
    line = failed(capsys, 4, export(tmp_path / "m", tmp_path / "m.gguf", "--format", "gguf"))
    assert "cannot be written as GGUF" in line


def test_reward_models(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from upslope.models.files.loading import RewardSettings, load_reward_folder, save_reward_folder

    model = load_model(tiny)
    torch.manual_seed(0)
    tensors = {**{n: p.detach() for n, p in model.named_parameters()}, "score.weight": torch.randn(1, 64)}
    save_reward_folder(
        model, tensors, tmp_path / "m", RewardSettings("process", "prod"), source_folder=tiny, pad_token_id=None
    )
    assert export(tmp_path / "m", tmp_path / "out", "--dtype", "float32", "--verify") == 0
    _, head, settings = load_reward_folder(tmp_path / "out")
    assert settings == RewardSettings("process", "prod")
    assert torch.equal(head.score.weight, tensors["score.weight"])
    ours, theirs = (
        AutoModelForSequenceClassification.from_pretrained(tmp_path / name)(TOKENS).logits for name in ("m", "out")
    )
    assert torch.equal(ours, theirs)
    line = failed(capsys, 4, export(tmp_path / "m", tmp_path / "m.gguf", "--format", "gguf"))
    assert "LlamaForSequenceClassification cannot be written as GGUF" in line


def _changed(folder: Path, **tensors: Any) -> None:
    stored = load_file(folder / "model.safetensors")
    for name, change in tensors.items():
        found = next(n for n in stored if n.endswith(name.replace("__", ".")))
        value = change(stored[found])
        if value is None:
            del stored[found]
        else:
            stored[found] = value
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})


def _config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


BROKEN: dict[str, Any] = {
    "cut short": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-100]),
        "cut short",
    ),
    "a tensor missing": (lambda f: _changed(f, norm__weight=lambda x: None), "missing"),
    "another shape": (lambda f: _changed(f, norm__weight=lambda x: x[:3].clone()), "misshapen"),
    "no number": (lambda f: _changed(f, norm__weight=lambda x: x * float("nan")), "holds NaN or infinity"),
    "whole numbers": (lambda f: _changed(f, up_proj__weight=lambda x: x.to(torch.int8)), "is int8"),
    "8-bit floats": (lambda f: _changed(f, up_proj__weight=lambda x: x.to(torch.float8_e4m3fn)), "is float8_e4m3fn"),
    "quantised": (lambda f: _config(f, quantization_config={"bits": 4}), "quantised weights"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no model.safetensors"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer"),
    "config cut": (lambda f: (f / "config.json").write_text('{"model_type"'), "cannot be read as JSON"),
    "no config": (lambda f: (f / "config.json").unlink(), "not a model folder"),
}


@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.parametrize("form", ["hf", "gguf"])
def test_broken_folders_are_one_line(tmp_path: Path, kind: str, form: str, capsys: pytest.CaptureFixture[str]) -> None:
    spoil, message = BROKEN[kind]
    folder = decoder_folder(tmp_path / "m")
    spoil(folder)
    out = tmp_path / ("out" if form == "hf" else "out.gguf")
    assert message in failed(capsys, 4, export(folder, out, "--format", form))
    assert not out.exists()


def test_values_beyond_float16_name_the_tensor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = decoder_folder(tmp_path / "m")
    _changed(folder, up_proj__weight=lambda x: x * 1e6)
    for out, form in ((tmp_path / "out", "hf"), (tmp_path / "m.gguf", "gguf")):
        line = failed(capsys, 4, export(folder, out, "--format", form, "--dtype", "float16"))
        assert "up_proj.weight holds" in line
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "x.gguf"], "say --format gguf"),
        (["--output", "x", "--format", "gguf"], "ends in .gguf"),
        (["--output", "x", "--dtype", "q8_0"], "q8_0 is for --format gguf"),
        (["--output", "x", "--dtype", "int4"], "dtype"),
        (["--output", "x", "--max-shard-gb", "0"], "above 0"),
        (["--output", "x", "--max-shard-gb", "nan"], "above 0"),
        (["--output", "x", "--pre-tokenizer", "qwen2"], "pre_tokenizer belongs to format = gguf"),
        (["--output", "x", "--base", "y"], "--base is for adapters"),
        ([], "output is missing"),
    ],
)
def test_options_that_do_not_fit(
    tiny: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in failed(capsys, 2, main(["export", str(tiny), *arguments]))


def test_what_exists_stays_unless_told(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for out, form in ((tmp_path / "out", "hf"), (tmp_path / "m.gguf", "gguf")):
        assert export(tiny, out, "--format", form) == 0
        before = sorted((p.name, p.stat().st_mtime_ns) for p in (out.iterdir() if out.is_dir() else [out]))
        assert "already exists" in failed(capsys, 5, export(tiny, out, "--format", form))
        assert before == sorted((p.name, p.stat().st_mtime_ns) for p in (out.iterdir() if out.is_dir() else [out]))
        assert export(tiny, out, "--format", form, "--overwrite") == 0


def test_overwriting_replaces_models_and_nothing_else(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "mother.txt").write_text("dear")
    line = failed(capsys, 5, export(tiny, tmp_path / "letters", "--overwrite"))
    assert "without config.json, so no model is replaced" in line
    assert export(tiny, tmp_path / "m") == 0
    capsys.readouterr()
    assert "holds what is to be exported" in failed(capsys, 5, export(tmp_path / "m", tmp_path / "m", "--overwrite"))
    (tmp_path / "x.gguf").mkdir()
    (tmp_path / "x.gguf" / "config.json").write_text("{}")
    code = export(tiny, tmp_path / "x.gguf", "--format", "gguf", "--overwrite")
    assert "already exists" in failed(capsys, 5, code)


def test_without_llama_cpp_nothing_is_begun(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    code = export(tiny, tmp_path / "m.gguf", "--format", "gguf", "--verify")
    assert "pip install 'upslope[verify]'" in failed(capsys, 2, code)
    assert export(tiny, tmp_path / "m.gguf", "--format", "gguf") == 0


def test_an_exported_folder_can_be_exported_and_trained_further(tiny: Path, tmp_path: Path) -> None:
    """A folder, its GGUF, that GGUF as a folder: the same bits all the way round."""
    assert export(tiny, tmp_path / "a", "--dtype", "float32") == 0
    assert export(tmp_path / "a", tmp_path / "a.gguf", "--format", "gguf", "--dtype", "float32") == 0
    assert export(tmp_path / "a.gguf", tmp_path / "b", "--dtype", "float32") == 0
    assert torch.equal(logits(tiny), logits(tmp_path / "b"))
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "the thing is in there"}\n' * 12)
    common = ["--dtype", "float32", "--max-steps", "1", "--batch-size", "2", "--eval-samples", "1"]
    trained = ["--data", str(rows), "--output-dir", str(tmp_path / "run"), *common]
    assert main(["sft", "--model", str(tmp_path / "b"), *trained]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "q8_0"])
def test_the_real_model(smollm2_folder: Path, tmp_path: Path, dtype: str) -> None:
    pytest.importorskip("xllamacpp")
    assert export(smollm2_folder, tmp_path / "m.gguf", "--format", "gguf", "--dtype", dtype, "--verify") == 0
    if dtype != "q8_0":
        assert export(smollm2_folder, tmp_path / "out", "--dtype", dtype, "--verify") == 0


def test_the_real_tokenizer(smollm2_folder: Path, tmp_path: Path) -> None:
    """SmolLM2's own vocabulary and template around a tiny network: llama.cpp splits and renders the same."""
    pytest.importorskip("xllamacpp")
    folder = decoder_folder(tmp_path / "m", AutoTokenizer.from_pretrained(smollm2_folder), num_hidden_layers=1)
    assert export(folder, tmp_path / "m.gguf", "--format", "gguf", "--dtype", "float32", "--verify") == 0

"""Pretraining: models learn more than counting pairs gives, repeat, resume, and load in transformers."""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_model import tiny_folder

from upslope.cli import main
from upslope.data.batching import Masking
from upslope.data.train_tokenizer import train_tokenizer
from upslope.errors import ConfigError, DataError, RunError, UpslopeError
from upslope.models.files.loading import load_model
from upslope.models.files.weights import load as load_weights
from upslope.models.lstm import LSTM
from upslope.options import PretrainOptions, SFTOptions
from upslope.recipes.pretrain import pretrain
from upslope.recipes.sft import sft

LETTERS = "abcde"


def line(generator: random.Random) -> str:
    """Two letters in turn: certain for who looks two back, a die of five sides for who looks one back."""
    places = [generator.randrange(5), generator.randrange(5)]
    while len(places) < 15:
        places.append(places[-2])
    return "".join(LETTERS[i] for i in places) + "\n"


def bigram_perplexity(held_out: str) -> float:
    """Of the best model that sees one character back, counted on the held-out text itself."""
    pairs, firsts = Counter(pairwise(held_out)), Counter(held_out[:-1])
    return math.exp(-sum(n * math.log(n / firsts[a]) for (a, _), n in pairs.items()) / sum(pairs.values()))


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, generator = tmp_path_factory.mktemp("texts"), random.Random(0)
    (folder / "train.txt").write_text("".join(line(generator) for _ in range(600)))
    (folder / "held.txt").write_text("".join(line(generator) for _ in range(40)))
    return folder


def options(texts: Path, folder: Path, **changes: Any) -> PretrainOptions:
    common: dict[str, Any] = {
        "data": (str(texts / "train.txt"),),
        "eval_data": (str(texts / "held.txt"),),
        "output_dir": str(folder),
        "cache_dir": str(texts.parent / "cache"),
        "tokenizer": "char",
        "vocab_size": 300,
        "hidden_size": 32,
        "num_layers": 2,
        "context_length": 48,
        "batch_size": 8,
        "max_steps": 4,
        "eval_every": 0,
        "dtype": "float32",
    }
    made = PretrainOptions(**(common | changes))
    made.validate()
    return made


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines() if '"eval/' not in text]


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [("decoder", {"max_steps": 140, "learning_rate": 1e-2}), ("lstm", {"max_steps": 60, "learning_rate": 1e-2})],
)
def test_it_learns_more_than_pairs_of_letters(
    architecture: str, changes: dict[str, Any], texts: Path, tmp_path: Path
) -> None:
    bound = bigram_perplexity((texts / "held.txt").read_text())
    summary = pretrain(options(texts, tmp_path / "run", architecture=architecture, eval_every=20, **changes))
    found = summary["evaluation"]
    assert bound > 3
    assert found["perplexity"] < 0.6 * bound
    held = (texts / "held.txt").read_bytes()
    tokens = len(held) + 1  # one token per letter, and the end of the text
    assert found["nats_per_byte"] == pytest.approx(found["eval_loss"] * tokens / len(held))
    assert found["bits_per_byte"] == pytest.approx(found["nats_per_byte"] / math.log(2))
    assert (tmp_path / "run/checkpoints/best").is_dir()


def test_the_decoders_folder_loads_in_transformers(texts: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for kind in ("bpe", "word", "char"):
        summary = pretrain(options(texts, tmp_path / kind, tokenizer=kind))
        theirs = AutoModelForCausalLM.from_pretrained(summary["model"])
        tokenizer = AutoTokenizer.from_pretrained(summary["model"])
        ours = load_model(summary["model"])
        ids = tokenizer("abcde\n", return_tensors="pt")["input_ids"]
        from upslope.models.attention.context import PackedContext

        with torch.no_grad():
            logits = ours.logits(ours(ids[0], PackedContext([ids.shape[1]])))
            torch.testing.assert_close(theirs(ids).logits[0], logits, rtol=1e-4, atol=1e-5)
        assert theirs.config.eos_token_id == theirs.generation_config.eos_token_id == tokenizer.eos_token_id == 0
        assert theirs.config.max_position_embeddings == 48


def test_an_lstms_folder_goes_on_in_sft(texts: Path, tmp_path: Path) -> None:
    summary = pretrain(options(texts, tmp_path / "run", architecture="lstm"))
    assert isinstance(load_model(summary["model"]), LSTM)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "ab", "completion": "cde"}\n' * 8)
    sft(
        SFTOptions(
            model=summary["model"],
            data=str(tmp_path / "rows.jsonl"),
            output_dir=str(tmp_path / "sft"),
            max_steps=30,
            learning_rate=2e-2,
            batch_size=4,
            eval_every=0,
        )
    )
    assert metrics_of(tmp_path / "sft")[-1]["loss"] < 0.7 < 3 < metrics_of(tmp_path / "sft")[0]["loss"]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_weights(folder / "checkpoints/last/model", torch.float32)


VARIANTS: dict[str, dict[str, Any]] = {
    "decoder": {"dtype": "bfloat16"},
    "lstm": {"architecture": "lstm", "label_smoothing": 0.1},
    "encoder": {"architecture": "encoder"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_repeats_and_resumes_bit_for_bit(variant: str, texts: Path, tmp_path: Path) -> None:
    changes = {**VARIANTS[variant], "max_steps": 6, "lr_scheduler_type": "constant"}
    for name in ("a", "b"):
        pretrain(options(texts, tmp_path / name, **changes))
    pretrain(options(texts, tmp_path / "c", **{**changes, "max_steps": 3}))
    summary = pretrain(options(texts, tmp_path / "c", **changes, resume=True))
    assert summary["steps"] == 6
    first = weights_of(tmp_path / "a")
    for name in ("b", "c"):
        assert all(torch.equal(w, weights_of(tmp_path / name)[n]) for n, w in first.items())
    losses = [[m["loss"] for m in metrics_of(tmp_path / name)] for name in "abc"]
    assert losses[0] == losses[1] == losses[2]
    pretrain(options(texts, tmp_path / "d", **changes, seed=1))
    assert not torch.equal(*(weights_of(tmp_path / n)[next(iter(first))] for n in "ad"))


def test_the_gradient_does_not_depend_on_the_token_budget(texts: Path, tmp_path: Path) -> None:
    for variant, changes in VARIANTS.items():
        for name, budget in (("small", 50), ("large", 4096)):
            given_ = {**changes, "dtype": "float32", "max_steps": 3, "micro_batch_tokens": budget}
            pretrain(options(texts, tmp_path / variant / name, **given_))
        small, large = (weights_of(tmp_path / variant / n) for n in ("small", "large"))
        for name, w in small.items():
            torch.testing.assert_close(w, large[name], rtol=1e-4, atol=1e-5, msg=f"{variant} {name}")


def test_label_smoothing_is_the_loss_and_not_the_measure(texts: Path, tmp_path: Path) -> None:
    pretrain(options(texts, tmp_path / "run", label_smoothing=0.2, max_steps=1, learning_rate=0.0))
    plain = pretrain(options(texts, tmp_path / "plain", max_steps=1, learning_rate=0.0))
    (smoothed,), (other,) = metrics_of(tmp_path / "run"), metrics_of(tmp_path / "plain")
    assert smoothed["loss/nll"] == pytest.approx(other["loss"], rel=1e-5)
    assert smoothed["loss"] != pytest.approx(other["loss"], rel=1e-5)
    again = pretrain(options(texts, tmp_path / "c", label_smoothing=0.2, max_steps=1, learning_rate=0.0))
    assert again["evaluation"] == plain["evaluation"]


def test_stride_changes_the_context_and_not_what_is_scored(texts: Path, tmp_path: Path) -> None:
    found = {
        stride: pretrain(options(texts, tmp_path / str(stride), max_steps=0, eval_stride=stride))["evaluation"]
        for stride in (4, 47)
    }
    assert found[4]["perplexity"] != found[47]["perplexity"]
    assert found[4]["perplexity"] == pytest.approx(found[47]["perplexity"], rel=0.05)


def test_the_last_tenth_is_held_out_without_eval_data(texts: Path, tmp_path: Path) -> None:
    summary = pretrain(options(texts, tmp_path / "run", eval_data=(), eval_samples=3, num_epochs=0.1))
    windows = math.ceil((600 * 16 * 0.9) / 47)
    assert summary["steps"] == pytest.approx(0.1 * windows / 8, abs=1)
    assert summary["evaluation"]["perplexity"] > 1


def test_pretraining_continues_from_a_folder(texts: Path, tmp_path: Path) -> None:
    base = pretrain(options(texts, tmp_path / "one", max_steps=60, learning_rate=1e-2))
    plain = dict.fromkeys(("tokenizer", "vocab_size", "hidden_size", "num_layers"))
    more = pretrain(options(texts, tmp_path / "two", model=base["model"], max_steps=20, **plain))
    assert more["evaluation"]["perplexity"] < base["evaluation"]["perplexity"]
    adapters = pretrain(options(texts, tmp_path / "three", model=base["model"], lora_rank=2, max_steps=2, **plain))
    assert (Path(adapters["model"]) / "adapter_model.safetensors").is_file()


def test_a_folders_tokenizer_is_taken(texts: Path, tmp_path: Path) -> None:
    train_tokenizer(["abcde\n"], "bpe", 270).save_pretrained(str(tmp_path / "tok"))
    summary = pretrain(options(texts, tmp_path / "run", tokenizer=str(tmp_path / "tok"), vocab_size=None))
    assert (Path(summary["model"]) / "tokenizer.json").read_text() == (tmp_path / "tok/tokenizer.json").read_text()


def test_unknown_words_are_reported(texts: Path, tmp_path: Path) -> None:
    summary = pretrain(options(texts, tmp_path / "run", tokenizer="word", vocab_size=6))
    assert 0.3 < summary["evaluation"]["unknown_share"] < 0.6


def test_the_masked_objective_learns_and_its_folder_loads(texts: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    summary = pretrain(
        options(
            texts,
            tmp_path / "run",
            architecture="encoder",
            max_steps=240,
            learning_rate=5e-3,
            context_length=18,
            batch_size=16,
            mask_probability=0.1,
        )
    )
    found = summary["evaluation"]
    assert found["masked_accuracy"] > 0.75
    assert found["masked_perplexity"] == pytest.approx(math.exp(found["eval_loss"]))
    network, tokenizer = (kind.from_pretrained(summary["model"]) for kind in (AutoModelForMaskedLM, AutoTokenizer))
    text = line(random.Random(9))
    with torch.no_grad():
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        target = int(ids[0, 8])
        ids[0, 8] = tokenizer.mask_token_id
        assert int(network(ids).logits[0, 8].argmax()) == target


@given(st.lists(st.integers(0, 30), min_size=1, max_size=60), st.integers(0, 1000))
def test_masking_leaves_special_tokens_alone(tokens: list[int], counter: int) -> None:
    masking = Masking(0.15, mask_id=4, words=range(5, 31), keep=frozenset(range(5)), seed=3)
    changed, places = masking.apply(tokens, counter)
    assert (changed, places) == masking.apply(tokens, counter)
    assert places == sorted(set(places))
    assert bool(places) == any(t >= 5 for t in tokens)
    assert all(tokens[t] >= 5 for t in places)
    for t, (old, new) in enumerate(zip(tokens, changed, strict=True)):
        assert old == new or t in places
        assert new == old or new == 4 or new >= 5


def test_masking_has_its_shares() -> None:
    masking = Masking(0.15, mask_id=4, words=range(5, 1005), keep=frozenset(range(5)), seed=3)
    tokens = [7] * 1000
    chosen = masked = same = 0
    for counter in range(200):
        changed, places = masking.apply(tokens, counter)
        chosen += len(places)
        masked += sum(changed[t] == 4 for t in places)
        same += sum(changed[t] == 7 for t in places)
    assert chosen / 200_000 == pytest.approx(0.15, abs=0.004)
    assert masked / chosen == pytest.approx(0.8, abs=0.01)
    assert same / chosen == pytest.approx(0.1, abs=0.01)
    assert masking.apply(tokens, 1) != masking.apply(tokens, 2)
    assert masking.apply(tokens, 1) != replace(masking, seed=4).apply(tokens, 1)


FOLLOWED = {"model": "{decoder}"} | dict.fromkeys(("tokenizer", "vocab_size", "hidden_size", "num_layers"))
"""A model of its own brings its tokenizer and its sizes along."""
BAD: dict[str, tuple[dict[str, Any], type[UpslopeError], str]] = {
    "no data": ({"data": ()}, ConfigError, "data is missing"),
    "absent data": ({"data": ("{tmp}/absent.txt",)}, DataError, r"absent\.txt: no such file"),
    "encoder and causal": ({"architecture": "encoder", "objective": "causal"}, ConfigError, "masked"),
    "decoder and masked": ({"objective": "masked"}, ConfigError, "does not fit architecture decoder"),
    "lstm and heads": ({"architecture": "lstm", "num_heads": 4}, ConfigError, "num_heads is 4, but an LSTM has none"),
    "odd heads": ({"num_heads": 3}, ConfigError, "no multiple"),
    "odd width per head": ({"num_heads": 32}, ConfigError, "even"),
    "adapters on nothing": ({"lora_rank": 4}, ConfigError, "lora_rank"),
    "small vocabulary": ({"vocab_size": 100}, ConfigError, "at least 257"),
    "unknown tokenizer": ({"tokenizer": "bpee", "vocab_size": None}, ConfigError, "'bpee'"),
    "sizes of a model that has its own": ({"model": "{tmp}"}, ConfigError, "belongs to model = scratch, not "),
    "masked from a decoder": (FOLLOWED | {"objective": "masked"}, ConfigError, "is no encoder"),
    "mask share of a decoder": ({"objective": "causal", "mask_probability": 0.2}, ConfigError, "mask_probability"),
    "stride": ({"eval_stride": 48}, ConfigError, "eval_stride"),
    "held-out text trained on": ({"eval_data": ("{data}",)}, DataError, "both in data and in eval_data"),
    "nothing to hold out": ({"data": ("{tmp}/one.txt",), "eval_data": ()}, DataError, "too short"),
    "bad line": ({"data": ("{tmp}/bad.jsonl",)}, DataError, r"bad\.jsonl:2: invalid JSON"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_clear_line(name: str, texts: Path, tmp_path: Path) -> None:
    change, error, said = BAD[name]
    (tmp_path / "one.txt").write_text("abc")
    if "decoder" in str(change):
        tiny_folder(tmp_path / "decoder")
    (tmp_path / "bad.jsonl").write_text('{"text": "x"}\n{"text": ')

    def filled(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(filled, value))
        places = {"{tmp}": str(tmp_path), "{data}": str(texts / "train.txt"), "{decoder}": str(tmp_path / "decoder")}
        for mark, path in places.items():
            value = value.replace(mark, path) if isinstance(value, str) else value
        return value

    with pytest.raises(error, match=said) as caught:
        pretrain(options(texts, tmp_path / "run", **{key: filled(value) for key, value in change.items()}))
    assert "\n" not in str(caught.value)


def test_a_changed_text_cannot_be_resumed(texts: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.txt"
    own.write_text((texts / "train.txt").read_text())
    pretrain(options(texts, tmp_path / "run", data=(str(own),)))
    own.write_text((texts / "train.txt").read_text() + "abcde\n")
    with pytest.raises(RunError, match=r"own\.txt \(--data\) has changed since .*step-00000004"):
        pretrain(options(texts, tmp_path / "run", data=(str(own),), resume=True, max_steps=8))


@pytest.mark.parametrize("architecture", ["decoder", "lstm", "encoder"])
def test_the_command_and_its_dry_run(architecture: str, texts: Path, tmp_path: Path, capsys: Any) -> None:
    words = ["pretrain", "--data", str(texts / "train.txt"), "--tokenizer", "char", "--vocab-size", "300"]
    words += ["--architecture", architecture, "--hidden-size", "32", "--context-length", "32", "--eval-samples", "4"]
    words += ["--output-dir", str(tmp_path / "run"), "--cache-dir", str(tmp_path / "cache"), "--max-steps", "2"]
    assert main([*words, "--dry-run", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["prediction"]["step_seconds"] > 0
    assert not (tmp_path / "run").exists()
    assert main([*words, "--dry-run"]) == 0
    assert "windows" in capsys.readouterr().out
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 2


def test_gpt2_through_the_adapter_trains_saves_and_reloads(texts: Path, tmp_path: Path) -> None:
    """A tiny GPT-2 folder: sft and pretraining, then plain transformers gives the same logits."""
    from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

    from upslope.models.attention.context import PackedContext
    from upslope.models.transformers_model import TransformersModel

    torch.manual_seed(0)
    tokenizer = train_tokenizer([(texts / "train.txt").read_text()], "char", 300)
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=2, n_positions=64)
    config.bos_token_id = config.eos_token_id = 0
    GPT2LMHeadModel(config).save_pretrained(str(tmp_path / "gpt2"))
    tokenizer.save_pretrained(str(tmp_path / "gpt2"))
    assert isinstance(load_model(tmp_path / "gpt2"), TransformersModel)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "ab", "completion": "cde"}\n' * 8)
    tuned = sft(
        SFTOptions(
            model=str(tmp_path / "gpt2"),
            data=str(tmp_path / "rows.jsonl"),
            output_dir=str(tmp_path / "sft"),
            max_steps=25,
            learning_rate=1e-2,
            batch_size=4,
            eval_every=0,
            dtype="float32",
        )
    )
    assert metrics_of(tmp_path / "sft")[-1]["loss"] < 0.7 < 3 < metrics_of(tmp_path / "sft")[0]["loss"]
    plain = dict.fromkeys(("tokenizer", "vocab_size", "hidden_size", "num_layers"))
    more = pretrain(options(texts, tmp_path / "more", model=tuned["model"], max_steps=40, learning_rate=1e-2, **plain))
    assert more["evaluation"]["perplexity"] < 8
    ids = torch.tensor(tokenizer("abcdeabcd")["input_ids"])
    for folder in (tuned["model"], more["model"]):
        theirs, ours = AutoModelForCausalLM.from_pretrained(folder).eval(), load_model(folder)
        with torch.no_grad():
            logits = ours.logits(ours(ids, PackedContext([len(ids)])))
            torch.testing.assert_close(theirs(ids[None]).logits[0], logits, rtol=1e-4, atol=1e-5)
    assert not np.array_equal(*(weights_of(tmp_path / n)["transformer.wte.weight"] for n in ("sft", "more")))

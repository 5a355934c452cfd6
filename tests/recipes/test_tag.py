"""upslope tag: sub-word alignment, sentences split and joined, learning, reports, repeat and resume, bad input."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from encoder_kit import bert_tokenizer, encoder_folder, roberta_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from upslope.cli import main
from upslope.data.labels import TaggedSentence, read_conll
from upslope.errors import DataError
from upslope.models.encoder.items import item_logits, padded_batch, pieces_of
from upslope.options import TagOptions
from upslope.recipes.tag import make_learner, tag

OBJECTIVES = ("cross_entropy", "policy_gradient", "policy_gradient_sampled")
NAMES = {"ann": "PER", "bob": "PER", "oslo": "LOC", "rome": "LOC"}


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return encoder_folder(tmp_path_factory.mktemp("bert") / "m")


def sentences() -> list[list[tuple[str, str]]]:
    """Names of one or two words between other words."""
    made = []
    for first, second, third in itertools.product(["we", "the film"], NAMES, ["visit", "saw and"]):
        for double in (False, True):
            name = [(first, "O")] if " " not in first else [(w, "O") for w in first.split()]
            kind = NAMES[second]
            name += [(second, f"B-{kind}")] + ([(second, f"I-{kind}")] if double else [])
            made.append(name + [(w, "O") for w in third.split()])
    return made


def conll(path: Path, rows: list[list[tuple[str, str]]], between: str = " x ") -> Path:
    path.write_text("\n\n".join("\n".join(f"{w}{between}{t}" for w, t in row) for row in rows) + "\n")
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return conll(tmp_path_factory.mktemp("data") / "train.conll", sentences())


def options(model: Path, rows: Path, **more: Any) -> TagOptions:
    shared: dict[str, Any] = {
        **{"model": str(model), "data": str(rows), "dtype": "float32", "batch_size": 8, "max_length": 32},
        **{"eval_share": 0.25, "lr_scheduler_type": "constant", "learning_rate": 2e-3, "eval_every": 0},
    }
    return TagOptions(**{**shared, **more})


# Tokens and tags

LABELS = ("B-PER", "I-PER", "O")


def test_the_first_sub_word_carries_the_tag() -> None:
    tokenizer = bert_tokenizer()
    row = TaggedSentence(("the", "bob", "saw"), ("O", "B-PER", "O"))
    [[x]] = pieces_of([row], tokenizer, LABELS, 32)
    assert tokenizer.convert_ids_to_tokens(x.tokens) == ["[CLS]", "the", "b", "##o", "##b", "saw", "[SEP]"]
    assert x.places == [1, 2, 5]
    assert x.targets == [2, 0, 2]


def test_a_byte_level_word_has_its_space_only_when_the_tokenizer_is_told_to(tmp_path: Path) -> None:
    folder = encoder_folder(tmp_path / "m", "roberta")
    path = conll(tmp_path / "d.conll", sentences())
    learner = make_learner(options(folder, path))
    read = learner.data
    assert learner.tokenizer.add_prefix_space is True
    space = roberta_tokenizer().convert_tokens_to_ids("Ġ")
    assert all(x.tokens[place] == space for pieces in read.train for x in pieces for place in x.places)


words = st.lists(st.text("abz", min_size=1, max_size=8), min_size=1, max_size=15)


@settings(max_examples=60)
@given(words, st.integers(4, 12), st.data())
def test_pieces_hold_every_word_once_in_order_and_fit(sentence: list[str], longest: int, draw: Any) -> None:
    tags = draw.draw(st.lists(st.sampled_from(LABELS), min_size=len(sentence), max_size=len(sentence)))
    tokenizer = bert_tokenizer()
    [pieces] = pieces_of([TaggedSentence(tuple(sentence), tuple(tags))], tokenizer, LABELS, longest)
    assert [t for x in pieces for t in x.targets] == [LABELS.index(t) for t in tags]
    assert [x.first for x in pieces] == [0, *itertools.accumulate(len(x.targets) for x in pieces)][:-1]
    said = [tokenizer.convert_ids_to_tokens(x.tokens[p]) for x in pieces for p in x.places]
    assert said == [word[0] for word in sentence]
    assert all(len(x.tokens) <= longest and len(x.places) == len(x.targets) for x in pieces)
    one = [[x] for x in pieces]
    assert len(one) == 1 or max(len(x.tokens) for x in pieces) > longest - 8


def test_a_word_without_tokens_becomes_the_unknown_token() -> None:
    tokenizer = bert_tokenizer()
    [[x]] = pieces_of([TaggedSentence(("the", "\x07", "saw"), ("O", "O", "O"))], tokenizer, LABELS, 32)
    assert tokenizer.convert_ids_to_tokens(x.tokens)[2] == "[UNK]"
    assert len(x.places) == 3


# Training


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_it_learns_names(objective: str, bert: Path, tmp_path: Path) -> None:
    rows = [
        [(a, "O"), (name, f"B-{NAMES[name]}"), (b, "O")]
        for a, name, b in itertools.product(["we", "saw", "and", "the"], NAMES, ["visit", "film", "was", "in"])
    ]
    data = conll(tmp_path / "names.conll", rows)
    o = options(bert, data, objective=objective, max_steps=100, num_samples=8, output_dir=str(tmp_path / "run"))
    summary = tag(o)
    assert summary["dev"]["f1"] >= 0.9
    report = json.loads((tmp_path / "run/report.json").read_text())["dev"]
    assert set(report["entities"]["labels"]) <= {"PER", "LOC"}
    assert report["tokens"]["title"] == "token level, includes O"
    assert set(report["tokens"]["labels"]) == {"B-LOC", "B-PER", "O"}
    text = (tmp_path / "run/report.txt").read_text()
    assert "entity level, strict IOB2" in text
    assert "token level, includes O" in text


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_loss_is_a_mean_over_the_words_of_the_step_however_it_is_split(
    objective: str, bert: Path, data: Path
) -> None:
    found = []
    for budget in (16, 4096):
        learner = make_learner(options(bert, data, objective=objective, micro_batch_tokens=budget))
        read = learner.data
        rows = [read.train[learner.order.at(i)] for i in range(8)]
        found.append((learner.step(0).metrics, rows, read))
    (split, rows, _), (whole, _, _) = found
    assert split["num_items"] == whole["num_items"] == sum(len(x.targets) for row in rows for x in row)
    assert split["loss"] == pytest.approx(whole["loss"], rel=1e-5, abs=1e-6)
    assert split["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-5)
    if objective == "cross_entropy":
        learner = make_learner(options(bert, data))
        with torch.no_grad():
            batch = padded_batch([x for row in rows for x in row], learner.encoder, 0)
            expected = torch.nn.functional.cross_entropy(item_logits(learner.encoder, batch), batch.targets_N)
        assert whole["loss"] == pytest.approx(float(expected), rel=1e-5)


def test_split_sentences_are_measured_whole(
    bert: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    o = options(bert, data, max_length=8, max_steps=2, output_dir=str(tmp_path / "run"))
    summary = tag(o)
    assert summary["data"]["split"]["train"] > 0
    assert "sentences split at max_length 8" in capsys.readouterr().err
    held = {"train": 24, "dev": 8, "test": 0}
    assert summary["data"]["rows"] == held
    words_in_all = sum(len(s.words) for s in read_conll(data))
    assert sum(summary["data"]["words"].values()) == words_in_all
    assert summary["dev"]["token_accuracy"]["n"] == summary["data"]["words"]["dev"]


def files(folder: Path) -> dict[str, Any]:
    last = (folder / "checkpoints/last").resolve()
    tensors = {
        f"{path.relative_to(last)}:{name}": tensor
        for path in sorted(last.rglob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }
    lines = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines() if '"eval/' not in x]
    return {"tensors": tensors, "metrics": [{k: v for k, v in line.items() if k != "time"} for line in lines]}


def test_runs_repeat_and_resume_bit_for_bit(bert: Path, data: Path, tmp_path: Path) -> None:
    def go(name: str, steps: int, resume: bool = False) -> dict[str, Any]:
        folder = tmp_path / name
        more: dict[str, Any] = {"lora_rank": 2, "objective": "policy_gradient_sampled", "eval_every": 2}
        tag(options(bert, data, max_steps=steps, resume=resume, output_dir=str(folder), **more))
        return files(folder)

    expected = go("whole", 4)
    go("parts", 2)
    for found in (go("again", 4), go("parts", 4, resume=True)):
        assert found["metrics"] == expected["metrics"]
        assert found["tensors"].keys() == expected["tensors"].keys()
        assert all(torch.equal(found["tensors"][n], t) for n, t in expected["tensors"].items())


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "xlnet"])
def test_every_family_trains_and_says_the_same_in_transformers(family: str, data: Path, tmp_path: Path) -> None:
    folder = encoder_folder(tmp_path / "m", family)
    summary = tag(options(folder, data, eval_data=str(data), max_steps=3, output_dir=str(tmp_path / "run")))
    plain = transformers.AutoModelForTokenClassification.from_pretrained(summary["best_model"]).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(summary["best_model"])
    right = total = 0
    for row in read_conll(data):
        batch = tokenizer(list(row.words), is_split_into_words=True, return_tensors="pt")
        ids = batch.word_ids()
        inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
        classes = plain(**inputs).logits[0].argmax(-1)
        for word, label in enumerate(row.tags):
            right += plain.config.id2label[int(classes[ids.index(word)])] == label
            total += 1
    assert summary["dev"]["token_accuracy"] == pytest.approx(
        {**summary["dev"]["token_accuracy"], "value": right / total, "n": total}
    )


def test_other_tags_are_measured_per_token(bert: Path, tmp_path: Path) -> None:
    rows = [[("we", "PRON"), ("saw", "VERB"), ("the", "DET"), ("film", "NOUN")], [("the", "DET"), ("visit", "NOUN")]]
    path = conll(tmp_path / "pos.conll", rows, "\t")
    folder = tmp_path / "run"
    o = options(bert, path, tag_scheme="none", eval_data=str(path), max_steps=40, output_dir=str(folder), target=1.0)
    summary = tag(o)
    assert summary["dev"]["token_accuracy"]["value"] == 1.0
    assert "f1" not in summary["dev"]
    assert "entities" not in json.loads((folder / "report.json").read_text())["dev"]


def test_the_command_end_to_end(bert: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["tag", "--model", str(bert), "--data", str(data), "--test-data", str(data), "--max-steps", "2"]
    words += ["--max-length", "32"]
    assert main([*words, "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["data"]["labels"] == 5
    assert main([*words, "--dry-run"]) == 0
    assert "⟦" in capsys.readouterr().out
    assert main([*words, "--json", "--output-dir", str(tmp_path / "run")]) == 0
    captured = capsys.readouterr()
    assert set(json.loads(captured.out)["test"]) == {"f1", "precision", "recall", "token_accuracy", "eval_loss"}
    assert "sentences that also stand in the training data: 29 of test" in captured.err
    bad = tmp_path / "bad.conll"
    bad.write_text("we O\nsaw the O\n")
    assert main(["tag", "--model", str(bert), "--data", str(bad)]) == 3
    said = capsys.readouterr().err.strip().splitlines()
    assert said == [f"upslope: error: {bad}:2: 3 columns, line 1 has 2; every word needs the same columns"]


def test_bad_data_ends_in_one_line(bert: Path, data: Path, tmp_path: Path) -> None:
    other = conll(tmp_path / "other.conll", [[("we", "O"), ("ann", "B-PERS")]])
    with pytest.raises(DataError, match=r"other.conll:1: label 'B-PERS' does not occur .*did you mean 'B-PER'"):
        tag(options(bert, data, test_data=str(other)))
    plain = conll(tmp_path / "plain.conll", [[("we", "O")], [("saw", "O")]])
    with pytest.raises(DataError, match="all 2 rows carry the label 'O'"):
        tag(options(bert, plain))

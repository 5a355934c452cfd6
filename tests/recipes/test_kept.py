"""Every row that is not used is counted by reason: in the log, in --dry-run, in summary.json, whatever the recipe."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from encoder_kit import encoder_folder
from preference_kit import labelled_rows, pair_rows, step_rows, write

from upslope.commands.train import run as run_verb
from upslope.errors import ConfigError, DataError
from upslope.options import (
    ClassifyOptions,
    DistillOptions,
    DPOOptions,
    ExpertOptions,
    PretrainOptions,
    RewardOptions,
    SFTOptions,
    TagOptions,
)
from upslope.options.supervised import Seq2SeqOptions
from upslope.recipes import classify, distill, dpo, expert, pretrain, reward, seq2seq, sft, tag

LONG = "a" * 300
QUICK: dict[str, Any] = {"max_steps": 1, "eval_every": 0, "eval_samples": 3, "batch_size": 2}
TASK = """
from upslope.tasks.base import Task, chat_prompt, select_prompts
from upslope.types import Reward


class Letter(Task):
    name = "letter"

    def prompts(self, split, n, *, seed):
        return select_prompts((chat_prompt(f"Say {i}", answer="a") for i in range(50)), split, n, name=self.name)

    def rewards(self, prompts, completions):
        return [Reward(1.0, correct=True) for _ in completions]
"""


def chats(count: int) -> list[dict[str, Any]]:
    return [
        {"messages": [{"role": "user", "content": f"Say {i}"}, {"role": "assistant", "content": "a"}]}
        for i in range(count)
    ]


def long_chats(count: int) -> list[dict[str, Any]]:
    return [{"messages": [{"role": "user", "content": LONG}, {"role": "assistant", "content": "a"}]}] * count


def told(
    run: Callable[[Any], int], learn: Callable[[Any], dict[str, Any]], options: Any, capsys: pytest.CaptureFixture[str]
) -> tuple[dict[str, Any], list[str]]:
    """summary.json's data, which --dry-run --json says too, and the lines of the log, which --dry-run shows too."""
    facts = json.loads((Path(learn(options)["folder"]) / "summary.json").read_text())["data"]
    said = capsys.readouterr().err
    lines = [line.removeprefix("upslope: ") for line in said.splitlines() if line.startswith("upslope: kept ")]
    assert run(replace(options, dry_run=True, json=True)) == 0
    assert json.loads(capsys.readouterr().out)["data"] == facts
    assert run(replace(options, dry_run=True)) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for line in lines:
        assert line in shown
    return facts, lines


def test_sft(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write(tmp_path / "chats.jsonl", [*chats(60), *long_chats(4)])
    o = SFTOptions(model=str(tiny), data=data, max_length=100, output_dir=str(tmp_path / "run"), **QUICK)
    facts, lines = told(run_verb, sft.sft, o, capsys)
    assert facts == {
        "rows": {"train": 54, "eval": 3},
        "dropped": {"train": {"longer than max_length": 4}, "eval": {"beyond eval_samples": 3}},
    }
    tokens = len("user\n" + LONG + "\nassistant\na\n") + 4  # a token per byte, and the template's four marks
    assert lines == [
        f"kept 60 of 64 rows of {data}: 4 longer than max_length (100; the longest has {tokens} tokens)",
        f"kept 3 of 6 rows of {data}, held out: 3 beyond eval_samples",
    ]


def test_sft_with_held_out_rows_of_their_own(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write(tmp_path / "train.jsonl", chats(12))
    held_out = write(tmp_path / "dev.jsonl", [*long_chats(2), *chats(4)])
    o = SFTOptions(
        model=str(tiny), data=data, eval_data=held_out, max_length=100, output_dir=str(tmp_path / "run"), **QUICK
    )
    facts, lines = told(run_verb, sft.sft, o, capsys)
    assert facts["rows"] == {"train": 12, "eval": 3}
    assert facts["dropped"] == {"train": {}, "eval": {"longer than max_length": 2, "beyond eval_samples": 1}}
    assert [line.split(":")[0] for line in lines] == [f"kept 3 of 6 rows of {held_out}"]


def test_a_row_beyond_the_context_is_too_long(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    context = json.loads((tiny / "config.json").read_text())["max_position_embeddings"]
    beyond = [{"messages": [{"role": "user", "content": "a" * context}, {"role": "assistant", "content": "a"}]}]
    data = write(tmp_path / "chats.jsonl", [*chats(20), *beyond])
    o = SFTOptions(model=str(tiny), data=data, max_length=9 * context, output_dir=str(tmp_path / "run"), **QUICK)
    facts, lines = told(run_verb, sft.sft, o, capsys)
    assert facts["dropped"]["train"] == {"longer than the model's context": 1}
    assert f"1 longer than the model's context ({context:,}; the longest has" in lines[0]
    o = replace(o, data=write(tmp_path / "none.jsonl", beyond), output_dir=None)
    with pytest.raises(DataError, match=rf"fits max_length {context:,} \(the model's context\): the shortest has"):
        sft.sft(o)


@pytest.mark.parametrize("templated", [True, False])
def test_texts_are_said_to_stay_plain(
    templated: bool, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of pairs of texts, with dpo too, and only where the model has a chat template; never of messages."""
    model = tmp_path / "model"
    shutil.copytree(tiny, model)
    if not templated:
        (model / "chat_template.jinja").unlink()
    rows = [{"prompt": f"Say {i}", "completion": "a", "chosen": "a", "rejected": "b"} for i in range(20)]
    texts = [{key: row[key] for key in ("prompt", "completion")} for row in rows]
    sides = [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in rows]
    o: dict[str, Any] = {"model": str(model), "dry_run": True, **QUICK}
    said = f"{tmp_path / 'rows.jsonl'}: read as plain text, without the chat template; give messages for a chat\n"
    for run, kind, given in (
        (run_verb, SFTOptions, texts),
        (run_verb, DPOOptions, sides),
        (run_verb, RewardOptions, sides),
    ):
        assert run(kind(data=write(tmp_path / "rows.jsonl", given), **o)) == 0
        assert capsys.readouterr().err.count(said) == templated
    if templated:
        assert run_verb(SFTOptions(data=write(tmp_path / "rows.jsonl", chats(20)), **o)) == 0
        assert "plain text" not in capsys.readouterr().err


def test_nothing_left(tiny: Path, tmp_path: Path) -> None:
    """One line that names the file."""
    data = write(tmp_path / "chats.jsonl", long_chats(3))
    o = SFTOptions(model=str(tiny), data=data, max_length=100, output_dir=str(tmp_path / "run"), **QUICK)
    with pytest.raises(DataError, match=r"chats.jsonl:1: none of 3 records fits max_length 100: the shortest has \d+ "):
        sft.sft(o)
    rows = [{**row, "chosen": LONG} for row in pair_rows(3)]
    preferences = write(tmp_path / "pairs.jsonl", rows)
    with pytest.raises(DataError, match=r"pairs.jsonl:1: none of 3 records fits max_length 100"):
        dpo.dpo(DPOOptions(model=str(tiny), data=preferences, max_length=100, output_dir=str(tmp_path / "d"), **QUICK))
    with pytest.raises((DataError, ConfigError), match=r"chats.jsonl: none of its 3 rows is left: 3 longer than"):
        distill.distill(distillation(tiny, data, tmp_path))


@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_dpo(loss: Any, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = pair_rows(20) if loss == "dpo" else labelled_rows(20)
    long = {"chosen": LONG, "rejected": "b"} if loss == "dpo" else {"completion": LONG, "label": True}
    data = write(tmp_path / "pairs.jsonl", [*rows, {**rows[0], **long}])
    o = DPOOptions(model=str(tiny), data=data, loss=loss, max_length=100, output_dir=str(tmp_path / "run"), **QUICK)
    facts, lines = told(run_verb, dpo.dpo, o, capsys)
    assert facts == {"rows": {"train": 18, "eval": 2}, "dropped": {"train": {"longer than max_length": 1}, "eval": {}}}
    assert [line.split(" (")[0] for line in lines] == [f"kept 20 of 21 rows of {data}: 1 longer than max_length"]


@pytest.mark.parametrize("kind", ["outcome", "process"])
def test_reward(kind: Any, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = pair_rows(20) if kind == "outcome" else step_rows(20)
    long = {"rejected": LONG} if kind == "outcome" else {"steps": [LONG], "labels": [1]}
    data = write(tmp_path / "rows.jsonl", [{**rows[0], **long}, *rows, {**rows[1], **long}])
    o = RewardOptions(model=str(tiny), data=data, kind=kind, max_length=100, output_dir=str(tmp_path / "run"), **QUICK)
    facts, lines = told(run_verb, reward.reward, o, capsys)
    assert facts == {"rows": {"train": 18, "eval": 2}, "dropped": {"train": {"longer than max_length": 2}, "eval": {}}}
    assert [line.split(" (")[0] for line in lines] == [f"kept 20 of 22 rows of {data}: 2 longer than max_length"]


def distillation(tiny: Path, data: str, tmp_path: Path) -> DistillOptions:
    return DistillOptions(
        model=str(tiny),
        teacher=str(tiny),
        data=data,
        max_length=100,
        num_prompts=2,
        num_generations=1,
        max_completion_length=4,
        max_steps=1,
        eval_every=0,
        eval_samples=3,
        output_dir=str(tmp_path / "run"),
    )


def test_distill(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write(tmp_path / "chats.jsonl", [*chats(40), *long_chats(5)])
    facts, lines = told(run_verb, distill.distill, distillation(tiny, data, tmp_path), capsys)
    dropped = {"train": {"longer than max_length": 5}, "eval": {"beyond eval_samples": 1}}
    assert facts == {"rows": {"train": 36, "eval": 3}, "dropped": dropped}
    assert [line.split(" (")[0] for line in lines] == [
        f"kept 40 of 45 rows of {data}: 5 longer than max_length",
        f"kept 3 of 4 rows of {data}, held out: 1 beyond eval_samples",
    ]


def test_expert(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write(tmp_path / "mix.jsonl", [*chats(6), *long_chats(1)])
    (tmp_path / "letter.py").write_text(TASK)
    o = ExpertOptions(
        model=str(tiny),
        task=f"{tmp_path / 'letter.py'}:Letter",
        mix_data=data,
        mix_ratio=0.5,
        max_length=100,
        num_prompts=2,
        num_train_prompts=4,
        num_generations=2,
        max_completion_length=4,
        train_steps=1,
        truncated="terminate",
        output_dir=str(tmp_path / "run"),
        **QUICK,
    )
    facts, lines = told(run_verb, expert.expert, o, capsys)
    assert facts["rows"] == {"train": 4, "eval": 3, "mix": 6}
    assert facts["dropped"] == {"train": {}, "eval": {}, "mix": {"longer than max_length": 1}}
    assert len(lines) == 1


def test_seq2seq(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Too long pairs, pairs that stand there twice, and pairs whose source is held out."""
    pair = [{"prompt": f"a {i}", "completion": f"b {i}"} for i in range(30)]
    data = write(tmp_path / "train.jsonl", [*pair, pair[3], pair[4], {"prompt": "a " * 60, "completion": "b"}])
    held_out = write(tmp_path / "dev.jsonl", [pair[0], {"prompt": "x", "completion": "y"}, pair[1], pair[0]])
    o = Seq2SeqOptions(
        data=data,
        eval_data=held_out,
        tokenizer="char",
        hidden_size=16,
        num_layers=1,
        num_heads=2,
        max_length=40,
        max_completion_length=8,
        output_dir=str(tmp_path / "run"),
        **QUICK,
    )
    facts, lines = told(run_verb, seq2seq.seq2seq, o, capsys)
    assert facts == {
        "rows": {"train": 28, "eval": 3},
        "dropped": {
            "train": {"the same pair again": 2, "also in the held-out rows": 2, "longer than max_length": 1},
            "eval": {"the same pair again": 1},
        },
    }
    assert lines[0].startswith(f"kept 28 of 33 rows of {data}: 2 the same pair again, 2 also in the held-out rows, 1 ")


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return encoder_folder(tmp_path_factory.mktemp("encoders") / "bert")


def test_classify(bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Texts that are cut and dev rows that are not looked at; torn rows of qqp are counted by glue's reader."""
    words = ["the film was good", "the visit was bad"]
    rows = [{"text": f"{words[i % 2]} {'abc'[i % 3]}", "label": "ab"[i % 2]} for i in range(40)]
    data = write(tmp_path / "rows.jsonl", [*rows, {"text": "the film " * 30, "label": "a"}])
    dev = write(tmp_path / "dev.jsonl", rows[:6])
    o = ClassifyOptions(
        model=str(bert), data=data, eval_data=dev, max_length=20, output_dir=str(tmp_path / "run"), **QUICK
    )
    facts, lines = told(run_verb, classify.classify, o, capsys)
    assert facts["rows"] == {"train": 41, "dev": 3, "test": 0}
    assert facts["dropped"] == {"train": {}, "dev": {"beyond eval_samples": 3}, "test": {}}
    assert facts["cut"] == {"train": 1, "dev": 0, "test": 0}
    assert lines == [f"kept 3 of 6 rows of {dev}: 3 beyond eval_samples"]


def test_torn_rows(bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    head = "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n"
    whole = "".join(f"{i}\t2\t3\tthe film {i}?\tthe visit {i}?\t{i % 2}\n" for i in range(20))
    (tmp_path / "train.tsv").write_text(head + whole + "90\t2\t3\ttorn\nhalf?\tb\t0\n")
    o = ClassifyOptions(
        model=str(bert), data=f"qqp:{tmp_path / 'train.tsv'}", max_length=32, output_dir=str(tmp_path / "run"), **QUICK
    )
    facts, lines = told(run_verb, classify.classify, o, capsys)
    assert facts["dropped"]["train"] == {"torn": 2}
    assert lines[0].startswith("kept 20 of 22 rows of qqp:")
    assert "2 torn (the first is " in lines[0]


def test_tag(bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A word of more sub-words than an input holds is cut and counted."""
    lines_of = [f"the O\ncat B-X\nsaw{'' if i else 'x' * 40} O\n" for i in range(20)]
    (tmp_path / "train.conll").write_text("\n".join(lines_of))
    (tmp_path / "dev.conll").write_text("\n".join(lines_of[1:6]))
    o = TagOptions(
        model=str(bert),
        data=str(tmp_path / "train.conll"),
        eval_data=str(tmp_path / "dev.conll"),
        max_length=12,
        output_dir=str(tmp_path / "run"),
        **QUICK,
    )
    facts, lines = told(run_verb, tag.tag, o, capsys)
    assert facts["rows"] == {"train": 20, "dev": 3, "test": 0}
    assert facts["cut"] == {"train": 1, "dev": 0, "test": 0}
    assert facts["dropped"] == {"train": {}, "dev": {"beyond eval_samples": 2}, "test": {}}
    assert len(lines) == 1


@pytest.mark.parametrize("architecture", ["decoder", "encoder"])
def test_pretrain(architecture: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No text is left out: as many windows as the tokens fill."""
    (tmp_path / "book.txt").write_text("the cat saw the dog and ran away\n" * 60)
    o = PretrainOptions(
        data=(str(tmp_path / "book.txt"),),
        architecture=architecture,
        tokenizer="char",
        hidden_size=16,
        num_layers=1,
        num_heads=2,
        context_length=16,
        cache_dir=str(tmp_path / "cache"),
        output_dir=str(tmp_path / "run"),
        **QUICK,
    )
    learn = pretrain.pretrain
    facts = json.loads((Path(learn(o)["folder"]) / "summary.json").read_text())["data"]
    assert facts["dropped"] == {"train": {}, "eval": {}}
    assert facts["rows"]["train"] >= 60 * 33 * 0.9 / 16
    assert "kept" not in capsys.readouterr().err

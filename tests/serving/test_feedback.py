"""Feedback becomes rows that the product's own readers and recipes take, and what was acknowledged is never lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pydantic")

from pydantic import ValidationError
from tiny_model import tiny_folder, tiny_tokenizer

from upslope.cli import main
from upslope.data.examples import examples_of, judged_of, pairs_of
from upslope.data.records import read_records
from upslope.errors import RunError
from upslope.serving.page import Edit, Feedback, Thumb, Vote

ASKED = [{"role": "user", "content": "2 + 2?"}]
TALKED = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "An earlier reply"},
    {"role": "user", "content": "2 + 2?"},
]


@pytest.fixture
def feedback(tmp_path: Path) -> Feedback:
    return Feedback(tmp_path / "feedback")


def thumb(key: str = "n1", **given: Any) -> Thumb:
    return Thumb(
        **{"id": key, "messages": ASKED, "reply": "4", "label": True, "model": "m", "weight_version": 3, **given}
    )


def edit(key: str = "n1", **given: Any) -> Edit:
    return Edit(**{"id": key, "messages": ASKED, "original": "5", "edited": "4", "model": "m", **given})


def vote(key: str, winner: str, *, first: str = "base", second: str = "tuned", **replies: str) -> Vote:
    sides = [
        {"model": m, "reply": replies.get(side, side), "weight_version": 0}
        for side, m in zip("ab", (first, second), strict=True)
    ]
    return Vote(id=key, messages=ASKED, a=sides[0], b=sides[1], winner=winner)  # pyright: ignore


def rows(feedback: Feedback, name: str) -> list[dict[str, Any]]:
    path = feedback.folder / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def test_a_good_reply_is_an_example_and_a_label(feedback: Feedback) -> None:
    feedback.thumb(thumb(messages=TALKED))
    [example] = rows(feedback, "sft")
    assert example["messages"][-1] == {"role": "assistant", "content": "4"}
    assert example["messages"][2] == {"role": "assistant", "content": "An earlier reply", "train": False}
    [label] = rows(feedback, "labels")
    assert (label["prompt"], label["completion"], label["label"]) == (
        TALKED,
        [{"role": "assistant", "content": "4"}],
        True,
    )
    assert (label["model"], label["weight_version"], label["id"]) == ("m", 3, "n1")


def test_only_the_approved_turn_is_trained_on(feedback: Feedback) -> None:
    feedback.thumb(thumb(messages=TALKED))
    tokenizer = tiny_tokenizer()
    records = read_records(feedback.folder / "sft.jsonl")
    [example] = examples_of(records, tokenizer, max_length=None).examples
    trained = [token for token, on in zip(example.tokens, example.mask, strict=True) if on]
    assert tokenizer.decode(trained) == "4<|im_end|>"


def test_a_changed_mind_replaces_and_withdraws(feedback: Feedback) -> None:
    feedback.thumb(thumb("n1"))
    feedback.thumb(thumb("n2"))
    feedback.thumb(thumb("n1", label=False))
    assert [(row["id"], row["label"]) for row in rows(feedback, "labels")] == [("n2", True), ("n1", False)]
    assert [row["id"] for row in rows(feedback, "sft")] == ["n2"]
    feedback.thumb(thumb("n1", label=None))
    assert [row["id"] for row in rows(feedback, "labels")] == ["n2"]
    assert feedback.counts() == {"sft": 1, "preferences": 0, "labels": 1, "votes": 0}


def test_an_edit_is_preferred_to_the_original(feedback: Feedback) -> None:
    feedback.edit(edit())
    [pair] = pairs_of(read_records(feedback.folder / "preferences.jsonl"), tiny_tokenizer(), max_length=None).rows
    decode = tiny_tokenizer().decode
    assert decode(pair.chosen.tokens).endswith("assistant\n4<|im_end|>")
    assert decode(pair.rejected.tokens).endswith("assistant\n5<|im_end|>")
    assert rows(feedback, "sft")[0]["messages"][-1]["content"] == "4"


def test_an_edit_of_nothing_has_no_rejected_side(feedback: Feedback) -> None:
    feedback.edit(edit(original="  "))
    assert rows(feedback, "preferences") == []
    assert len(rows(feedback, "sft")) == 1


def test_what_readers_said_is_for_the_owner_alone(feedback: Feedback) -> None:
    """Also the file that is written anew for a changed judgement."""
    before = os.umask(0)
    try:
        feedback.thumb(thumb())
        feedback.thumb(thumb(label=False))
        feedback.edit(edit())
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in feedback.folder.iterdir()}
    assert modes.keys() >= {"labels.jsonl", "preferences.jsonl"}
    assert set(modes.values()) == {0o600}
    assert feedback.folder.stat().st_mode & 0o777 == 0o700


def test_votes_are_counted_by_model_whatever_their_side(feedback: Feedback) -> None:
    ways = (("base", "tuned"), ("tuned", "base"), ("base", "tuned"), ("base", "tuned"), ("base", "other"))
    for i, (winner, (first, second)) in enumerate(zip(("a", "a", "tie", "b", "b"), ways, strict=True)):
        feedback.vote(vote(f"v{i + 1}", winner, first=first, second=second), {"base": "runs/base"})
    assert feedback.tally() == [
        {"models": ["base", "other"], "wins": [0, 1], "ties": 0},
        {"models": ["base", "tuned"], "wins": [1, 2], "ties": 1},
    ]
    first, *others = rows(feedback, "preferences")
    assert (first["chosen"][0]["content"], first["rejected"][0]["content"], first["models"]) == (
        "a",
        "b",
        ["base", "tuned"],
    )
    assert [row["id"] for row in others] == ["v2", "v4", "v5"]
    assert rows(feedback, "votes")[0]["a"] == {"model": "base", "weight_version": 0, "source": "runs/base"}


def test_a_vote_sent_twice_counts_once(feedback: Feedback) -> None:
    feedback.vote(vote("v1", "a"), {})
    feedback.vote(vote("v1", "tie"), {})
    assert feedback.tally() == [{"models": ["base", "tuned"], "wins": [0, 0], "ties": 1}]
    assert rows(feedback, "preferences") == []


@pytest.mark.parametrize("replies", [{"a": "same", "b": "same"}, {"a": " ", "b": "x"}])
def test_a_vote_between_replies_that_teach_nothing_is_only_counted(feedback: Feedback, replies: dict[str, str]) -> None:
    feedback.vote(vote("v1", "b", **replies), {})
    assert rows(feedback, "preferences") == []
    assert feedback.tally()[0]["wins"] == [0, 1]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: thumb(reply=" \n"), "reply is empty"),
        (lambda: thumb("../../etc"), "id"),
        (lambda: thumb(messages=[]), "messages"),
        (lambda: thumb(messages=TALKED[:3]), "must end with the user's turn"),
        (lambda: thumb(messages=[{"role": "user", "content": "x", "train": True}]), "train"),
        (lambda: thumb(messages=[{"role": "oracle", "content": "x"}]), "role"),
        (lambda: thumb(label="yes"), "label"),
        (lambda: thumb(weight_version=-1), "weight_version"),
        (lambda: edit(edited=""), "edited is empty"),
        (lambda: edit(edited="5"), "same as original"),
        (lambda: vote("v1", "a", second="base"), "the same model"),
        (lambda: vote("v1", "c"), "winner"),
    ],
)
def test_what_could_not_be_trained_on_is_refused(make: Any, said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        make()


def test_text_survives_as_it_is(feedback: Feedback) -> None:
    text = 'a "quote"\n\u2028 line\x00, 你好 🎢 \u202eback</script>{{ x }}'
    feedback.edit(edit(edited=text))
    [record] = read_records(feedback.folder / "preferences.jsonl")
    assert record.chosen is not None
    assert record.chosen[0].content == text  # pyright: ignore


def test_sft_and_dpo_train_on_the_files(feedback: Feedback, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_folder(tmp_path / "m")
    for i in range(10):
        asked = [{"role": "user", "content": f"{i} + 1?"}]
        feedback.thumb(thumb(f"t{i}", messages=asked, reply=str(i + 1), label=i % 2 == 0))
        feedback.edit(edit(f"e{i}", messages=asked, original="no", edited=str(i + 1)))
    common = ["--model", str(model), "--dry-run", "--json", "--max-steps", "1", "--batch-size", "4"]
    for verb in (["sft"], ["dpo"], ["dpo", "--loss", "kto"]):
        name = {"sft": "sft", "dpo": "preferences", "kto": "labels"}[verb[-1]]
        assert main([*verb, "--data", str(feedback.folder / f"{name}.jsonl"), *common]) == 0
        assert json.loads(capsys.readouterr().out)["prediction"]["memory_gb"] > 0


def test_kto_pairs_every_label_with_another_prompt(feedback: Feedback) -> None:
    for i, label in enumerate((True, False, True)):
        feedback.thumb(thumb(f"t{i}", messages=[{"role": "user", "content": f"{i}?"}], label=label))
    judged = judged_of(read_records(feedback.folder / "labels.jsonl"), tiny_tokenizer(), max_length=None).rows
    assert [row.desirable for row in judged] == [True, False, True]


def test_a_line_torn_by_a_kill_is_cut_off(feedback: Feedback) -> None:
    feedback.thumb(thumb("n1"))
    with open(feedback.folder / "labels.jsonl", "a") as file:
        file.write('{"prompt": [{"role"')
    assert feedback.counts()["labels"] == 1
    feedback.thumb(thumb("n2"))
    assert [row["id"] for row in rows(feedback, "labels")] == ["n1", "n2"]


WRITER = """
import sys
from upslope.serving.page import Feedback, Thumb
feedback = Feedback(sys.argv[1])
for i in range(100000):
    known = i % 7 == 6  # now and then an earlier row is replaced, which rewrites the file
    key = f"n{i - 3 if known else i}"
    messages = [{"role": "user", "content": "x" * 500}]
    feedback.thumb(Thumb(id=key, messages=messages, reply=str(i), label=not known, model="m"))
    print(key, flush=True)
"""


@pytest.mark.parametrize("after", [1, 20])
def test_what_was_acknowledged_survives_a_kill(feedback: Feedback, after: int) -> None:
    command = [sys.executable, "-c", WRITER, str(feedback.folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        acknowledged = [writer.stdout.readline().strip() for _ in range(after)]
        writer.send_signal(signal.SIGKILL)
        acknowledged += [line.strip() for line in writer.stdout if line.endswith("\n")]
    found = [record.extra["id"] for record in read_records(feedback.folder / "labels.jsonl")]
    assert set(acknowledged) <= set(found)
    assert len(found) == len(set(found))
    feedback.thumb(thumb("after"))
    assert rows(feedback, "labels")[-1]["id"] == "after"


def test_threads_lose_nothing(feedback: Feedback) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: Feedback(feedback.folder).thumb(thumb(f"n{i % 20}", reply=str(i))), range(60)))
    assert sorted(row["id"] for row in rows(feedback, "labels")) == sorted(f"n{i}" for i in range(20))


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"file/.*cannot be saved: .*--feedback") as caught:
        Feedback(tmp_path / "file").thumb(thumb())
    assert "\n" not in str(caught.value)


def test_a_damaged_line_is_named(feedback: Feedback) -> None:
    feedback.folder.mkdir()
    (feedback.folder / "votes.jsonl").write_text('{"winner": "a"}\n')
    with pytest.raises(RunError, match=r"votes.jsonl:1: not a vote"):
        feedback.tally()
    (feedback.folder / "labels.jsonl").write_text("[1]\n")
    with pytest.raises(RunError, match=r"labels.jsonl:1"):
        feedback.thumb(thumb())

"""Preference rows that repeat the prompt in their sides, and columns of other names."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from upslope.data.examples import pairs_of
from upslope.data.records import read_records, record_of
from upslope.errors import ConfigError, DataError
from upslope.options.common import column_names
from upslope.types import Message

ASKED, GOOD, BAD = (
    {"role": r, "content": c} for r, c in (("user", "Why?"), ("assistant", "So."), ("assistant", "No."))
)
SYSTEM, AGAIN = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "And how?"}


def turns(*rows: dict[str, str]) -> tuple[Message, ...]:
    return tuple(Message(row["role"], row["content"]) for row in rows)


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": "Why?", "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]}, turns(ASKED)),
        ({"prompt": "Why? ", "chosen": [SYSTEM, ASKED, GOOD], "rejected": [SYSTEM, ASKED, BAD]}, turns(SYSTEM, ASKED)),
        ({"chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]}, turns(ASKED)),
        ({"chosen": [ASKED, GOOD, AGAIN, GOOD], "rejected": [ASKED, GOOD, AGAIN, BAD]}, turns(ASKED, GOOD, AGAIN)),
        ({"prompt": [ASKED], "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]}, turns(ASKED)),
        ({"prompt": [ASKED], "chosen": [GOOD], "rejected": [BAD]}, turns(ASKED)),
        ({"prompt": "Why?", "chosen": [GOOD], "rejected": [BAD]}, turns(ASKED)),
    ],
    ids=[
        "ultrafeedback",
        "with a system turn",
        "implicit",
        "of several turns",
        "messages repeated",
        "plain",
        "replies",
    ],
)
def test_conversations_have_their_common_beginning_as_prompt(row: dict[str, Any], prompt: tuple[Message, ...]) -> None:
    record = record_of(row, "here")
    assert (record.prompt, record.chosen, record.rejected) == (prompt, turns(GOOD), turns(BAD))


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        (
            "\n\nHuman: Why?\n\nAssistant: I say so.",
            "\n\nHuman: Why?\n\nAssistant: I do not.",
            "\n\nHuman: Why?\n\nAssistant:",
        ),
        ("The sum is 19.", "The sum is 12.", "The sum is"),
        ("The sum is 19.", "The sum isnt 12.", "The sum"),
        ("Name it:\nblue", "Name it:\nred", "Name it:"),
    ],
)
def test_the_prompt_of_texts_ends_with_a_turn_or_a_word(chosen: str, rejected: str, prompt: str) -> None:
    record = record_of({"chosen": chosen, "rejected": rejected}, "here")
    assert (record.prompt, f"{record.prompt}{record.chosen}", f"{record.prompt}{record.rejected}") == (
        prompt,
        chosen,
        rejected,
    )


@given(st.text(alphabet="ab \n", max_size=9), st.text(alphabet="ab \n", max_size=9))
def test_texts_are_split_whole_or_refused(chosen: str, rejected: str) -> None:
    with suppress(DataError):
        record = record_of({"chosen": chosen, "rejected": rejected}, "f:1")
        assert isinstance(record.prompt, str)
        assert record.prompt.strip()
        assert (f"{record.prompt}{record.chosen}", f"{record.prompt}{record.rejected}") == (chosen, rejected)


def write(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_texts_that_repeat_their_prompt_hold_it_once() -> None:
    record = record_of({"prompt": "Q: 1+1?", "chosen": "Q: 1+1? 2", "rejected": "Q: 1+1? 3"}, "here")
    assert (record.prompt, record.chosen, record.rejected) == ("Q: 1+1?", " 2", " 3")
    record = record_of({"prompt": "1", "chosen": "1 apple", "rejected": "one"}, "here")  # the reply's own words
    assert (record.prompt, record.chosen, record.rejected) == ("1", "1 apple", "one")


@pytest.mark.parametrize("prompt", [{}, {"prompt": "Why?"}, {"prompt": [ASKED]}], ids=["none", "text", "messages"])
def test_conversations_of_which_one_begins_with_the_other_are_no_pair(prompt: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="here: 'chosen' and 'rejected' differ in no reply"):
        record_of({**prompt, "chosen": [ASKED, GOOD], "rejected": [ASKED, GOOD, AGAIN, BAD]}, "here")


def test_what_a_pair_learner_gets_is_what_it_gets_of_a_prompt_apart(tmp_path: Path) -> None:
    from tiny_model import tiny_tokenizer

    plain = {"prompt": [ASKED], "chosen": [GOOD], "rejected": [BAD]}
    implicit = {"chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]}
    pairs = [
        pairs_of(read_records(write(tmp_path / "r.jsonl", row)), tiny_tokenizer(), max_length=None).rows[0]
        for row in (plain, implicit, {"prompt": "Why?", **implicit})
    ]
    for pair in pairs[1:]:
        assert (pair.chosen, pair.rejected) == (pairs[0].chosen, pairs[0].rejected)


def test_a_row_that_lost_its_prompt_is_not_taken_for_an_implicit_one(tmp_path: Path) -> None:
    rows = [
        {"prompt": "Why?", "chosen": "It is so.", "rejected": "It is."},
        {"chosen": "It is a.", "rejected": "It is b."},
    ]
    with pytest.raises(DataError, match=r"r.jsonl:2: 'prompt' is in some rows and not in others"):
        read_records(write(tmp_path / "r.jsonl", *rows))


def test_columns_of_other_names(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", {"question": "Why?", "answer": "So.", "text": "not read", "id": 7})
    with pytest.raises(DataError, match="--columns prompt=question completion=answer"):
        read_records(write(tmp_path / "s.jsonl", {"question": "Why?", "answer": "So."}))
    record = read_records(path, columns=("prompt=question", "completion=answer"))[0]
    assert (record.kind, record.prompt, record.completion) == ("completion", "Why?", "So.")
    assert record.extra == {"text": "not read", "id": 7}
    with pytest.raises(
        DataError, match=r"r.jsonl:1: no column 'reply' to take completion from; there are question, ans"
    ):
        read_records(path, columns=("prompt=question", "completion=reply"))
    with pytest.raises(DataError, match="columns names prompt, but the row is read as messages"):
        read_records(write(tmp_path / "m.jsonl", {"q": "Why?", "messages": [ASKED, GOOD]}), columns=("prompt=q",))
    swapped = read_records(
        write(tmp_path / "x.jsonl", {"prompt": "a", "completion": "b"}),
        columns=("prompt=completion", "completion=prompt"),
    )
    assert (swapped[0].prompt, swapped[0].completion) == ("b", "a")


@pytest.mark.parametrize("word", ["question", "prompt=", "answer=b", "prompt=a prompt=b", "prompt=a completion=a"])
def test_columns_that_say_nothing_are_refused(word: str) -> None:
    with pytest.raises(ConfigError, match="is not NAME=COLUMN, each name and column once, of prompt, completion"):
        column_names(word.split(" "))

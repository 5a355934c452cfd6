"""How much a text has in common with a reference: edit distance, n-grams, and the field's own BLEU, chrF and ROUGE.

As reward functions they take (prompts, completions) and compare with each prompt's references: its answer and, where
the task lists them in `metadata["references"]`, all of those, of which the nearest counts. A prompt without any gets
None (no verdict). Each is total: any text gets a finite number in [0, 1] (`ngram_overlap` with a weight below 0 is a
penalty). `inline_safe` marks those that are quick on any text.
"""

import importlib
import re
import string
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from functools import lru_cache
from typing import Any

from upslope.errors import ConfigError
from upslope.extras import require
from upslope.rewards.functions import ngrams, quick
from upslope.types import Prompt

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def edit_distance(a: Sequence[Hashable], b: Sequence[Hashable]) -> int:
    """The fewest insertions, deletions and substitutions that turn `a` into `b` (Levenshtein 1966).

    A whole column of the table per step, as bits of one integer (Myers 1999, in the form of Hyyrö 2003), so that
    texts of thousands of units take milliseconds.
    """
    if not a or not b:
        return len(a) + len(b)
    places: dict[Hashable, int] = {}
    for i, unit in enumerate(a):
        places[unit] = places.get(unit, 0) | 1 << i
    whole, last = (1 << len(a)) - 1, 1 << (len(a) - 1)
    rises, falls, distance = whole, 0, len(a)
    for unit in b:
        equal = places.get(unit, 0)
        diagonal = ((((equal & rises) + rises) ^ rises) | equal | falls) & whole
        up = falls | (whole & ~(diagonal | rises))
        down = rises & diagonal
        distance += bool(up & last) - bool(down & last)
        up, down = (up << 1 | 1) & whole, (down << 1) & whole
        rises, falls = down | (whole & ~(diagonal | up)), up & diagonal
    return distance


def units_of(text: str, unit: str) -> Sequence[str]:
    """What is counted: "words" (split at white space) or "characters" (of the stripped text)."""
    if unit == "words":
        return text.split()
    if unit == "characters":
        return text.strip()
    raise ConfigError(f"unit must be words or characters, not '{unit}'")


def nearest(text: str, references: Sequence[str], *, unit: str = "words") -> tuple[int, int]:
    """(edits, reference length) against the reference at the smallest distance; of equals the first."""
    said = units_of(text, unit)
    wanted = [units_of(reference, unit) for reference in references]
    return min(((edit_distance(said, w), len(w)) for w in wanted), key=lambda pair: pair[0])


def references_of(prompt: Prompt) -> tuple[str, ...]:
    """Every accepted reply of a prompt; empty where it has none."""
    listed = prompt.metadata.get("references", ())
    return tuple(listed) if listed else () if prompt.answer is None else (prompt.answer,)


def _against(
    prompts: Sequence[Prompt], completions: Sequence[str], one: Callable[[str, tuple[str, ...]], float]
) -> list[float | None]:
    paired = [(text, references_of(prompt)) for prompt, text in zip(prompts, completions, strict=True)]
    return [one(text, references) if references else None for text, references in paired]


@quick
def edit_similarity(
    prompts: Sequence[Prompt], completions: Sequence[str], *, unit: str = "words"
) -> list[float | None]:
    """1 - min(1, edits / reference length), against the nearest reference; an empty reference wants an empty reply.

    unit: "words" (so 1 - the word error rate) or "characters".
    """
    units_of("", unit)
    return _against(prompts, completions, lambda text, refs: similarity(*nearest(text, refs, unit=unit)))


def similarity(edits: int, length: int) -> float:
    """1 - min(1, edits / length)."""
    return 1.0 - min(1.0, edits / max(1, length))


@quick
def ngram_overlap(
    prompts: Sequence[Prompt], completions: Sequence[str], *, n: int = 2, against: str = "answer"
) -> list[float | None]:
    """F1 of the word n-grams (counted as often as they occur in both, letter case aside), in [0, 1].

    against: "answer" for what the reply shares with the best of its references, or "prompt" for what it copies from
    the question: give that a negative weight ("ngram_overlap:n=4,against=prompt@-0.5"). A text of fewer than n words
    has no n-grams and shares nothing; two such texts are compared whole.
    """
    if n < 1:
        raise ConfigError(f"reward 'ngram_overlap': n must be at least 1, got {n}")
    if against == "prompt":
        asked = [prompt.text if prompt.text is not None else _asked(prompt) for prompt in prompts]
        return [_ngram_f1(text, question, n) for question, text in zip(asked, completions, strict=True)]
    if against != "answer":
        raise ConfigError(f"reward 'ngram_overlap': against must be answer or prompt, not '{against}'")
    return _against(prompts, completions, lambda text, refs: max(_ngram_f1(text, ref, n) for ref in refs))


def _asked(prompt: Prompt) -> str:
    return "\n".join(message.content for message in prompt.messages if message.role == "user")


def _ngram_f1(text: str, other: str, n: int) -> float:
    left, right = Counter(ngrams(text, n)), Counter(ngrams(other, n))
    if not left and not right:
        return float(text.casefold().split() == other.casefold().split())
    return _f1(left, right)


def _f1(left: Counter[Any], right: Counter[Any]) -> float:
    """2 shared / (all of the one + all of the other)."""
    return 2.0 * (left & right).total() / (left.total() + right.total())


@quick
def token_f1(prompts: Sequence[Prompt], completions: Sequence[str]) -> list[float | None]:
    """F1 of the words, the best over the references, normalised as for SQuAD: no case, punctuation or articles.

    Source: Rajpurkar et al. 2016 (1606.05250), section 6.1. Two texts of which nothing remains are equal.
    """
    return _against(prompts, completions, lambda text, refs: max(squad_f1(text, ref) for ref in refs))


def squad_words(text: str) -> list[str]:
    """An answer's words without case, punctuation and articles (Rajpurkar et al. 2016, arXiv 1606.05250, 6.1)."""
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def squad_f1(text: str, reference: str) -> float:
    """F1 of the words of two texts as `squad_words`; 1 where neither has any."""
    left, right = Counter(squad_words(text)), Counter(squad_words(reference))
    return _f1(left, right) if left or right else 1.0


@quick
def bleu(prompts: Sequence[Prompt], completions: Sequence[str], *, tokenize: str = "13a") -> list[float | None]:
    """Sentence BLEU in [0, 1], with every reference, by sacrebleu (effective order, its own smoothing).

    tokenize: sacrebleu's "13a" (as in published scores), "char", "intl" or "none". Source: Papineni et al. 2002; Post
    2018 (1804.08771). A sentence's BLEU is a training signal; what one reports is a corpus's.
    """
    return _against(prompts, completions, lambda text, refs: sentence_bleu(text, refs, tokenize=tokenize))


@quick
def chrf(prompts: Sequence[Prompt], completions: Sequence[str], *, word_order: int = 0) -> list[float | None]:
    """Sentence chrF in [0, 1], with every reference, by sacrebleu; word_order=2 is chrF++.

    Source: Popovic 2015 (chrF), 2017 (chrF++).
    """
    return _against(prompts, completions, lambda text, refs: sentence_chrf(text, refs, word_order=word_order))


def sentence_bleu(text: str, references: Sequence[str], *, tokenize: str = "13a") -> float:
    """BLEU of one sentence, in [0, 1]."""
    _check("bleu", "tokenize", tokenize, ("13a", "char", "intl", "none"))
    metric = _metric("sacrebleu.metrics", "BLEU", effective_order=True, tokenize=tokenize)
    return metric.sentence_score(text, list(references)).score / 100


def sentence_chrf(text: str, references: Sequence[str], *, word_order: int = 0) -> float:
    """chrF of one sentence, in [0, 1]."""
    _check("chrf", "word_order", word_order, (0, 1, 2))
    metric = _metric("sacrebleu.metrics", "CHRF", word_order=word_order)
    return metric.sentence_score(text, list(references)).score / 100


def rouge(prompts: Sequence[Prompt], completions: Sequence[str], *, kind: str = "rougeL") -> list[float | None]:
    """ROUGE F-measure in [0, 1], the best over the references, by the rouge-score package, without stemming.

    kind: rouge1, rouge2, rougeL or rougeLsum. Its words are runs of [a-z0-9], so it says nothing about other
    alphabets. Not inline_safe: its longest common subsequence takes the product of the two lengths. Source: Lin 2004.
    """
    _check("rouge", "kind", kind, ("rouge1", "rouge2", "rougeL", "rougeLsum"))
    score = _metric("rouge_score.rouge_scorer", "RougeScorer", (kind,), use_stemmer=False).score
    return _against(
        prompts, completions, lambda text, refs: max(float(score(ref, text)[kind].fmeasure) for ref in refs)
    )


def _check(reward: str, option: str, given: Any, known: Sequence[Any]) -> None:
    if given not in known:
        raise ConfigError(f"reward '{reward}': {option} must be one of {', '.join(map(str, known))}, not '{given}'")


@lru_cache(maxsize=16)
def _metric(module: str, name: str, *args: Any, **how: Any) -> Any:
    """A metric of a package, made once. ConfigError: it is not installed."""
    require("tasks", module.partition(".")[0])
    return getattr(importlib.import_module(module), name)(*args, **how)

"""Built-in reward functions. Each is total: any text gets a finite judgement, and no text is ever run.

A reward function takes (prompts, completions) and its own parameters by name, and returns one judgement per
completion. If it names a parameter `num_tokens` or `finish_reasons`, the judge fills in one per completion.
`inline_safe` marks those that are quick on any text, so that they need no worker process.

Those from `edit_similarity` on say how much a text has in common with a reference: edit distance, n-grams, and the
field's own BLEU, chrF and ROUGE. They compare with each prompt's references: its answer and, where the task lists them
in `metadata["references"]`, all of those, of which the nearest counts. A prompt without any gets None (no verdict).
Each gives a number in [0, 1] (`ngram_overlap` with a weight below 0 is a penalty).
"""

import importlib
import json
import re
import string
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import lru_cache
from typing import Any, TypeVar

from upslope.errors import ConfigError, DataError
from upslope.extras import require
from upslope.types import Prompt, Reward

F = TypeVar("F", bound=Callable[..., Any])


def quick(function: F) -> F:
    function.inline_safe = True  # type: ignore[attr-defined]
    return function


@quick
def length(
    prompts: Sequence[Prompt],
    completions: Sequence[str],
    *,
    target: int,
    unit: str = "words",
    num_tokens: Sequence[int] | None = None,
) -> list[float]:
    """Closeness of the length to `target`: max(0, 1 - |length - target| / target), in [0, 1].

    unit: "words" (split at white space), "characters" or "tokens" (those the policy sampled, the end included).
    Source: the linear length reward of L1 (2503.04697), scaled to [0, 1].
    """
    if target < 1:
        raise ConfigError(f"reward 'length': target must be at least 1, got {target}")
    if unit not in ("words", "characters", "tokens"):
        raise ConfigError(f"reward 'length': unit must be words, characters or tokens, not '{unit}'")
    counts: Sequence[int] | None = num_tokens
    if unit != "tokens":
        counts = [len(text.split() if unit == "words" else text) for text in completions]
    if counts is None:
        raise DataError("reward 'length': unit=tokens needs the completions' token counts (num_tokens)")
    return [max(0.0, 1.0 - abs(count - target) / target) for count in counts]


def format(prompts: Sequence[Prompt], completions: Sequence[str], *, pattern: str) -> list[float]:
    """1 where the whole reply, stripped, matches the regular expression `pattern`, else 0 (`.` matches newlines).

    Source: the format reward of DeepSeek-R1 (2501.12948, section 2.2.2). Not inline_safe: a pattern can take
    exponential time on some replies, which the judge's time limit ends.
    """
    try:
        compiled = re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise ConfigError(f"reward 'format': '{pattern}' is not a regular expression ({error})") from None
    return [float(compiled.fullmatch(text.strip()) is not None) for text in completions]


@quick
def json_object(
    prompts: Sequence[Prompt], completions: Sequence[str], *, keys: str = "", exact: bool = False
) -> list[float]:
    """1 where the whole reply is one JSON object with every one of `keys` (written a|b|c), else 0.

    exact: no other key may occur. Strict JSON (RFC 8259): no NaN or Infinity, no key given twice, nothing around it.
    """
    wanted = {key for key in keys.split("|") if key}
    return [float(_is_object(text, wanted, exact)) for text in completions]


def _is_object(text: str, wanted: set[str], exact: bool) -> bool:
    try:
        value = json.loads(text, parse_constant=_refuse, object_pairs_hook=_without_repeats, parse_int=str)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and (set(value) == wanted if exact else set(value) >= wanted)


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) != len(pairs):
        raise ValueError("a key is given twice")
    return dict(pairs)


@quick
def repetition(prompts: Sequence[Prompt], completions: Sequence[str], *, ngram: int = 3) -> list[float]:
    """Minus the share of repeated word n-grams: -(1 - distinct / all), in (-1, 0]; 0 below two n-grams.

    Source: the n-gram repetition penalty of 2502.03373 (section 3.4), per reply.
    """
    if ngram < 1:
        raise ConfigError(f"reward 'repetition': ngram must be at least 1, got {ngram}")
    return [distinct_share(text, ngram) - 1.0 for text in completions]


def distinct_share(text: str, n: int) -> float:
    """Different word n-grams over all of them, letter case aside; 1 where there is none."""
    grams = ngrams(text, n)
    return len(set(grams)) / len(grams) if grams else 1.0


def ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    """The n-grams of a text's words in lower case."""
    words = text.casefold().split()
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


@quick
def exact_match(
    prompts: Sequence[Prompt], completions: Sequence[str], *, ignore_case: bool = False
) -> list[Reward | None]:
    """1 and correct where the reply is the prompt's answer, white space at both ends aside; else 0.

    None (no verdict, the sample is excluded) for a prompt without an answer.
    """
    fold = str.casefold if ignore_case else str
    paired = [(text.strip(), prompt.answer) for prompt, text in zip(prompts, completions, strict=True)]
    verdicts = [None if answer is None else fold(text) == fold(answer.strip()) for text, answer in paired]
    return [None if correct is None else Reward(float(correct), correct=correct) for correct in verdicts]


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
        return [_ngram_f1(text, _asked(prompt), n) for prompt, text in zip(prompts, completions, strict=True)]
    if against != "answer":
        raise ConfigError(f"reward 'ngram_overlap': against must be answer or prompt, not '{against}'")
    return _against(prompts, completions, lambda text, refs: max(_ngram_f1(text, ref, n) for ref in refs))


def _asked(prompt: Prompt) -> str:
    turns = "\n".join(message.content for message in prompt.messages if message.role == "user")
    return turns if prompt.text is None else prompt.text


def _ngram_f1(text: str, other: str, n: int) -> float:
    same = text.casefold().split() == other.casefold().split()
    return _f1(ngrams(text, n), ngrams(other, n), float(same))


def _f1(left: Iterable[Any], right: Iterable[Any], without: float) -> float:
    """2 shared / (all of the one + all of the other); `without` any in either."""
    ours, theirs = Counter(left), Counter(right)
    return 2.0 * (ours & theirs).total() / (ours.total() + theirs.total()) if ours or theirs else without


@quick
def token_f1(prompts: Sequence[Prompt], completions: Sequence[str]) -> list[float | None]:
    """F1 of the words, the best over the references, normalised as for SQuAD: no case, punctuation or articles.

    Source: Rajpurkar et al. 2016 (1606.05250), section 6.1. Two texts of which nothing remains are equal.
    """
    return _against(prompts, completions, lambda text, refs: max(squad_f1(text, ref) for ref in refs))


def squad_f1(text: str, reference: str) -> float:
    """F1 of the words of two texts as `squad_words`; 1 where neither has any."""
    return _f1(squad_words(text), squad_words(reference), 1.0)


def squad_words(text: str) -> list[str]:
    """An answer's words without case, punctuation and articles (Rajpurkar et al. 2016, arXiv 1606.05250, 6.1)."""
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


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

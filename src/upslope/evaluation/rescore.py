"""N-best lists of a recogniser or a translator, put into another order by a language model.

    total(hypothesis) = log p(text | source) [/ its tokens] + weight * its own score

log p counts the end-of-sequence token, so that a hypothesis is judged as a whole utterance. Figures before (by the
list's own scores, else its first entry), after, and of the oracle (the best entry there is).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Literal

from upslope.data.batching import data_order
from upslope.data.chat import encode_completion, encode_document, with_eos
from upslope.data.readers import rows_of
from upslope.errors import ConfigError, DataError, located
from upslope.evaluation.measurement import Figure, Measurement
from upslope.evaluation.metrics import SPACELESS, Texts, bleu_metric, measure
from upslope.evaluation.scorer import Request, Scorer
from upslope.rewards.functions import nearest

GRID = (0.0, *(round(10 ** (e / 4), 4) for e in range(-8, 9)))
"""Weights that are tried: 0, and 0.01 to 100 in four steps per power of ten."""


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """One entry of a list, with the score its maker gave it (higher is better)."""

    text: str
    score: float | None = None


@dataclass(frozen=True, slots=True)
class NBest:
    """The hypotheses of one utterance or sentence, and what is right; `source` where it is a translation."""

    where: str
    references: tuple[str, ...]
    hypotheses: tuple[Hypothesis, ...]
    source: str | None = None

    @property
    def first(self) -> int:
        """The list's own choice: its best score, the first of equals; without scores its first entry."""
        return max(range(len(self.hypotheses)), key=lambda i: (self.hypotheses[i].score or 0.0, -i))


def read_nbest(path: str) -> list[NBest]:
    """Rows {reference, hypotheses: [{text, score?}], id?, source?}; `references` lists several, `prompt` is `source`.

    Scores stand in every hypothesis of the file or in none. DataError naming file, row, key and remedy.
    """
    found: list[NBest] = []
    for where, row in rows_of(path):
        found.append(_nbest(where, row))
        scored = [h.score is not None for entry in (found[0], found[-1]) for h in entry.hypotheses]
        if any(scored) and not all(scored):
            raise DataError(f"{where}: some hypotheses have a 'score' and others none; give it everywhere or nowhere")
    if not found:
        raise DataError(f"{path}: holds no rows")
    return found


def _nbest(where: str, row: Mapping[str, Any]) -> NBest:
    unknown = sorted(set(row) - {"id", "source", "prompt", "reference", "references", "hypotheses"})
    if unknown:
        raise DataError(
            f"{where}: unknown key {unknown[0]!r}; a row has reference (or references), hypotheses, id and source"
        )
    references = row.get("references", [row["reference"]] if "reference" in row else None)
    if not isinstance(references, list) or not references or not all(isinstance(x, str) for x in references):
        raise DataError(f"{where}: 'reference' must be a text (or 'references' a list of texts); add it")
    listed = row.get("hypotheses")
    if not isinstance(listed, list) or not listed:
        raise DataError(f"{where}: 'hypotheses' must be a list of at least one {{text, score}}; add it")
    source = row.get("source", row.get("prompt"))
    if source is not None and not (isinstance(source, str) and source):
        raise DataError(f"{where}: 'source' must be a text that is not empty; fill it in or leave it out")
    entries = tuple(_hypothesis(f"{where}: hypotheses[{i}]", entry) for i, entry in enumerate(listed))
    return NBest(where, tuple(references), entries, source)


def _hypothesis(where: str, entry: Any) -> Hypothesis:
    given = entry if isinstance(entry, Mapping) else {"text": entry}
    text, score = given.get("text"), given.get("score")
    if not isinstance(text, str) or set(given) - {"text", "score"}:
        raise DataError(f"{where} must be an object with 'text' and, if there is one, 'score'")
    number = isinstance(score, int | float) and not isinstance(score, bool) and abs(score) < math.inf
    if score is not None and not number:
        raise DataError(f"{where}: 'score' must be a finite number, is {score!r}")
    return Hypothesis(text, None if score is None else float(score))


def rescore(
    scorer: Scorer,
    lists: Sequence[NBest],
    *,
    dataset: str,
    language: str = "en",
    length_normalized: bool = False,
    weight: float | Literal["tuned"] = 0.0,
    seed: int = 0,
) -> list[Measurement | Figure]:
    """WER (Chinese and Japanese: CER) and BLEU of the lists in their own order, the model's, and at their best.

    Also the change from before to after, with its paired interval. weight "tuned": the value of GRID with the fewest
    errors on a random half of the lists (of equals the smallest); figures are then of the other half only.
    ConfigError: a weight for scores that the file does not have.
    """
    if weight != 0.0 and lists[0].hypotheses[0].score is None:
        raise ConfigError(f"{dataset}: its hypotheses have no 'score', so a score_weight has nothing to weigh")
    if weight == "tuned" and len(lists) < 2:
        raise ConfigError(
            f"{dataset}: one list cannot both tune the weight and be measured; give score_weight a number"
        )
    cut = scorer.truncated
    requests = [_request(scorer, entry, i) for entry in lists for i in range(len(entry.hypotheses))]
    totals = iter(s.total / (len(s.logprobs) if length_normalized else 1) for s in scorer.score(requests))
    values = [list(islice(totals, len(entry.hypotheses))) for entry in lists]
    tuned_on: list[int] = []
    if weight == "tuned":
        order = data_order(len(lists), seed=seed, epoch=0)
        tuned_on = order[: len(lists) // 2]
        unit = _unit(language)
        edits = {i: [nearest(h.text, lists[i].references, unit=unit)[0] for h in lists[i].hypotheses] for i in tuned_on}
        weight = min(GRID, key=lambda w: sum(edits[i][_best(lists[i], values[i], w)] for i in tuned_on))
    held = sorted(set(range(len(lists))) - set(tuned_on))
    kept, scores = [lists[i] for i in held], [values[i] for i in held]
    after = [_best(entry, value, weight) for entry, value in zip(kept, scores, strict=True)]
    detail = {"score_weight": weight, "length_normalized": length_normalized, "tuned_on": len(tuned_on)}
    detail["truncated"] = scorer.truncated - cut
    return _figures(kept, after, dataset, language, detail, seed)


def _request(scorer: Scorer, entry: NBest, place: int) -> Request:
    """A text's tokens and EOS, after the source or the prefix token alone. DataError names the row."""
    where, text = f"{entry.where}: hypotheses[{place}]", entry.hypotheses[place].text
    tokenizer = scorer.tokenizer
    with located(where, DataError):
        if entry.source is not None:
            example = encode_completion(tokenizer, entry.source, text)
            first = example.mask.index(True)
            request: Request = (example.tokens[:first], example.tokens[first:])
        elif scorer.model.whole_prompts:
            raise DataError("an encoder-decoder needs the 'source' of the hypotheses; add it to the row")
        else:
            tokens = encode_document(tokenizer, text).tokens if text else with_eos(tokenizer, [])
            # the scorer puts the prefix there itself
            request = ((), tokens[bool(text) and tokens[0] == tokenizer.bos_token_id :])
    scorer.fitted(*request, where=where)
    return request


def _best(entry: NBest, logprobs: Sequence[float], weight: float) -> int:
    """The place of the highest total; of equals the first."""
    totals = [x + weight * (h.score or 0.0) for x, h in zip(logprobs, entry.hypotheses, strict=True)]
    return max(range(len(totals)), key=lambda i: (totals[i], -i))


def _unit(language: str) -> str:
    return "characters" if language in SPACELESS else "words"


def _figures(
    lists: Sequence[NBest], after: Sequence[int], dataset: str, language: str, detail: Mapping[str, Any], seed: int
) -> list[Measurement | Figure]:
    unit = _unit(language)
    rate = "cer" if unit == "characters" else "wer"
    bleu = bleu_metric(language, sentence=True)
    # the highest sentence BLEU, which a corpus BLEU is nearly highest with
    goodness = {
        rate: lambda text, references: -nearest(text, references, unit=unit)[0],
        "bleu": lambda text, references: bleu.sentence_score(text, list(references)).score,
    }
    references, where = [entry.references for entry in lists], [entry.where for entry in lists]
    found: list[Measurement | Figure] = []
    for metric, good in goodness.items():
        scores = [[good(h.text, entry.references) for h in entry.hypotheses] for entry in lists]
        oracle = [each.index(max(each)) for each in scores]
        stages = {}
        for stage, places in {"before": [entry.first for entry in lists], "after": after, "oracle": oracle}.items():
            said = [entry.hypotheses[i].text for entry, i in zip(lists, places, strict=True)]
            (measured,) = measure([metric], Texts(dataset, said, references, where, language))
            stages[stage] = replace(measured, name=f"{metric}/{stage}", detail={**measured.detail, **detail})
        change = stages["after"].difference(stages["before"], seed=seed)
        assert change is not None
        found += [*stages.values(), replace(change, name=f"{metric}/change", detail={**change.detail, **detail})]
    return found

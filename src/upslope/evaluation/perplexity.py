"""Perplexity per token, word and byte, with lm-evaluation-harness's definitions.

    perplexity = exp(-sum of log-probs / count)        bits per byte = -sum of log-probs / (ln 2 * bytes)

The log-probs are of the tokens of the text as it stands; words (runs between white space) and UTF-8 bytes are counted
in that same text, whatever the tokenizer made of it, so that these figures compare models of different vocabularies.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np

from upslope.data.pieces import encode_pieces
from upslope.data.readers import rows_of, text_of
from upslope.data.records import record_of
from upslope.errors import DataError, ModelError
from upslope.evaluation.measurement import Measurement
from upslope.evaluation.scorer import Scorer

FORMS = ("file", "line", "wikitext")
"""What a text file can be named as, before its path and a colon."""
_ROWS = (".jsonl", ".json", ".csv", ".parquet")
_TITLE = re.compile(r" = (?!= )\S.*(?<! =) = ?")
_SPACE = re.compile(r"\s+")
_BLOCK = 512  # tokens of a block, where one document is all there is
_BLOCKS = 20  # blocks there should be at least


@dataclass(frozen=True, slots=True)
class Document:
    """A text that is scored by itself, and where it stands."""

    where: str
    text: str


@dataclass(frozen=True, slots=True)
class Documents:
    """Documents of one file, what made them ("rows", "file", "lines", "WikiText articles"), how many the file has."""

    source: str
    form: str
    texts: tuple[Document, ...]
    available: int


def read_documents(spec: str, *, limit: int | None = None) -> Documents:
    """The documents of a file, at most the first `limit`; `spec` is its path, or "FORM:path".

    Rows of .jsonl, .json, .csv, .parquet (key `text`) are documents. Any other file is text: the form "wikitext"
    splits it before each ` = Title = ` line, "line" makes every line a document without the spaces around it (Penn
    Treebank; blank lines are none), "file" takes it whole. Where none is named it is wikitext if the first line with
    text is such a title, line if the file's name has "ptb" in it, else file. DataError naming file, row, key and
    remedy.
    """
    form, _, path = spec.partition(":")
    if form not in FORMS:
        form, path = "", spec
    file = Path(path).expanduser()
    name = file.name.lower().removesuffix(".gz")
    if name.endswith(_ROWS):
        if form:
            raise DataError(f"{path}: its rows are the documents; leave {form!r} out, or give a text file")
        kind, found = "rows", []
        for where, row in rows_of(path):
            record = record_of(row, where)
            if record.text is None:
                raise DataError(
                    f"{where}: perplexity needs a row with the key 'text', this is one of kind {record.kind!r}"
                )
            found.append(Document(where, record.text))
    elif not file.is_file():
        raise DataError(
            f"{path}: no such file; perplexity wants a text file, with a form before it if need be "
            f"({', '.join(f'{form}:FILE' for form in FORMS)}), or rows with the key 'text'"
        )
    else:
        text = text_of(file)
        lines = text.split("\n")
        if not form:
            first = next(line for line in lines if line.strip())
            form = "wikitext" if _TITLE.fullmatch(first.rstrip("\r")) else "line" if "ptb" in name else "file"
        if form == "file":
            kind, found = "file", [Document(path, text)]
        elif form == "line":
            kind = "lines"
            found = [Document(f"{path}:{i}", line.strip()) for i, line in enumerate(lines, 1) if line.strip()]
        else:
            kind, found = "WikiText articles", _articles(path, lines)
    if not found:
        raise DataError(f"{spec}: holds no documents")
    return Documents(spec, kind, tuple(found[:limit]), len(found))


def _articles(path: str, lines: Sequence[str]) -> list[Document]:
    """Texts that begin with a title line; a title stands between two blank lines, which a formula does not."""
    blank = [True, *(not line.strip() for line in lines), True]
    starts = [i for i, line in enumerate(lines) if _TITLE.fullmatch(line.rstrip("\r")) and blank[i] and blank[i + 2]]
    if not starts:
        raise DataError(f"{path}: no line is a WikiText title (' = Title = '); name it file:FILE or line:FILE")
    edges = [*([] if all(blank[: starts[0] + 1]) else [0]), *starts, len(lines)]
    return [
        Document(f"{path}:{low + 1}", "\n".join(lines[low:high]) + ("\n" if high < len(lines) else ""))
        for low, high in pairwise(edges)
    ]


def count_words(text: str) -> int:
    r"""len(re.split(r"\s+", text)), as lm-evaluation-harness counts them: white space at an end counts one more."""
    return len(_SPACE.split(text))


def perplexity(scorer: Scorer, documents: Documents, *, context: int, stride: int) -> list[Measurement]:
    """token_perplexity, word_perplexity, byte_perplexity and bits_per_byte of the documents.

    context, stride: of the windows (`Scorer.rolling`). n counts documents, and the interval resamples them; where
    there is one document only, both are over blocks of up to 512 consecutive tokens of it.
    """
    if scorer.model.whole_prompts:
        raise ModelError("an encoder-decoder predicts a target from a source: it has no perplexity of plain text")
    encoded = []
    for document in documents.texts:
        ids, starts = encode_pieces(scorer.tokenizer, document.text, ())
        own = int(ids[:1] == [scorer.tokenizer.bos_token_id])  # the scorer puts a BOS before every text
        if not ids[own:]:
            raise DataError(f"{document.where}: the text has no tokens; remove it")
        encoded.append((ids[own:], starts[own:]))
    scored = scorer.rolling([ids for ids, _ in encoded], stride=stride, context=context)
    if len(encoded) == 1:
        rows, unit = _blocks(documents.texts[0].text, encoded[0][1], scored[0]), "blocks of one document"
    else:
        pairs = zip(documents.texts, scored, strict=True)
        rows = [(math.fsum(x), len(x), count_words(d.text), len(d.text.encode())) for d, x in pairs]
        unit = f"documents ({documents.form})"
    statistics_N4 = np.array(rows, dtype=np.float64)
    _, tokens, words, size = (int(x) for x in statistics_N4.sum(axis=0))
    detail = {
        "documents": len(encoded),
        "available": documents.available,
        **({"of": documents.available} if len(encoded) > 1 else {}),
        "form": documents.form,
        "tokens": tokens,
        "words": words,
        "bytes": size,
        "context": context,
        "stride": stride,
    }
    units = ("token", "word", "byte")
    values = {f"{unit}_perplexity": partial(_perplexity, column=i) for i, unit in enumerate(units, 1)}
    values["bits_per_byte"] = lambda sums: float(-sums[0] / (math.log(2) * sums[3]))
    return [
        Measurement(name, statistics_N4, value, documents.source, "lower", unit, None, detail)
        for name, value in values.items()
    ]


def _perplexity(sums: np.ndarray, column: int) -> float:
    nats = -sums[0] / sums[column] if sums[column] else math.inf
    return math.exp(nats) if nats < 709 else math.inf  # exp(710) is more than a float holds


def _blocks(text: str, starts: Sequence[int], logprobs: Sequence[float]) -> list[tuple[float, int, int, int]]:
    """(log-prob, tokens, words, bytes) of consecutive blocks; their sums are the document's own."""
    size = max(1, min(_BLOCK, len(starts) // _BLOCKS))
    first = list(range(0, len(starts), size))
    edges = [0, *(starts[i] for i in first[1:]), len(text)]
    words = [0] * len(first)
    block = 0
    for gap in _SPACE.finditer(text):
        while gap.start() >= edges[block + 1]:
            block += 1
        words[block] += 1
    words[-1] += 1
    return [
        (math.fsum(logprobs[i : i + size]), min(size, len(starts) - i), words[b], len(text[low:high].encode()))
        for b, (i, low, high) in enumerate(zip(first, edges, edges[1:], strict=False))
    ]

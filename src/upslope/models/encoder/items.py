"""Texts and words as labelled items of an encoder's inputs: padded batches, logits, scores, trained encoders in use.

A classifier says how likely each label of a text is, a tagger the tag of each word.

Shapes: B inputs, T tokens of the longest, N labelled items, C labels.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from upslope.data.chat import load_tokenizer, token_count
from upslope.data.labels import LabelledText, TaggedSentence
from upslope.devices.hardware import choose_dtype, device_of_machine
from upslope.errors import ConfigError, ModelError
from upslope.models.encoder.network import Encoder, Kind, load_encoder
from upslope.models.files.sources import resolve
from upslope.models.lora import padded_keys
from upslope.models.protocol import evaluating
from upslope.options.supervised import EncoderOptions
from upslope.runs.progress import counted, told


@dataclass(frozen=True, slots=True)
class Input:
    """One sequence of tokens and its labelled items.

    places: the token that carries each item (empty: the text itself is the one item). targets: the class of each item
    (int), or the number that it is to be given (float). row: index of the row it comes from; first: number of the
    row's items that stand in earlier inputs.
    """

    tokens: list[int]
    targets: Sequence[Any]
    places: list[int]
    types: list[int] | None = None
    row: int = 0
    first: int = 0


@dataclass(frozen=True, slots=True)
class ItemBatch:
    """Padded inputs. items_N: index of each item among B (text) or B * T (tokens); rows_N, counters_N: its address.

    fields: "weight" is 1 for each item: their number is the denominator (training/step.py).
    """

    ids_BT: Tensor
    mask_BT: Tensor
    types_BT: Tensor | None
    items_N: Tensor
    targets_N: Tensor
    rows_N: list[int]
    counters_N: list[int]
    fields: Mapping[str, Tensor] = field(default_factory=lambda: {"weight": torch.ones(())})


def groups_of(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Inputs of like length together, each group at most `budget` tokens with its padding (one input if longer).

    A group also ends where the next input is shorter than its longest by a quarter and by more than 6 tokens: padding
    costs as much as text. Longest first; the result depends on nothing but the arguments.
    """
    groups: list[list[int]] = []
    longest = 0
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        short = longest - lengths[index] > max(6, longest / 4)
        if not groups or short or (len(groups[-1]) + 1) * longest > budget:
            groups.append([])
            longest = lengths[index]
        groups[-1].append(index)
    return groups


def padded_batch(inputs: Sequence[Input], encoder: Encoder, pad: int, pad_type: int = 0) -> ItemBatch:
    """Pad on the encoder's side and address every item."""
    width = max(len(x.tokens) for x in inputs)
    left = encoder.padding_side == "left"

    def padded(values: Sequence[int], fill: int) -> list[int]:
        gap = [fill] * (width - len(values))
        return [*gap, *values] if left else [*values, *gap]

    items, rows, counters = [], [], []
    for b, x in enumerate(inputs):
        shift = b * width + (width - len(x.tokens) if left else 0)
        items += [shift + place for place in x.places] or [b]
        rows += [x.row] * len(x.targets)
        counters += range(x.first, x.first + len(x.targets))
    device = encoder.device

    def tensor(values: Any) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    return ItemBatch(
        ids_BT=tensor([padded(x.tokens, pad) for x in inputs]),
        mask_BT=tensor([padded([1] * len(x.tokens), 0) for x in inputs]),
        types_BT=None if inputs[0].types is None else tensor([padded(x.types or [], pad_type) for x in inputs]),
        items_N=tensor(items),
        targets_N=torch.tensor([t for x in inputs for t in x.targets], device=device),
        rows_N=rows,
        counters_N=counters,
    )


def item_logits(encoder: Encoder, batch: ItemBatch) -> Tensor:
    """Logits of the labelled items, [N, C], in float32 or wider."""
    logits = encoder(batch.ids_BT, batch.mask_BT, batch.types_BT)
    flat = logits.reshape(-1, logits.shape[-1]).index_select(0, batch.items_N)
    return flat.float() if flat.dtype.itemsize < 4 else flat


def keys_of(encoder: Encoder, batch: ItemBatch) -> Tensor:
    """What decides the dropout of adapters, a key per row as the layers meet them; XLNet's stand [T, B]."""
    keys_BT = padded_keys(batch.ids_BT, batch.mask_BT)
    return keys_BT.t() if encoder.config.model_type == "xlnet" else keys_BT


def scores(
    encoder: Encoder, inputs: Sequence[Input], *, pad: int, pad_type: int = 0, budget: int
) -> list[list[list[float]]]:
    """The logits of every item, per input, in the order of the inputs."""
    found: list[list[list[float]]] = [[] for _ in inputs]
    with evaluating(encoder):
        for group in groups_of([len(x.tokens) for x in inputs], budget):
            batch = padded_batch([inputs[i] for i in group], encoder, pad, pad_type)
            logits = item_logits(encoder, batch).tolist()
            for i in group:
                found[i] = logits[: len(inputs[i].targets)]
                logits = logits[len(inputs[i].targets) :]
    return found


def likeliest(found: Sequence[Sequence[Sequence[float]]]) -> list[list[int]]:
    """The place of every item's highest score, the first of equal ones."""
    return [[max(range(len(z)), key=z.__getitem__) for z in items] for items in found]


def pads_of(tokenizer: Any) -> tuple[int, int]:
    """The token and the token type that padding is made of."""
    return tokenizer.pad_token_id, getattr(tokenizer, "pad_token_type_id", 0) or 0


@dataclass(slots=True)
class Start:
    """The encoder to train and its tokenizer."""

    encoder: Encoder
    tokenizer: Any


def load_start(options: EncoderOptions, kind: Kind, labels: Sequence[str] | None) -> Start:
    """The encoder of `--model` with a head for `labels`, adapters if asked, in the compute dtype; and its tokenizer."""
    return _load(options.model, kind, labels, options.dtype, options)


def _load(
    source: str, kind: Kind, labels: Sequence[str] | None, dtype: str, options: EncoderOptions | None = None
) -> Start:
    folder, device = resolve(source), device_of_machine()
    chosen, _ = choose_dtype(dtype, device)
    tokenizer = load_tokenizer(folder)
    if kind == "tag" and getattr(tokenizer, "add_prefix_space", None) is False:
        from transformers import AutoTokenizer

        # byte-level tokenizers see a word of a list as they see it in a sentence only with the space before it
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, add_prefix_space=True)
    if tokenizer.pad_token_id is None:
        raise ModelError(f"{folder}: the tokenizer has no padding token; name one in tokenizer_config.json")
    more = {} if options is None else {x: getattr(options, x) for x in ("gradient_checkpointing", "seed")}
    encoder = load_encoder(folder, kind, labels=labels, **more)
    encoder.check_tokens(token_count(tokenizer), folder)
    if encoder.fresh:
        print(f"upslope: {folder.name}: fresh, drawn from the seed: {', '.join(encoder.fresh)}", file=sys.stderr)
    if options is not None and options.lora_rank:
        encoder.add_adapters(**options.adapters)
    return Start(encoder.to_compute(chosen, device), tokenizer)


def check_length(options: Any, encoder: Encoder) -> None:
    """ConfigError when --max-length is more than the encoder reads."""
    if encoder.max_positions is not None and options.max_length > encoder.max_positions:
        raise ConfigError(f"max_length is {options.max_length}, but the model reads {encoder.max_positions} tokens")


@dataclass(frozen=True, slots=True)
class Classifier:
    """A trained encoder that says how likely each of its labels is; texts longer than max_length tokens are cut."""

    encoder: Encoder
    tokenizer: Any
    max_length: int
    batch_tokens: int = 8192

    @property
    def labels(self) -> tuple[str, ...]:
        """The label of class 0, 1, ..."""
        return self.encoder.labels

    def logits(self, rows: Sequence[LabelledText]) -> list[list[float]]:
        """A score per label for each text or pair."""
        inputs, cut = inputs_of(rows, self.tokenizer, [-1] * len(rows), self.max_length)
        if cut:
            print(f"upslope: cut to max_length {self.max_length}: {cut} of {len(rows)}", file=sys.stderr)
        pad, pad_type = pads_of(self.tokenizer)
        return [z for (z,) in scores(self.encoder, inputs, pad=pad, pad_type=pad_type, budget=self.batch_tokens)]


def load_classifier(source: str, *, dtype: str = "auto", max_length: int | None = None) -> Classifier:
    """The encoder of a folder that `classify` wrote (or any sequence classifier's), to be asked.

    max_length: longest input in tokens, by default what the encoder reads (512 where it has no limit). ModelError: no
    encoder, or none with a head on labels.
    """
    start = _load(source, "classify", None, dtype)
    reads = start.encoder.max_positions or 512
    return Classifier(start.encoder, start.tokenizer, min(max_length or reads, reads))


def inputs_of(
    rows: Sequence[LabelledText], tokenizer: Any, targets: Sequence[float], max_length: int
) -> tuple[list[Input], int]:
    """(inputs, how many were cut): the longer text of a pair is cut first."""
    if not rows:
        return [], 0
    texts = [row.text for row in rows]
    pairs = [row.pair or "" for row in rows] if rows[0].pair is not None else None
    with told(f"encoding {len(texts):,} texts"):
        whole = tokenizer(texts, pairs, truncation=False, verbose=False)
    long = [i for i, ids in enumerate(whole["input_ids"]) if len(ids) > max_length]
    short = {i: k for k, i in enumerate(long)}
    if long:
        again = tokenizer(
            [texts[i] for i in long],
            None if pairs is None else [pairs[i] for i in long],
            truncation="longest_first",
            max_length=max_length,
        )
    made = []
    for i in range(len(rows)):
        source, at = (again, short[i]) if i in short else (whole, i)
        types = source["token_type_ids"][at] if "token_type_ids" in source else None
        made.append(Input(list(source["input_ids"][at]), [targets[i]], [], types, row=i))
    return made, len(long)


Sentences = list[list[Input]]
"""Each sentence as the pieces it was split into."""


def cut_words(rows: Sequence[TaggedSentence], sentences: Sentences, tokenizer: Any, max_length: int) -> int:
    """How many words are longer than a whole input, so that only their first sub-words are read."""
    room = max_length - tokenizer.num_special_tokens_to_add(pair=False)
    full = [x for pieces in sentences for x in pieces if len(x.targets) == 1 and len(x.tokens) >= max_length]
    return sum(_sizes(_readable([rows[x.row].words[x.first]], tokenizer), tokenizer)[0] > room for x in full)


def pieces_of(rows: Sequence[TaggedSentence], tokenizer: Any, labels: Sequence[str], max_length: int) -> Sentences:
    """Each sentence as inputs of at most `max_length` tokens, split between words.

    A word carries its tag on its first sub-word. A word the tokenizer makes nothing of becomes its unknown token. Of a
    word longer than a whole input the first sub-words are kept, among them the one that carries the tag.
    """
    index = {label: i for i, label in enumerate(labels)}
    room = max_length - tokenizer.num_special_tokens_to_add(pair=False)
    made = []
    for number, row in enumerate(counted(rows, "encoding", unit="sentence")):
        words = _readable(row.words, tokenizer)
        sizes = _sizes(words, tokenizer)
        pieces, start = [], 0
        while start < len(words):
            end, used = start + 1, min(sizes[start], room)
            while end < len(words) and used + sizes[end] <= room:
                used += sizes[end]
                end += 1
            targets = [index[label] for label in row.tags[start:end]]
            pieces.append(_piece(words[start:end], targets, tokenizer, max_length, number, start))
            start = end
        made.append(pieces)
    return made


def _readable(words: Sequence[str], tokenizer: Any) -> list[str]:
    """Words without any token (control characters, say) replaced by the unknown token."""
    sizes = _sizes(words, tokenizer)
    return [word if size else tokenizer.unk_token or "?" for word, size in zip(words, sizes, strict=True)]


def _sizes(words: Sequence[str], tokenizer: Any) -> list[int]:
    """Sub-words of each word."""
    encoded = tokenizer(list(words), is_split_into_words=True, add_special_tokens=False, verbose=False)
    sizes = [0] * len(words)
    for word in encoded.word_ids():
        sizes[word] += 1
    return sizes


def _piece(words: Sequence[str], targets: list[int], tokenizer: Any, max_length: int, row: int, first: int) -> Input:
    encoded = tokenizer(
        list(words), is_split_into_words=True, truncation=True, max_length=max_length, return_special_tokens_mask=True
    )
    places: dict[int, int] = {}
    for place, word in enumerate(encoded.word_ids()):
        if word is not None:
            places.setdefault(word, place)
    types = list(encoded["token_type_ids"]) if "token_type_ids" in encoded else None
    return Input(list(encoded["input_ids"]), targets, [places[i] for i in range(len(words))], types, row, first)


def tags_of(source: str, sentences: Sequence[tuple[str, ...]], *, dtype: str = "auto") -> list[list[str]]:
    """The likeliest tag of each word of every sentence, by the tagger in a folder."""
    start = _load(source, "tag", None, dtype)
    names, longest = start.encoder.labels, min(start.encoder.max_positions or 512, 512)
    untagged = [TaggedSentence(words, (names[0],) * len(words)) for words in sentences]
    pieces = pieces_of(untagged, start.tokenizer, names, longest)
    pad, pad_type = pads_of(start.tokenizer)
    flat = [x for own in pieces for x in own]
    classes = iter(likeliest(scores(start.encoder, flat, pad=pad, pad_type=pad_type, budget=8192)))
    return [[names[c] for _ in own for c in next(classes)] for own in pieces]

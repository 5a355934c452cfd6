"""A tokenizer as a GGUF file stores it: tokens, their kinds, merges, and the name of the split before the merges.

llama.cpp does not read how a byte-level vocabulary cuts text before it merges; it knows some dozens of ways by name
("tokenizer.ggml.pre"). Its own converter finds the name by a hash of the ids of one test text, so only of
vocabularies it has seen. Here the way of cutting itself is compared, which also names the split of a new vocabulary.
"""

import json
import re
from collections.abc import Mapping
from itertools import product
from typing import Any

from upslope.errors import ModelError

# What a token is, by the numbers of llama.cpp's llama_token_type.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

_TOKEN_NAMES = tuple(f"{kind}_token" for kind in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
_SPACE = "\u2581"  # SentencePiece's mark of a space
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# (how text is cut, whether a piece that is a token is taken whole) -> llama.cpp's name. Names that share an entry in
# llama.cpp (smollm, starcoder, refact, command-r) cut alike.
_SPLITS: dict[tuple[tuple[str, ...], bool], str] = {
    (("bytes of gpt-2's words",), False): "gpt-2",
    (("single digits", "bytes of gpt-2's words"), False): "smollm",
    ((rf"{_LETTERS}|\p{{N}}|{_REST}", "bytes"), False): "qwen2",
    ((rf"{_LETTERS}|\p{{N}}{{1,3}}|{_REST}", "bytes"), True): "llama-bpe",
    ((rf"{_LETTERS}|\p{{N}}{{1,3}}|{_REST}", "bytes"), False): "dbrx",
    ((_TEKKEN, "bytes"), True): "tekken",
}


def read_vocab(tokenizer: Any, size: int, *, split: str | None = None) -> dict[str, Any]:
    """The vocabulary of a fast tokenizer for a model of `size` embedding rows; rows without a token get a name.

    The keys are GGUFWriter's names of the entries; scores and the space prefix are SentencePiece's, merges byte-level
    BPE's. `split` is llama.cpp's name of the split, for a byte-level tokenizer whose way of cutting is not known here.
    Raises ModelError for tokenizers that llama.cpp cannot run: not BPE, another normaliser, other pieces around a text.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    model = state["model"]
    if model["type"] != "BPE":
        raise ModelError(f"the tokenizer is a {model['type']}; a GGUF file can hold byte-level or SentencePiece BPE")
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise ModelError("the tokenizer marks word ends or continuations, which llama.cpp's BPE does not know")
    tokens, kinds = _tokens(tokenizer, size)
    merges = [tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    frame = dict(zip(("add_bos_token", "add_eos_token"), _frame(tokenizer), strict=True))
    common = {"token_list": tokens, "token_types": kinds}
    if model.get("byte_fallback"):
        if split is not None:
            raise ModelError(f"--pre-tokenizer {split}: a SentencePiece vocabulary is not cut before its merges")
        kinds[:] = [BYTE if k == NORMAL and _BYTE_TOKEN.fullmatch(t) else k for t, k in zip(tokens, kinds, strict=True)]
        if tokenizer.unk_token_id is not None:
            kinds[tokenizer.unk_token_id] = UNKNOWN
        pieces = {"token_scores": _scores(tokens, kinds, merges), "add_space_prefix": _space_prefix(state)}
        return {"tokenizer_model": "llama", "tokenizer_pre": "default", **common, **pieces, **frame}
    if not merges:
        raise ModelError("the tokenizer has single bytes and no merges; a GGUF file cannot say so")
    written = [" ".join(part.replace(" ", "\u0120") for part in pair) for pair in merges]
    name = split or _split_name(state)
    return {"tokenizer_model": "gpt2", "tokenizer_pre": name, **common, "token_merges": written, **frame}


def pinned_template(template: str, tokenizer: Any, *, bos: int | None, eos: int | None) -> str:
    """The chat template, led by settings of those special tokens' names in it that llama.cpp would write otherwise.

    llama.cpp writes a token of its own choice for a BOS or EOS that the file (`bos`, `eos`) does not name, and nothing
    for the names of other tokens; transformers writes the tokenizer's tokens, and nothing for one that it lacks.
    """
    theirs = dict.fromkeys(_TOKEN_NAMES, "")
    theirs |= {"bos_token": _text(tokenizer, bos), "eos_token": _text(tokenizer, eos)}
    ours = {name: getattr(tokenizer, name) or "" for name in theirs if re.search(rf"\b{name}\b", template)}
    lead = [f"{{%- set {name} = {_quoted(text)} -%}}" for name, text in ours.items() if text != theirs[name]]
    if not lead or template.startswith("".join(lead).removesuffix("-%}")):  # read from such a file
        return template
    if template[0].isspace():  # which `-%}` would remove; a newline after a block is removed alone
        lead[-1] = lead[-1].removesuffix("-%}") + "%}\n"
    return "".join(lead) + template


def _text(tokenizer: Any, token: int | None) -> str | None:
    return None if token is None else tokenizer.convert_ids_to_tokens(token)


def _quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def _tokens(tokenizer: Any, size: int) -> tuple[list[str], list[int]]:
    """Token text and kind of every embedding row."""
    by_id = {i: text for text, i in tokenizer.get_vocab().items()}
    if by_id and max(by_id) >= size:
        raise ModelError(f"the tokenizer has token {max(by_id)}, but the model's embedding only {size} rows")
    added = tokenizer.added_tokens_decoder
    kinds = [NORMAL if i in by_id else UNUSED for i in range(size)]
    for i in by_id.keys() & added.keys():
        kinds[i] = CONTROL if added[i].special else USER_DEFINED
    return [by_id.get(i, f"[PAD{i}]") for i in range(size)], kinds


def _frame(tokenizer: Any) -> tuple[bool, bool]:
    """Whether the tokenizer puts its BOS before a text and its EOS behind it."""
    plain = tokenizer("a", add_special_tokens=False).input_ids
    framed = tokenizer("a").input_ids
    bos, eos = [tokenizer.bos_token_id], [tokenizer.eos_token_id]
    for add_bos, add_eos in product((False, True), repeat=2):
        if framed == bos * add_bos + plain + eos * add_eos:
            return add_bos, add_eos
    raise ModelError("the tokenizer puts tokens around a text that are not its BOS and EOS; llama.cpp cannot do that")


def _scores(tokens: list[str], kinds: list[int], merges: list[tuple[str, ...]]) -> list[float]:
    """Scores under which SentencePiece merges in the same order: a piece's is minus the rank of its first merge."""
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(merges):
        ranks.setdefault("".join(pair), rank)
    last = float(len(merges))
    return [-float(ranks.get(t, last)) if k == NORMAL else 0.0 for t, k in zip(tokens, kinds, strict=True)]


def _space_prefix(state: Mapping[str, Any]) -> bool:
    """Whether a SentencePiece tokenizer puts a space before a text; ModelError where it does more than that."""
    normalizers = _steps(state.get("normalizer"), "normalizers")
    splits = _steps(state.get("pre_tokenizer"), "pretokenizers")
    kinds = [part["type"] for part in normalizers + splits]
    if kinds in (["Prepend", "Replace"], ["Replace"]):
        replace = normalizers[-1]
        if replace["pattern"] == {"String": " "} and replace["content"] == _SPACE:
            return kinds[0] == "Prepend"
    if kinds == ["Metaspace"] and splits[0]["replacement"] == _SPACE and not splits[0].get("split", True):
        return splits[0].get("prepend_scheme", "always") != "never"
    raise ModelError(f"the tokenizer prepares text by {', '.join(kinds) or 'nothing'}, which llama.cpp's cannot do")


def _split_name(state: Mapping[str, Any]) -> str:
    """llama.cpp's name of the way a byte-level tokenizer cuts text."""
    normalizers = _steps(state.get("normalizer"), "normalizers")
    if [part["type"] for part in normalizers] not in ([], ["NFC"]):  # llama.cpp has no NFC; text mostly is in it
        kinds = ", ".join(part["type"] for part in normalizers)
        raise ModelError(f"the tokenizer normalises text by {kinds}, which llama.cpp's byte-level BPE cannot do")
    parts = tuple(_describe(part) for part in _steps(state.get("pre_tokenizer"), "pretokenizers"))
    whole = bool(state["model"].get("ignore_merges"))
    name = _SPLITS.get((parts, whole))
    if name is None:
        raise ModelError(
            f"the tokenizer cuts text by {' then '.join(parts) or 'nothing'}, for which no name of llama.cpp is known "
            "here; if llama.cpp has one, give it with --pre-tokenizer and check it with --verify"
        )
    return name


def _describe(part: Mapping[str, Any]) -> str:
    """One step of cutting in words, or the regular expression it cuts by."""
    if part["type"] == "Digits" and part.get("individual_digits"):
        return "single digits"
    if part["type"] == "ByteLevel" and not part.get("add_prefix_space"):
        return "bytes of gpt-2's words" if part.get("use_regex", True) else "bytes"
    pattern = part.get("pattern", {})
    if part["type"] == "Split" and part.get("behavior") == "Isolated" and not part.get("invert"):
        if pattern == {"Regex": r"\p{N}"}:
            return "single digits"
        return pattern.get("Regex", json.dumps(pattern))
    return json.dumps(part, ensure_ascii=False)


def _steps(part: Mapping[str, Any] | None, key: str) -> list[Mapping[str, Any]]:
    if part is None:
        return []
    return list(part[key]) if part["type"] == "Sequence" else [part]

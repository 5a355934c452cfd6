"""Conversations to tokens: what the sampler is prompted with, and what is trained on.

For every assistant turn the prompt's tokens (`encode_prompt` of the messages before it) are a prefix of the training
tokens (`encode_conversation` of the whole): both tokenise the template's text in the same pieces.

What ends a turn: the tokens after which a completion stops, here and wherever the model is taken. transformers reads
them from generation_config.json, else from config.json. What training ends a sequence with may be another token: the
tokenizer's EOS after a text, the special token with which the chat template closes an assistant's turn after a
conversation. All of these end a turn; `write_ends` says so in a folder, so that others stop there too.
"""

import json
from bisect import bisect_left
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import Any

from upslope.atomic import read_object
from upslope.data.messages import at
from upslope.data.pieces import (
    SOURCE_FOLDER,
    FastTokenizer,
    PairTokenizer,
    closing_special,
    encode_pieces,
    pair_tokenizer,
)
from upslope.data.template import ChatTemplate, Tools
from upslope.errors import DataError, ModelError, is_rust_error, one_line
from upslope.types import Example, Message, Prompt

_NO_CHAT = "an encoder-decoder takes a text as prompt (the source) and as completion (the target), not messages"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


class TooLongError(DataError):
    """A sequence has more tokens than allowed. It is never cut; the caller drops and counts it, or stops."""

    def __init__(self, length: int, max_length: int) -> None:
        super().__init__(f"{length} tokens are more than max_length {max_length}: shorten it or raise max_length")
        self.length = length
        self.max_length = max_length


def load_tokenizer(folder: str | Path) -> Any:
    """The tokenizer of a model folder, read from local files only: transformers' own, or an encoder-decoder's pair.

    Raises ModelError when the folder or its files are missing or cannot be read.
    """
    path = Path(folder).expanduser()
    file = path / _CONFIG
    if (config := read_object(file, ModelError) if file.is_file() else {}).get("is_encoder_decoder"):
        source = _load_one(path / SOURCE_FOLDER, pair=True) if (path / SOURCE_FOLDER).is_dir() else None
        return pair_tokenizer(path, config, _load_one(path, pair=True), source)
    return _load_one(path, ours=str(config.get("model_type")).startswith("upslope_"))


def _load_one(path: Path, *, pair: bool = False, ours: bool = False) -> FastTokenizer:
    """One tokenizer; of a pair, or of an architecture that transformers does not have, whatever class it has for it."""
    if not path.is_dir():
        raise ModelError(f"{path}: no such model folder")
    if not any((path / name).is_file() for name in _TOKENIZER_FILES):
        raise ModelError(f"{path}: no tokenizer here (expected tokenizer.json); copy it from the model's source")
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if pair and not (path / "tokenizer.json").is_file():
        raise ModelError(f"{path}: no tokenizer.json here; save the tokenizer as a fast one")
    kind = PreTrainedTokenizerFast if pair or ours else AutoTokenizer
    try:
        tokenizer = kind.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
        tokenizer("a")  # what is wrong with its settings shows here
    except BaseException as error:  # the Rust reader raises bare Exception, and its panics are not even that
        if not isinstance(error, Exception) and not is_rust_error(error):
            raise
        raise ModelError(f"{path}: the tokenizer cannot be read: {one_line(error)}") from error
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(f"{path}: {type(tokenizer).__name__} is not a fast tokenizer; save it as tokenizer.json")
    if len(tokenizer) == 0:
        raise ModelError(f"{path}: the tokenizer's vocabulary is empty")
    return tokenizer


def token_count(tokenizer: Any) -> int:
    """One more than the largest id of the tokenizer, added ones too; of an encoder-decoder's pair: of its targets."""
    if isinstance(tokenizer, PairTokenizer):
        return max(token_count(tokenizer.target), 1 + tokenizer.decoder_start_token_id)
    return 1 + max(tokenizer.get_vocab().values())


def encode_prompt(tokenizer: FastTokenizer, prompt: Prompt, *, tools: Tools = ()) -> list[int]:
    """The tokens a sampler is given for `prompt`.

    Messages go through the chat template with a generation prompt; text is taken as it stands, behind a BOS token only
    if the tokenizer puts one there itself; an encoder-decoder's pair makes the text a source and takes no messages.
    Raises DataError for an empty prompt, a prompt with both or neither of messages and text, tools beside a text, or a
    template that is missing, refuses, or has no place for something given.
    """
    where = f"prompt {prompt.key}"
    if bool(prompt.messages) == (prompt.text is not None):
        raise DataError(f"{where}: give exactly one of messages and text")
    if isinstance(tokenizer, PairTokenizer):
        with at(where):
            if prompt.text is None:
                raise DataError(_NO_CHAT)
            return tokenizer.source_ids(prompt.text)
    if prompt.text is not None:
        _check_no_tools(tools)
        ids = encode_text(tokenizer, prompt.text)
    else:
        rendered = ChatTemplate(tokenizer, tools).render(prompt.messages, add_generation_prompt=True)
        ids, _ = encode_pieces(tokenizer, rendered.text, rendered.cuts)
    if not ids:
        raise DataError(f"{where}: it has no tokens")
    return ids


def encode_text(tokenizer: FastTokenizer, text: str) -> list[int]:
    """The tokens of a text as it stands, behind BOS if the tokenizer adds one itself and the text does not have it."""
    ids, _ = encode_pieces(tokenizer, text, ())
    bos = tokenizer.bos_token_id
    adds_bos = bos is not None and list(tokenizer("")["input_ids"])[:1] == [bos]
    return [bos, *ids] if adds_bos and ids[:1] != [bos] else ids


def encode_conversation(
    tokenizer: FastTokenizer, messages: Sequence[Message], *, max_length: int | None = None, tools: Tools = ()
) -> Example:
    """The training sequence of a conversation; the mask is True on its assistant turns' own tokens.

    That is what the model would sample after the generation prompt: the reply up to and with the end-of-turn token,
    not the header before it and not the white space after it. `Message.train` overrides per assistant turn; system,
    user and tool messages are never trained on.

    Raises DataError when the template is missing, refuses the conversation, has no place for a part of it, rewrites
    earlier turns, never closes a turn, or leaves nothing to train on; TooLongError beyond `max_length` tokens (nothing
    is ever cut).
    """
    if isinstance(tokenizer, PairTokenizer):
        raise DataError(_NO_CHAT)
    template = ChatTemplate(tokenizer, tools)
    rendered = template.render(messages, add_generation_prompt=False)
    spans = template.trained_spans(rendered, messages)
    ids, starts = encode_pieces(tokenizer, rendered.text, rendered.cuts)
    mask = [False] * len(ids)
    for low, high in spans:
        for t in range(bisect_left(starts, low), bisect_left(starts, high)):
            mask[t] = True
    if not any(mask[1:]):
        raise DataError("the trained turns of this conversation have no tokens: is the tokenizer the template's own?")
    mask[0] = False
    check_length(len(ids), max_length)
    return Example(ids, mask)


def encode_completion(
    tokenizer: FastTokenizer,
    prompt: str | Sequence[Message],
    completion: str | Sequence[Message],
    *,
    max_length: int | None = None,
    tools: Tools = (),
) -> Example:
    """The training sequence of a prompt and its completion; only the completion is trained on, end token included.

    Two strings: the prompt as `encode_text`, then the completion's own tokens and EOS. A message list as prompt: a
    chat, whose completion is a message list or the text of one assistant turn. For an encoder-decoder's pair both are
    strings, source and target. Raises as `encode_conversation` does.
    """
    if isinstance(tokenizer, PairTokenizer):
        if not isinstance(prompt, str) or not isinstance(completion, str):
            raise DataError(_NO_CHAT)
        _check_no_tools(tools)
        return _checked(tokenizer.source_ids(prompt), tokenizer.target_ids(completion), max_length)
    if isinstance(prompt, str):
        if not isinstance(completion, str):
            raise DataError("'prompt' is text but 'completion' is a list of messages: make both the same")
        _check_no_tools(tools)
        if not (head := encode_text(tokenizer, prompt)):
            raise DataError("'prompt' has no tokens")
        tail = with_eos(tokenizer, encode_pieces(tokenizer, completion, (), continues=True)[0])
        return _checked(head, tail, max_length)
    given = [replace(m, train=False) if m.role == "assistant" and m.train is None else m for m in prompt]
    reply = [Message("assistant", completion)] if isinstance(completion, str) else list(completion)
    return encode_conversation(tokenizer, [*given, *reply], max_length=max_length, tools=tools)


def encode_document(
    tokenizer: FastTokenizer, text: str, *, max_length: int | None = None, tools: Tools = ()
) -> Example:
    """The training sequence of a plain text: every token is trained on, with EOS at the end.

    The very first token is not: nothing stands before it to predict it. Raises DataError when nothing is left to train
    on or the tokenizer has no EOS; TooLongError beyond `max_length`.
    """
    if isinstance(tokenizer, PairTokenizer):
        raise DataError("an encoder-decoder learns from pairs: give records with 'prompt' (source) and 'completion'")
    _check_no_tools(tools)
    if not (ids := encode_text(tokenizer, text)):
        raise DataError("'text' has no tokens")
    ids = with_eos(tokenizer, ids)
    return _checked(ids[:1], ids[1:], max_length)


def with_eos(tokenizer: FastTokenizer, ids: list[int]) -> list[int]:
    """`ids` ended by exactly one EOS token. Raises DataError when the tokenizer has none."""
    if (eos := tokenizer.eos_token_id) is None:
        raise DataError("the tokenizer has no EOS token, so nothing can teach the model to stop: set its eos_token")
    return ids if ids[-1:] == [eos] else [*ids, eos]


def _check_no_tools(tools: Tools) -> None:
    if tools:
        raise DataError("'tools' have no place beside a text; give messages, which go through the chat template")


def _checked(given: list[int], trained: list[int], max_length: int | None) -> Example:
    ids = given + trained
    check_length(len(ids), max_length)
    return Example(ids, [False] * len(given) + [True] * len(trained))


def check_length(length: int, max_length: int | None) -> None:
    """TooLongError beyond `max_length` tokens; None is no limit."""
    if max_length is not None and length > max_length:
        raise TooLongError(length, max_length)


_GENERATION, _CONFIG = "generation_config.json", "config.json"
_COPIED = ("bos_token_id", "pad_token_id", "decoder_start_token_id")
_ASKED, _REPLY, _TOOLS = Message("user", "What is it?"), "It is one.", ("first_tool", "second_tool")
_CALLS = [{"id": f"callabcd{i}", "type": "function", "function": {"name": _TOOLS[i], "arguments": {}}} for i in (0, 1)]
_NO_ARGUMENTS = {"type": "object", "properties": {}}
_OFFERED = [
    {"type": "function", "function": {"name": name, "description": "A tool.", "parameters": _NO_ARGUMENTS}}
    for name in _TOOLS
]
# (tools, a turn of the assistant, text from which on its end is looked for)
_PROBES: tuple[tuple[list[dict[str, Any]], Message, str], ...] = (
    ([], Message("assistant", _REPLY), _REPLY),
    (_OFFERED, Message("assistant", "", tool_calls=tuple(_CALLS)), _TOOLS[0]),
)


def turn_ends(folder: Path | str, tokenizer: Any, *, vocab_size: int | None = None) -> tuple[int, ...]:
    """The ids that end a turn of the model in `folder`, each once.

    In this order: those of generation_config.json, else of config.json; the tokenizer's EOS; what closes the chat
    template's turns. ModelError where there is none, and for one that is no token of `vocab_size`.
    """
    paths = (Path(folder) / name for name in (_GENERATION, _CONFIG))
    said = ((path, _ids(read_object(path, ModelError), path)) for path in paths if path.is_file())
    where, named = next(((path, ids) for path, ids in said if ids), ("", []))
    found = dict.fromkeys(named, f"{where}: eos_token_id")
    if tokenizer.eos_token_id is not None:
        found.setdefault(tokenizer.eos_token_id, f"{folder}: the tokenizer's EOS")
    for token in closing_tokens(tokenizer):
        found.setdefault(tokenizer.convert_tokens_to_ids(token), f"{folder}: the chat template's {token!r}")
    if not found:
        raise ModelError(
            f"{folder}: neither {_GENERATION}, {_CONFIG}, the tokenizer nor a chat template says what ends a turn; "
            f"write eos_token_id into {_GENERATION}"
        )
    for token_id, who in found.items():
        if vocab_size is not None and token_id >= vocab_size:
            raise ModelError(f"{who} is token {token_id}, but the model has only {vocab_size} tokens; correct it")
    return tuple(found)


def write_ends(folder: Path, ends: Sequence[int]) -> None:
    """Make the model folder's generation_config.json say that these ids end a turn, if it does not yet.

    Where there is no such file it also gets what transformers would have taken from config.json.
    """
    path = folder / _GENERATION
    config = read_object(path if path.is_file() else folder / _CONFIG, ModelError)
    if set(_ids(config, path)) == set(ends):
        return
    if not path.is_file():
        config = {name: config[name] for name in _COPIED if config.get(name) is not None}
    config["eos_token_id"] = ends[0] if len(ends) == 1 else list(ends)
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def closing_tokens(tokenizer: FastTokenizer) -> list[str]:
    """The special tokens with which the chat template closes an assistant's turn: a reply, and a turn of tool calls.

    Each as training marks it, and, where the template writes more after a conversation's last turn, as it closes a
    turn that a user's follows. Nothing where there is no template or it refuses; nor a token that the template writes
    within the turn too, since that does not end it.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        return []
    turns: list[str] = []
    for tools, turn, mark in _PROBES:
        with suppress(DataError):  # a template may refuse such a conversation, which then nobody trains on
            template = ChatTemplate(tokenizer, tools)
            last = _since(mark, template.closed([_ASKED, turn])[0])
            turns.append(last)
            followed = _since(mark, template.closed([_ASKED, turn, _ASKED])[0])
            turns.append(_common(tokenizer, last, followed).rstrip())
    found = [(closing_special(tokenizer, text), text) for text in turns]
    return list(dict.fromkeys(token for token, text in found if token is not None and text.count(token) == 1))


def _since(mark: str, text: str) -> str:
    """`text` from the last `mark` on; nothing where it is not there."""
    return text[text.rindex(mark) :] if mark in text else ""


def _common(tokenizer: FastTokenizer, text: str, other: str) -> str:
    """The beginning of `text` whose tokens are also those of `other`."""
    ids, starts = encode_pieces(tokenizer, text, ())
    same = takewhile(lambda pair: pair[0] == pair[1], zip(ids, encode_pieces(tokenizer, other, ())[0], strict=False))
    return text[: [*starts, len(text)][len(list(same))]]


def _ids(config: dict[str, Any], path: Path) -> list[int]:
    """eos_token_id as a list; of a text model's part of config.json too. ModelError for what are no token ids."""
    if (value := config.get("eos_token_id")) is None and isinstance(text := config.get("text_config"), dict):
        value = text.get("eos_token_id")
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in ids):
        raise ModelError(f"{path}: eos_token_id is {value!r}; it must be a token id or a list of them")
    return ids

"""What ends a turn: the tokens after which a completion stops, here and wherever the model is taken.

transformers reads them from generation_config.json, else from config.json. What training ends a sequence with may be
another token: the tokenizer's EOS after a text, the special token with which the chat template closes an assistant's
turn after a conversation. All of these end a turn; `write_ends` says so in a folder, so that others stop there too.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upslope.atomic import read_object
from upslope.data.pieces import closing_special, encode_pieces
from upslope.data.template import ChatTemplate
from upslope.errors import DataError, ModelError
from upslope.types import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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
    where, named = _named(Path(folder))
    found = dict.fromkeys(named, where)
    if tokenizer.eos_token_id is not None:
        found.setdefault(tokenizer.eos_token_id, f"{folder}: the tokenizer's EOS")
    for token in closing_tokens(tokenizer):
        found.setdefault(tokenizer.convert_tokens_to_ids(token), f"{folder}: the chat template's {token!r}")
    if not found:
        raise ModelError(
            f"{folder}: neither {_GENERATION}, {_CONFIG}, the tokenizer nor a chat template says what ends a turn; "
            f"write eos_token_id into {_GENERATION}"
        )
    for token_id, said in found.items():
        if vocab_size is not None and token_id >= vocab_size:
            raise ModelError(f"{said} is token {token_id}, but the model has only {vocab_size} tokens; correct it")
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


def closing_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The special tokens with which the chat template closes an assistant's turn: a reply, and a turn of tool calls.

    Each as training marks it, and, where the template writes more after a conversation's last turn, as it closes a
    turn that a user's follows. Nothing where there is no template or it refuses; nor a token that the template writes
    within the turn too, since that does not end it.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        return []
    turns: list[str] = []
    for tools, turn, mark in _PROBES:
        try:
            template = ChatTemplate(tokenizer, tools)
            last = _since(mark, template.closed([_ASKED, turn])[0])
            turns.append(last)
            followed = _since(mark, template.closed([_ASKED, turn, _ASKED])[0])
        except DataError:  # a template may refuse such a conversation, which then nobody trains on
            continue
        turns.append(_common(tokenizer, last, followed).rstrip())
    found = [(closing_special(tokenizer, text), text) for text in turns]
    return list(dict.fromkeys(token for token, text in found if token is not None and text.count(token) == 1))


def _since(mark: str, text: str) -> str:
    """`text` from the last `mark` on; nothing where it is not there."""
    return text[text.rindex(mark) :] if mark in text else ""


def _common(tokenizer: PreTrainedTokenizerBase, text: str, other: str) -> str:
    """The beginning of `text` whose tokens are also those of `other`."""
    ids, starts = encode_pieces(tokenizer, text, ())
    same = takewhile(lambda pair: pair[0] == pair[1], zip(ids, encode_pieces(tokenizer, other, ())[0], strict=False))
    return text[: [*starts, len(text)][len(list(same))]]


def _named(folder: Path) -> tuple[str, list[int]]:
    """What the first of the two files says that says anything, and its name; a text model's part of config.json too."""
    for name in (_GENERATION, _CONFIG):
        path = folder / name
        if path.is_file() and (ids := _ids(read_object(path, ModelError), path)):
            return f"{path}: eos_token_id", ids
    return "", []


def _ids(config: dict[str, Any], path: Path) -> list[int]:
    """eos_token_id as a list. ModelError for what are no token ids."""
    value = config.get("eos_token_id")
    if value is None and isinstance(text := config.get("text_config"), dict):
        value = text.get("eos_token_id")
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in ids):
        raise ModelError(f"{path}: eos_token_id is {value!r}; it must be a token id or a list of them")
    return ids

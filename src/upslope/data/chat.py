"""Conversations to tokens: what the sampler is prompted with, and what is trained on.

For every assistant turn the prompt's tokens (`encode_prompt` of the messages before it) are a prefix of the training
tokens (`encode_conversation` of the whole): both tokenise the template's text in the same pieces.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upslope.atomic import read_object
from upslope.data.messages import at
from upslope.data.pairs import SOURCE_FOLDER, PairTokenizer, pair_tokenizer
from upslope.data.pieces import encode_pieces
from upslope.data.template import ChatTemplate, Tools
from upslope.errors import DataError, ModelError, is_rust_error, one_line
from upslope.types import Example, Message, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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
    file = path / "config.json"
    config = read_object(file, ModelError) if file.is_file() else {}
    if config.get("is_encoder_decoder"):
        source = _load_one(path / SOURCE_FOLDER, pair=True) if (path / SOURCE_FOLDER).is_dir() else None
        return pair_tokenizer(path, config, _load_one(path, pair=True), source)
    return _load_one(path, ours=str(config.get("model_type")).startswith("upslope_"))


def _load_one(path: Path, *, pair: bool = False, ours: bool = False) -> PreTrainedTokenizerBase:
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


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, *, tools: Tools = ()) -> list[int]:
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


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The tokens of a text as it stands, behind BOS if the tokenizer adds one itself and the text does not have it."""
    ids, _ = encode_pieces(tokenizer, text, ())
    bos = tokenizer.bos_token_id
    adds_bos = bos is not None and list(tokenizer("")["input_ids"])[:1] == [bos]
    return [bos, *ids] if adds_bos and ids[:1] != [bos] else ids


def encode_conversation(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, max_length: int | None = None, tools: Tools = ()
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
    tokenizer: PreTrainedTokenizerBase,
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
        head = encode_text(tokenizer, prompt)
        if not head:
            raise DataError("'prompt' has no tokens")
        tail = with_eos(tokenizer, encode_pieces(tokenizer, completion, (), continues=True)[0])
        return _checked(head, tail, max_length)
    given = [replace(m, train=False) if m.role == "assistant" and m.train is None else m for m in prompt]
    reply = [Message("assistant", completion)] if isinstance(completion, str) else list(completion)
    return encode_conversation(tokenizer, [*given, *reply], max_length=max_length, tools=tools)


def encode_document(
    tokenizer: PreTrainedTokenizerBase, text: str, *, max_length: int | None = None, tools: Tools = ()
) -> Example:
    """The training sequence of a plain text: every token is trained on, with EOS at the end.

    The very first token is not: nothing stands before it to predict it. Raises DataError when nothing is left to train
    on or the tokenizer has no EOS; TooLongError beyond `max_length`.
    """
    if isinstance(tokenizer, PairTokenizer):
        raise DataError("an encoder-decoder learns from pairs: give records with 'prompt' (source) and 'completion'")
    _check_no_tools(tools)
    ids = encode_text(tokenizer, text)
    if not ids:
        raise DataError("'text' has no tokens")
    ids = with_eos(tokenizer, ids)
    return _checked(ids[:1], ids[1:], max_length)


def with_eos(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    """`ids` ended by exactly one EOS token. Raises DataError when the tokenizer has none."""
    eos = tokenizer.eos_token_id
    if eos is None:
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

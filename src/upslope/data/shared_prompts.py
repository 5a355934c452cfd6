"""Preference rows whose sides repeat the prompt: UltraFeedback's conversations, HH-RLHF's sides without a prompt."""

from __future__ import annotations

from itertools import takewhile

from upslope.errors import DataError
from upslope.types import Message

__all__ = ["split_sides"]

Content = str | tuple[Message, ...]
TURN = "\n\nAssistant:"
"""What HH-RLHF's texts write before each reply."""


def split_sides(prompt: Content | None, chosen: Content, rejected: Content) -> tuple[Content, ...]:
    """Prompt, chosen and rejected of a row, what the sides have in common moved into the prompt.

    prompt: None where the row has none; a text, which conversations then hold as a user's turn. Sides that do not
    repeat the prompt stay as they are. Of conversations the prompt is their longest common beginning before the last
    reply; of texts it ends with the last "Assistant:" of their common beginning, else before its last word.
    DataError: nothing in common, nothing that differs, another prompt than the row's.
    """
    if isinstance(chosen, str) and isinstance(rejected, str):
        if prompt is None:
            return _of_texts(chosen, rejected)
        if isinstance(prompt, str) and all(side.startswith(prompt) and side != prompt for side in (chosen, rejected)):
            return prompt, chosen.removeprefix(prompt), rejected.removeprefix(prompt)
        return prompt, chosen, rejected
    if isinstance(chosen, str) or isinstance(rejected, str):
        if prompt is not None and not isinstance(prompt, str):
            return prompt, chosen, rejected
        raise DataError("one of 'chosen' and 'rejected' is a text, the other messages: make both the same")
    if isinstance(prompt, tuple) and not (chosen[: len(prompt)] == prompt == rejected[: len(prompt)]):
        return prompt, chosen, rejected
    most = min(len(chosen), len(rejected)) - 1
    common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(chosen[:most], rejected, strict=False)))
    if isinstance(prompt, str) and common == 0 and chosen[0].role == rejected[0].role == "assistant":
        return (Message("user", prompt),), chosen, rejected
    if common and chosen[common] == rejected[common]:
        raise DataError("'chosen' and 'rejected' differ in no reply, one begins with the other; drop the row")
    head = chosen[:common]
    if isinstance(prompt, str) and not any(m.role == "user" and m.content.strip() == prompt.strip() for m in head):
        raise DataError("'prompt' is none of the user's turns with which 'chosen' and 'rejected' begin")
    for key, side in (("chosen", chosen), ("rejected", rejected)):
        if not common or side[common].role != "assistant":
            what = f"'{key}[{common}]' is a turn of the {side[common].role}" if common else "nothing of them is alike"
            raise DataError(f"'chosen' and 'rejected' must be alike up to a reply, but {what}; give a prompt")
    return head, chosen[common:], rejected[common:]


def _of_texts(chosen: str, rejected: str) -> tuple[str, str, str]:
    same = takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False))
    common = "".join(letter for letter, _ in same)
    end = common.rfind(TURN)
    cut = end + len(TURN) if end >= 0 else len(common[: max(common.rfind(" "), common.rfind("\n"))].rstrip())
    if chosen == rejected or not common[:cut].strip():
        what = "are the same" if chosen == rejected else "have no beginning in common that could be the prompt"
        raise DataError(f"'chosen' and 'rejected' {what}; give a prompt of its own, or drop the row")
    return chosen[:cut], chosen[cut:], rejected[cut:]

"""What a chat template makes of a conversation: its text, and where in it each assistant turn lies.

Two kinds of template are understood. Those with {% generation %} blocks say what is trained on. All others are
probed by prefixes: the text of messages[:k] with a generation prompt is what the sampler sees before turn k, the text
of messages[:k+1] is that with the turn. Where these are not prefixes of the whole text the template rewrites
history, and no mask over the whole text would describe what the model saw.

Whatever is rendered is checked for what the template leaves out: a conversation whose calls, tools or contents it has
no place for, or cuts, is refused by name (data/lost.py).
"""

import os
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from upslope.data.lost import check_nothing_cut, check_nothing_lost, check_reply_whole, name_of
from upslope.data.messages import at, message_of, tools_of
from upslope.data.pieces import FastTokenizer, closing_special
from upslope.data.sandbox import FAULTS, budget, compiled, line_of
from upslope.errors import DataError, one_line
from upslope.types import Message

Tools = Sequence[Mapping[str, Any]]
Span = tuple[int, int]

_CLOCK: ContextVar[datetime | None] = ContextVar("the clock of chat templates", default=None)
_HERE = "the conversation"
_CONVERSATION_SECONDS = 120.0
_MARKING = threading.Lock()
_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")


@contextmanager
def clock_at(moment: datetime) -> Iterator[None]:
    """Within it `strftime_now` in a chat template says `moment`; elsewhere it is the time of day."""
    token = _CLOCK.set(moment)
    try:
        yield
    finally:
        _CLOCK.reset(token)


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation's text. `starts[k]`: the character where the sampler takes over in assistant turn k (a message
    index), or None when its prompt is not a prefix of the text. `marked`: the {% generation %} spans, if there are."""

    text: str
    starts: dict[int, int | None]
    marked: list[Span] | None

    @property
    def cuts(self) -> list[int]:
        """The borders between what was given and what was sampled, ascending."""
        return sorted({start for start in self.starts.values() if start is not None})


class ChatTemplate:
    """One tokenizer's chat template with the tools offered to it and further `variables` that it may read.

    Raises DataError when the tokenizer has none.
    """

    def __init__(self, tokenizer: FastTokenizer, tools: Tools = (), variables: Mapping[str, Any] | None = None) -> None:
        if tokenizer.chat_template is None:
            raise DataError(
                f"the tokenizer of {tokenizer.name_or_path or 'this model'} has no chat template: put a "
                "chat_template.jinja into the model folder, or give the data as text or as prompt and completion texts"
            )
        self.tokenizer = tokenizer
        self.tools = [dict(tool) for tool in tools_of(list(tools), _HERE)] or None
        self.variables = dict(variables or {})
        try:
            self.source = tokenizer.get_chat_template(tools=self.tools)
        except ValueError as error:
            raise DataError(f"chat template: {one_line(error)}") from error
        self.has_marks = bool(_MARKED.search(self.source))

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> Rendered:
        """The text of a conversation and where its assistant turns begin.

        Raises DataError if the template refuses, LostError (a DataError) if it has no place for something given.
        """
        if not messages:
            raise DataError("the conversation has no messages")
        with budget(seconds=_CONVERSATION_SECONDS):
            messages = _in_form(messages)
            text, marked = self._raw(messages, add_generation_prompt)
            check_nothing_lost(
                messages, self.tools or [], text, lambda m, tools: self._raw(m, add_generation_prompt, tools)[0]
            )
            starts = {k: self._start(text, messages[:k]) for k, turn in enumerate(messages) if turn.role == "assistant"}
            check_nothing_cut(messages, text, starts)
        return Rendered(text, starts, marked if self.has_marks else None)

    def closed(self, messages: Sequence[Message]) -> tuple[str, str | None]:
        """The text of a conversation up to the end of its last turn, and the special token there, if one closes it.

        The turn ends before the white space at the text's end; where a {% generation %} block ends with a special
        token, with that. Raises DataError if the template refuses.
        """
        text, marked = self._raw(messages, False)
        for end in [high for _, high in marked[-1:]] + [len(text)]:
            closed = text[:end].rstrip()
            if (closing := closing_special(self.tokenizer, closed)) is not None:
                return closed, closing
        return text.rstrip(), None

    def trained_spans(self, rendered: Rendered, messages: Sequence[Message]) -> list[Span]:
        """Character spans that are trained on, end-of-turn tokens included, ascending.

        Raises DataError naming the message when a turn cannot be told apart, is never closed by a special token, or
        when nothing is trained at all.
        """
        spans: list[Span] = []
        messages = _in_form(messages)
        for k, turn in enumerate(messages):
            with at(name_of(messages, k)):
                if turn.train and turn.role != "assistant":
                    raise DataError("only assistant turns can be trained on; drop its 'train'")
                if turn.role == "assistant" and turn.train is not False:
                    spans.extend(self._turn_spans(rendered, messages, k))
        if not spans:
            raise DataError(
                "no assistant turn is trained on in this conversation: end it with an assistant message "
                "(and do not set train to false on all of them)"
            )
        return spans

    def _turn_spans(self, rendered: Rendered, messages: Sequence[Message], k: int) -> list[Span]:
        if (start := rendered.starts[k]) is None:
            raise DataError(
                "the chat template is not prefix-preserving: what the model would be prompted "
                "with here is not how the whole conversation begins, so it cannot be trained as one sequence; split it "
                "into one conversation per reply, or use a template that leaves earlier turns as they were"
            )
        header = rendered.text[start : max(start, rendered.text.find(messages[k].content.strip(), start))].strip()
        if header and "add_generation_prompt" not in self.source:
            raise DataError(
                f"the chat template ignores add_generation_prompt, so the model would have to "
                f"write {header!r} itself; add '{{% if add_generation_prompt %}}' with it to the template's end"
            )
        closed, closing = self.closed(messages[: k + 1])
        if closing is None:
            raise DataError(
                f"the chat template closes the assistant's turn with no special token "
                f"(it ends in {closed[-12:]!r}), so the model would never learn to stop; let the template write "
                "eos_token there, or register its end-of-turn text as a special token"
            )
        if closing in messages[k].content:
            raise DataError(
                f"its content holds {closing!r}, the token that ends a turn: the model would "
                "learn to go on after an end; take it out, the template writes it"
            )
        spans = [(start, len(closed))]
        if rendered.marked is not None:
            spans = self._marked_spans(rendered, start, closing, messages[k])
        elif not rendered.text.startswith(closed) or len(closed) <= start:
            raise DataError(
                "the chat template is not prefix-preserving: it writes this turn differently "
                "once more messages follow; set train to false on all but the last assistant turn, or split the "
                "conversation into one per reply, or use a template with {% generation %} blocks"
            )
        if spans:
            reply = "".join(rendered.text[low:high] for low, high in spans)
            check_reply_whole(rendered.text[: spans[0][0]], reply, messages[k])
        return spans

    def _marked_spans(self, rendered: Rendered, start: int, closing: str, turn: Message) -> list[Span]:
        """The {% generation %} spans of a turn, the last one made to end right after the end-of-turn token."""
        limit = min((cut for cut in rendered.cuts if cut > start), default=len(rendered.text))
        spans = [span for span in rendered.marked or [] if start <= span[0] < limit and span[0] < span[1]]
        if not spans:
            if turn.train:
                raise DataError("train is true, but the template has no generation block for it")
            return []
        low, high = spans[-1]
        inner = rendered.text[low:high].rstrip()
        if closing_special(self.tokenizer, inner) is not None:
            return [*spans[:-1], (low, low + len(inner))]
        if rendered.text.startswith(closing, high):
            return [*spans[:-1], (low, high + len(closing))]
        raise DataError(
            f"the template's generation block ends before the end-of-turn token {closing!r}, so the model would never "
            "learn to stop; move {% endgeneration %} behind it"
        )

    def _start(self, text: str, before: Sequence[Message]) -> int | None:
        with suppress(DataError):  # a template may refuse to prompt here; training on such a turn is refused by name
            if before and text.startswith(prompt := self._raw(before, True)[0]):
                return len(prompt)
        return None

    def _raw(
        self, messages: Sequence[Message], add_generation_prompt: bool, tools: Tools | None = None
    ) -> tuple[str, list[Span]]:
        """The text and the {% generation %} spans, under the limits of data/sandbox.py. DataError: it refuses."""
        given = {
            "documents": None,
            **self.tokenizer.special_tokens_map,
            **self.variables,
            "messages": [replace(message, train=None).as_mapping() for message in messages],
            "tools": self.tools if tools is None else list(tools) or None,
            "add_generation_prompt": add_generation_prompt,
        }
        blocks: list[str] = []
        marked: list[Span] = []
        template = None
        try:
            with budget(sum(len(message.content) for message in messages)), ExitStack() as tracked:
                template = compiled(self.source)
                template.globals["strftime_now"] = lambda format: (_CLOCK.get() or datetime.now()).strftime(format)
                if self.has_marks:  # the tracker is the template's, which threads share
                    tracked.enter_context(_MARKING)
                    tracked.enter_context(template.environment.activate_tracker(blocks, marked))
                for block in template.root_render_func(template.new_context(given)):
                    blocks.append(block)  # one by one: the tracker reads what is there
        except FAULTS as error:
            path = os.path.join(self.tokenizer.name_or_path or "", "chat_template.jinja")
            line = line_of(error, template)
            places = [path] * os.path.isfile(path) + [f"line {line}"] * (line is not None)
            where = f" ({', '.join(places)})" if places else ""
            roles = ", ".join(message.role for message in messages[:8]) + ", …" * (len(messages) > 8)
            said = f"the chat template{where} refuses this conversation ({roles}): {one_line(error)}"
            raise DataError(said) from error
        return "".join(blocks), marked


def _in_form(messages: Sequence[Message]) -> list[Message]:
    """The messages with their calls as templates want them, whoever made them."""
    return [
        message_of(message.as_mapping(), f"messages[{k}]", _HERE) if message.tool_calls else message
        for k, message in enumerate(messages)
    ]

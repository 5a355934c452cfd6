"""A conversation with one model: its turns, how replies are drawn, and the engine that draws them.

The engine keeps the keys and values of what was said, so a later turn costs only what is new in it.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from upslope.build import load_inference
from upslope.commands.generate import has_template, open_engine, say_suggested
from upslope.config import coerce, hints_of, suggestion
from upslope.data.chat import encode_prompt
from upslope.data.records import Record
from upslope.data.template import Tools
from upslope.errors import ConfigError, DataError, ModelError
from upslope.models.attention.context import BLOCK
from upslope.options import ChatOptions
from upslope.types import Completion, Message, Prompt, SamplingParams

Show = Callable[[str], None]
Stopped = Callable[[], bool]
SETTINGS = ("max_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "stop", "seed")
"""The options that say how a reply is drawn, each the engine's parameter of that name."""
ALTERNATIVES = 3


@dataclass(frozen=True, slots=True)
class Reply:
    """What came: the completion (log-probs at the sampling temperature, ALTERNATIVES per token) and what it cost.

    `cached_tokens` of the prompt's `prompt_tokens` were in the prefix cache; `limit` is max_tokens, or what the
    context had left.
    """

    completion: Completion
    prompt_tokens: int
    cached_tokens: int
    limit: int
    seconds: float


class ChatSession:
    """`turns` is the conversation without its system turn; it ends with a reply, or is empty, or was loaded so.

    Every method that changes the conversation leaves it as it was when it raises.
    """

    def __init__(self, options: ChatOptions) -> None:
        self.options = options
        self.system = options.system
        self.turns: list[Message] = []
        self.tools: Tools = ()
        self.last: Reply | None = None
        self._attempt = 0
        self.open(options.model)

    def open(self, source: str) -> None:
        """Go on with another model. Raises ModelError, also for one without a chat template."""
        policy = load_inference(source, dtype=self.options.dtype)
        if not has_template(policy.tokenizer):
            raise ModelError(f"{source}: it has no chat template to talk through; use upslope generate")
        say_suggested(policy, self.options)
        positions, room = policy.model.spec.max_positions, self.options.kv_cache_gb
        self.engine = open_engine(policy, sequences=1, longest=positions, max_batch=1, kv_cache_gb=room)
        self.tokenizer: Any = policy.tokenizer
        self.options = replace(self.options, model=source)
        self.last = None

    @property
    def context(self) -> int:
        """Tokens that a conversation may have: the model's positions, or what the cache holds."""
        return min(self.engine.model.spec.max_positions, self.engine.pool.num_blocks * BLOCK)

    @property
    def messages(self) -> tuple[Message, ...]:
        """The conversation with its system turn."""
        return self._with_system(self.turns)

    @property
    def row(self) -> dict[str, Any]:
        """The conversation as a row that `upslope sft` takes. Raises DataError when it does not end with a reply."""
        if not self.turns or self.waiting:
            raise DataError("there is no reply to save yet")
        row: dict[str, Any] = {"messages": [m.as_mapping() for m in self.messages]}
        return row | ({"tools": list(self.tools)} if self.tools else {})

    @property
    def waiting(self) -> bool:
        """Whether the last turn is to be answered."""
        return bool(self.turns) and self.turns[-1].role != "assistant"

    def say(self, text: str, show: Show, stopped: Stopped) -> Reply:
        """Add a user turn and the reply to it; see `_answer`."""
        if self.waiting:
            raise DataError("the last turn has no reply yet: /retry draws it, /undo takes the turn back")
        return self._answer([*self.turns, Message("user", text)], 0, show, stopped)

    def retry(self, show: Show, stopped: Stopped) -> Reply:
        """Draw the last reply once more, with other random numbers."""
        if not self.turns:
            raise DataError("there is no reply yet")
        asked = self.turns if self.waiting else self.turns[:-1]
        return self._answer(asked, self._attempt + (not self.waiting), show, stopped)

    def edit(self, text: str, show: Show, stopped: Stopped) -> Reply:
        """Say the last user turn differently and draw the reply to it."""
        return self._answer([*self.turns[: self._last_user()], Message("user", text)], 0, show, stopped)

    def undo(self) -> str:
        """Take back the last user turn and what followed it; returns its text."""
        place = self._last_user()
        text = self.turns[place].content
        self.turns, self.last, self._attempt = self.turns[:place], None, 0
        return text

    def last_user_text(self) -> str:
        """What the user said last."""
        return self.turns[self._last_user()].content

    def start(self, messages: Sequence[Message] = (), tools: Tools = ()) -> None:
        """A new conversation, empty (the system turn stays), or one that was saved, with its own system turn."""
        turns = list(messages)
        if turns:
            self.system = turns.pop(0).content if turns[0].role == "system" else None
        self.turns, self.tools, self.last, self._attempt = turns, tools, None, 0

    def load(self, record: Record) -> None:
        """Go on with a row of training data. Raises DataError for a row that holds no messages."""
        if record.kind != "messages":
            raise DataError(f"{record.where}: a row of kind {record.kind!r}; a conversation has messages")
        self.start(record.messages, record.tools)

    def set(self, name: str, words: Sequence[str]) -> None:
        """Change how replies are drawn. Raises ConfigError for an unknown name or a value out of range."""
        key = name.replace("-", "_")
        if key not in SETTINGS:
            raise ConfigError(
                f"no setting {name!r}{suggestion(key, SETTINGS)}; there are: {', '.join(map(repr, SETTINGS))}"
            )
        hint = hints_of(ChatOptions)[key]
        values = tuple(coerce(key, word, hint, f"/set {name}", word=True) for word in words)
        if key != "stop" and len(values) != 1:
            raise ConfigError(f"/set {name} takes one value")
        changed = replace(self.options, **{key: values if key == "stop" else values[0]})
        changed.validate()
        self.options = changed

    def _with_system(self, turns: Sequence[Message]) -> tuple[Message, ...]:
        return (*([] if self.system is None else [Message("system", self.system)]), *turns)

    def _last_user(self) -> int:
        places = [place for place, turn in enumerate(self.turns) if turn.role == "user"]
        if not places:
            raise DataError("you have not said anything yet")
        return places[-1]

    def _answer(self, turns: list[Message], attempt: int, show: Show, stopped: Stopped) -> Reply:
        """Draw the reply to `turns`, hand its text to `show` as it comes, and add it.

        When `stopped()` turns true the reply ends as it is; one of which nothing came is not added. (options.seed,
        the number of turns, the attempt) seed it. Raises DataError when the conversation fills the context: turns are
        never left out.
        """
        prompt = encode_prompt(self.tokenizer, Prompt(0, messages=self._with_system(turns)), tools=self.tools)
        room = self.context - len(prompt)
        if room < 1:
            raise DataError(
                f"the conversation has {len(prompt)} tokens with your turn, and the context holds {self.context}, the "
                "reply included: the turn was not sent, and nothing was left out; /undo or /new makes room"
            )
        limit = min(self.options.max_tokens, room)
        began, cached = time.perf_counter(), self.engine.stats.cached_tokens
        drawn = {name: getattr(self.options, name) for name in SETTINGS} | {"max_tokens": limit}
        params = SamplingParams(**drawn, logprobs=min(ALTERNATIVES, self.engine.model.spec.vocab_size))
        request = self.engine.add(prompt, params, key=len(turns), sample=attempt, stream=True)
        completion = self._follow(request, show, stopped)
        found = self.engine.stats.cached_tokens - cached
        reply = Reply(completion, len(prompt), found, limit, time.perf_counter() - began)
        if completion.text or completion.finish_reason != "cancelled":
            self.turns, self._attempt = [*turns, Message("assistant", completion.text)], attempt
            self.last = reply
        return reply

    def _follow(self, request: int, show: Show, stopped: Stopped) -> Completion:
        try:
            while True:
                for event in self.engine.cancel(request) if stopped() else self.engine.step():
                    if event.error is not None:
                        raise event.error
                    if event.text:
                        show(event.text)
                    if event.completion is not None:
                        return event.completion
        finally:
            self.engine.cancel(request)  # unless it has finished

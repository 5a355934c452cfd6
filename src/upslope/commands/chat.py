"""`upslope chat`: talk to a model in the terminal, or through a pipe."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

from upslope.commands.chat_commands import COMMANDS, perform
from upslope.commands.chat_screen import Screen, stop_on_ctrl_c
from upslope.commands.chat_session import ChatSession, Reply
from upslope.errors import UpslopeError
from upslope.options import ChatOptions

__all__ = ["run"]


def run(options: ChatOptions) -> int:
    """Read turns and commands until the end of the input.

    Where nobody types, the first mistake is raised; on a terminal it is shown and the conversation goes on.
    """
    screen = Screen(COMMANDS)
    conversation = Conversation(ChatSession(options), screen)
    if screen.interactive:
        context = conversation.session.context
        screen.note(f"{options.model}: {context} tokens of context. /help, Ctrl-C stops a reply, Ctrl-D ends.")
    while True:
        try:
            conversation.take(screen.read())
        except EOFError:
            break
        except UpslopeError as error:
            if not screen.interactive:
                raise
            screen.note(f"error: {error}", "red")
    if screen.interactive:
        screen.note("")
    return 0


class Conversation:
    """A session and the screen it is shown on."""

    def __init__(self, session: ChatSession, screen: Screen) -> None:
        self.session = session
        self.screen = screen

    def take(self, text: str) -> None:
        """A turn, or a command; nothing for a blank line."""
        if text.startswith("/") and not text.startswith("//"):
            perform(self, text)
        elif text.strip():
            said = text[1:] if text.startswith("//") else text
            self.respond(lambda show, stopped: self.session.say(said, show, stopped))

    def respond(self, draw: Callable[[Callable[[str], None], Callable[[], bool]], Reply]) -> None:
        """Show the reply that `draw` draws while it comes, then what there is to say about it."""
        try:
            with stop_on_ctrl_c() if self.screen.interactive else nullcontext(lambda: False) as stopped:
                reply = draw(self.screen.write, stopped)
        except UpslopeError:
            if self.screen.interactive:
                self.screen.end_reply()
            raise
        self.screen.end_reply()
        for line in self._remarks(reply):
            self.screen.note(line)

    def _remarks(self, reply: Reply) -> list[str]:
        completion, lines = reply.completion, []
        if completion.finish_reason == "cancelled":
            lines.append("stopped; what came is kept" if completion.text else "stopped before anything came")
        elif completion.finish_reason == "length" and reply.limit < self.session.options.max_tokens:
            lines.append(f"cut off: the context of {self.session.context} tokens is full; /undo or /new makes room")
        elif completion.finish_reason == "length":
            lines.append(f"cut off by max_tokens = {reply.limit}; /set max_tokens N, then /retry")
        elif not completion.text:
            lines.append("an empty reply")
        if self.screen.interactive:
            count = len(completion.tokens)
            cost = f"{count} tokens in {reply.seconds:.1f} s"
            lines.append(f"{cost}; prompt: {reply.prompt_tokens} tokens, {reply.cached_tokens} of them from the cache")
        return lines

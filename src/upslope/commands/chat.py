"""`upslope chat`: talk to a model in the terminal, or through a pipe."""

from upslope.commands.chat_commands import COMMANDS, Chat
from upslope.commands.chat_screen import Screen
from upslope.commands.chat_session import ChatSession
from upslope.errors import UpslopeError
from upslope.options import ChatOptions


def run(options: ChatOptions) -> int:
    """Read turns and commands until the end of the input.

    Where nobody types, the first mistake is raised; on a terminal it is shown and the conversation goes on.
    """
    screen = Screen(COMMANDS)
    chat = Chat(ChatSession(options), screen)
    if screen.interactive:
        context = chat.session.context
        screen.note(f"{options.model}: {context} tokens of context. /help, Ctrl-C stops a reply, Ctrl-D ends.")
    while True:
        try:
            chat.take(screen.read())
        except EOFError:
            break
        except UpslopeError as error:
            if not screen.interactive:
                raise
            screen.note(f"error: {error}", "red")
    if screen.interactive:
        screen.note("")
    return 0

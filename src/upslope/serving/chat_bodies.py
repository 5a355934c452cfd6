"""What may be sent to /v1/chat/completions, and of a conversation to /tokenize.

Names and meanings are OpenAI's, with vLLM's extra fields where they are supported. A field that is not listed here is
refused by name, so that nothing a client asks for is dropped in silence.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from upslope.serving.bodies import MAX_LOGPROBS, Body, Items, ModelBody, SamplingBody

MAX_MESSAGES = 2048
"""The template is rendered once per turn of the assistant, so the work grows with the square of their number."""


def _kind_of_content(value: Any) -> str:
    return "parts" if isinstance(value, list) else "text"


class TextPart(Body):
    """A part of a message; the models served here read text only."""

    type: Literal["text"]
    text: str


Content = Annotated[
    Annotated[str, Tag("text")] | Annotated[list[TextPart], Items, Tag("parts")], Discriminator(_kind_of_content)
]


class CalledFunction(Body):
    """The function of an earlier call and its arguments, a JSON object as text."""

    name: str
    arguments: str


class EarlierCall(Body):
    """A call that the assistant made in an earlier turn."""

    id: str = Field(max_length=256)
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(Body):
    """One turn."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None
    name: str | None = None
    tool_calls: Annotated[list[EarlierCall], Items] = Field([])
    tool_call_id: str | None = None
    type: Literal["text"] | None = Field(None, description="Sent by lm-evaluation-harness; says nothing more.")

    @property
    def text(self) -> str:
        """The content, its parts joined."""
        content = self.content or ""
        return content if isinstance(content, str) else "".join(part.text for part in content)

    @model_validator(mode="after")
    def _role_has_its_fields(self) -> Self:
        if self.tool_calls and self.role != "assistant":
            raise ValueError(f"tool_calls belong to an assistant message, this one is from {self.role!r}")
        if (self.tool_call_id is not None) != (self.role == "tool"):
            raise ValueError("tool_call_id belongs to a tool message, which must have one")
        if self.content is None and not self.tool_calls:
            raise ValueError("content is missing")
        return self


class FunctionDefinition(Body):
    """A function that the model may call; `strict` makes its arguments follow `parameters`."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class FunctionTool(Body):
    """A tool; functions are the only kind."""

    type: Literal["function"]
    function: FunctionDefinition


class FunctionName(Body):
    """Which function."""

    name: str = Field(max_length=64)


class NamedTool(Body):
    """The function that must be called."""

    type: Literal["function"]
    function: FunctionName


class FreeFormat(Body):
    """Free text, or some JSON object."""

    type: Literal["text", "json_object"]


class NamedSchema(Body):
    """A JSON Schema; it is always enforced, as OpenAI does where `strict` is true."""

    name: str = Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class SchemaFormat(Body):
    """JSON that validates against a schema."""

    type: Literal["json_schema"]
    json_schema: NamedSchema


class ConversationBody(ModelBody):
    """A conversation, as the chat template writes it."""

    messages: Annotated[list[ChatMessage], Items] = Field(min_length=1, max_length=MAX_MESSAGES)
    tools: Annotated[list[FunctionTool], Items] = Field([], max_length=128)
    add_generation_prompt: bool | None = Field(None, description="Left out: unless continue_final_message.")
    continue_final_message: bool = Field(False, description="Go on with the last message, the assistant's.")
    chat_template_kwargs: dict[str, Any] = Field({}, description="Further variables of the chat template.")

    @property
    def size(self) -> int:
        """About how many characters are to be read."""
        return 2048 + sum(len(message.text) + 512 for message in self.messages)

    @property
    def offers_tools(self) -> bool:
        """Whether the reply may hold calls."""
        return bool(self.tools)

    @model_validator(mode="after")
    def _can_be_written(self) -> Self:
        names = [tool.function.name for tool in self.tools]
        if len(set(names)) < len(names):
            raise ValueError("tools: two functions have the same name")
        last = self.messages[-1]
        if self.continue_final_message and (last.role != "assistant" or not last.text.strip()):
            raise ValueError("continue_final_message needs a last message of the assistant that has text")
        return self


class ChatBody(ConversationBody, SamplingBody):
    """/v1/chat/completions. Without max_tokens or max_completion_tokens a reply may fill the context."""

    max_tokens: int | None = Field(None, ge=1, lt=2**31)
    max_completion_tokens: int | None = Field(None, ge=1, lt=2**31, description="The same as max_tokens.")
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    tool_choice: Literal["none", "auto", "required"] | NamedTool = "auto"
    parallel_tool_calls: bool = True
    response_format: Annotated[FreeFormat | SchemaFormat, Field(discriminator="type")] = FreeFormat(type="text")

    @property
    def budget(self) -> int | None:
        """The tokens that a reply may have; None: all that fit."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @model_validator(mode="after")
    def _belongs_together(self) -> Self:
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            raise ValueError("max_tokens and max_completion_tokens are two names of one thing and differ; give one")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs = true")
        names, choice = [tool.function.name for tool in self.tools], self.tool_choice
        if isinstance(choice, NamedTool) and choice.function.name not in names:
            raise ValueError(f"tool_choice: no function {choice.function.name!r} is among the tools")
        if choice == "required" and not names:
            raise ValueError("tool_choice is 'required' but there are no tools")
        if self.offers_tools and self.response_format.type != "text":
            raise ValueError("response_format does not go with tools that may be called; set tool_choice to 'none'")
        if self.constrained and self.ignore_eos:
            raise ValueError("ignore_eos does not go with an output that must end where its grammar does")
        if self.continue_final_message and self.add_generation_prompt:
            raise ValueError("continue_final_message and add_generation_prompt exclude each other")
        return self

    @property
    def offers_tools(self) -> bool:
        """Whether the reply may hold calls."""
        return bool(self.tools) and self.tool_choice != "none"

    @property
    def constrained(self) -> bool:
        """Whether a grammar decides what the reply may be."""
        strict = any(tool.function.strict for tool in self.tools)
        return self.response_format.type != "text" or (self.offers_tools and (strict or self.tool_choice != "auto"))

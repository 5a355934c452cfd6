"""What may be sent. A field that is not listed is refused by name; null means that a field was not given.

Names, meanings and ranges are OpenAI's; those that OpenAI does not have are vLLM's. So nothing that a client asks for
is dropped in silence.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator

Items = Field(fail_fast=True)
"""A list of which the first wrong item is told; the others are not even looked at."""
Token = Annotated[int, Field(ge=0, lt=2**31)]


def _kind_of_prompt(value: Any) -> str:
    first = value[0] if isinstance(value, list) and value else ""
    if not isinstance(value, list):
        return "(text)"
    return "(texts)" if isinstance(first, str) else "(token lists)" if isinstance(first, list) else "(tokens)"


Prompt = Annotated[
    Annotated[str, Tag("(text)")]
    | Annotated[list[str], Items, Tag("(texts)")]
    | Annotated[list[Token], Items, Tag("(tokens)")]
    | Annotated[list[Annotated[list[Token], Items]], Items, Tag("(token lists)")],
    Discriminator(_kind_of_prompt),
]
"""A text, texts, tokens, or lists of tokens: what the first item is, so that no other kind is tried."""


class Strict(BaseModel):
    """A JSON object of which every field is known and has the right type, without any conversion."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _one_surplus_is_enough(cls, data: Any) -> Any:
        """Of the fields that are not known only the first, so that refusing a hundred thousand is quick."""
        if not isinstance(data, dict):
            return data
        known = {field.alias or name for name, field in cls.model_fields.items()}
        surplus = next((key for key in data if key not in known), None)
        return {key: value for key, value in data.items() if key in known or key == surplus}


class Body(Strict):
    """A Strict object in which null means that a field was not given."""

    @model_validator(mode="before")
    @classmethod
    def _null_is_not_given(cls, data: Any) -> Any:
        return {key: value for key, value in data.items() if value is not None} if isinstance(data, dict) else data


class ModelBody(Body):
    """What is said to one model; the first one where none is named."""

    model: str | None = None


class UserBody(ModelBody):
    """What OpenAI's clients may send under a user's name."""

    user: str | None = Field(None, description="Accepted and not used: nothing is kept of who asked.")


MAX_SAMPLES = 128
MAX_MESSAGES = 2048
"""The template is rendered once per turn of the assistant, so the work grows with the square of their number."""
MAX_LOGPROBS = 20
MAX_BIASES = 4096
Stop = Annotated[str, Field(min_length=1, max_length=256)]


def _few(value: Any) -> Any:
    if isinstance(value, dict) and len(value) > MAX_BIASES:
        raise ValueError(f"{len(value)} tokens, at most {MAX_BIASES} are taken")
    return value


class StreamOptions(Body):
    """include_usage: a last chunk without choices carries the counts of tokens."""

    include_usage: bool = False


class SamplingBody(UserBody):
    """What /v1/completions and /v1/chat/completions have in common: how tokens are drawn.

    A seed makes the text repeat, whatever else is running; without one every answer differs.
    """

    n: int = Field(1, ge=1, le=MAX_SAMPLES)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    stop_token_ids: list[Token] = Field([], max_length=256)
    ignore_eos: bool = False
    temperature: float = Field(1.0, ge=0, le=100, description="0 is greedy; else at least 0.001.")
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1, lt=2**31, description="0 and -1 switch it off.")
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, ge=0.01, le=100)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    logit_bias: Annotated[
        dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]],
        BeforeValidator(_few),
    ] = Field({})
    best_of: int | None = Field(None, ge=1, le=MAX_SAMPLES, description="Draw so many, answer with the n best.")
    use_beam_search: bool = Field(False, description="Beam search of width best_of, else n.")
    length_penalty: float = Field(1.0, ge=-10, le=10, description="Of beam search.")
    stream: bool = False
    stream_options: StreamOptions | None = None
    return_token_ids: bool = False

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if 0 < self.temperature < 1e-3:
            raise ValueError(f"temperature is {self.temperature}; it must be 0 (greedy) or at least 0.001")
        if self.best_of is not None and self.best_of < self.n:
            raise ValueError(f"best_of is {self.best_of}, less than n = {self.n}")
        if self.stream and (self.best_of or 0) > self.n and not self.use_beam_search:
            raise ValueError("best_of chooses when all is done, so that it cannot be streamed; leave out stream")
        if self.length_penalty != 1.0 and not self.use_beam_search:
            raise ValueError("length_penalty belongs to use_beam_search")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options belongs to stream")
        return self

    @property
    def drawn(self) -> int:
        """Samples that are drawn at a time."""
        return self.n if self.best_of is None else self.best_of

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with the counts."""
        return self.stream_options is not None and self.stream_options.include_usage


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

"""/v1/chat/completions: messages through the model's chat template, the reply whole or as it comes."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request, Response

from upslope.data.lost import LostError
from upslope.data.messages import CLOSE, OPEN, message_of, tools_of
from upslope.data.pieces import encode_pieces
from upslope.data.template import ChatTemplate
from upslope.errors import ConfigError, DataError
from upslope.serving.access import room, service_of, while_connected
from upslope.serving.chat_answer import ChatAnswer
from upslope.serving.chat_bodies import ChatBody, ConversationBody, NamedTool, SchemaFormat
from upslope.serving.constraints import Constraint, Marks, calls_grammar, offered_grammar
from upslope.serving.errors import ApiError
from upslope.serving.sampling import sampling_params
from upslope.serving.service import Service
from upslope.types import Message

NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}
OWN_VARIABLES = {"conversations", "messages", "tools", "documents", "chat_template", "add_generation_prompt"}
OWN_VARIABLES |= {"return_assistant_tokens_mask", "continue_final_message"}

router = APIRouter(tags=["chat"])


@router.post("/v1/chat/completions")
async def chat_completions(request: Request, body: ChatBody) -> Response:
    """The assistant's next turn: one or several, whole or streamed, free or constrained."""
    service = service_of(request, body.model)
    answer = await while_connected(request, service.aside(prepare, service, body, size=body.size))
    return await answer.respond(request)


def prepare(service: Service, body: ChatBody) -> ChatAnswer:
    """What a body asks of the engine. ApiError, DataError or ConfigError where that cannot be done."""
    prompt = prompt_tokens(service, body)
    params = sampling_params(
        body,
        service.vocab_size,
        max_tokens=room(service, prompt, body.budget, "messages"),
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
    )
    if body.offers_tools and not body.parallel_tool_calls:
        params = replace(params, stop=(*params.stop, CLOSE))
    answer = ChatAnswer(service, body, [prompt], params)
    answer.mask = constraint(service, body)
    return answer


def prompt_tokens(service: Service, body: ConversationBody) -> list[int]:
    """The tokens of the conversation, as the trainer would write them, up to where the reply begins."""
    if getattr(service.tokenizer, "chat_template", None) is None:
        raise ApiError(400, f"{service.name} has no chat template; send a prompt to /v1/completions instead", "model")
    messages, tools = conversation_of(service, body)
    opens = body.add_generation_prompt is not False and not body.continue_final_message
    template = ChatTemplate(service.tokenizer, tools, body.chat_template_kwargs)
    for name in body.chat_template_kwargs:
        if name in OWN_VARIABLES or len(name) > 64 or not re.search(rf"\b{re.escape(name)}\b", template.source):
            says = f"chat_template_kwargs: the chat template of {service.name} has no variable {name[:64]!r}"
            raise ApiError(400, says, "chat_template_kwargs")
    try:
        rendered = template.render(messages, add_generation_prompt=opens)
        text = rendered.text
        if body.continue_final_message:
            text = text[: end_of_last(text, messages[-1].content)]
        text.encode("utf-8")
    except LostError as error:
        raise ApiError(400, f"{service.name}: {error}", error.part) from error
    except RecursionError as error:
        raise ApiError(400, "messages or tools are nested too deeply", "messages") from error
    except UnicodeEncodeError as error:
        raise ApiError(400, "messages: half of a surrogate pair is no character", "messages") from error
    tokens, _ = encode_pieces(service.tokenizer, text, [cut for cut in rendered.cuts if cut < len(text)])
    return tokens


def conversation_of(service: Service, body: ConversationBody) -> tuple[list[Message], Sequence[Mapping[str, Any]]]:
    """Messages and tools through the door that training data goes through.

    ApiError 400 also where the model's own tag for a call is a control token, which text does not show.
    """
    given = [message.model_dump(exclude_none=True, exclude={"type"}) for message in body.messages]
    part = "messages"
    try:
        messages = [message_of(message, f"messages[{k}]", "request") for k, message in enumerate(given)]
        if not body.offers_tools:
            return messages, ()
        part, tokens = "tools", service.tokenizer.added_tokens_decoder.values()
        if any(token.special and token.content == OPEN for token in tokens):
            raise DataError(f"{service.name} writes calls in a form that is not read here; leave tools out")
        return messages, tools_of([tool.model_dump(exclude_none=True) for tool in body.tools], "request")
    except DataError as error:
        raise ApiError(400, str(error), part) from error


def end_of_last(text: str, content: str) -> int:
    """Where the last message's content ends in the rendered text; templates may strip it."""
    start = text.rfind(content.strip())
    if start < 0:
        raise ApiError(400, "the chat template rewrites the last message, so it cannot be continued", "messages")
    kept = content.lstrip()
    return start + len(kept if text.startswith(kept, start) else content.strip())


def constraint(service: Service, body: ChatBody) -> Constraint | None:
    """The grammar that the reply must follow, compiled; None where it is free."""
    if not body.constrained:
        return None
    grammars, wanted = service.grammars, body.response_format
    param = "tools" if wanted.type == "text" else "response_format"
    try:
        if isinstance(wanted, SchemaFormat):
            return grammars.schema(wanted.json_schema.schema_, samples=body.drawn)
        if wanted.type == "json_object":
            return grammars.schema({"type": "object"}, samples=body.drawn)
        several = body.parallel_tool_calls and not isinstance(body.tool_choice, NamedTool)
        grammar = offered_grammar if body.tool_choice == "auto" else calls_grammar
        written = grammar(functions_of(body), Marks.of(grammars), several=several)
        return grammars.lark(written, samples=body.drawn)
    except ConfigError as error:
        raise ApiError(400, f"{param}: the schema cannot be enforced: {error}", param, "unsupported_schema") from error


def functions_of(body: ChatBody) -> dict[str, dict[str, Any]]:
    """The functions that may be called with the schemas of their arguments.

    A function that is not strict and need not be called takes any object.
    """
    chosen = body.tool_choice.function.name if isinstance(body.tool_choice, NamedTool) else None
    found = {}
    for function in [tool.function for tool in body.tools]:
        if chosen in (None, function.name):
            free = body.tool_choice == "auto" and not function.strict
            given = {} if free else NO_ARGUMENTS if function.parameters is None else function.parameters
            found[function.name] = {"type": "object", **given}
    return found

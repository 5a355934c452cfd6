"""/v1/chat/completions: messages through the model's chat template, the reply whole or as it comes."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request, Response

from upslope.data.lost import LostError
from upslope.data.messages import CLOSE, OPEN, ToolCall, ToolReader, calls_in, message_of, tools_of
from upslope.data.pieces import encode_pieces
from upslope.data.template import ChatTemplate
from upslope.engine import Event
from upslope.errors import ConfigError, DataError
from upslope.serving.answers import LEAST_LOGPROB, Answer, Write, room, sampling_params, service_of, while_connected
from upslope.serving.bodies import ChatBody, ConversationBody, NamedTool, SchemaFormat
from upslope.serving.errors import ApiError
from upslope.serving.service import Service
from upslope.serving.vocabulary import Constraint, calls_grammar, offered_grammar
from upslope.types import Completion, Message


class ChatAnswer(Answer[ChatBody]):
    """The answer to a conversation."""

    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def whole(self, found: Sequence[Sequence[Completion]]) -> dict[str, Any]:
        """The body of an answer that is not streamed; with the conversation's tokens where they are asked for."""
        return super().whole(found) | ({"prompt_token_ids": self.prompts[0]} if self.body.return_token_ids else {})

    def chunk(self, choices: list[dict[str, Any]], counts: dict[str, int] | None = None) -> dict[str, Any]:
        """The body of one event; of the first of each choice with the conversation's tokens."""
        begins = self.body.return_token_ids and any("role" in choice["delta"] for choice in choices)
        return super().chunk(choices, counts) | ({"prompt_token_ids": self.prompts[0]} if begins else {})

    def choice(self, place: int, completion: Completion) -> dict[str, Any]:
        """A reply, without its index."""
        shown, calls = calls_in(completion.text) if self.body.offers_tools else (completion.text, [])
        message: dict[str, Any] = {"role": "assistant", "content": shown, "refusal": None}
        if calls:
            message |= {"content": shown or None, "tool_calls": [_call(call) for call in calls]}
        choice: dict[str, Any] = {"message": message, "logprobs": None}
        choice["finish_reason"] = _reason(completion, called=bool(calls))
        if self.body.logprobs:
            rows = zip(completion.tokens, completion.policy_logprobs, completion.top_logprobs or [], strict=True)
            choice["logprobs"] = {"content": [self.entry(*row) for row in rows], "refusal": None}
        if self.body.return_token_ids:
            choice["token_ids"] = completion.tokens
        return choice

    def writer(self, place: int, index: int) -> Write:
        """A chunk that says who speaks, then one per piece of text or call, then why the reply ends.

        Log-probs of tokens whose text is held back wait for it.
        """
        body, reader = self.body, ToolReader() if self.body.offers_tools else None
        entries: list[dict[str, Any]] = []
        tokens: list[int] = []
        drawn = calls = 0

        def choice_of(delta: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
            nonlocal entries, tokens
            choice: dict[str, Any] = {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}
            if entries:
                choice["logprobs"], entries = {"content": entries, "refusal": None}, []
            if tokens:
                choice["token_ids"], tokens = tokens, []
            return choice

        def write(event: Event) -> Iterator[dict[str, Any]]:
            nonlocal tokens, drawn, calls
            if not drawn:
                yield choice_of({"role": "assistant", "content": ""})
            new = [event.token] if event.completion is None else event.completion.tokens[drawn:]
            drawn += len(new)
            if body.logprobs and event.token is not None:
                assert event.policy_logprob is not None
                entries.append(self.entry(event.token, event.policy_logprob, event.top_logprobs or {}))
            if body.return_token_ids:
                tokens += [token for token in new if token is not None]
            plain = [event.text] if event.text else []
            for part in plain if reader is None else reader.push(event.text, final=event.completion is not None):
                if isinstance(part, str):
                    yield choice_of({"content": part})
                else:
                    yield choice_of({"tool_calls": [{"index": calls, **_call(part)}]})
                    calls += 1
            if event.completion is not None:
                if entries or tokens:
                    yield choice_of({"content": ""})
                yield choice_of({}, _reason(event.completion, called=calls > 0))

        return write

    def entry(self, token: int, logprob: float, top: dict[int, float]) -> dict[str, Any]:
        """One token's log-prob with the likeliest alternatives, in nats of the policy at the request's temperature."""
        likeliest = list(top.items())[: self.body.top_logprobs or 0]
        return {**self._named(token, logprob), "top_logprobs": [self._named(*one) for one in likeliest]}

    def _named(self, token: int, logprob: float) -> dict[str, Any]:
        pieces = self.service.pieces
        return {"token": pieces.text(token), "logprob": max(logprob, LEAST_LOGPROB), "bytes": list(pieces.raw(token))}


def _call(call: ToolCall) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _reason(completion: Completion, *, called: bool) -> str:
    """ "tool_calls" where the turn ended with calls; what the token budget cut is "length" all the same."""
    return "tool_calls" if called and completion.finish_reason == "stop" else completion.finish_reason


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
        service,
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
        return grammars.lark(grammar(functions_of(body), grammars.marks(), several=several), samples=body.drawn)
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

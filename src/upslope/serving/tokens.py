"""/tokenize, /detokenize and /tokenizer_info, in the shapes of vLLM's server."""

from functools import partial
from typing import Annotated, Any

import fastapi
from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import Discriminator, Tag

from upslope.serving.access import encode_all, reply, service_of
from upslope.serving.bodies import Items, ModelBody, Token
from upslope.serving.chat import prompt_tokens
from upslope.serving.chat_bodies import ConversationBody
from upslope.serving.errors import ApiError

router = APIRouter(tags=["tokens"])


class _Tokenize(ModelBody):
    return_token_strs: bool = False


class TokenizeTextBody(_Tokenize):
    """/tokenize: a text."""

    prompt: str
    add_special_tokens: bool = True


class TokenizeChatBody(_Tokenize, ConversationBody):
    """/tokenize: a conversation, as the chat template writes it."""


def _kind(data: Any) -> str:
    chat = data.get("messages") is not None if isinstance(data, dict) else isinstance(data, TokenizeChatBody)
    return "(chat)" if chat else "(text)"


TokenizeBody = Annotated[
    Annotated[TokenizeTextBody, Tag("(text)")] | Annotated[TokenizeChatBody, Tag("(chat)")],
    Discriminator(_kind),
    fastapi.Body(),
]


class DetokenizeBody(ModelBody):
    """/detokenize: tokens."""

    tokens: Annotated[list[Token], Items]


@router.post("/tokenize")
async def tokenize(request: Request, body: TokenizeBody) -> Response:
    """The tokens of a text or of a conversation; with return_token_strs also what each stands for."""
    service = service_of(request, body.model)
    if isinstance(body, TokenizeTextBody):
        (tokens,) = await encode_all(service, [body.prompt], special=body.add_special_tokens)
    else:
        tokens = await service.aside(prompt_tokens, service, body, size=body.size)
    names = None
    if body.return_token_strs:
        names = await service.aside(lambda: [service.pieces.text(token) for token in tokens], size=len(tokens))
    answer = {"count": len(tokens), "max_model_len": service.max_positions, "tokens": tokens, "token_strs": names}
    return reply(service, answer)


@router.post("/detokenize")
async def detokenize(request: Request, body: DetokenizeBody) -> Response:
    """The text of tokens, special ones included."""
    service = service_of(request, body.model)
    limit = service.engine.model.spec.input_vocab_size
    wrong = next((token for token in body.tokens if token >= limit), None)
    if wrong is not None:
        raise ApiError(400, f"token {wrong} is outside the vocabulary of {limit} tokens", "tokens")
    decode = partial(service.tokenizer.decode, body.tokens, skip_special_tokens=False)
    return reply(service, {"prompt": await service.aside(decode, size=len(body.tokens))})


@router.get("/tokenizer_info")
async def tokenizer_info(request: Request, model: str | None = None) -> Response:
    """The tokenizer's special tokens and chat template, so that a client needs no tokenizer of its own."""
    service = service_of(request, model)
    tokenizer = service.target
    info: dict[str, Any] = {
        "tokenizer_class": type(tokenizer).__name__,
        "model_max_length": service.max_positions,
        "vocab_size": len(tokenizer),
        "chat_template": tokenizer.chat_template,
        **{name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)},
    }
    return reply(service, info)

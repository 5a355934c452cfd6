"""Families of damaged chat templates and of damaged requests to the server, which is called in this process."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

from fastapi.testclient import TestClient
from fuzz_data import CHAT, TOOL, TOOLED
from fuzz_kit import Family, damaged, damaged_json
from tiny_model import CHATML, tiny_folder, tiny_tokenizer

from upslope.build import load_inference
from upslope.data.chat import closing_tokens, encode_conversation, encode_prompt
from upslope.data.messages import message_of, tools_of
from upslope.data.readers import json_of
from upslope.engine import Engine
from upslope.errors import ModelError
from upslope.options import ServeOptions
from upslope.serving.server import create_app
from upslope.serving.service import Service
from upslope.types import Prompt

PARTS = (
    *("{% for m in messages %}", "{% endfor %}", "{{ m['content'] }}", "{{ m.role }}", "{% if tools %}{{ tools }}"),
    *("{% endif %}", "{{ raise_exception('no') }}", "{{ 1 / 0 }}", "{{ x.y.z }}", "{{ 'a' * 10**9 }}", "{{ m }}"),
    *("{% for i in range(10**9) %}x{% endfor %}", "{% set ns = namespace(a=1) %}", "{{ ''.__class__.__mro__ }}"),
    *(
        "{% generation %}",
        "{% endgeneration %}",
        "{% include 'x' %}",
        "{% macro f(x) %}{{ f(x) }}{% endmacro %}",
        "{{ f(1) }}",
    ),
    *("{{ messages[9].content }}", "{{ messages | tojson(indent=4) }}", "{{ strftime_now('%Y') }}", "{{", "%}", "\0"),
    *("{{ 10 ** 10 ** 7 }}", "{{ '%1000000000d' % 1 }}", "{{ bos_token + eos_token }}", "{{ [0] * 10**9 }}"),
)


def templates(_: Any, rng: random.Random, scratch: Path) -> None:
    """A template that is damaged, with conversations that need not be."""
    template = CHATML
    for _step in range(rng.choice((0, 1, 1, 2, 4))):
        if rng.random() < 0.6:
            at = rng.choice([i for i in range(len(template) + 1) if template[i : i + 1] in "{<" or i == len(template)])
            template = template[:at] + rng.choice(PARTS) + template[at:]
        else:
            template = damaged(rng, template.encode(), [CHATML.encode()]).decode("utf-8", "replace")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    chat = (
        json_of(damaged_json(rng, json.dumps(TOOLED).encode()).decode("utf-8", "replace"), "row 1")
        if rng.random() < 0.2
        else CHAT
    )
    chat = chat if isinstance(chat, list) else [chat]
    messages = [message_of(m, "messages", "row 1") for m in chat]
    tools = tools_of([TOOL], "row 1") if rng.random() < 0.3 else ()
    way = rng.randrange(3)
    if way == 0:
        encode_conversation(tokenizer, messages, max_length=500, tools=tools)
    elif way == 1:
        encode_prompt(tokenizer, Prompt(1, tuple(messages)), tools=tools)
    else:
        closing_tokens(tokenizer)


KEY = "sk-test"
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
BODIES: dict[str, list[dict[str, Any]]] = {
    "/v1/chat/completions": [
        {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2, "temperature": 0.5, "top_p": 0.9, "n": 2},
        {"messages": TOOLED, "tools": [TOOL], "max_tokens": 2, "stop": ["a"], "logprobs": True, "top_logprobs": 2},
        {
            "messages": CHAT[:2],
            "max_tokens": 2,
            "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}},
        },
        {"messages": CHAT[:2], "max_tokens": 2, "tools": [TOOL], "tool_choice": "required", "seed": 1},
        {"messages": CHAT[:2], "max_tokens": 2, "stream": True, "stream_options": {"include_usage": True}},
    ],
    "/v1/completions": [
        {"prompt": "hi", "max_tokens": 2, "echo": True, "logprobs": 1, "logit_bias": {"5": 1.0}},
        {"prompt": [[5, 6], [7]], "max_tokens": 1, "stream": True},
        {"prompt": ["a", "b"], "max_tokens": 1, "frequency_penalty": 0.1, "presence_penalty": -0.1, "min_p": 0.1},
    ],
    "/v1/embeddings": [{"input": ["hi", "you"], "encoding_format": "base64"}, {"input": [[5, 6]]}],
    "/tokenize": [{"prompt": "hi"}, {"messages": CHAT}],
    "/detokenize": [{"tokens": [5, 6]}],
    "/admin/weights": [{"model": "tiny", "source": "nowhere"}],
    "/v1/feedback": [{"kind": "vote", "winner": "a"}],
}


def _app(folder: Path) -> Any:
    """The application over a tiny model; the client begins in the child that sends."""
    model = tiny_folder(folder / "m", max_position_embeddings=96)

    def app() -> Any:
        policy = load_inference(model, dtype="float32")
        engine = Engine(policy.model, policy.tokenizer, eos_token_ids=policy.eos_token_ids, num_blocks=64)

        def none(source: str) -> Any:
            raise ModelError(f"{source[:40]!r}: there are no other weights here")

        service = Service("tiny", engine, policy.tokenizer, source=str(model), load=none, max_queue=64)
        return create_app({"tiny": service}, ServeOptions(feedback=str(folder / "feedback"), api_key=KEY))

    return app


_CLIENTS: dict[int, TestClient] = {}


def _client(app: Any) -> TestClient:
    if not _CLIENTS:
        client = TestClient(app(), base_url="http://127.0.0.1", raise_server_exceptions=False)
        _CLIENTS[0] = client.__enter__()
    return _CLIENTS[0]


def requests(app: Any, rng: random.Random, scratch: Path) -> None:
    """One damaged request; anything but success or a refusal in OpenAI's shape is an error."""
    client = _client(app)
    route = rng.choice(list(BODIES))
    content = json.dumps(rng.choice(BODIES[route])).encode()
    content = damaged_json(rng, content, [json.dumps(rng.choice(BODIES[rng.choice(list(BODIES))])).encode()])
    kind = "application/json" if rng.random() < 0.95 else rng.choice(("text/plain", "", "application/json; charset=x"))
    headers = {"Content-Type": kind, "Authorization": f"Bearer {KEY}" if rng.random() < 0.97 else "Bearer \xe9"}
    response = client.post(route, content=content, headers={k: v.encode("latin-1") for k, v in headers.items()})
    if response.status_code == 200:
        return
    assert 400 <= response.status_code < 500, f"{route}: status {response.status_code}: {response.text[:100]}"
    if response.status_code not in (404, 405):
        message = response.json()["error"]["message"]
        assert message, route
        assert "\n" not in message, route
        assert len(message) < 2000, route


FAMILIES = (
    Family("templates", "templates", lambda _: None, templates, share=1.5, seconds=10.0),
    Family("requests", "server", _app, requests, share=1.5, seconds=10.0),
)
assert sys.getrecursionlimit()

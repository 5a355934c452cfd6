"""llama.cpp through its prebuilt Python binding: a GGUF file loaded in this process, asked over the loopback.

The binding (xllamacpp) runs llama.cpp's own server; attention and cache are set to float32, so that what is compared
is the file and llama.cpp's products, and no setting.
"""

import json
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from upslope.errors import RunError, one_line
from upslope.extras import require

_CERTAIN = 1e4  # a logit bias that decides
Prediction = tuple[list[int], list[tuple[int, float]]]


class LlamaCpp:
    """A GGUF file in llama.cpp. A context manager; RunError where llama.cpp refuses the file or a request."""

    def __init__(self, path: Path, *, context: int, threads: int) -> None:
        binding: Any = require("verify", "xllamacpp")
        params = binding.CommonParams()
        params.model.path = str(path)
        params.n_ctx = context
        params.n_parallel = 1
        params.n_gpu_layers = 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        params.port = 0
        params.warmup = False
        params.verbosity = -1
        params.cache_type_k = params.cache_type_v = binding.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = binding.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        try:
            self._server: Any = binding.Server(params)
        except (RuntimeError, ValueError) as error:
            raise RunError(f"llama.cpp cannot load the file: {one_line(error)}") from error
        self._address = self._server.listening_address
        self._open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open
        self._plain = self.tokenize("a", frame=False)[-1]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        # A server that is destroyed before its loop has begun waits for it for ever: what its loop answers proves it.
        with suppress(RunError):
            self._complete([self._plain], n_predict=0)
        del self._server

    def tokenize(self, text: str, *, frame: bool = True) -> list[int]:
        """Token ids; `frame` adds BOS and EOS as the file says."""
        return self._post("/tokenize", {"content": text, "add_special": frame, "parse_special": True})["tokens"]

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The chat template's text, with the opening of an answer."""
        return self._post("/apply-template", {"messages": list(messages)})["prompt"]

    def ends(self) -> set[int]:
        """The tokens after which generation stops: those that `ignore_eos` would exclude."""
        answer = self._complete([self._plain], n_predict=0, ignore_eos=True)
        return {entry["token"] for entry in answer["generation_settings"]["logit_bias"]}

    def ends_with(self, token: int) -> bool:
        """Whether generation stops after `token`."""
        return self._complete([self._plain], n_predict=2, logit_bias=[[token, _CERTAIN]])["stop_type"] == "eos"

    def predictions(self, tokens: Sequence[int], *, top: int, then: int) -> Iterator[Prediction]:
        """For every prefix of `tokens`, and `then` greedy tokens more: (prefix, the `top` likeliest (token, log-prob)).

        The log-probs are of the whole distribution, before any sampling option.
        """
        known = list(tokens)
        for count in range(1, len(known) + then + 1):
            # A token that ends inside a character would be held back with its log-probs: a plain one is forced.
            answer = self._complete(known[:count], n_predict=1, n_probs=top, logit_bias=[[self._plain, _CERTAIN]])
            best = [(e["id"], e["logprob"]) for e in answer["completion_probabilities"][0]["top_logprobs"]]
            yield known[:count], best
            if count >= len(tokens):
                known.append(best[0][0])

    def _complete(self, prompt: Sequence[int], **settings: Any) -> dict[str, Any]:
        return self._post("/completion", {"prompt": list(prompt), "temperature": 0, "cache_prompt": True, **settings})

    def _post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        request = urllib.request.Request(
            self._address + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with self._open(request, timeout=300) as answer:
                return json.loads(answer.read())
        except urllib.error.HTTPError as error:
            raise RunError(f"llama.cpp refuses {path}: {_said(error.read())}") from error
        except (OSError, ValueError) as error:
            raise RunError(f"llama.cpp does not answer {path}: {error}") from error


def _said(body: bytes) -> str:
    """What llama.cpp says in a refusal, on one line: the message of its JSON object, or a text that is none."""
    text = body.decode(errors="replace")
    with suppress(ValueError, LookupError, TypeError):
        text = str(json.loads(text)["error"]["message"])
    return " ".join(text.split())[:300] or "it gives no reason"

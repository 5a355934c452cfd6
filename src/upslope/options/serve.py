"""Options of `upslope serve`."""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass

from upslope.errors import ConfigError
from upslope.options.common import Dtype, check

KEY_VARIABLE = "UPSLOPE_API_KEY"


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """An OpenAI-compatible server and a chat page on loopback, over the engine that training samples with."""

    model: str = "smollm2-135m"
    """What to serve: a model folder, a run folder, adapters, a hub id, a .gguf file, or the alias smollm2-135m."""
    served_model_name: str | None = None
    """The model's name in requests and in /v1/models; left out: the last part of --model."""
    compare: str | None = None
    """A second model, served beside the first under its own name; the chat page then offers blind A/B."""
    host: str = "127.0.0.1"
    """Address to listen on; another than loopback needs an API key."""
    port: int = 8000
    """Port to listen on; 0 takes a free one and prints it."""
    api_key: str | None = None
    """Key that every route but /health asks for; left out: the environment variable UPSLOPE_API_KEY, else none."""
    dtype: Dtype = "auto"
    """Compute dtype; auto is bfloat16 where this processor is faster in it."""
    max_batch: int = 64
    """Sequences decoded together."""
    kv_cache_gb: float = 1.0
    """GiB of keys and values."""
    max_queue: int = 256
    """Requests that may wait; one more is answered 429 with Retry-After."""
    max_body_mb: float = 4.0
    """MiB that a request's body may have; a larger one is answered 413."""
    drain_seconds: float = 30.0
    """How long running requests may take to finish after SIGTERM."""
    feedback: str = "feedback"
    """Folder to which the chat page saves thumbs, edits and A/B votes, as rows that sft and dpo read."""

    @property
    def key(self) -> str | None:
        """The API key: the option's, else the environment's."""
        return self.api_key if self.api_key is not None else os.environ.get(KEY_VARIABLE)

    @property
    def on_loopback(self) -> bool:
        """Whether nobody but this machine can connect."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    def validate(self) -> None:
        """Raise ConfigError for a value out of range, or for an open address without a key."""
        check(
            self,
            port=(0, 65535),
            max_batch=(1, None),
            kv_cache_gb=(0, None),
            max_queue=(1, None),
            max_body_mb=(0.001, None),
            drain_seconds=(0, None),
        )
        if self.key is not None and not self.key.strip():
            raise ConfigError(f"the API key is empty: set --api-key (or {KEY_VARIABLE}) to a secret, or leave it out")
        if not self.on_loopback and self.key is None:
            raise ConfigError(
                f"host = {self.host} can be reached from other machines: set --api-key (or {KEY_VARIABLE}), "
                "or listen on 127.0.0.1"
            )

"""Options of `upslope serve`."""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass

from upslope.config import option
from upslope.errors import ConfigError
from upslope.options.generate import EngineOptions

KEY_VARIABLE = "UPSLOPE_API_KEY"


@dataclass(frozen=True, kw_only=True)
class ServeOptions(EngineOptions):
    """An OpenAI-compatible server and a chat page on loopback, over the engine that training samples with."""

    served_model_name: str | None = None
    """The model's name in requests and in /v1/models; default: the last part of --model."""
    compare: str | None = None
    """A second model, served beside the first under its own name; the chat page then offers blind A/B."""
    host: str = "127.0.0.1"
    """Address to listen on; another than loopback needs an API key."""
    port: int = option(8000, 0, 65535)
    """Port to listen on; 0 takes a free one and prints it."""
    api_key: str | None = None
    """Key that every route but /health asks for; default: the environment variable UPSLOPE_API_KEY, else none."""
    max_batch: int = option(64, 1)
    """Sequences decoded together."""
    kv_cache_gb: float = option(1.0, 0)
    max_queue: int = option(256, 0)
    """Requests that may wait; one more is answered 429 with Retry-After."""
    max_body_mb: float = option(4.0, 0.001)
    """MiB that a request's body may have; a larger one is answered 413."""
    drain_seconds: float = option(30.0, 0)
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
        super().validate()
        if self.key is not None and not self.key.strip():
            raise ConfigError(f"the API key is empty: set --api-key (or {KEY_VARIABLE}) to a secret, or leave it out")
        if not self.on_loopback and self.key is None:
            raise ConfigError(
                f"host = {self.host} can be reached from other machines: set --api-key (or {KEY_VARIABLE}), "
                "or listen on 127.0.0.1"
            )

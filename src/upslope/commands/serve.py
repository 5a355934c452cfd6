"""`upslope serve`: load one model or two, then answer requests until a signal."""

from __future__ import annotations

import os
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from upslope.errors import ConfigError
from upslope.extras import require
from upslope.options import ServeOptions

if TYPE_CHECKING:
    from upslope.serving.service import Service


def run(options: ServeOptions) -> int:
    """Serve until SIGTERM or Ctrl-C; one line on standard output says where, when requests can come."""
    for module in ("fastapi", "uvicorn", "prometheus_client", "llguidance"):
        require("serve", module)
    from upslope.devices.hardware import apart
    from upslope.serving.server import bind, create_app, serve

    sources = [options.model] if options.compare is None else [options.model, options.compare]
    names = _names(sources, options.served_model_name)
    with bind(options.host, options.port) as bound:
        made = [partial(_service, name, source, options) for name, source in zip(names, sources, strict=True)]
        services = {service.name: service for service in map(apart, made)}
        said = f"upslope: serving {' and '.join(services)} at"
        return serve(create_app(services, options), bound, options, lambda url: print(said, url, flush=True))


def _names(sources: list[str], first: str | None) -> list[str]:
    """What the models are called: a hub id as it is, a folder or file by its last part."""
    names = [Path(s).stem if s.endswith(".gguf") else Path(s).name if os.path.isdir(s) else s for s in sources]
    names[0] = first or names[0]
    if len(set(names)) < len(names):
        raise ConfigError(f"both models would be called {names[0]!r}: give the first another --served-model-name")
    return names


def _service(name: str, source: str, options: ServeOptions) -> Service:
    """The model with its engine, warmed up: kernels compiled, cache allocated."""
    from upslope.build import load_inference
    from upslope.commands.generate import DRAWN, open_engine, suggested
    from upslope.models.files.sources import say
    from upslope.serving.service import Service
    from upslope.types import SamplingParams

    say(f"{name}: loading {source}")
    began = time.monotonic()
    load = partial(load_inference, dtype=options.dtype)
    policy = load(source)
    if words := suggested(policy.folder, DRAWN):
        words = words.replace("--", "")
        say(f"{name}: the model suggests {words}; a request that leaves these out gets the API's own")
    spec, batch, room = policy.model.spec, options.max_batch, options.kv_cache_gb
    engine = open_engine(policy, sequences=batch, longest=spec.max_positions - 1, max_batch=batch, kv_cache_gb=room)
    service = Service(name, engine, policy.tokenizer, source=source, load=load, max_queue=options.max_queue)
    engine.generate([service.tokens_of("a")], SamplingParams(max_tokens=2, ignore_eos=True))
    millions, precision = spec.parameters / 1e6, str(policy.model.dtype).removeprefix("torch.")
    say(f"{name}: {millions:.0f}M parameters in {precision}, ready after {time.monotonic() - began:.1f} s")
    return service

"""The application: routes, limits and errors around the services that do the work."""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

from fastapi import FastAPI

from upslope.options import ServeOptions
from upslope.serving import admin, chat, completions, embeddings, errors, page, tokens
from upslope.serving.limits import Guard
from upslope.serving.metrics import Metrics
from upslope.serving.service import Service
from upslope.version import __version__


def create_app(services: Mapping[str, Service], settings: ServeOptions) -> FastAPI:
    """An ASGI application over `services`, which start and stop with it.

    Interactive documentation is left out, because its page loads scripts from elsewhere; /openapi.json is there.
    `app.state`: services, settings, metrics, and `draining`, which turns new requests away while it is True.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        for service in services.values():
            service.start()
        yield
        for service in services.values():
            await service.stop()

    app = FastAPI(
        title="upslope",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        responses={"4XX": {"description": "refused; error.message says why"}, "5XX": {"description": "failed"}},
    )
    app.state.services = dict(services)
    app.state.settings = settings
    app.state.metrics = Metrics(services)
    app.state.draining = False
    errors.install(app)
    for room in (admin, completions, chat, embeddings, tokens, page):
        app.include_router(room.router)
    app.add_middleware(Guard, state=app.state)
    return app

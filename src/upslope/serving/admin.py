"""/health, /version, /metrics, /v1/models, and /admin/weights, which replaces what the server knows."""

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import Field

from upslope.errors import UpslopeError
from upslope.options.inference import KEY_VARIABLE
from upslope.serving.access import reply, service_of
from upslope.serving.bodies import ModelBody
from upslope.serving.engine_thread import Stopped
from upslope.serving.errors import ApiError
from upslope.serving.metrics import CONTENT_TYPE
from upslope.serving.service import Service
from upslope.version import __version__

router = APIRouter(tags=["server"])


class WeightsBody(ModelBody):
    """/admin/weights: where the new weights are, as `upslope serve` would be told; of several models, for which one."""

    source: str = Field(min_length=1, max_length=4096)


@router.get("/health")
async def health(request: Request) -> Response:
    """200 while every model takes requests; 503 while the server drains, and after an engine has failed."""
    state = request.app.state
    broken = [name for name, service in state.services.items() if not service.healthy]
    if state.draining or broken:
        return JSONResponse({"status": "draining" if state.draining else "failed", "models": broken}, 503)
    return JSONResponse({"status": "ok"})


@router.get("/version")
async def version() -> Response:
    """The program's version."""
    return JSONResponse({"version": __version__})


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Figures for Prometheus; what they are is said in upslope/serving/metrics.py."""
    return Response(request.app.state.metrics.text(), media_type=CONTENT_TYPE)


@router.get("/v1/models")
async def models(request: Request) -> Response:
    """What is being served."""
    return JSONResponse({"object": "list", "data": [_card(s) for s in request.app.state.services.values()]})


@router.get("/v1/models/{name:path}")
async def model(request: Request, name: str) -> Response:
    """One served model."""
    service = service_of(request, name)
    return JSONResponse(_card(service), headers={"X-Weight-Version": str(service.version)})


@router.post("/admin/weights")
async def weights(request: Request, body: WeightsBody) -> Response:
    """Replace a model's weights by another folder's of the same network, while requests run; none is dropped.

    The answer names the model. Where several are served, the request must.
    """
    if request.app.state.settings.key is None:
        raise ApiError(
            403,
            f"weights can be replaced only where the server has an API key: start it with --api-key or {KEY_VARIABLE}",
            code="no_api_key_configured",
        )
    service = service_of(request, body.model, guess=False)
    try:
        now = await service.swap(body.source)
    except Stopped:
        raise
    except (UpslopeError, OSError) as error:
        raise ApiError(400, f"the weights stay as they are: {error}", "source", "weights_refused") from error
    return reply(service, {"model": service.name, "source": service.source, "version": now}, version=now)


def _card(service: Service) -> dict[str, Any]:
    return {
        "id": service.name,
        "object": "model",
        "created": service.created,
        "owned_by": "upslope",
        "root": service.source,
        "max_model_len": service.max_positions,
        "weight_version": service.version,
        "system_fingerprint": service.fingerprint,
    }

"""The chat page at `/`: its files out of the package, and the routes that save what readers say about replies.

Whatever a model writes, the page runs no script but its own (SECURITY_HEADERS). Requests of other sites' pages never
get here: see `limits.Guard`.
"""

import hashlib
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response

from upslope.serving.access import service_of
from upslope.serving.errors import ApiError
from upslope.serving.feedback import Edit, Feedback, Thumb, Vote

STATIC = Path(__file__).parent / "static"

SECURITY_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}

_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}

router = APIRouter()


@cache
def _files() -> dict[str, Response]:
    """Every file of the page by name. Only these can be asked for, so no path leads out of the folder."""
    files = {}
    for path in STATIC.iterdir():
        if path.suffix in _TYPES:
            content = path.read_bytes()
            tag = {"ETag": f'"{hashlib.sha256(content).hexdigest()[:32]}"', "Cache-Control": "no-cache"}
            files[path.name] = Response(content, headers=SECURITY_HEADERS | tag, media_type=_TYPES[path.suffix])
    return files


@router.get("/", include_in_schema=False)
async def page(request: Request) -> Response:
    """The chat page."""
    return _answer(request, "index.html")


@router.get("/static/{name}", include_in_schema=False)
async def static(request: Request, name: str) -> Response:
    """One of the page's files."""
    return _answer(request, name)


def _answer(request: Request, name: str) -> Response:
    file = _files().get(name)
    if file is None:
        raise ApiError(404, f"the page has no file {name[:80]!r}")
    headers = {name: file.headers[name] for name in (*SECURITY_HEADERS, "ETag", "Cache-Control")}
    unchanged = request.headers.get("If-None-Match") == headers["ETag"]
    return Response(status_code=304, headers=headers) if unchanged else file


def _feedback(request: Request) -> Feedback:
    return Feedback(request.app.state.settings.feedback)


Folder = Annotated[Feedback, Depends(_feedback)]


@router.post("/feedback/thumb", tags=["feedback"])
def thumb(body: Thumb, folder: Folder) -> dict[str, bool]:
    """Save that a reply is good or bad, or withdraw it."""
    folder.thumb(body)
    return {"saved": True}


@router.post("/feedback/edit", tags=["feedback"])
def edit(body: Edit, folder: Folder) -> dict[str, bool]:
    """Save a better reply than the model's."""
    folder.edit(body)
    return {"saved": True}


@router.post("/feedback/vote", tags=["feedback"])
def vote(request: Request, body: Vote, folder: Folder) -> dict[str, Any]:
    """Save which of two replies is better; answers with the tally."""
    sources = {side.model: service_of(request, side.model).source for side in (body.a, body.b)}
    folder.vote(body, sources)
    return {"saved": True, "tally": folder.tally()}


@router.get("/feedback", tags=["feedback"])
def saved(request: Request, folder: Folder) -> dict[str, Any]:
    """How many rows the feedback folder holds, and the tally of the blind comparisons."""
    return {"folder": request.app.state.settings.feedback, "rows": folder.counts(), "tally": folder.tally()}

"""The chat page at `/`: its files out of the package, and the routes that save what readers say about replies.

Whatever a model writes, the page runs no script but its own (SECURITY_HEADERS). Requests of other sites' pages never
get here: see `errors.Guard`.

What readers say is saved as the rows that `sft` and `dpo` train on. In the feedback folder: `sft.jsonl` {messages},
`preferences.jsonl` {prompt, chosen, rejected}, `labels.jsonl` {prompt, completion, label} (for `dpo --loss kto`) and
`votes.jsonl`, from which the tally of the blind A/B is counted. Every row has the `id` of what it judges: judging the
same thing again replaces the row. A row that was acknowledged is on the disk, and a file is whole whatever kills the
server.
"""

import hashlib
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from fastapi import APIRouter, Depends, Request, Response
from filelock import FileLock
from pydantic import Field, model_validator

from upslope.atomic import fsync_folder, refuse_other_than_file, write_atomic
from upslope.errors import RunError
from upslope.runs.encoding import to_json
from upslope.runs.lines import MetricLines, read_lines
from upslope.serving.answers import service_of
from upslope.serving.bodies import Items, Strict
from upslope.serving.errors import ApiError

FILES = ("sft", "preferences", "labels", "votes")

Id = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$", description="Of the judged reply; the same id replaces.")]
Version = Annotated[int, Field(ge=0, description="Weight version that wrote the reply.")]


class Turn(Strict):
    """One message of the conversation before the judged reply."""

    role: Literal["system", "user", "assistant"]
    content: str


class _Judgement(Strict):
    id: Id
    messages: Annotated[
        list[Turn], Items, Field(min_length=1, description="The conversation up to the user's last turn.")
    ]

    @model_validator(mode="after")
    def _ends_with_the_user(self) -> Self:
        if self.messages[-1].role != "user":
            raise ValueError("messages must end with the user's turn that was replied to")
        return self


class _OfOne(_Judgement):
    model: str
    weight_version: Version | None = None

    @property
    def about(self) -> dict[str, Any]:
        """What its rows say besides the texts."""
        return {"model": self.model, "weight_version": self.weight_version, **_now(self.id)}


class Thumb(_OfOne):
    """A reply found good (true) or bad (false); null withdraws what was said before."""

    reply: str
    label: bool | None

    @model_validator(mode="after")
    def _something_to_judge(self) -> Self:
        _need_text(self.reply, "reply")
        return self


class Edit(_OfOne):
    """A reply and what the reader made of it; an empty original is no rejected side, only the edit is kept."""

    original: str
    edited: str

    @model_validator(mode="after")
    def _something_changed(self) -> Self:
        _need_text(self.edited, "edited")
        if self.edited == self.original:
            raise ValueError("edited is the same as original")
        return self


class Voted(Strict):
    """One side of a blind comparison."""

    model: str
    reply: str
    weight_version: Version | None = None


class Vote(_Judgement):
    """The better of two replies to the same messages by two models whose names were hidden."""

    a: Voted
    b: Voted
    winner: Literal["a", "b", "tie"]

    @model_validator(mode="after")
    def _two_models(self) -> Self:
        if self.a.model == self.b.model:
            raise ValueError("a.model and b.model are the same model")
        return self


class Feedback:
    """The rows under `folder`, made at the first row for its owner alone. Safe for several threads and processes.

    Raises RunError where the folder cannot be written or read, or a file in it is damaged.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder).expanduser()

    def thumb(self, thumb: Thumb) -> None:
        """A label, and when it is a good one the conversation to imitate."""
        turns, about = _plain(thumb.messages), thumb.about
        label = {"prompt": turns, "completion": _reply(thumb.reply), "label": thumb.label, **about}
        self._put("labels", thumb.id, None if thumb.label is None else label)
        self._put("sft", thumb.id, _imitated(turns, thumb.reply, about) if thumb.label else None)

    def edit(self, edit: Edit) -> None:
        """The edit preferred to the original, and the conversation that ends with it to imitate."""
        turns, about = _plain(edit.messages), edit.about
        if edit.original.strip():
            row = {"prompt": turns, "chosen": _reply(edit.edited), "rejected": _reply(edit.original), **about}
            self._put("preferences", edit.id, row)
        self._put("sft", edit.id, _imitated(turns, edit.edited, about))

    def vote(self, vote: Vote, sources: Mapping[str, str]) -> None:
        """A line for the tally, and the better reply preferred to the other where the two differ.

        sources: where each model's weights came from, so that a tally can be told apart by checkpoint later.
        """
        sides = {"a": vote.a, "b": vote.b}
        line = {"winner": "tie" if vote.winner == "tie" else sides[vote.winner].model, **_now(vote.id)}
        for name, side in sides.items():
            line[name] = {"model": side.model, "weight_version": side.weight_version, "source": sources.get(side.model)}
        self._put("votes", vote.id, line)
        self._put("preferences", vote.id, _preferred(vote))

    def tally(self) -> list[dict[str, Any]]:
        """For each pair of models, in alphabetical order: wins of the first, wins of the second, ties."""
        counts: dict[tuple[str, str], Counter[str]] = {}
        for number, row in enumerate(self._rows("votes"), start=1):
            try:
                first, second = sorted(row[side]["model"] for side in "ab")
                counts.setdefault((first, second), Counter())[row["winner"]] += 1
            except (KeyError, TypeError) as error:
                raise RunError(f"{self._path('votes')}:{number}: not a vote; delete that line") from error
        wins = [(pair, [won[name] for name in pair], won.total()) for pair, won in sorted(counts.items())]
        return [{"models": list(pair), "wins": won, "ties": total - sum(won)} for pair, won, total in wins]

    def counts(self) -> dict[str, int]:
        """The number of rows in each file."""
        return {name: sum(1 for _ in self._rows(name)) for name in FILES}

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.jsonl"

    def _rows(self, name: str) -> Iterator[dict[str, Any]]:
        path = self._path(name)
        refuse_other_than_file(path)
        return read_lines(path) if path.exists() else iter(())

    def _put(self, name: str, key: str, row: Mapping[str, Any] | None) -> None:
        """Make `row` the only one of this key in the file; None: make it have none."""
        path = self._path(name)
        with _saving(path):
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with FileLock(self.folder / ".lock", mode=0o600):
                if any(known.get("id") == key for known in self._rows(name)):
                    kept = [known for known in self._rows(name) if known.get("id") != key]
                    write_atomic(path, "".join(to_json(known) + "\n" for known in [*kept, *([row] if row else [])]))
                elif row is not None:
                    _append(path, row)


@contextmanager
def _saving(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, RunError) as error:
        cause = error if isinstance(error, OSError) else error.__cause__
        if not isinstance(cause, OSError):
            raise  # a damaged line, which the message names
        raise RunError(
            f"{path}: the feedback cannot be saved: {cause.strerror or cause}; "
            "free some space, change the permissions, or serve with another --feedback folder"
        ) from error


def _append(path: Path, row: Mapping[str, Any]) -> None:
    new = not path.exists()
    with closing(MetricLines(path)) as lines:  # cuts off a line that a kill left torn
        lines.append(row)
        lines.flush()
    if new:
        fsync_folder(path.parent)


def _need_text(value: str, name: str) -> None:
    if not value.strip():
        raise ValueError(f"{name} is empty: there is nothing to learn from")


def _plain(turns: Sequence[Turn]) -> list[dict[str, Any]]:
    return [turn.model_dump() for turn in turns]


def _reply(text: str) -> list[dict[str, Any]]:
    return [{"role": "assistant", "content": text}]


def _imitated(turns: list[dict[str, Any]], reply: str, about: Mapping[str, Any]) -> dict[str, Any]:
    """Only the last turn was approved of: earlier replies are context, not trained on."""
    context = [{**turn, "train": False} if turn["role"] == "assistant" else turn for turn in turns]
    return {"messages": [*context, *_reply(reply)], **about}


def _preferred(vote: Vote) -> dict[str, Any] | None:
    chosen, rejected = (vote.a, vote.b) if vote.winner == "a" else (vote.b, vote.a)
    differ = chosen.reply != rejected.reply and chosen.reply.strip() and rejected.reply.strip()
    if vote.winner == "tie" or not differ:
        return None
    return {
        "prompt": _plain(vote.messages),
        "chosen": _reply(chosen.reply),
        "rejected": _reply(rejected.reply),
        "models": [chosen.model, rejected.model],
        "weight_versions": [chosen.weight_version, rejected.weight_version],
        **_now(vote.id),
    }


def _now(key: str) -> dict[str, Any]:
    return {"id": key, "time": time.time()}


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

_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}

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
    return await static(request, "index.html")


@router.get("/static/{name}", include_in_schema=False)
async def static(request: Request, name: str) -> Response:
    """One of the page's files."""
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
    folder.vote(body, {side.model: service_of(request, side.model).source for side in (body.a, body.b)})
    return {"saved": True, "tally": folder.tally()}


@router.get("/feedback", tags=["feedback"])
def saved(request: Request, folder: Folder) -> dict[str, Any]:
    """How many rows the feedback folder holds, and the tally of the blind comparisons."""
    return {"folder": request.app.state.settings.feedback, "rows": folder.counts(), "tally": folder.tally()}

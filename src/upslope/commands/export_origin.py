"""Where an exported model comes from, as far as its files say: the runs that trained it, and what they started from."""

import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from upslope.cache import cache_root
from upslope.errors import ModelError, UpslopeError
from upslope.models.files.adapters import adapter_config, base_source
from upslope.models.files.folders import is_adapter, model_of_run, provenance, run_of
from upslope.models.files.sources import ALIASES
from upslope.runs.folder import Run

Figures = Mapping[str, Any]  # metric -> number, or {"value", "low", "high", "n", ...}


@dataclass(frozen=True, slots=True)
class Stage:
    """One run of the chain. `step` is the exported checkpoint's; `figures` were measured at that very step."""

    name: str
    verb: str
    config: Mapping[str, Any]
    config_toml: str
    environment: Mapping[str, Any]
    result: Mapping[str, Any] | None
    step: int | None
    figures: Figures


@dataclass(frozen=True, slots=True)
class Origin:
    """Stages in the order they ran, and the start: `base_model` is its hub id ("" where it is not known)."""

    stages: tuple[Stage, ...]
    base_model: str
    base_words: str
    license: str | None
    adapters: str = ""

    @property
    def figures(self) -> Figures:
        """What was measured at the exported step."""
        return self.stages[-1].figures if self.stages else {}

    @property
    def summary(self) -> str:
        """One line: what was done to what."""
        done = " then ".join(stage.verb for stage in self.stages)
        return f"{self.base_words}, {f'trained by {done} with' if done else 'exported by'} upslope"


def origin_of(found: Path, folder: Path, *, base: str | None = None, license: str | None = None) -> Origin:
    """Follow runs backwards from the model folder or adapters `found` to a model that no run made.

    `folder` is the model folder itself, or the base of adapters; `base` and `license` are what the caller was told.
    """
    stages: list[Stage] = []
    adapters = ""
    if is_adapter(found):
        config = adapter_config(found)
        adapters = f"rank {config.get('r')}, alpha {config.get('lora_alpha')}, merged in float32"
    start: Path | None = found
    source = str(found)
    while start is not None and (run := run_of(start)) is not None and len(stages) < 100:
        stages.insert(0, _stage(run, start))
        source, start = _started_from(stages[0])
    if is_adapter(found) and not stages:
        source = base if base is not None else base_source(found)
        start = folder
    base_model, words, known = _base(source, start)
    return Origin(
        stages=tuple(stages), base_model=base_model, base_words=words, license=license or known, adapters=adapters
    )


def _stage(run: Path, model: Path) -> Stage:
    names = (model.parent.name, model.resolve().parent.name)  # a link to a checkpoint has its step, too
    found = next(filter(None, (re.match(r"step-(\d+)", name) for name in names)), None)
    step = int(found[1]) if found else None
    with Run.open(run, read_only=True) as opened:
        result = opened.result
        environment: Mapping[str, Any] = {}
        with suppress(UpslopeError):
            environment = opened.environment
        return Stage(
            name=run.resolve().name,
            verb=opened.verb or str(environment.get("verb", "")),
            config=opened.config,
            config_toml=opened.config_toml,
            environment=environment,
            result=result,
            step=step,
            figures={} if step is None else opened.evaluated(step) or {},
        )


def _started_from(stage: Stage) -> tuple[str, Path | None]:
    """The run's `model` as written, and its folder where it is a folder that still exists."""
    model = str(stage.config.get("model") or "none")
    path = Path(str(stage.environment.get("folder", ""))) / Path(model).expanduser()
    with suppress(ModelError):
        if path.is_dir():
            return model, path if (path / "config.json").is_file() else model_of_run(path, lambda line: None)
    return model, None


def _base(source: str, folder: Path | None) -> tuple[str, str, str | None]:
    """Hub id, words and licence of a model that no run here made."""
    if source in ("none", "scratch"):
        return "", "random weights", None
    name = source if source in ALIASES and folder is None else _alias_of(folder)
    if name is not None:
        alias, cached = ALIASES[name], cache_root() / "models" / name
        record = provenance(cached) if cached.is_dir() else {}
        took = f"{alias.repo}, its weights from {record['origin']}" if record.get("kind") == "gguf" else alias.repo
        return alias.repo, took, alias.license
    if folder is None:
        local = source.startswith((".", "~", "/")) or source.count("/") != 1 or source.endswith(".gguf")
        return ("", f"{Path(source).name}, which is no longer at its place", None) if local else (source, source, None)
    record, (named, license) = provenance(folder), _said_by_card(folder)
    if record.get("kind") == "hub":
        revision = f", revision {record['revision']}" if record.get("revision") else ""
        return str(record["origin"]), f"{record['origin']}{revision}", license
    if record.get("kind") in ("gguf", "wheel"):
        return named, f"{record.get('origin')} (sha256 {record.get('sha256') or record.get('wheel_sha256')})", license
    return named, f"{named or f'the local folder {folder.name}, whose origin is not known'}", license


def _alias_of(folder: Path | None) -> str | None:
    """The alias whose cached folder this is."""
    if folder is None:
        return None
    return next((name for name in ALIASES if folder.resolve() == (cache_root() / "models" / name).resolve()), None)


def _said_by_card(folder: Path) -> tuple[str, str | None]:
    """base_model and licence in the YAML head of the folder's own README.md."""
    from huggingface_hub import metadata_load

    head: Any = None
    with suppress(Exception):  # whatever a card of unknown make does to the reader: it then says nothing
        head = metadata_load(folder / "README.md")
    if not isinstance(head, dict):
        return "", None
    base = head.get("base_model")
    base = base[0] if isinstance(base, list) and base else base
    license = head.get("license")
    return (base if isinstance(base, str) else ""), (license if isinstance(license, str) else None)

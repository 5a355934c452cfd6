"""Where an exported model comes from, and the model card (README.md) that says so.

The runs that trained it, and what they started from, as far as its files say, and no word more.
The head is YAML as the hub reads it; every configuration is written beside the card, so that its command can be run.
"""

import hashlib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from upslope.cache import cache_root
from upslope.commands.export_verify import Gap
from upslope.errors import ModelError, UpslopeError
from upslope.models.files.adapters import adapter_config, base_source
from upslope.models.files.config_json import architecture
from upslope.models.files.folders import is_adapter, provenance, read_config
from upslope.models.files.places import model_of_run, run_of
from upslope.models.files.sources import ALIASES
from upslope.models.files.weights import read_shapes
from upslope.models.lstm import MODEL_TYPE as LSTM_TYPE
from upslope.runs.folder import Run
from upslope.version import __version__

_DATA_KEYS = ("data", "eval_data", "test_data", "mix_data", "task", "reward", "rewards", "teacher")
_FILES = re.compile(r".*\.(jsonl|json|csv|txt|parquet|py)(\.gz)?", re.I)
_HUB_ID = re.compile(r"([\w.-]+/)?[\w.-]+(:[\w.-]+)?")
_ENVIRONMENT = {
    "python": "Python",
    **{name: name for name in ("upslope", "torch", "transformers", "tokenizers", "safetensors", "numpy", "peft")},
    "platform": "system",
    "cpu": "processor",
    "threads": "threads",
    "dtype": "compute dtype",
    "device": "device",
}
_TASKS = {
    "ForCausalLM": "text-generation",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForMaskedLM": "fill-mask",
    "MTModel": "translation",
}
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
    return Origin(tuple(stages), base_model, words, license or known, adapters)


def _stage(run: Path, model: Path) -> Stage:
    names = (model.parent.name, model.resolve().parent.name)  # a link to a checkpoint has its step, too
    found = next(filter(None, (re.match(r"step-(\d+)", name) for name in names)), None)
    step = int(found[1]) if found else None
    with Run.open(run, read_only=True) as opened:
        environment: Mapping[str, Any] = {}
        with suppress(UpslopeError):
            environment = opened.environment
        return Stage(
            name=run.resolve().name,
            verb=opened.verb or str(environment.get("verb", "")),
            config=opened.config,
            config_toml=opened.config_toml,
            environment=environment,
            result=opened.result,
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
    homes = {name: cache_root() / "models" / name for name in ALIASES}
    found = (name for name, home in homes.items() if folder is not None and folder.resolve() == home.resolve())
    name = source if source in ALIASES and folder is None else next(found, None)
    if name is not None:
        alias, record = ALIASES[name], provenance(homes[name]) if homes[name].is_dir() else {}
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


def write_card(origin: Origin, folder: Path, *, name: str, dtype: str, gaps: Sequence[Gap] = ()) -> None:
    """Write README.md into the exported `folder`, and the files that its commands name."""
    config = read_config(folder)
    files = {f"upslope_{i}_{s.verb or 'run'}.toml": s.config_toml for i, s in enumerate(origin.stages, 1)}
    stages = [_chapter(*stage) for stage in zip(origin.stages, files, _commands(origin, files, dtype), strict=True)]
    parts = [
        f"---\n{_head(origin, config, name)}\n---",
        f"# {name}",
        f"Start and making: {origin.summary}.",
        _table(("", ""), _facts(origin, config, folder, dtype)),
        "## Use",
        _usage(config),
        "## Training",
        *(stages or ["Not known: the exported folder does not lie in a run of upslope."]),
        "## Figures",
        _figures(origin),
        "## Checks of this export",
        "\n".join(f"- {gap.in_words()}" for gap in gaps) or "None was asked for (`upslope export --verify`).",
        "## What is not known",
        _unknown(origin),
        f"Written by upslope {__version__} from the files of the run and of the model.",
    ]
    files["README.md"] = "\n\n".join(part for part in parts if part) + "\n"
    for file, text in files.items():
        (folder / file).write_text(text, encoding="utf-8")


def _head(origin: Origin, config: Mapping[str, Any], name: str) -> str:
    """The YAML head; a key whose value is not known is left out."""
    from huggingface_hub import EvalResult, ModelCardData

    results = [
        EvalResult(
            task_type=_task(config) or "other",
            dataset_type="upslope-held-out",
            dataset_name=f"held-out part of {_dataset_name(origin)}",
            metric_type=metric,
            metric_value=figure["value"],
        )
        for metric, figure in origin.figures.items()
        if isinstance(figure, Mapping) and math.isfinite(figure["value"])
    ]
    datasets = sorted({hub for stage in origin.stages for hub in _hub_data(stage.config)})
    return ModelCardData(
        base_model=origin.base_model or None,
        datasets=datasets or None,
        library_name="upslope" if config.get("model_type") == LSTM_TYPE else "transformers",
        license=origin.license,
        pipeline_tag=_task(config),
        tags=["upslope", *dict.fromkeys(stage.verb for stage in origin.stages if stage.verb)],
        model_name=name,
        eval_results=results or None,
    ).to_yaml()


def _task(config: Mapping[str, Any]) -> str | None:
    return next((task for ending, task in _TASKS.items() if architecture(config).endswith(ending)), None)


def _facts(origin: Origin, config: Mapping[str, Any], folder: Path, dtype: str) -> list[tuple[str, str]]:
    parameters = sum(math.prod(shape) for shape in read_shapes(folder).values())
    context = config.get("max_position_embeddings")
    return [
        ("network", f"{architecture(config) or config.get('model_type')}, {parameters:,} stored values"),
        ("number type", dtype),
        ("context", f"{context:,} tokens" if isinstance(context, int) else "not known"),
        ("start", origin.base_words),
        ("licence", origin.license or "not known: the files of the start model do not say it"),
        *([("adapters", origin.adapters)] if origin.adapters else []),
    ]


def _usage(config: Mapping[str, Any]) -> str:
    if config.get("model_type") == LSTM_TYPE:
        return _code("bash", "upslope generate FOLDER --prompt '...'") + "\n\nNo other program has this network."
    name = architecture(config)
    return _code(
        "python",
        f"from transformers import AutoTokenizer, {name}\n\n"
        f'model = {name}.from_pretrained("FOLDER")\ntokenizer = AutoTokenizer.from_pretrained("FOLDER")',
    )


def _commands(origin: Origin, files: Iterable[str], dtype: str) -> list[str]:
    """What runs each stage again, one after the other; a later one starts from the step that was taken before it."""
    commands, start = [], ""
    for number, (stage, file) in enumerate(zip(origin.stages, files, strict=True), 1):
        commands.append(f"upslope {stage.verb} --config {file}{start} --output-dir new/{number}")
        start = "" if stage.step is None else f" --model new/{number}/checkpoints/step-{stage.step:08d}"
    if commands:
        commands[-1] += f"\nupslope export new/{len(commands)} --dtype {dtype} --output FOLDER"
    return commands


def _chapter(stage: Stage, file: str, command: str) -> str:
    done = stage.result or {}
    at = f"Exported after step {stage.step}" if stage.step is not None else "The exported step is not recorded"
    ended = f"the run ended with {done['stopped']!r}" if "stopped" in done else "how the run ended is not recorded"
    tokens = f", {done['trained_tokens']:,} trained tokens" if isinstance(done.get("trained_tokens"), int) else ""
    return "\n\n".join(
        [
            f"### {file.split('_')[1]}. {stage.verb or 'a run'} ({stage.name})",
            f"{at}; {ended}{tokens}.",
            _code("bash", command),
            _table(("data", ""), _data(stage)) or "Data: not recorded.",
            f"Configuration, also in `{file}`:",
            _code("toml", stage.config_toml.strip()),
            _table(("environment", ""), _environment(stage.environment)) or "Environment: not recorded.",
        ]
    )


def _data(stage: Stage) -> list[tuple[str, str]]:
    launched = Path(str(stage.environment.get("folder", "")))
    rows = []
    for key in _DATA_KEYS:
        for value in _values(stage.config.get(key)):
            if (path := launched / Path(value).expanduser()).is_file():
                digest = hashlib.sha256(path.read_bytes()).hexdigest()
                words = f"file {path.name}, {path.stat().st_size:,} bytes, sha256 {digest} (as found at export)"
            elif _FILES.fullmatch(value):
                words = f"file {Path(value).name}, no longer at its place: its content is not known"
            else:
                words = f"`{value}`"
            rows.append((key, words))
    return rows


def _values(value: Any) -> Iterable[str]:
    """The set values of an option; "none" is how a configuration says that there is none."""
    listed = value if isinstance(value, list) else [value]
    return [str(item) for item in listed if item is not None and str(item).lower() not in ("none", "")]


def _hub_data(config: Mapping[str, Any]) -> Iterable[str]:
    """The hub data sets among the rows that were read."""
    for key in ("data", "eval_data", "test_data", "mix_data"):
        for value in _values(config.get(key)):
            if _HUB_ID.fullmatch(value) and not _FILES.fullmatch(value) and not Path(value).exists():
                yield value.partition(":")[0]


def _dataset_name(origin: Origin) -> str:
    config = origin.stages[-1].config
    named = [*_values(config.get("eval_data")), *_values(config.get("data")), *_values(config.get("task"))]
    return Path(named[0]).name if named else "data that are not recorded"


def _environment(environment: Mapping[str, Any]) -> list[tuple[str, str]]:
    known = {key: value for key, value in environment.items() if value is not None}
    rows = [(shown, str(known[key])) for key, shown in _ENVIRONMENT.items() if key in known]
    if rows and "upslope" not in known:
        rows.append(("upslope", "not recorded: it was not installed as a package"))
    git = environment.get("git")
    commit = "not recorded: the run did not start in a git working copy"
    if isinstance(git, Mapping):
        commit = f"{git.get('commit')}{', with uncommitted changes' if git.get('dirty') else ''}"
    return [*rows, ("commit of the folder it ran in", commit)] if rows else []


def _figures(origin: Origin) -> str:
    if not origin.figures:
        return "None: nothing was measured at the exported step." if origin.stages else "None are known."
    rows = []
    for metric, figure in origin.figures.items():
        if not isinstance(figure, Mapping):
            rows.append((metric, f"{figure:.6g}", "not known", "not known"))
            continue
        interval = f"{figure['low']:.4g} to {figure['high']:.4g}"
        rows.append((metric, f"{figure['value']:.6g}", interval, f"{figure.get('n', 'not known')}"))
    told = f"Measured at the exported step on the held-out part of {_dataset_name(origin)}."
    return f"{told}\n\n{_table(('figure', 'value', '95% interval', 'n'), rows)}"


def _unknown(origin: Origin) -> str:
    lines = ["Nothing but the figures above was measured: no safety, no bias, no other language or task."]
    if origin.license is None:
        lines.append("The licence of the start model is not known; it binds this model too.")
    if not origin.base_model and origin.base_words != "random weights":
        lines.append("The start model has no known name on the hub.")
    return "\n".join(f"- {line}" for line in lines)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    lines = [[" ".join(str(cell).replace("|", "\\|").split()) for cell in row] for row in (head, *rows)]
    lines.insert(1, ["---"] * len(head))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _code(language: str, text: str) -> str:
    """A fenced block that its own text cannot close."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"

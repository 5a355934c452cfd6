"""What the options name, looked for before anything is loaded: a mistyped path is said at once. Free of torch.

A name that may be a hub's, an alias or a pattern is left to whatever reads it.
"""

import os
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from upslope.config import PLUGINS
from upslope.data.readers import near_file, rows_of
from upslope.data.records import record_of
from upslope.errors import ConfigError, DataError, ModelError, RunError
from upslope.models.files.places import is_path, near_names
from upslope.options import DistillOptions, DPOOptions, RewardOptions, RunOptions, SFTOptions
from upslope.plugins import check_file, parse_spec
from upslope.rewards.summands import check_reward, parse_rewards

ROWS = "data eval_data test_data mix_data rewards prompts rescore hypotheses preferences perplexity benchmark configs"
MODELS = "model models compare teacher critic base tokenizer"
_RECORDS, _BY_LINE = (SFTOptions, DPOOptions, RewardOptions, DistillOptions), (".jsonl", ".csv", ".txt")
_FILE = re.compile(r".*\.(jsonl?|csv|tsv|txt|parquet|conll|tokens|toml)(\.gz)?", re.IGNORECASE)


def look(options: Any, *, skip: tuple[str, ...] = ()) -> None:
    """DataError, ModelError, ConfigError or RunError for the first option that names what is not there."""
    for option in ROWS.split():
        for text in _texts(options, option):
            _file(text, ConfigError if option == "configs" else DataError)
    for option in set(MODELS.split()) - set(skip):
        for text in _texts(options, option):
            path, (run, inside, _) = Path(text).expanduser(), text.partition("/checkpoints")
            written = is_path(text) or text.lower().endswith(".gguf")
            if written and not path.exists() and not (inside and _there(run)):
                hint = near_names(path) or "give a model folder, a .gguf file, a hub id or an alias"
                raise ModelError(f"{text}: no such folder; {hint}")
    for option in PLUGINS:
        for text, _ in parse_rewards(_texts(options, option)):
            spec = parse_spec(text)
            if spec.path is not None and not _there(spec.path):
                raise ConfigError(f"{spec.path}: no such file{near_file(Path(spec.path).expanduser())}")
            for key, value in spec.params.items():
                if key.endswith(("path", "file")) and isinstance(value, str):
                    _file(value, ModelError if spec.name == "reward_model" else DataError)
            if option == "reward":
                check_reward(spec)
            elif option != "task" and spec.path is not None:
                check_file(spec)
    for text in _texts(options, "from_run"):
        _run(text)
    if not isinstance(options, RunOptions):
        return
    for source in [*_texts(options, "data"), *_texts(options, "eval_data")] if isinstance(options, _RECORDS) else []:
        if source.lower().removesuffix(".gz").endswith(_BY_LINE) and Path(source).is_file():
            for where, row in islice(rows_of(source, columns=options.columns), 3):
                record_of(row, where)
    if options.output_dir is None:
        return
    folder = Path(options.output_dir)
    if options.resume:
        _run(folder)
    elif not options.dry_run and (folder / "config.toml").is_file() and (folder / "env.json").is_file():
        raise RunError(f"{folder}: already holds a run; continue it with --resume, or choose another --output-dir")


def _texts(options: Any, option: str) -> Iterator[str]:
    value = getattr(options, option, None)
    yield from (item for item in (value if isinstance(value, list | tuple) else (value,)) if isinstance(item, str))


def _file(text: str, error: type[ConfigError | DataError | ModelError]) -> None:
    """The file of TEXT or FORM:TEXT, where it is written as one."""
    bare = text if _there(text) else re.sub(r"\A\w+:(?=.)", "", text)
    written = _FILE.fullmatch(bare) or bare.startswith((".", "~", os.sep)) or bare.endswith("/") or bare.count("/") > 1
    if not written or _there(bare) or re.search(r"[*?[]", bare):
        return
    raise error(f"{bare}: no such file{near_file(Path(bare).expanduser())}")


def _there(text: str) -> bool:
    return Path(text).expanduser().exists()


def _run(folder: Path | str) -> None:
    if not (Path(folder) / "config.toml").is_file():
        raise RunError(f"{folder}: not a run folder (it has no config.toml); look under runs/ for its name")

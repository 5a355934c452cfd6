"""A model folder as files: read whole, written whole or not at all, and known again later. Free of torch.

It holds config.json, weights (models.files.weights), the tokenizer's files and, where upslope made it, an
upslope_source.json that says where it came from. One in a checkpoint has a manifest, one in the cache a record of its
files: `check_intact` compares every byte with them.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from upslope.atomic import fsync_file, fsync_folder, fsync_tree, read_object, write_atomic
from upslope.errors import ModelError, RunError
from upslope.manifest import damage, damaged_file, inventory, read_manifest, step_of

ADAPTER_CONFIG = "adapter_config.json"
GENERATION_CONFIG = "generation_config.json"
PROVENANCE = "upslope_source.json"
RECORD = "upslope_files.json"
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "chat_template.json", "chat_template.jinja"),
)
TOKENIZER_FOLDERS = ("additional_chat_templates", "source_tokenizer")


def read_config(folder: Path | str) -> dict[str, Any]:
    """config.json of a model folder. Raises ModelError when it is absent or not a JSON object."""
    if not (path := Path(folder) / "config.json").is_file():
        raise ModelError(f"{folder}: no config.json, so this is not a model folder in the Hugging Face layout")
    return read_object(path, ModelError)


def is_adapter(folder: Path | str) -> bool:
    """True for a folder that holds adapters in the PEFT layout and no model."""
    folder = Path(folder)
    return (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file()


def provenance(folder: Path | str) -> dict[str, Any]:
    """What is known about a folder's origin: its upslope_source.json, the hub's commit, or just that it is a folder."""
    folder = Path(folder)
    if (record := folder / PROVENANCE).is_file():
        return read_object(record, ModelError, "delete the folder and fetch it again")
    if folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--"):
        repo = folder.parent.parent.name.removeprefix("models--").replace("--", "/")
        return {"kind": "hub", "origin": repo, "revision": folder.name}
    return {"kind": "folder", "origin": str(folder)}


def check_intact(folder: Path | str) -> None:
    """Raise ModelError, naming the file and the remedy, where a model folder is not what upslope once wrote.

    Every byte of it is read, once in a process. A folder without manifest or record is taken as it is.
    """
    folder = Path(folder)
    checkpoint = folder.resolve().parent
    if folder.resolve().name == "model" and _is_checkpoint(checkpoint):
        if problem := damage(checkpoint, within="model"):
            raise ModelError(
                f"{checkpoint}: this checkpoint is damaged ({problem}); use another one of {checkpoint.parent}, or, if "
                "you changed it yourself, a copy of its model folder"
            )
    elif problem := damage_of_cached(folder):
        raise ModelError(f"{folder}: {problem}; delete the folder and fetch the model again")


def _is_checkpoint(path: Path) -> bool:
    """By its name, which then calls for a manifest; or, of one that was renamed, by its manifest."""
    with suppress(RunError):
        return step_of(path) >= 0 or bool(read_manifest(path))
    return False


def seal(folder: Path) -> None:
    """Note what a folder of the cache holds, for `damage_of_cached`."""
    write_atomic(folder / RECORD, json.dumps({"files": inventory(folder)}, indent=1))


def damage_of_cached(folder: Path) -> str | None:
    """What is wrong with a sealed folder, in words; None where it is whole, or was never sealed."""
    if not (record := folder / RECORD).is_file():
        return None
    try:
        return damaged_file(folder, read_object(record, ModelError)["files"])
    except (ModelError, ValueError, KeyError, TypeError, AttributeError, OSError):
        return f"{RECORD} is damaged"


@contextmanager
def new_folder(path: Path | str, *, overwrite: bool = False, record: Mapping[str, Any] | None = None) -> Iterator[Path]:
    """A temporary folder that becomes `path` when the block ends without an error, and vanishes otherwise.

    record: its provenance. Every file is flushed to disk before the rename. Raises RunError for what the file system
    refuses.
    """
    if (path := Path(path)).exists() and not overwrite and (not path.is_dir() or any(path.iterdir())):
        raise RunError(f"{path} already exists; choose another output folder")
    with _beside(path) as temp:
        temp.mkdir()
        temp.chmod(0o755)
        yield temp
        if record is not None:
            write_json(temp / PROVENANCE, record)
        fsync_tree(temp)


@contextmanager
def new_file(path: Path | str, *, overwrite: bool = False) -> Iterator[Path]:
    """The place of a temporary file that becomes `path` when the block ends without an error, and vanishes otherwise.

    It is flushed to disk before the rename. Raises RunError for what the file system refuses.
    """
    if (path := Path(path)).is_dir() or (path.exists() and not overwrite):
        raise RunError(f"{path} already exists; choose another output, or --overwrite a file")
    with _beside(path) as temp:
        yield temp
        temp.chmod(0o644)
        fsync_file(temp)


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """A place in a hidden folder beside `path`; what the block puts there is renamed to `path`."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        hidden = f".{path.name}.tmp-"
        with tempfile.TemporaryDirectory(prefix=hidden, dir=path.parent, ignore_cleanup_errors=True) as work:
            temp = Path(work, path.name)
            yield temp
            _swap_in(temp, path)
    except (OSError, SafetensorError) as error:
        raise RunError(f"cannot write {path}: {error}; free space or choose another place, then run again") from error


def _swap_in(temp: Path, path: Path) -> None:
    """Rename `temp` to `path`; a folder already there is moved aside first and removed last."""
    old: Path | None = None
    if path.is_dir():
        old = Path(tempfile.mkdtemp(prefix=f".{path.name}.old-", dir=path.parent))
        os.replace(path, old)
    try:
        os.replace(temp, path)
    except OSError:
        if old is not None:
            os.replace(old, path)
        raise
    fsync_folder(path.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def copy_companions(source: Path, target: Path) -> None:
    """Tokenizer files, chat templates and the generation config, as they are."""
    for name in (*TOKENIZER_FILES, GENERATION_CONFIG):
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    for name in TOKENIZER_FOLDERS:
        if (source / name).is_dir():
            shutil.copytree(source / name, target / name, dirs_exist_ok=True)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """A JSON object as a text file of two-space indents."""
    path.write_text(json.dumps(dict(value), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def listed(kind: str, items: Sequence[str]) -> str:
    """How many there are of a kind, and the first four of them."""
    more = f" and {len(items) - 4} more" if len(items) > 4 else ""
    return f"{len(items)} {kind} ({', '.join(items[:4])}{more})"

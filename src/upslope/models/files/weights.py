"""Weights on disk: Hugging Face folders of safetensors, read tensor by tensor and written atomically.

A folder holds `config.json`, either `model.safetensors` or shards named by `model.safetensors.index.json`, and the
tokenizer's files. Pickle files are refused: reading one runs whatever code its author put there.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from upslope.atomic import fsync_folder, fsync_tree
from upslope.errors import ModelError, RunError
from upslope.json_file import read_object

__all__ = [
    "check_finite",
    "check_shapes",
    "copy_companions",
    "listed",
    "load",
    "new_folder",
    "read_config",
    "read_shapes",
    "save_folder",
    "write_json",
]

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
CHAT_TEMPLATE = "chat_template.jinja"
GENERATION_CONFIG = "generation_config.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "chat_template.json",
    CHAT_TEMPLATE,
)
TOKENIZER_FOLDERS = ("additional_chat_templates", "source_tokenizer")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


class Tokenizer(Protocol):
    """What `save_folder` needs of a tokenizer."""

    def save_pretrained(self, save_directory: str) -> object:
        """Write the tokenizer's files."""
        ...


def read_config(folder: Path | str) -> dict[str, Any]:
    """config.json of a model folder. Raises ModelError when it is absent or not a JSON object."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ModelError(f"{folder}: no config.json, so this is not a model folder in the Hugging Face layout")
    return read_object(path, ModelError)


def read_shapes(folder: Path | str) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in the folder, read from the files' headers only."""
    shapes: dict[str, tuple[int, ...]] = {}
    for _, file, names in _opened_files(Path(folder)):
        for name in sorted(names):
            shapes[name] = tuple(file.get_slice(name).get_shape())
    return shapes


def load(
    folder: Path | str, dtype: torch.dtype | None = None, *, names: Sequence[str] | None = None
) -> dict[str, Tensor]:
    """The folder's tensors (all, or those named) as copies of their own; floating ones are cast to `dtype`.

    The files are mapped, and one tensor at a time is copied out of the map: peak memory is the result plus one
    tensor, and a file replaced later cannot change what was loaded. Raises ModelError for NaN and infinity.
    """
    wanted = None if names is None else set(names)
    state: dict[str, Tensor] = {}
    for path, file, stored in _opened_files(Path(folder)):
        for name in sorted(stored if wanted is None else stored & wanted):
            tensor = file.get_tensor(name)
            state[name] = tensor.to(_final_dtype(tensor, dtype), copy=True)
            check_finite(name, state[name], where=path)
    if wanted is not None and (absent := sorted(wanted - state.keys())):
        raise ModelError(f"{folder}: {listed('missing', absent)}")
    return state


def check_finite(name: str, tensor: Tensor, *, where: Path | str) -> None:
    """Raise ModelError for a weight that holds NaN or infinity: every answer of such a network is one of them."""
    if tensor.dtype not in _FLOATS or tensor.is_meta or bool(tensor.sum().isfinite()):
        return
    if not bool(tensor.isfinite().all()):  # a sum may also overflow
        raise ModelError(
            f"{where}: {name} holds NaN or infinity, so the model is damaged; take another checkpoint or get it again"
        )


def check_shapes(
    expected: Mapping[str, Sequence[int]], found: Mapping[str, Sequence[int]], *, where: Path | str
) -> None:
    """Raise one ModelError that names every kind of mismatch: missing, unexpected and misshapen tensors."""
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected]
    misshapen = [
        f"{name} is {list(found[name])} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in found and tuple(found[name]) != tuple(shape)
    ]
    kinds = (("missing", missing), ("unexpected", unexpected), ("misshapen", misshapen))
    parts = [listed(kind, items) for kind, items in kinds if items]
    if parts:
        raise ModelError(
            f"{where}: weights do not fit config.json: {'; '.join(parts)}; get the folder again, or correct config.json"
        )


def save_folder(
    path: Path | str,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: float = 5e9,
    source_folder: Path | str | None = None,
    tokenizer: Tokenizer | None = None,
    chat_template: str | None = None,
    generation_config: Mapping[str, Any] | None = None,
    extra_files: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a complete model folder that transformers and vLLM load with no code of ours; return its path.

    Floating tensors are cast to `dtype` if given; config.json's dtype is set to what is written. A head tied to the
    embedding is written once. Tokenizer files, chat template and generation config come from `source_folder`, and
    `tokenizer`, `chat_template` and `generation_config` win over it. `extra_files` maps further names to their text.

    Atomic: the folder appears under its name only when every file is complete on disk. Raises RunError when `path`
    is in use (unless `overwrite`), cannot be written, or the disk is full; nothing that existed is lost then.
    """
    tensors = _without_tied_head(config, tensors)
    written = dtype or _common_dtype(tensors)
    config = {**{k: v for k, v in config.items() if k != "torch_dtype"}, "dtype": str(written).removeprefix("torch.")}
    with new_folder(path, overwrite=overwrite) as temp:
        if source_folder is not None:
            copy_companions(Path(source_folder), temp)
        if tokenizer is not None:
            tokenizer.save_pretrained(str(temp))
        if chat_template is not None:
            (temp / CHAT_TEMPLATE).write_text(chat_template, encoding="utf-8")
        if generation_config is not None:
            write_json(temp / GENERATION_CONFIG, generation_config)
        for name, text in (extra_files or {}).items():
            (temp / name).write_text(text, encoding="utf-8")
        _write_tensors(temp, tensors, dtype, max_shard_bytes)
        write_json(temp / "config.json", config)
    return Path(path)


@contextmanager
def new_folder(path: Path | str, *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary sibling folder that becomes `path` when the block ends without an error, and vanishes otherwise.

    Every file is flushed to disk before the rename. Raises RunError for what the file system refuses.
    """
    path = Path(path)
    if path.exists() and not overwrite and (not path.is_dir() or any(path.iterdir())):
        raise RunError(f"{path} already exists; choose another output folder")
    temp: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temp = Path(tempfile.mkdtemp(prefix=f".{path.name}.tmp-", dir=path.parent))
        temp.chmod(0o755)
        yield temp
        fsync_tree(temp)
        _swap_in(temp, path)
    except (OSError, SafetensorError) as error:
        raise RunError(f"cannot write {path}: {error}; free space or choose another folder, then run again") from error
    finally:
        if temp is not None:
            shutil.rmtree(temp, ignore_errors=True)


def _swap_in(temp: Path, path: Path) -> None:
    """Rename `temp` to `path`; a folder already there is moved aside first and removed last."""
    old: Path | None = None
    if path.exists():
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


def _write_tensors(
    folder: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype | None, max_shard_bytes: float
) -> None:
    """One file, or shards and their index; each shard is cast just before it is written."""
    sizes = {name: t.numel() * _final_dtype(t, dtype).itemsize for name, t in tensors.items()}
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        files = [SINGLE]
    for file, names in zip(files, shards, strict=True):
        part = {n: tensors[n].detach().to("cpu", _final_dtype(tensors[n], dtype)).contiguous() for n in names}
        save_file(part, str(folder / file), metadata={"format": "pt"})
        (folder / file).chmod(0o644)
    if len(shards) > 1:
        where = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        write_json(folder / INDEX, {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where})


def _final_dtype(tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    return dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype


def _common_dtype(tensors: Mapping[str, Tensor]) -> torch.dtype:
    """The dtype that most floating values have."""
    counts: dict[torch.dtype, int] = {}
    for tensor in tensors.values():
        if tensor.is_floating_point():
            counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.numel()
    return max(counts, key=lambda dtype: counts[dtype]) if counts else torch.float32


def _without_tied_head(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Drop a head that the reader will tie to the embedding; refuse one that tying would lose."""
    kept = dict(tensors)
    if config.get("tie_word_embeddings") and _HEAD in kept and _EMBEDDING in kept:
        head, embedding = kept.pop(_HEAD), kept[_EMBEDDING]
        if head.data_ptr() != embedding.data_ptr() and not torch.equal(head, embedding):
            raise ModelError(
                f"config says tie_word_embeddings=true but {_HEAD} differs from {_EMBEDDING}; set it to false"
            )
    return kept


def copy_companions(source: Path, target: Path) -> None:
    """Tokenizer files, chat templates and the generation config, as they are."""
    for name in (*TOKENIZER_FILES, GENERATION_CONFIG):
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    for name in TOKENIZER_FOLDERS:
        if (source / name).is_dir():
            shutil.copytree(source / name, target / name, dirs_exist_ok=True)


def _by_file(folder: Path) -> dict[Path, set[str] | None]:
    """The folder's weight files, each with the tensors its index assigns to it (None: all it holds)."""
    if (folder / INDEX).is_file():
        where = read_object(folder / INDEX, ModelError).get("weight_map")
        if not isinstance(where, dict) or not where or not all(map(_plain_name, where.values())):
            raise ModelError(f"{folder / INDEX}: no usable weight_map; get the folder again")
        files: dict[Path, set[str] | None] = {folder / file: set() for file in sorted(set(where.values()))}
        for name, file in where.items():
            names = files[folder / file]
            assert names is not None
            names.add(name)
        if absent := [path.name for path in files if not path.is_file()]:
            raise ModelError(f"{folder}: {listed('shards missing', absent)}; get the folder again")
        return files
    if (folder / SINGLE).is_file():
        return {folder / SINGLE: None}
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        raise ModelError(
            f"{folder}: holds pickle weights ({pickles[0]}), which can run code when read; convert them once to "
            "safetensors where you trust them (transformers: from_pretrained, then save_pretrained)"
        )
    raise ModelError(f"{folder}: no {SINGLE} and no {INDEX}; is the download complete?")


def _opened_files(folder: Path) -> Iterator[tuple[Path, Any, set[str]]]:
    """Every weight file, open, and the names of those of its tensors that belong to the model."""
    for path, named in _by_file(folder).items():
        with _opened(path) as file:
            stored = set(file.keys())
            yield path, file, stored if named is None else named & stored


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A mapped safetensors file; what cannot be read is a ModelError with the file's name."""
    try:
        with safe_open(str(path), framework="pt") as file:
            yield file
    except (SafetensorError, OSError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(f"{path}: cannot be read, damaged or cut short ({reason}); get the file again") from error


def listed(kind: str, items: Sequence[str], shown: int = 4) -> str:
    """How many there are of a kind, and the first of them."""
    more = f" and {len(items) - shown} more" if len(items) > shown else ""
    return f"{len(items)} {kind} ({', '.join(items[:shown])}{more})"


def _plain_name(file: object) -> bool:
    """Whether it can be the name of a file in the same folder."""
    return isinstance(file, str) and file.isprintable() and len(file) < 256 and Path(file).name == file


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """A JSON object as a text file of two-space indents."""
    path.write_text(json.dumps(dict(value), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

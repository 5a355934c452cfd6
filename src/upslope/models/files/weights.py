"""Weights on disk: Hugging Face folders of safetensors, read tensor by tensor and written atomically.

A folder holds `config.json`, either `model.safetensors` or shards named by `model.safetensors.index.json`, and the
tokenizer's files. Pickle files are refused: reading one runs whatever code its author put there.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from upslope.atomic import read_object
from upslope.errors import ModelError
from upslope.models.files.folders import GENERATION_CONFIG, copy_companions, listed, new_folder, write_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


class Tokenizer(Protocol):
    """What `save_folder` needs of a tokenizer."""

    def save_pretrained(self, save_directory: str) -> object:
        """Write the tokenizer's files."""
        ...


def read_shapes(folder: Path | str) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in the folder, read from the files' headers only."""
    opened = _opened_files(Path(folder))
    return {name: tuple(file.get_slice(name).get_shape()) for _, file, names in opened for name in sorted(names)}


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


def read_file(path: Path) -> dict[str, Tensor]:
    """All tensors of one safetensors file. ModelError: it cannot be read, or holds NaN or infinity."""
    with _opened(path) as file:
        state = {name: file.get_tensor(name) for name in sorted(file.keys())}
    for name, tensor in state.items():
        check_finite(name, tensor, where=path)
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
    kinds = {
        "missing": [name for name in expected if name not in found],
        "unexpected": [name for name in found if name not in expected],
        "misshapen": [
            f"{name} is {list(found[name])} instead of {list(shape)}"
            for name, shape in expected.items()
            if name in found and tuple(found[name]) != tuple(shape)
        ],
    }
    if parts := [listed(kind, items) for kind, items in kinds.items() if items]:
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
    generation_config: Mapping[str, Any] | None = None,
    record: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a complete model folder that transformers and vLLM load with no code of ours; return its path.

    Floating tensors are cast to `dtype` if given; config.json's dtype is set to what is written. A head tied to the
    embedding is written once. Tokenizer files, chat template and generation config come from `source_folder`, and
    `tokenizer` and `generation_config` win over it. `record`: its provenance.

    Atomic: the folder appears under its name only when every file is complete on disk. Raises RunError when `path`
    is in use (unless `overwrite`), cannot be written, or the disk is full; nothing that existed is lost then.
    """
    tensors = _without_tied_head(config, tensors)
    written = dtype or _common_dtype(tensors)
    config = {**{k: v for k, v in config.items() if k != "torch_dtype"}, "dtype": str(written).removeprefix("torch.")}
    with new_folder(path, overwrite=overwrite, record=record) as temp:
        if source_folder is not None:
            copy_companions(Path(source_folder), temp)
        if tokenizer is not None:
            tokenizer.save_pretrained(str(temp))
        if generation_config is not None:
            write_json(temp / GENERATION_CONFIG, generation_config)
        _write_tensors(temp, tensors, dtype, max_shard_bytes)
        write_json(temp / "config.json", config)
    return Path(path)


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
    counts: Counter[torch.dtype] = Counter()
    for tensor in tensors.values():
        counts[tensor.dtype] += tensor.numel() * tensor.is_floating_point()
    return counts.most_common(1)[0][0] if counts.total() else torch.float32


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


def _by_file(folder: Path) -> dict[Path, set[str] | None]:
    """The folder's weight files, each with the tensors its index assigns to it (None: all it holds)."""
    if (folder / INDEX).is_file():
        where = read_object(folder / INDEX, ModelError).get("weight_map")
        if not isinstance(where, dict) or not where or not all(map(_plain_name, where.values())):
            raise ModelError(f"{folder / INDEX}: no usable weight_map; get the folder again")
        files: dict[Path, set[str]] = {folder / file: set() for file in sorted(set(where.values()))}
        for name, file in where.items():
            files[folder / file].add(name)
        if absent := [path.name for path in files if not path.is_file()]:
            raise ModelError(f"{folder}: {listed('shards missing', absent)}; get the folder again")
        return dict(files)
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


def _plain_name(file: object) -> bool:
    """Whether it can be the name of a file in the same folder."""
    return isinstance(file, str) and file.isprintable() and len(file) < 256 and Path(file).name == file

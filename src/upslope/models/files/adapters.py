"""LoRA adapters in the PEFT layout, merged into the weights they were trained beside.

W + scale B A in float32 (Hu et al. 2021, arXiv 2106.09685, section 4.1), scale = alpha / r, or alpha / sqrt(r) for
rank-stabilised adapters (Kalajdzievski 2023, arXiv 2312.03732). What else a folder may hold (whole layers trained
beside the adapters) takes the place of the model's own; forms whose merge is another formula are refused by name.
"""

import math
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from upslope.atomic import read_object
from upslope.errors import ModelError
from upslope.models.files.folders import ADAPTER_CONFIG, check_intact, copy_companions, new_folder
from upslope.models.files.loading import load_model, save_model
from upslope.models.files.places import run_of
from upslope.models.files.weights import read_file

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
_DOWN, _UP = ".lora_A.weight", ".lora_B.weight"
# Options under which the merged weight is not W + scale B A, or the base is not the stored one.
_OTHER_FORMULAS = (
    *("use_dora", "use_qalora", "use_bdlora", "lora_bias", "fan_in_fan_out", "trainable_token_indices"),
    *("alora_invocation_tokens", "layer_replication", "target_parameters", "arrow_config", "kasa_config"),
    *("monteclora_config", "megatron_config"),
)
# No group repeated, few repetitions and groups: going back over a layer's name stays short.
_PATTERN = re.compile(r"(?!.*\)[*+?])(?!(?:[^*+?(]*[*+?(]){5})[\w.:\\^$|*+?\[\]()-]{1,200}")
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")


def adapter_config(folder: Path | str) -> dict[str, Any]:
    """adapter_config.json of a PEFT folder. Raises ModelError for what is no LoRA, or cannot be merged here."""
    path = Path(folder) / ADAPTER_CONFIG
    config = read_object(path, ModelError)
    for key in ("rank_pattern", "alpha_pattern"):
        _check_patterns(config.get(key), f"{path}: {key}")
    if config.get("peft_type") != "LORA":
        kind = config.get("peft_type")
        raise ModelError(f"{path}: peft_type is {kind!r}, only LORA can be merged here; merge it with peft")
    used = [key for key in _OTHER_FORMULAS if config.get(key)]
    if (start := config.get("init_lora_weights")) not in _PLAIN_STARTS:
        used.append(f"init_lora_weights={start!r}")
    if used:
        raise ModelError(f"{path}: {', '.join(used)} cannot be merged here; merge it with peft (merge_and_unload)")
    return config


def _check_patterns(patterns: Any, where: str) -> None:
    """An object of regular expressions (or names of layers) to numbers."""
    if patterns is None:
        return
    if not isinstance(patterns, dict):
        raise ModelError(f"{where} = {patterns!r:.60}; it must be an object of layers' names to numbers")
    for pattern in patterns:
        try:
            re.compile(rf"(.*\.)?({pattern})")
        except (re.error, OverflowError, RecursionError) as error:
            raise ModelError(f"{where}: {pattern!r:.60} is no regular expression ({error})") from error
        if not _PATTERN.fullmatch(pattern):
            raise ModelError(f"{where}: {pattern!r:.60} may compare for ever; give layers' names, or at most 4 of *+?(")


def base_source(folder: Path | str) -> str:
    """What the adapters were trained on: the config's base_model_name_or_path, else the `model` of the run they lie in.

    A base that is no folder here (the run came from another machine) gives way to the run's word. Raises ModelError
    where neither says it.
    """
    folder = Path(folder)
    if not (named := adapter_config(folder).get("base_model_name_or_path")) or not Path(str(named)).is_dir():
        named = _model_of_run(folder) or named
    if not named:
        raise ModelError(
            f"{folder}: {ADAPTER_CONFIG} has no base_model_name_or_path and no run's config.toml lies above it; "
            "say which model they belong to with --base"
        )
    return str(named)


def _model_of_run(folder: Path) -> str | None:
    """`model` in the config.toml of the run whose checkpoint `folder` is; a relative path starts where the run did."""
    if (run := run_of(folder)) is None:
        return None
    try:
        model = tomllib.loads((run / "config.toml").read_text(encoding="utf-8")).get("model")
        started = read_object(run / "env.json", ModelError).get("folder", "")
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{run}: which model it started from cannot be read ({error}); say it with --base") from error
    if not isinstance(model, str):
        return None
    there = Path(str(started)) / model
    return str(there) if there.exists() else model


@torch.no_grad()
def merge_adapters(model: nn.Module, folder: Path | str) -> None:
    """Add the adapters of a PEFT folder to the float32 weights of `model`, in place.

    Equal to peft's merge_and_unload within float32 rounding. Raises ModelError for files that cannot be read, tensors
    that do not fit the model, and pairs that are not complete; the model is then unchanged.
    """
    folder = Path(folder)
    check_intact(folder)
    config = adapter_config(folder)
    if not (path := folder / WEIGHTS).is_file():
        raise ModelError(f"{path}: no such file; adapters are read from safetensors only")
    stored = {name.removeprefix(PREFIX): x for name, x in read_file(path).items()}
    parameters = dict(model.named_parameters())
    whole = {name: x for name, x in stored.items() if ".lora_" not in name}
    layers = sorted(name.removesuffix(_DOWN) for name in stored if name.endswith(_DOWN))
    odd = [n for n in stored if ".lora_" in n and not n.endswith((_DOWN, _UP))]
    odd += [n for n in stored if n.endswith(_UP) and n.removesuffix(_UP) not in layers]
    odd += [f"{layer}{_DOWN}" for layer in layers if f"{layer}{_UP}" not in stored]
    if odd or not stored:
        raise ModelError(f"{path}: {odd[0] if odd else 'no tensor'}: no pair of lora_A and lora_B weights")
    changes = [(f"{layer}.weight", *_pair(stored, layer, config)) for layer in layers]
    shapes = {name: (up.shape[0], down.shape[1]) for name, up, down, _ in changes}
    _check_fit(folder, parameters, {**shapes, **{name: tuple(x.shape) for name, x in whole.items()}})
    tied = [name for name in whole if parameters[name] is getattr(model, "output_weight", None)]
    if tied and not config.get("ensure_weight_tying"):
        raise ModelError(
            f"{folder}: holds {tied[0]} apart from the output layer, with which the base model shares it; "
            "train with ensure_weight_tying, or merge it with peft"
        )
    for name, up, down, scale in changes:
        weight = parameters[name]
        weight.add_((up @ down).to(weight.device, weight.dtype), alpha=scale)
    for name, tensor in whole.items():
        parameters[name].copy_(tensor)


def save_merged(base: Path, adapters: Path, target: Path, record: Mapping[str, Any]) -> None:
    """Write the whole model of a folder of adapters in float32, and `record` as its provenance.

    A tokenizer beside the adapters wins over the base's.
    """
    model = load_model(base)
    merge_adapters(model, adapters)
    with new_folder(target, overwrite=True, record=record) as temp:
        save_model(model, temp, source_folder=base, overwrite=True)
        copy_companions(adapters, temp)


def _pair(stored: Mapping[str, Tensor], layer: str, config: Mapping[str, Any]) -> tuple[Tensor, Tensor, float]:
    """B [out, r], A [r, in] and their scale."""
    down, up = stored[layer + _DOWN].float(), stored[layer + _UP].float()
    rank = _of_pattern(config.get("rank_pattern"), layer, config.get("r"))
    alpha = _of_pattern(config.get("alpha_pattern"), layer, config.get("lora_alpha"))
    if down.ndim != 2 or up.ndim != 2 or not isinstance(rank, int) or (down.shape[0], up.shape[1]) != (rank, rank):
        shapes = f"lora_A {list(down.shape)} and lora_B {list(up.shape)}"
        raise ModelError(f"{layer}: {shapes} are not [r, in] and [out, r] with r = {rank} of {ADAPTER_CONFIG}")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not abs(alpha) < 1e30:
        raise ModelError(f"{layer}: lora_alpha is {alpha!r} in {ADAPTER_CONFIG}; it must be a number")
    return up, down, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _check_fit(folder: Path, parameters: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    for name, shape in shapes.items():
        if name not in parameters:
            raise ModelError(f"{folder}: adapts {name}, which the base model does not have; is it the right --base?")
        if (own := tuple(parameters[name].shape)) != shape:
            said = f"{name} is {list(shape)} but the base model's is {list(own)}"
            raise ModelError(f"{folder}: {said}; is it the right --base?")


def _of_pattern(patterns: Mapping[str, Any] | None, layer: str, default: Any) -> Any:
    """peft's rule: the first pattern that is the layer's name, or the end of it from a dot on."""
    matching = (value for pattern, value in (patterns or {}).items() if re.fullmatch(rf"(.*\.)?({pattern})", layer))
    return next(matching, default)

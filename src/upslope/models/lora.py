"""LoRA layers (Hu et al. 2021, arXiv 2106.09685): which layers get them, their dropout, the folder that peft loads.

Dropout of what adapters read (as peft's lora_dropout) goes by a counter and not by a generator. A number is dropped
where a hash of (seed, step, layer, the sequence up to this token, channel) says so: whatever the micro-batches, the
packing and the order, and again where activations are recomputed. It acts inside `dropping` alone.

Shapes: T packed tokens, S segments, B padded texts of T tokens, D width.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from upslope.errors import ConfigError, ModelError
from upslope.models.files.adapters import PREFIX, WEIGHTS
from upslope.models.files.folders import ADAPTER_CONFIG, provenance, write_json
from upslope.models.protocol import CausalModel
from upslope.types import Batch


def _mix(x: Tensor) -> Tensor:
    """SplitMix64 (Steele, Lea & Flood 2014) of int64, whose products wrap."""
    x = x - 0x61C8864680B583EB
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15), (31, 1)):
        x.bitwise_xor_((x >> shift).bitwise_and_(2 ** (64 - shift) - 1)).mul_(factor)  # the shift keeps the sign
    return x


class AdapterDropout(nn.Module):
    """x with each number 0 with probability p, else over 1 - p, where `keys` are set (one per row); else x itself.

    p counts in 65536ths, rounded up. ModelError for an x whose rows are not those of the keys.
    """

    def __init__(self, p: float, seed: int, layer: int) -> None:
        super().__init__()
        self.dropped = math.ceil(p * 2**16)
        self.own = int(_mix(_mix(torch.tensor(seed % 2**63)) + layer))
        self.keys: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.keys is None:
            return x
        extra = x.shape[:-1].numel() - self.keys.numel()
        if extra < 0 or (extra and x.dim() > 2):  # rows added behind packed ones are read by nobody
            raise ModelError(
                f"lora_dropout: a layer with adapters reads {x.shape[:-1].numel()} rows of {self.keys.numel()} tokens; "
                "set it to 0, or name other layers (lora_target_modules)"
            )
        rows = _mix(F.pad(self.keys.flatten(), (0, extra)) + self.own)
        words = _mix(rows[:, None] + torch.arange(-(-x.shape[-1] // 4), device=x.device) * -0x61C8864680B583EB)
        drop = words.view(torch.int16)[:, : x.shape[-1]] < self.dropped - 2**15  # four numbers a word
        return x.masked_fill(drop.view(x.shape), 0) * (2**16 / (2**16 - self.dropped))


def drop_inputs(model: nn.Module, p: float, seed: int) -> None:
    """Give every adapter of `model` its dropout; with p = 0 it stays as peft made it, without."""
    adapters = [m.lora_dropout for m in model.modules() if isinstance(getattr(m, "lora_dropout", None), nn.ModuleDict)]
    for layer, places in enumerate(adapters if p else ()):
        places["default"] = AdapterDropout(p, seed, layer)


@contextmanager
def dropping(
    model: nn.Module, batches: Iterable[Any], keys_of: Callable[[Any], Tensor], step: int | None
) -> Iterator[Iterator[Any]]:
    """The batches one by one; while one is at work, forward and backward, the adapters drop out what `step` has them.

    keys_of: a key per row of the batch, as the layers meet them. A step of None drops nothing.
    """
    layers = [m for m in model.modules() if isinstance(m, AdapterDropout)] if step is not None else []

    def each() -> Iterator[Any]:
        for batch in batches:
            keys = _mix(keys_of(batch) + _mix(torch.tensor(step))) if layers else None
            for layer in layers:
                layer.keys = keys
            yield batch

    try:
        yield each()
    finally:
        for layer in layers:
            layer.keys = None


def packed_keys(batch: Batch) -> Tensor:
    """A key per packed token [T], of all tokens of its sequence up to it; a shared prompt's are what they are alone."""
    lengths_S, parents_S = (torch.tensor(x, device=batch.tokens_T.device) for x in (batch.lengths, batch.parents))
    sums_T = _mix(_mix(batch.positions_T) + batch.tokens_T).cumsum(0)
    ends_S = sums_T[lengths_S.cumsum(0) - 1]
    before_S = F.pad(ends_S[:-1], (1, 0))
    before_S = before_S - torch.where(parents_S < 0, 0, (ends_S - before_S)[parents_S])
    return sums_T - before_S.repeat_interleave(lengths_S)


def padded_keys(ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """A key per token [B, T], of its whole text (which an encoder sees) and its place in it, padding aside."""
    places_BT = mask_BT.cumsum(1)
    whole_B1 = (_mix(_mix(places_BT) + ids_BT) * mask_BT).sum(1, keepdim=True)
    return _mix(whole_B1 + places_BT)


LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "gate_proj", "up_proj", "down_proj", "fc1", "fc2")
ALL = "all-linear"


def target_layers(linear: Sequence[str], wanted: Sequence[str], usual: Sequence[str] = LORA_TARGETS) -> list[str]:
    """The entries of `wanted` that peft is to adapt: last names, ends of names from a dot on, or all-linear.

    linear: full names of the linear layers that may be adapted. Nothing wanted: those of the `usual` that are there.
    ConfigError for an entry that is none of them.
    """
    last = sorted({name.rpartition(".")[2] for name in linear})
    if not wanted:
        wanted = [name for name in last if name in usual]
    elif list(wanted) == [ALL]:
        wanted = last
    odd = [one for one in wanted if not any(name == one or name.endswith(f".{one}") for name in linear)]
    if odd or not wanted:
        what = f"no linear layer is called {odd[0]!r}" if odd else "none of the usual layers is here"
        raise ConfigError(f"lora_target_modules: {what}; this model has {', '.join(last) or 'none'} (or {ALL})")
    return sorted(wanted)


def add_adapters(
    model: CausalModel,
    folder: Path,
    *,
    rank: int,
    alpha: float,
    targets: Sequence[str],
    seed: int,
    dropout: float = 0.0,
) -> Any:
    """Inject adapters with peft, seeded; everything else is frozen. The configuration says what `folder` is.

    Never the output layer, which is read as a matrix and not called. ConfigError for dropout in an encoder-decoder.
    """
    if dropout and model.whole_prompts:
        raise ConfigError("lora_dropout: the layers of an encoder-decoder do not read whole sequences; leave it out")
    heads = [m.weight for m in model.modules() if isinstance(m, nn.Linear) and m.weight is model.output_weight]
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and not any(m.weight is h for h in heads)]
    record = provenance(folder)
    hub = record.get("kind") == "hub"
    layers = target_layers(names, targets)
    torch.manual_seed(seed)
    return inject(
        model,
        layers,
        rank=rank,
        alpha=alpha,
        dropout=dropout,
        seed=seed,
        base_model_name_or_path=str(record["origin"]) if hub else str(folder.absolute()),
        revision=record.get("revision") if hub else None,
        task_type="SEQ_2_SEQ_LM" if model.whole_prompts else "CAUSAL_LM",
    )


def inject(
    model: nn.Module, layers: Sequence[str], *, rank: int, alpha: float, dropout: float, seed: int, **more: Any
) -> Any:
    """Have peft put adapters into `layers`, from torch's generator; `seed` is the dropout's. The configuration."""
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=dropout,
        target_modules=list(layers),
        **more,
    )
    inject_adapter_in_model(config, model, adapter_name="default")
    drop_inputs(model, dropout, seed)
    return config


def save_adapters(model: nn.Module, config: Any, folder: Path, trained: Mapping[str, Tensor]) -> None:
    """Write the adapters `trained` (float32 masters) as peft does, so that its auto classes load them."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    state = get_peft_model_state_dict(
        model, state_dict=dict(trained), adapter_name="default", save_embedding_layers=False
    )
    folder.mkdir(parents=True, exist_ok=True)
    told = config.to_dict() | {"inference_mode": True, "target_modules": sorted(config.target_modules)}
    write_json(folder / ADAPTER_CONFIG, dict(sorted(told.items())))
    tensors = {f"{PREFIX}{name}": x.contiguous() for name, x in state.items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})

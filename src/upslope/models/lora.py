"""LoRA layers (Hu et al. 2021, arXiv 2106.09685): which layers get them, and the folder that peft itself loads."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from upslope.errors import ConfigError
from upslope.models.files.adapters import PREFIX, WEIGHTS
from upslope.models.files.folders import ADAPTER_CONFIG, provenance, write_json
from upslope.models.lora_dropout import drop_inputs
from upslope.models.protocol import CausalModel

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

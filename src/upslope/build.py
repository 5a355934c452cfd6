"""Configuration -> the parts a recipe works with: policy, critic, reference, engine, optimizer. Plain functions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from upslope.config import check
from upslope.data.chat import load_tokenizer, token_count, turn_ends, write_ends
from upslope.devices.hardware import choose_dtype, device_of_machine
from upslope.engine.engine import Engine
from upslope.errors import ConfigError, ModelError, RunError
from upslope.models.attention.context import BLOCK, KVCache
from upslope.models.files.adapters import PREFIX, WEIGHTS, merge_adapters
from upslope.models.files.folders import is_adapter
from upslope.models.files.loading import load_model, save_model, stored_score
from upslope.models.files.sources import base_folder, resolve, say
from upslope.models.files.weights import load as load_weights
from upslope.models.files.weights import read_file
from upslope.models.lora import add_adapters, save_adapters
from upslope.models.protocol import CausalModel, ScalarHead
from upslope.options import RunOptions
from upslope.runs.progress import told
from upslope.training.optim import Group, MasterAdamW, decay_groups


@dataclass(slots=True)
class Policy:
    """The network being trained, its tokenizer, and where it came from.

    `masters` are the float32 weights behind parameters that compute in a narrower dtype; `take_masters` gives them to
    the one optimizer that trains them.
    """

    model: CausalModel
    tokenizer: Any
    folder: Path
    masters: dict[str, Tensor] | None
    lora: Any = None

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The ids that end a completion (data.chat.turn_ends)."""
        return turn_ends(self.folder, self.tokenizer, vocab_size=self.model.spec.vocab_size)

    def write(self, folder: Path, trained: Mapping[str, Tensor]) -> None:
        """Save as a Hugging Face folder (adapters: a PEFT folder) with the float32 masters `trained`.

        What ends a turn is written into a Hugging Face folder; adapters have it from the model they belong to.
        """
        if self.lora is None:
            save_model(self.model, folder, tensors=dict(trained), source_folder=self.folder, overwrite=True)
            write_ends(folder, self.eos_token_ids)
            return
        save_adapters(self.model, self.lora, folder, trained)

    def read(self, folder: Path) -> dict[str, Tensor]:
        """The trained float32 weights of a folder that `write` made, by parameter name."""
        if self.lora is None:
            return load_weights(folder, torch.float32)
        stored = read_file(folder / WEIGHTS)
        return {name.removeprefix(PREFIX).replace(".weight", ".default.weight"): x for name, x in stored.items()}

    @contextmanager
    def as_reference(self) -> Iterator[CausalModel]:
        """The start model inside the trained one: its adapters switched off. Only under LoRA."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        if not (layers := [m for m in self.model.modules() if isinstance(m, BaseTunerLayer)]):
            raise ConfigError("the reference model is inside the policy only when adapters are trained (lora_rank > 0)")
        for layer in layers:
            layer.enable_adapters(False)
        try:
            yield self.model
        finally:
            for layer in layers:
                layer.enable_adapters(True)


@told("loading the model")
def load_policy(options: RunOptions, *, trunk: bool = False) -> Policy:
    """Load `--model` with float32 masters and a compute copy, or with fresh adapters on frozen weights.

    With `trunk` a reward model may be given, of which the part under its head is taken.
    """
    device = device_of_machine()
    dtype, _ = choose_dtype(options.dtype, device)
    folder = resolve(options.model)
    tokenizer = load_tokenizer(folder)
    model = load_model(folder, gradient_checkpointing=options.gradient_checkpointing, trunk=trunk)
    _keep_tokens(model, tokenizer, folder)
    turn_ends(folder, tokenizer, vocab_size=model.spec.vocab_size)  # what is wrong is said now, not at a checkpoint
    lora = add_adapters(model, folder, **options.adapters) if options.lora_rank else None
    masters = _to_compute(model, dtype, device)
    return Policy(model=model, tokenizer=tokenizer, folder=folder, masters=masters, lora=lora)


def load_inference(source: str | Path, *, dtype: str = "auto", base: str | None = None, trunk: bool = False) -> Policy:
    """A model to be used and not trained, in its compute dtype; `source` as for `--model`, or a folder of adapters.

    Adapters are merged in float32 into `base`, else into the model their own folder or run names; a tokenizer that
    lies beside them wins over the base's.
    """
    device = device_of_machine()
    chosen, _ = choose_dtype(dtype, device)
    found = resolve(source, adapters=True)
    if not is_adapter(found):
        if base is not None:
            raise ConfigError(f"--base is for adapters, and {found} holds a whole model")
        model = load_model(found, dtype=chosen, trunk=trunk)
        folder, tokenizer = found, load_tokenizer(found)
    else:
        folder = resolve(base) if base is not None else base_folder(found)
        say(f"merging the adapters of {found} into {folder}")
        model = load_model(folder, dtype=torch.float32)
        merge_adapters(model, found)
        model.to(chosen)
        tokenizer = load_tokenizer(found if (found / "tokenizer.json").is_file() else folder)
    _keep_tokens(model, tokenizer, found)
    model.to(device).requires_grad_(False).eval()
    return Policy(model=model, tokenizer=tokenizer, folder=folder, masters={})


def _keep_tokens(model: CausalModel, tokenizer: Any, folder: Path) -> None:
    """Predict only what the tokenizer knows, and say what that leaves out."""
    if left_out := model.keep_tokens(token_count(tokenizer), folder):
        say(f"{folder}: {left_out} of the {len(model.output_weight)} rows of its head are no token; never predicted")


def _to_compute(model: nn.Module, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """Cast the module; return the float32 originals of what is trained and was rounded."""
    rounded = [] if dtype == torch.float32 else [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    masters = {name: p.detach().to(device) for name, p in rounded}
    model.to(device=device, dtype=dtype)
    return masters


def take_masters(part: Policy | ValueNetwork) -> dict[str, Tensor]:
    """The float32 weights of a policy or critic, for its optimizer: once, where there are any.

    RunError after that: the optimizer that took them changes them, and what is left is rounded.
    """
    if part.masters is None:
        kind = "policy" if isinstance(part, Policy) else "critic"
        raise RunError(
            f"the float32 weights of this {kind} are another optimizer's, and those it computes with are rounded; "
            "load it again for a second optimizer"
        )
    masters, part.masters = part.masters, None if part.masters else {}
    return masters


def make_optimizer(policy: Policy, options: RunOptions, extra: list[Group] | None = None) -> MasterAdamW:
    """AdamW over what is trained in the policy, and further groups (a value head).

    ConfigError as `config.check`, RunError as `take_masters`.
    """
    check(options)
    groups = decay_groups(policy.model.named_parameters(), weight_decay=options.weight_decay)
    return MasterAdamW([*groups, *(extra or [])], masters=take_masters(policy))


def load_reference(policy: Policy, options: RunOptions) -> CausalModel | None:
    """A frozen copy of the policy as it is now; None under LoRA, where `Policy.as_reference` is it."""
    if options.lora_rank:
        return None
    model = load_model(policy.folder, dtype=policy.model.dtype).to(policy.model.device)
    model.keep_tokens(policy.model.spec.vocab_size, policy.folder)
    model.load_state_dict(policy.model.state_dict())  # of a policy that was handed over they are not the folder's
    return model.requires_grad_(False).eval()


@dataclass(slots=True)
class ValueNetwork:
    """Where values come from: a head on the policy's trunk (`model` is None), or on a trunk of its own.

    `masters` as those of a policy.
    """

    head: ScalarHead
    model: CausalModel | None
    masters: dict[str, Tensor] | None

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Head and own trunk, by names that cannot clash with the policy's."""
        named = {f"critic.{name}": p for name, p in self.head.named_parameters()}
        if self.model is not None:
            named |= {f"critic.{name}": p for name, p in self.model.named_parameters() if p.requires_grad}
        return named


def load_critic(policy: Policy, choice: str, options: RunOptions) -> ValueNetwork:
    """shared: a zero head on the policy's trunk; separate: a copy of `--model`; else a reward model's folder."""
    head = ScalarHead(policy.model.spec.hidden_size)
    if choice == "shared":
        return ValueNetwork(head.to(policy.model.device), None, {})
    source = resolve(options.model if choice == "separate" else choice)
    trunk = load_model(source, gradient_checkpointing=options.gradient_checkpointing, trunk=True)
    rows, own = len(trunk.output_weight), len(policy.model.output_weight)
    if rows != own:
        raise ModelError(
            f"{choice}: its vocabulary has {rows} tokens, the policy's {own}: a critic must read the policy's tokens"
        )
    head = ScalarHead(trunk.spec.hidden_size)
    if choice != "separate":
        if (weight := stored_score(source)) is None:
            raise ModelError(f"{choice}: no score.weight in it; a critic starts from a reward model with a scalar head")
        head.score.weight.data.copy_(weight)
    masters = _to_compute(trunk, policy.model.dtype, policy.model.device)
    return ValueNetwork(head.to(policy.model.device), trunk, {f"critic.{name}": x for name, x in masters.items()})


def make_engine(policy: Policy, *, sequences: int, longest: int, max_batch: int = 256) -> Engine:
    """An engine over the policy's own weights, with a cache for `sequences` of up to `longest` tokens each.

    The cache is capped at a gigabyte (what does not fit waits its turn) and never smaller than one such sequence and
    two whole contexts of up to 2,048 tokens, so that a prompt longer than expected still runs.
    """
    spec = policy.model.spec
    least = 2 * -(-min(spec.max_positions, 2048) // BLOCK)
    one = -(-(longest + 1) // BLOCK)
    wanted = min(sequences, max_batch) * one
    most = int(1e9) // KVCache.bytes_per_block(spec, policy.model.dtype)
    return Engine(
        policy.model,
        policy.tokenizer,
        eos_token_ids=policy.eos_token_ids,
        max_batch=max_batch,
        num_blocks=max(least, one, min(wanted, most)),
    )

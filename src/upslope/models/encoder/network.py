"""Encoders that look both ways: one label per text (classify), one per token (tag), or masked tokens (masked).

transformers' own architectures (BERT, RoBERTa, DistilBERT, XLNet, ...) run here, so that a saved folder gives the same
logits in plain transformers. Pooling is therefore the architecture's: BERT's and MiniLM's label is read off the first
token through the pooler, although MiniLM's sentence vectors were trained as a mean over tokens.

Shapes: B texts, T tokens with padding, C labels, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from upslope.errors import ModelError
from upslope.models.files.config_json import one_model_error, quiet, transformers_config
from upslope.models.files.folders import check_intact, copy_companions, new_folder, read_config, write_json
from upslope.models.files.weights import Tokenizer, check_finite, check_shapes
from upslope.models.lora import ALL, inject, target_layers
from upslope.models.protocol import Network, check_rows
from upslope.models.transformers_model import load_network

Kind = Literal["classify", "tag", "masked"]

_AUTO = {
    "classify": ("AutoModelForSequenceClassification", "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES"),
    "tag": ("AutoModelForTokenClassification", "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES"),
    "masked": ("AutoModelForMaskedLM", "MODEL_FOR_MASKED_LM_MAPPING_NAMES"),
}
_ALSO_ENCODERS = {"xlnet"}  # looks both ways, but its own head on words predicts a permutation
_OFFSET_POSITIONS = {"roberta", "xlm-roberta", "xlm-roberta-xl", "roberta-prelayernorm", "camembert", "mpnet"}
_SIZES = {
    "distilbert": {"intermediate_size": "hidden_dim"},
    "xlnet": {"intermediate_size": "d_inner", "max_positions": None},
}


class Encoder(Network):
    """A transformers encoder with its head; parameter names are those of the wrapped network.

    kind; labels (of class 0, 1, ...; empty for "masked"); max_positions (longest input in tokens, None: any);
    padding_side ("left" where the label is read off the last token); fresh (tensors that were not in the folder).
    `masters` are float32 originals of parameters that compute in a narrower dtype; an optimizer takes them as its
    start. Dropout is switched off for good, so that the gradient of a batch does not depend on how it is split; the
    saved config.json keeps the values it had.
    """

    def __init__(
        self,
        network: PreTrainedModel,
        kind: Kind,
        *,
        labels: Sequence[str] = (),
        dropout: Mapping[str, float] | None = None,
        source: Path | None = None,
        fresh: Sequence[str] = (),
    ) -> None:
        super().__init__()
        for name, child in network.named_children():
            self.add_module(name, child)
        object.__setattr__(self, "network", network)  # not registered: parameter names stay the wrapped network's
        self.network: PreTrainedModel
        self.config: PretrainedConfig = network.config
        self.kind: Kind = kind
        self.labels = tuple(labels)
        self.source = source
        self.fresh = tuple(fresh)
        self.masters: dict[str, Tensor] = {}
        self.max_positions = _longest_input(network.config)
        self.padding_side = "left" if network.config.model_type == "xlnet" else "right"
        self._dropout = dict(dropout or {})
        takes = "token_type_ids" in inspect.signature(network.forward).parameters
        self._token_types = takes and getattr(network.config, "type_vocab_size", 2) > 1

    def forward(
        self, input_ids_BT: Tensor, attention_mask_BT: Tensor, token_type_ids_BT: Tensor | None = None
    ) -> Tensor:
        """Logits in the compute dtype: [B, C] to classify, [B, T, C] to tag, [B, T, V] for masked tokens."""
        extra = {"token_type_ids": token_type_ids_BT} if token_type_ids_BT is not None and self._token_types else {}
        return self.network(input_ids=input_ids_BT, attention_mask=attention_mask_BT, **extra).logits

    def train(self, mode: bool = True) -> Encoder:
        """Training mode: it only decides whether activations are recomputed."""
        super().train(mode)
        self.network.train(mode)
        return self

    def to_compute(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> Encoder:
        """Move and cast in place; `masters` keeps what casting rounded, in float32."""
        if dtype.itemsize < 4:
            self.masters = {name: p.detach().to(device, torch.float32) for name, p in self.named_parameters()}
        return self.to(device=device, dtype=dtype)

    def is_head(self, name: str) -> bool:
        """Whether a parameter belongs to what reads the trunk (head, pooler) and not to the trunk."""
        return not name.startswith(f"{self.network.base_model_prefix}.") or ".pooler." in name

    def add_adapters(
        self, rank: int, *, alpha: float, seed: int, targets: Sequence[str] = (), dropout: float = 0.0
    ) -> tuple[str, ...]:
        """LoRA (Hu et al. 2021, arXiv 2106.09685) on linear layers of the trunk, those that `targets`
        name or all; the head stays fully trained.

        Call it before `to_compute`. Returns the layers' names. Layers that keep their matrices as bare parameters
        (XLNet's attention) get none. ModelError where there is no linear layer at all.
        """
        linear = [n for n, m in self.named_modules() if isinstance(m, nn.Linear) and not self.is_head(f"{n}.weight")]
        if not linear:
            raise ModelError(f"{self.config.model_type}: no linear layer in its trunk, adapters cannot attach")
        chosen = target_layers(linear, targets or (ALL,))
        targets = [name for name in linear if name.endswith(tuple(f".{one}" for one in chosen)) or name in chosen]
        with _seeded(seed):
            inject(self.network, targets, rank=rank, alpha=alpha, dropout=dropout, seed=seed)
        for name, parameter in self.named_parameters():
            if self.is_head(name):
                parameter.requires_grad_(True)
        return tuple(targets)

    def check_tokens(self, count: int, where: object) -> None:
        """Raise ModelError, naming `where`, when a tokenizer has more ids than the embedding has rows."""
        check_rows(len(self.network.get_input_embeddings().weight), count, where)

    @torch.no_grad()
    def weights(self, tensors: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Every weight by its plain name, in float32 or wider, with adapters added into the matrices they adapt.

        `tensors` (an optimizer's masters) come before `masters`, those before the parameters themselves.
        """
        best = {name: p.detach() for name, p in self.named_parameters()} | self.masters | dict(tensors or {})
        plain = {name.replace(".base_layer.", "."): t for name, t in best.items() if ".lora_" not in name}
        for name, module in self.named_modules():
            scaling = getattr(module, "scaling", None)
            if hasattr(module, "lora_A") and scaling is not None:
                down, up = (best[f"{name}.lora_{x}.default.weight"].to(plain[f"{name}.weight"]) for x in "AB")
                plain[f"{name}.weight"] = plain[f"{name}.weight"] + scaling["default"] * (up @ down)
        return plain

    def save(
        self, folder: Path | str, tensors: Mapping[str, Tensor] | None = None, tokenizer: Tokenizer | None = None
    ) -> Path:
        """Write a folder that plain transformers loads, adapters merged; atomic. What `weights` says is written.

        The tokenizer is `tokenizer`, else that of the folder it was loaded from.
        """
        state = {n: t.detach().to("cpu").contiguous() for n, t in self.weights(tensors).items()}
        with torch.device("meta"):
            twin = _auto_class(self.kind).from_config(self.config)
        expected = {name: tuple(p.shape) for name, p in twin.named_parameters()}
        check_shapes(expected, {n: tuple(t.shape) for n, t in state.items()}, where="weights to save")
        written = next(t.dtype for t in state.values() if t.is_floating_point())
        with new_folder(folder, overwrite=True) as temp, quiet():
            twin.save_pretrained(str(temp), state_dict=state)
            config = read_config(temp) | self._dropout | {"dtype": str(written).removeprefix("torch.")}
            if self.source is not None:
                copy_companions(self.source, temp)
            if tokenizer is not None:
                tokenizer.save_pretrained(str(temp))
            write_json(temp / "config.json", config)
        return Path(folder)

    def read(self, folder: Path | str) -> dict[str, Tensor]:
        """The weights of a folder that `save` wrote, by plain name, in float32, bit for bit."""
        stored = load_encoder(folder, self.kind, labels=None)
        return {name: p.detach() for name, p in stored.named_parameters()}


def load_encoder(
    folder: Path | str,
    kind: Kind,
    *,
    labels: Sequence[str] | None = None,
    dtype: torch.dtype = torch.float32,
    gradient_checkpointing: bool = False,
    seed: int = 0,
) -> Encoder:
    """The encoder of a model folder, its head included if the folder has one for these labels, else a fresh one.

    labels: of class 0, 1, ...; a folder whose head knows exactly these, in any order, keeps its head and its order.
    None takes the folder's own. A fresh head is drawn from `seed`. ModelError: not an encoder, no head and no labels,
    weights missing from the trunk, a damaged checkpoint.
    """
    path = Path(folder)
    check_intact(path)
    raw = read_config(path)
    config = transformers_config(path)
    _check_kind(config, kind, str(path))
    wanted = getattr(modeling_auto, _AUTO[kind][1]).get(config.model_type)
    named = kind != "masked" and wanted in (raw.get("architectures") or ())  # the folder has a head of this kind
    stored = tuple(config.id2label[i] for i in range(len(config.id2label))) if named else ()
    if kind != "masked" and labels is None and not named:
        raise ModelError(f"{path}: has no head to {kind}; give the labels of a new one")
    keep = kind == "masked" or (named and (labels is None or set(labels) == set(stored)))
    chosen = stored if keep else tuple(labels or ())
    dropout = _switch_off_dropout(config, raw)
    with _seeded(seed), quiet():
        network, missing = _load(path, config, kind)
        if not keep:
            trunk = network.base_model.state_dict()
            network = _auto_class(kind).from_config(_with_labels(config, chosen))
            network.base_model.load_state_dict(trunk, strict=False)
            trunk_prefix = f"{network.base_model_prefix}."
            fresh = (name for name, _ in network.named_parameters() if not name.startswith(trunk_prefix))
            missing = sorted({*missing, *fresh})
    encoder = Encoder(
        network, kind, labels=chosen if kind != "masked" else (), dropout=dropout, source=path, fresh=missing
    )
    absent = [name for name in missing if not encoder.is_head(name)]
    if absent:
        raise ModelError(f"{path}: {len(absent)} weights of the trunk are missing, first {absent[0]}; get it again")
    if gradient_checkpointing:
        _enable_checkpointing(network)
    return encoder.to_compute(dtype)


def new_encoder(
    kind: Kind,
    *,
    vocab_size: int,
    hidden_size: int,
    num_layers: int,
    num_heads: int,
    intermediate_size: int,
    max_positions: int,
    model_type: str = "bert",
    labels: Sequence[str] | None = None,
    pad_token_id: int = 0,
    seed: int = 0,
    gradient_checkpointing: bool = False,
    **more: Any,
) -> Encoder:
    """A random encoder of a transformers model type, in float32; `more` goes into its configuration.

    ModelError: not an encoder, sizes that do not fit each other.
    """
    sizes: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "pad_token_id": pad_token_id,
        **more,
    }
    own = _SIZES.get(model_type, {})
    sizes[own.get("intermediate_size") or "intermediate_size"] = intermediate_size
    if "max_positions" not in own:
        offset = pad_token_id + 1 if model_type in _OFFSET_POSITIONS else 0
        sizes["max_position_embeddings"] = max_positions + offset
    if hidden_size % num_heads:
        raise ModelError(f"hidden_size {hidden_size} is no multiple of num_heads {num_heads}")
    if model_type == "xlnet":
        sizes["d_head"] = hidden_size // num_heads
    if kind != "masked" and not labels:
        raise ModelError(f"a new encoder to {kind} needs labels")
    with one_model_error(f"model type {model_type!r} does not fit"):
        config = AutoConfig.for_model(model_type, **sizes)
    _check_kind(config, kind, model_type)
    dropout = _switch_off_dropout(config, config.to_dict())
    if kind != "masked":
        _with_labels(config, tuple(labels or ()))
    with _seeded(seed):
        network = _auto_class(kind).from_config(config)
    if gradient_checkpointing:
        _enable_checkpointing(network)
    return Encoder(network, kind, labels=labels or (), dropout=dropout)


def _load(path: Path, config: PretrainedConfig, kind: Kind) -> tuple[PreTrainedModel, list[str]]:
    with one_model_error(f"{path}: cannot be loaded as an encoder"):
        network, report = load_network(_auto_class(kind), path, config, path / "config.json", dtype=torch.float32)
    wrong = sorted(str(key) for key in report.get("mismatched_keys") or ())
    if wrong:
        raise ModelError(f"{path}: weights do not fit config.json, first {wrong[0]}; get the folder again")
    for name, parameter in network.named_parameters():
        check_finite(name, parameter.detach(), where=path)
    return network, sorted(report["missing_keys"])


def _enable_checkpointing(network: PreTrainedModel) -> None:
    if not getattr(network, "supports_gradient_checkpointing", False):
        raise ModelError(f"{type(network).__name__} cannot recompute activations; leave gradient_checkpointing off")
    enable = getattr(network, "activation_checkpointing_enable", None) or network.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def _auto_class(kind: Kind) -> Any:
    return getattr(transformers, _AUTO[kind][0])


def _check_kind(config: PretrainedConfig, kind: Kind, where: str) -> None:
    masked = getattr(modeling_auto, _AUTO["masked"][1])
    known = getattr(modeling_auto, _AUTO[kind][1])
    if config.model_type not in known or config.model_type not in {*masked, *_ALSO_ENCODERS}:
        raise ModelError(
            f"{where}: model type {config.model_type!r} is no encoder that can {kind}; give a BERT, RoBERTa, "
            "DistilBERT, XLNet or like folder, or the alias minilm"
        )


def _with_labels(config: PretrainedConfig, labels: Sequence[str]) -> PretrainedConfig:
    if len(set(labels)) != len(labels):
        raise ModelError("two labels of the head are the same")
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: i for i, label in enumerate(labels)}
    config.problem_type = None
    return config


def _switch_off_dropout(config: PretrainedConfig, raw: Mapping[str, Any]) -> dict[str, Any]:
    """Set every dropout rate to 0; returns what is to be written back into a saved config.json."""
    rates = {
        name: value
        for name, value in config.to_dict().items()
        if "drop" in name and isinstance(value, int | float) and not isinstance(value, bool) and value > 0
    }
    for name in rates:
        setattr(config, name, 0.0)
    return {name: raw.get(name, value) for name, value in rates.items()}


def _longest_input(config: PretrainedConfig) -> int | None:
    longest = getattr(config, "max_position_embeddings", None)
    if longest is None or longest <= 0 or config.model_type == "xlnet":
        return None
    return longest - config.pad_token_id - 1 if config.model_type in _OFFSET_POSITIONS else longest


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Random numbers from `seed` inside the block, and the generator as it was behind it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield

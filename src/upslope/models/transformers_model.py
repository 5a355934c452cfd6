"""Any causal transformer of the transformers library behind the same protocol as our own decoder.

The library lets every model call a registered attention function. Ours hands queries, keys and values to the call's
Context, so packing without padding, the block KV cache and prefix sharing work unchanged. The sums inside the model
are the library's own: slower than models.decoder.network, and equal between decoding and training only to rounding.

What cannot run this way is refused by name: first what the configuration gives away, then what a probe of two short
packed sequences shows when it is compared with the library's own attention on each sequence alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from upslope.errors import ModelError, one_line
from upslope.kernels.products import PackedWeights, pad_rows
from upslope.models.attention.context import PackedContext
from upslope.models.files.config_json import LIBRARY_ERRORS, check_sizes, transformers_config
from upslope.models.files.folders import listed
from upslope.models.files.weights import check_finite, read_shapes
from upslope.models.protocol import CausalModel, Context, ModelSpec

ATTENTION = "upslope"
_DROPPED = ("drop", "jitter")
_PROBE_LENGTHS = (7, 12)
_LOGIT_SCALES = {"logit_scale": 1.0, "logits_scaling": -1.0}
"""Configuration keys of a constant that multiplies (+1, Cohere) or divides (-1, Granite) the logits."""


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    upslope_context: Context | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """The attention function transformers calls: q [1, H, T, d], k and v [1, K, T, d] -> [1, T, H, d]."""
    name = type(module).__name__
    layer, capped = getattr(module, "layer_idx", None), options.get("softcap") is not None
    for refused, why in (
        (upslope_context is None, "does not pass keyword arguments on to its attention, which the adapter needs"),
        (not getattr(module, "is_causal", True), "is not causal"),
        (capped or options.get("s_aux") is not None, "uses attention sinks or softcapping"),
        (layer is None, "does not know its layer's number"),
    ):
        if refused:
            raise ModelError(f"{name} {why}")
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return upslope_context.attend(layer, q, k, v, scale)[None], None


AttentionInterface.register(ATTENTION, _attend)
# No mask function is registered under that name: transformers then builds no mask, and the Context does the masking.


class TransformersModel(CausalModel):
    """A transformers model as a CausalModel; parameter names are those of the wrapped model.

    Dropout and router noise are switched off for good: a rollout and its update must see the same network. A head's
    bias becomes one more column of the head, met by a constant 1 at the end of each hidden state; a constant that
    scales the logits scales the hidden states instead.
    """

    exact = False  # the library's own operations do not promise a row's bits

    def __init__(self, network: PreTrainedModel, *, gradient_checkpointing: bool = False) -> None:
        super().__init__()
        self.config: PreTrainedConfig = network.config
        self.architecture = type(network).__name__
        head = network.get_output_embeddings()
        if not isinstance(head, nn.Linear):
            raise ModelError(f"{self.architecture}: its head is not one linear layer")
        for name, child in network.named_children():
            self.add_module(name, child)
        object.__setattr__(self, "network", network)  # not registered: parameter names stay the wrapped model's
        self._base = network.base_model_prefix
        self._head = next(name for name, module in network.named_modules() if module is head)
        self._scale = _logit_scale(network.config)
        if gradient_checkpointing:
            _enable_checkpointing(network)
            self.train()  # the library recomputes only in training mode, which differs in nothing else here
        self.spec = _measured_spec(self)

    @classmethod
    def from_folder(
        cls, folder: Path | str, *, dtype: torch.dtype = torch.float32, gradient_checkpointing: bool = False
    ) -> TransformersModel:
        """Load a folder through transformers. Raises ModelError for weights or architectures that do not fit."""
        config = _quiet_config(folder)
        kind = (config.architectures or [config.model_type])[0]
        try:
            if reason := _refusal(config):
                raise ModelError(f"it {reason}")
            options = {"dtype": dtype, "attn_implementation": ATTENTION}
            network, report = load_network(AutoModelForCausalLM, folder, config, "config.json", _refusal, **options)
        except ModelError as error:
            raise ModelError(f"{folder}: {kind} cannot run here: {error}") from error
        except LIBRARY_ERRORS as error:
            raise ModelError(f"{folder}: {kind} cannot be loaded ({one_line(error)})") from error
        _check_report(report, folder)
        for name, parameter in network.named_parameters():
            check_finite(name, parameter.detach(), where=folder)
        try:
            model = cls(network, gradient_checkpointing=gradient_checkpointing)
            model.check_against_eager()
        except ModelError as error:
            raise ModelError(f"{folder}: {kind} cannot run here: {error}") from error
        except LIBRARY_ERRORS as error:
            raise ModelError(f"{folder}: {kind} cannot run here: its forward pass fails ({one_line(error)})") from error
        return model

    def forward(self, tokens_T: Tensor, context: Context) -> Tensor:
        """Hidden states [T, D] after the last norm (scaled, and with a column of ones where the head has a bias)."""
        output = self.get_submodule(self._base)(
            input_ids=tokens_T[None], position_ids=context.positions_T[None], use_cache=False, upslope_context=context
        )
        hidden = output.last_hidden_state[0]
        if self._scale != 1.0:
            hidden = hidden * self._scale
        if self._linear.bias is not None:
            hidden = torch.cat([hidden, hidden.new_ones(len(hidden), 1)], dim=-1)
        return hidden

    def _apply(self, fn: Any, recurse: bool = True) -> TransformersModel:
        """Cast and move everything but computed tables (rotary frequencies), which keep their precision."""
        tables = [
            (module, name, buffer)
            for module in self.modules()
            for name, buffer in module.named_buffers(recurse=False)
            if name in module._non_persistent_buffers_set and buffer.is_floating_point()
        ]
        super()._apply(fn, recurse)
        for module, name, buffer in tables:
            setattr(module, name, buffer.to(module.get_buffer(name).device))
        return self

    @property
    def _linear(self) -> nn.Linear:
        head = self.get_submodule(self._head)
        assert isinstance(head, nn.Linear)
        return head

    @property
    def output_weight(self) -> Tensor:
        """The output embedding [V, D], its bias (if any) as the last column."""
        head = self._linear
        return head.weight if head.bias is None else torch.cat([head.weight, head.bias[:, None]], dim=1)

    def logits(self, hidden_ND: Tensor, packed: PackedWeights | None = None) -> Tensor:
        """Logits [N, V] in the compute dtype."""
        head = self._linear
        rows = pad_rows(hidden_ND)
        if head.bias is not None:
            rows = rows[:, :-1]
        product = nn.functional.linear if packed is None else packed.linear
        vocabulary = self.spec.vocab_size
        bias = None if head.bias is None else head.bias[:vocabulary]
        return product(rows, head.weight[:vocabulary], bias)[: len(hidden_ND)]

    @torch.no_grad()
    def check_against_eager(self) -> None:
        """Compare a packed pass with the library's own attention on each sequence alone.

        Raises ModelError when log-probs differ by more than rounding: then something besides this attention mixes
        tokens or scales logits (a recurrent state, a position bias in the scores, softcapping).
        """
        tokens = _probe_tokens(self.spec.vocab_size, self.device)
        context = PackedContext(_PROBE_LENGTHS, device=self.device)
        ours = self.logits(self(tokens, context)).float().log_softmax(-1)
        self.network.set_attn_implementation("eager")
        try:
            parts = [self.network(input_ids=t[None], use_cache=False).logits[0] for t in tokens.split(_PROBE_LENGTHS)]
        finally:
            self.network.set_attn_implementation(ATTENTION)
        theirs = torch.cat(parts).float().log_softmax(-1)
        best = theirs.argmax(-1, keepdim=True)
        gap = (ours.gather(1, best) - theirs.gather(1, best)).abs().mean().item()
        allowed = 1e-4 if self.dtype in (torch.float32, torch.float64) else 0.25
        if not gap <= allowed:
            raise ModelError(
                f"packed log-probs differ from the library's own by {gap:.2g} (mean; {allowed:g} allowed), so its "
                "layers mix tokens or scale logits in a way the adapter does not know"
            )


def load_network(
    auto: Any,
    folder: Path | str,
    config: PreTrainedConfig,
    named: Path | str,
    refusal: Callable[[PreTrainedConfig, PreTrainedModel], str | None] = lambda config, skeleton: None,
    **options: Any,
) -> tuple[PreTrainedModel, Mapping[str, Any]]:
    """A folder's network by one of transformers' auto classes, and the library's report of what did not fit.

    Before any weight is read the sizes of config.json (`named` so in errors) are held against the files, and `refusal`
    may say of the network without weights why "it" cannot run. ModelError, or what the library raises.
    """
    shapes = read_shapes(folder)
    check_sizes(config.to_dict(), shapes, named)
    with torch.device("meta"):
        skeleton = auto.from_config(config)
    if reason := refusal(config, skeleton):
        raise ModelError(f"it {reason}")
    check_sizes({}, shapes, named, elements=sum(p.numel() for p in skeleton.parameters()))
    more = {"output_loading_info": True, "trust_remote_code": False, "use_safetensors": True}
    return auto.from_pretrained(str(folder), config=config, **options, **more)


class _Recorder(PackedContext):
    """A packed context that notes the widths each layer asks for."""

    def __init__(self, device: torch.device) -> None:
        super().__init__([len(_PROBE_LENGTHS)], device=device)
        self.seen: list[tuple[int, int, int, int]] = []

    def attend(self, layer: int, q_THd: Tensor, k_TKd: Tensor, v_TKd: Tensor, scale: float) -> Tensor:
        if q_THd.shape[2] != k_TKd.shape[2] or k_TKd.shape != v_TKd.shape:
            raise ModelError("its keys and values have different widths")
        self.seen.append((layer, q_THd.shape[1], k_TKd.shape[1], k_TKd.shape[2]))
        return super().attend(layer, q_THd, k_TKd, v_TKd, scale)


@torch.no_grad()
def _measured_spec(model: TransformersModel) -> ModelSpec:
    """Layers, heads and widths as one forward pass shows them."""
    config, linear = model.config, model._linear
    recorder = _Recorder(model.device)
    hidden = model(_probe_tokens(linear.out_features, model.device)[: len(_PROBE_LENGTHS)], recorder)
    layers, widths = [s[0] for s in recorder.seen], {s[1:] for s in recorder.seen}
    if layers != list(range(config.num_hidden_layers)) or len(widths) != 1:
        raise ModelError(
            f"its {config.num_hidden_layers} layers do not each attend once with the same heads (seen: layers {layers})"
        )
    heads, kv_heads, head_dim = widths.pop()
    return ModelSpec(
        num_layers=len(layers),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        hidden_size=hidden.shape[-1],
        vocab_size=linear.out_features,
        max_positions=_max_positions(config),
        intermediate_size=_intermediate_size(config),
        parameters=sum(p.numel() for p in model.parameters()),
    )


def _probe_tokens(vocab_size: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocab_size, (sum(_PROBE_LENGTHS),), generator=generator).to(device)


def _enable_checkpointing(network: PreTrainedModel) -> None:
    enable = getattr(network, "activation_checkpointing_enable", None) or network.gradient_checkpointing_enable
    try:
        enable({"use_reentrant": False})
    except ValueError as error:
        raise ModelError(
            f"it cannot recompute activations ({one_line(error)}); set gradient_checkpointing to false"
        ) from error
    network.disable_input_require_grads()  # only reentrant checkpoints need them


def _quiet_config(folder: Path | str) -> PreTrainedConfig:
    """The folder's configuration with dropout and router noise at 0."""
    config = transformers_config(folder)
    for key, value in config.to_dict().items():
        if isinstance(value, float) and any(word in key for word in _DROPPED):
            setattr(config, key, 0.0)
    return config


def _check_report(report: Mapping[str, Any], folder: Path | str) -> None:
    """transformers warns and fills gaps with random numbers; here a gap is an error."""
    parts, faults = [], {"missing_keys": "missing", "unexpected_keys": "unexpected", "mismatched_keys": "misshapen"}
    for key, kind in {**faults, "error_msgs": "unreadable"}.items():
        names = sorted(str(item[0]) if isinstance(item, tuple) else str(item) for item in report.get(key) or ())
        if names:
            parts.append(listed(kind, names))
    if parts:
        raise ModelError(f"{folder}: weights do not fit config.json: {'; '.join(parts)}; get the folder again")


def _refusal(config: PreTrainedConfig, network: PreTrainedModel | None = None) -> str | None:
    """Why this configuration (and network, once built) cannot run through the adapter, or None if nothing says so."""
    get = config.to_dict().get
    kinds = set(get("layer_types") or ()) - {"full_attention", "sliding_attention"}
    window = sliding_window(config)
    softcap = next((key for key in ("attn_logit_softcapping", "final_logit_softcapping") if get(key)), None)
    more = not config.is_encoder_decoder and config.get_text_config() is not config
    reasons = [
        (config.is_encoder_decoder, "is an encoder-decoder"),
        (more, "takes more than text"),
        (get("quantization_config"), "has quantised weights; take the unquantised model"),
        (kinds, f"has layers other than full attention ({', '.join(sorted(kinds))})"),
        (window is not None, f"has a sliding window of {window}, shorter than its context"),
        (get("attention_chunk_size"), "attends in chunks"),
        (softcap, f"caps its logits ({softcap})"),
        (get("alibi") or get("position_embedding_type") == "alibi", "adds position biases to the scores (ALiBi)"),
    ]
    if network is not None:
        sinks = any(name.rpartition(".")[2] == "sinks" for name, _ in network.named_parameters())
        reasons += [
            (getattr(network, "_is_stateful", False), "keeps a recurrent state"),
            (not network._supports_attention_backend, "does not call transformers' attention interface"),
            (sinks, "uses attention sinks"),
        ]
    return next((reason for applies, reason in reasons if applies), None)


def sliding_window(config: PreTrainedConfig) -> int | None:
    """The sliding window in effect, or None when every token of the longest context sees all before it."""
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    unused = getattr(config, "use_sliding_window", True) is False or (types and "sliding_attention" not in types)
    return window if window and not unused and window < _max_positions(config) else None


def _max_positions(config: PreTrainedConfig) -> int:
    """The longest sequence whose numbers do not depend on the other sequences of the pack.

    "dynamic" and "longrope" rotary positions change with the longest position of a call once it passes the original
    context, so they are used up to there.
    """
    positions = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    if positions is None:
        raise ModelError("its configuration does not say max_position_embeddings")
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") in ("dynamic", "longrope"):
        original = rope.get("original_max_position_embeddings")
        positions = min(positions, original or getattr(config, "original_max_position_embeddings", None) or positions)
    return int(positions)


def _logit_scale(config: PreTrainedConfig) -> float:
    """The constant that multiplies the logits."""
    for key, power in _LOGIT_SCALES.items():
        value = getattr(config, key, None)
        if isinstance(value, int | float):
            return float(value) ** power
    return 1.0


def _intermediate_size(config: PreTrainedConfig) -> int:
    """Width of the feed-forward layers (an estimate of 4 D where the configuration does not say)."""
    sizes = (getattr(config, key, None) for key in ("intermediate_size", "ffn_dim", "n_inner"))
    return next((size for size in sizes if isinstance(size, int)), None) or 4 * config.hidden_size

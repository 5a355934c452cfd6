"""The encoder-decoder Transformer behind the protocol of a decoder (same engine, same packed trainer), and its folders.

A sequence is [source tokens..., decoder_start, target tokens...]; the row of decoder_start predicts the first target
token. The encoder reads the source rows of every sequence that begins in the call, all to all. The decoder runs over
the other rows; its self-attention and its cross-attention are two cache layers of the same causal `Context.attend`, in
which one more dimension of the heads tells the two kinds of rows apart: a query carries 1 there, a key that it must
not see a number so low that the key's probability is exactly 0. So blocks, forks, beams, preemption and shared
prompts work as they are, and a target token's hidden state is the same bits in training and in decoding.

Vaswani et al. 2017 (arXiv 1706.03762). Parameter names are those of Hugging Face's Marian and Pegasus.

Shapes: T rows of a call, S source rows, N target rows, D width, H heads, d head width, w padded head width.
"""

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from upslope.errors import DataError, ModelError
from upslope.kernels.products import least_rows, pad_rows
from upslope.models.attention.context import PackedContext
from upslope.models.files.config_json import check_sizes, transformers_config
from upslope.models.files.folders import read_config
from upslope.models.files.weights import check_shapes, load, read_shapes
from upslope.models.protocol import CausalModel, Context, ModelSpec, Segment
from upslope.models.seq2seq.layers import Drop, Layout, Seq2SeqConfig, Side, Trunk, padded_head_dim, sinusoids

_BIAS, _SCORE, _SHARED, _HEAD = "final_logits_bias", "score.weight", "model.shared.weight", "lm_head.weight"
_SOURCE, _TARGET = (f"model.{side}.embed_tokens.weight" for side in ("encoder", "decoder"))
_POSITIONS = tuple(f"model.{side}.embed_positions.weight" for side in ("encoder", "decoder"))


class Seq2Seq(CausalModel):
    """The network with random weights (Glorot's uniform; embeddings normal with deviation D^-0.5).

    `use_dropout` lets `config.dropout` act in training mode where gradients are recorded; it is off unless a supervised
    recipe sets it, because a policy's update must see the network that sampled. `final_logits_bias` is a constant that
    real Marian models carry: where it is not zero, it becomes one more column of the head, met by a 1 at the end of
    each hidden state.
    """

    whole_prompts = True
    final_logits_bias: Tensor

    def __init__(self, config: Seq2SeqConfig, *, gradient_checkpointing: bool = False) -> None:
        super().__init__(config, gradient_checkpointing)
        self.use_dropout = False
        self.model = Trunk(config)
        self.register_buffer("final_logits_bias", torch.zeros(1, config.vocab_size))
        self.apply(self._init)
        self._tables: dict[tuple[torch.dtype, torch.device], Tensor] = {}
        self._biased = False
        self._measure()

    def _measure(self) -> None:
        config = self.config
        self.spec = ModelSpec(
            num_layers=2 * config.decoder_layers,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_attention_heads,
            head_dim=padded_head_dim(config.hidden_size // config.num_attention_heads),
            hidden_size=config.hidden_size + self._biased,
            vocab_size=config.vocab_size,
            max_positions=2 * config.max_position_embeddings,
            intermediate_size=config.intermediate_size,
            parameters=sum(p.numel() for p in self.parameters()),
            input_vocab_size=config.vocab_size + (config.source_vocab_size or 0),
        )

    def _init(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.hidden_size**-0.5)

    def set_logits_bias(self, bias: Tensor | None) -> None:
        """Take a folder's final_logits_bias [1, V] (None: zeros)."""
        weight = self._embedding
        bias = torch.zeros(1, self.config.vocab_size) if bias is None else bias
        self.final_logits_bias = bias.to(weight.device, weight.dtype)
        self._biased = bool((bias != 0).any())
        self._measure()

    @property
    def _embedding(self) -> Tensor:
        """The target embedding [V, D]."""
        return (self.model.shared if self.config.source_vocab_size is None else self.model.decoder.embed_tokens).weight

    @property
    def output_weight(self) -> Tensor:
        """The target embedding [V, D], with the constant bias (if any) as its last column."""
        weight = self._embedding
        return torch.cat([weight, self.final_logits_bias.T], dim=1) if self._biased else weight

    def check_prompt(self, prompt: Sequence[int]) -> None:
        """DataError unless the prompt is a source that fits, followed by the one decoder_start_token_id in it."""
        start, offset = self.config.decoder_start_token_id, self.config.source_offset
        if prompt[-1] != start or start in prompt[:-1] or len(prompt) < 2:
            raise DataError(
                f"the prompt of an encoder-decoder is its source tokens (at least one) and then decoder_start_token_id "
                f"{start}, once: encode it with the model folder's own tokenizer"
            )
        if len(prompt) - 1 > self.config.max_position_embeddings:
            raise DataError(
                f"the source has {len(prompt) - 1} tokens but the encoder holds {self.config.max_position_embeddings}: "
                "shorten it"
            )
        wrong = next((t for t in prompt[:-1] if t < offset), None)
        if wrong is not None:
            raise DataError(f"source token {wrong} is a target token: source ids start at {offset} in this model")

    def room(self, prompt_length: int) -> int:
        """Target tokens that may follow decoder_start, whatever the source's length."""
        return self.config.max_position_embeddings - 1

    def forward(self, tokens_T: Tensor, context: Context) -> Tensor:
        """Hidden states [T, D] of the target rows, decoder_start's included; zeros at source rows.

        Raises ModelError where a sequence holds no decoder_start, no source, or more tokens than positions.
        """
        layout = self._layout(tokens_T, context.segments)
        drop = self._drop()
        memory = self._encode(tokens_T, layout, drop)
        x = self._embed(self._embedding, tokens_T[layout.target_rows], layout.target_positions, drop)
        for layer in self.model.decoder.layers:
            x = self.run(layer, x, memory, layout, context, drop)
        x = self._last_norm(self.model.decoder, x)[: layout.target_rows.shape[0]]
        if self._biased:
            x = torch.cat([x, x.new_ones(x.shape[0], 1)], dim=1)
        return x.new_zeros(layout.total, x.shape[1]).index_copy(0, layout.target_rows, x)

    def _encode(self, tokens_T: Tensor, layout: Layout, drop: Drop) -> Tensor:
        """The encoder's output at the source rows of the call (none of them in plain decoding)."""
        if not layout.source_lengths:
            return self._embedding.new_zeros(0, self.config.hidden_size)
        ids = tokens_T[layout.source_rows] - self.config.source_offset
        if self.config.source_offset and int(ids.min()) < 0:
            raise ModelError(f"a source holds a target token: source ids start at {self.config.source_offset}")
        context = PackedContext(layout.source_lengths, causal=False, device=tokens_T.device)
        weight = self._embedding if self.config.source_vocab_size is None else self.model.encoder.embed_tokens.weight
        x = self._embed(weight, ids, layout.source_positions, drop)
        for layer in self.model.encoder.layers:
            x = self.run(layer, x, context, drop)
        return self._last_norm(self.model.encoder, x)

    def _last_norm(self, side: Side, x: Tensor) -> Tensor:
        return side.layer_norm(x) if self.config.norm == "pre" else x

    def _embed(self, weight: Tensor, ids: Tensor, positions: Tensor, drop: Drop) -> Tensor:
        least = least_rows(self.config.hidden_size * min(self.config.hidden_size, self.config.intermediate_size))
        x = F.embedding(pad_rows(ids, least=least), weight)
        if self.config.scale_embedding:
            x = x * math.sqrt(self.config.hidden_size)
        return drop(x + self._positions()[pad_rows(positions, least=least)])

    def _positions(self) -> Tensor:
        key = (self.dtype, self.device)
        if key not in self._tables:
            with torch.inference_mode(False):  # the engine's first call must not make what training uses later
                table = sinusoids(self.config.max_position_embeddings, self.config.hidden_size)
                self._tables = {key: table.to(device=key[1], dtype=key[0])}
        return self._tables[key]

    def _drop(self) -> Drop:
        active = self.training and self.use_dropout and torch.is_grad_enabled()
        p = self.config.dropout if active else 0.0
        return (lambda x: F.dropout(x, p)) if p else (lambda x: x)

    def _layout(self, tokens_T: Tensor, segments: Sequence[Segment]) -> Layout:
        marks = (tokens_T == self.config.decoder_start_token_id).nonzero()[:, 0].tolist()
        sources = [0 if s.parent != -1 else self._source_length(s, marks) for s in segments]
        lengths, source, source_at, target, target_at = [], [], [], [], []
        most = self.config.max_position_embeddings
        for own, s in zip(sources, segments, strict=True):
            size = own if s.parent == -1 else sources[s.parent]
            inside = max(0, size - s.start)
            if inside:
                lengths.append(size)
                source.append(torch.arange(s.row, s.row + size))
                source_at.append(torch.arange(size))
            first = s.start + inside - size
            target.append(torch.arange(s.row + inside, s.row + s.count))
            target_at.append(torch.arange(first, first + s.count - inside))
            for side, length in (("source", size), ("target", first + s.count - inside)):
                if length > most:
                    raise ModelError(f"a {side} of {length} tokens is longer than max_position_embeddings {most}")
        none = [torch.empty(0, dtype=torch.long)]
        columns = (source or none, source_at or none, target, target_at)
        return Layout(tokens_T.shape[0], tuple(lengths), *(torch.cat(c).to(tokens_T.device) for c in columns))

    def _source_length(self, segment: Segment, marks: list[int]) -> int:
        """Source tokens of the sequence a segment without parent belongs to."""
        start = self.config.decoder_start_token_id
        if segment.start:
            if segment.prompt is None or segment.start < segment.prompt:
                raise ModelError("an encoder-decoder must be given the whole prompt of a sequence in one call")
            return segment.prompt - 1
        at = bisect_left(marks, segment.row)
        size = marks[at] - segment.row if at < len(marks) else segment.count
        if not 0 < size < segment.count:
            raise ModelError(
                f"a sequence of {segment.count} tokens has no source followed by decoder_start_token_id {start}: "
                "encode it with the model folder's own tokenizer"
            )
        if segment.prompt is not None and segment.prompt != size + 1:
            raise ModelError(f"decoder_start_token_id {start} stands inside a prompt instead of at its end")
        return size


def load_seq2seq(folder: Path | str, *, dtype: torch.dtype, gradient_checkpointing: bool = False) -> Seq2Seq:
    """The network of a Marian or Pegasus folder; keys that config.json leaves out get transformers' defaults for it.

    Tables of positions that a folder stores must be the sinusoids; copies of the shared embedding must be equal to it.
    A final_logits_bias that is not zero is kept as a constant column of the head. Raises ModelError as load_model does.
    """
    raw = read_config(folder)
    if raw.get("quantization_config"):
        raise ModelError(f"{folder}: holds quantised weights; training needs the unquantised model")
    defaults = {key: value for key, value in transformers_config(folder).to_dict().items() if value is not None}
    config = Seq2SeqConfig.from_hf({**defaults, **{k: v for k, v in raw.items() if v is not None or k not in defaults}})
    config = replace(config, extra={key: value for key, value in config.extra.items() if key in raw})
    found = read_shapes(folder)
    check_sizes(vars(config), found, Path(folder) / "config.json")
    with torch.device("meta"):
        model = Seq2Seq(config, gradient_checkpointing=gradient_checkpointing)
    expected = {name: tuple(p.shape) for name, p in model.named_parameters()}
    found.pop(_SCORE, None)
    bias = load(folder, dtype, names=[_BIAS])[_BIAS] if found.pop(_BIAS, None) else None
    for name in _POSITIONS:
        if found.pop(name, None):
            _check_positions(folder, name)
    state = {} if config.source_vocab_size is not None else _shared(folder, found, dtype)
    if config.source_vocab_size is not None and found.pop(_HEAD, None):
        _check_equal(folder, _HEAD, _TARGET)
    check_shapes(expected, {**found, **{name: tuple(t.shape) for name, t in state.items()}}, where=folder)
    state |= load(folder, dtype, names=[name for name in expected if name not in state])
    if bias is not None and tuple(bias.shape) != (1, config.vocab_size):
        raise ModelError(f"{folder}: {_BIAS} is {list(bias.shape)} instead of {[1, config.vocab_size]}")
    model.load_state_dict({**state, _BIAS: torch.zeros(1, config.vocab_size, dtype=dtype)}, assign=True)
    model.set_logits_bias(bias)
    return model


def stored_tensors(model: Seq2Seq, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parameters with the fixed tensors that transformers expects to find beside them."""
    stored = {**parameters, _BIAS: model.final_logits_bias}
    if model.config.norm == "pre":
        table = sinusoids(model.config.max_position_embeddings, model.config.hidden_size).float()
        stored |= {name: table.clone() for name in _POSITIONS}
    return stored


def _shared(folder: Path | str, found: dict[str, tuple[int, ...]], dtype: torch.dtype) -> dict[str, Tensor]:
    """The one embedding under its own name; its stored copies are taken out of `found`."""
    names = [name for name in (_SHARED, _TARGET, _SOURCE, _HEAD) if name in found]
    for name in names[1:]:
        _check_equal(folder, name, names[0])
    for name in names:
        del found[name]
    return {_SHARED: load(folder, dtype, names=names[:1])[names[0]]} if names else {}


def _check_equal(folder: Path | str, first: str, second: str) -> None:
    pair = load(folder, names=[first, second])
    if not torch.equal(pair[first], pair[second]):
        raise ModelError(f"{folder}: {first} differs from {second}, but config.json makes them one matrix")


def _check_positions(folder: Path | str, name: str) -> None:
    stored = load(folder, torch.float64, names=[name])[name]
    gap = (stored - sinusoids(*stored.shape)).abs().max()
    if not float(gap) < 0.02:  # bfloat16 rounds to 0.004
        raise ModelError(f"{folder}: {name} is not the table of sinusoids, the only positions this network has")

"""What every network gives the engine and the trainer: hidden states of packed tokens, and a head over them.

Shapes: T tokens laid end to end, N rows, H query heads, K key/value heads, d head width, D model width, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from upslope.errors import ModelError
from upslope.kernels.products import PackedWeights, least_rows, pad_rows


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """The numbers the engine and the memory estimate need; `parameters` counts shared weights once.

    Logits are over `vocab_size` tokens; prompts may hold ids below `input_vocab_size` (0: the same).
    """

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    vocab_size: int
    max_positions: int
    intermediate_size: int = 0
    parameters: int = 0
    input_vocab_size: int = 0

    def __post_init__(self) -> None:
        if not self.input_vocab_size:
            object.__setattr__(self, "input_vocab_size", self.vocab_size)


@dataclass(frozen=True, slots=True)
class Segment:
    """Consecutive rows of one call that belong to one sequence.

    `count` rows from row `row` of the call on, the first of them at position `start` of its sequence. Where it
    continues another segment of the same call, `parent` is that one's index (else -1). `prompt`: tokens of the
    sequence's prompt, None where the call does not know.
    """

    row: int
    count: int
    start: int
    parent: int = -1
    prompt: int | None = None


class Context:
    """Where the tokens of one call stand and what they may attend to (models/attention/context.py has three)."""

    positions_T: Tensor
    segments: tuple[Segment, ...]
    packed: PackedWeights | None = None
    """Copies of the weights for decoding, where the caller keeps some."""

    def attend(self, layer: int, q_THd: Tensor, k_TKd: Tensor, v_TKd: Tensor, scale: float) -> Tensor:
        """Attention of the call's queries, [T, H, d] -> [T, H, d]."""
        raise TypeError(f"{type(self).__name__} does not define attend")

    def write(self, layer: int, k_TKd: Tensor, v_TKd: Tensor) -> None:
        """Keep what `before` gives in a later call, where anything is kept; `attend` does it itself."""

    def before(self, layer: int) -> tuple[Tensor, Tensor] | None:
        """What was kept [S, K, d] at the token before each segment's first (zeros at a start); None: none has one."""
        return None


def check_rows(rows: int, count: int, where: object) -> None:
    """Raise ModelError, naming `where`, for fewer rows of an embedding than the `count` ids of a tokenizer."""
    if rows < count:
        raise ModelError(
            f"{where}: the tokenizer has ids up to {count - 1} but the model embeds only {rows} tokens; take the "
            "tokenizer that belongs to the model, or the model that belongs to the tokenizer"
        )


class Network(nn.Module):
    """A module that says where its weights are and what it computes in."""

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype."""
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device


class CausalModel(Network):
    """A network that predicts the next token of packed sequences, with a linear head over its hidden states.

    `whole_prompts` says that a prompt must enter in one call, from its first token on: the engine then never cuts one
    into chunks and never takes the beginning of one from its prefix cache. `captures` says that a decoding step
    asks its context for attention alone and reads nothing back from the device, so that it can be a CUDA graph.
    `gradient_checkpointing`: layers' activations are computed again in the backward pass instead of being kept.
    """

    spec: ModelSpec
    whole_prompts: bool = False
    captures: bool = False

    def __init__(self, config: Any = None, gradient_checkpointing: bool = False) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = gradient_checkpointing

    def forward(self, tokens_T: Tensor, context: Context) -> Tensor:
        """Hidden states [T, D] after the last norm, before the head."""
        raise TypeError(f"{type(self).__name__} does not define forward(tokens, context)")

    def check_prompt(self, prompt: Sequence[int]) -> None:
        """Raise DataError for a prompt this network cannot continue; token ids have been checked before."""
        return

    def room(self, prompt_length: int) -> int:
        """How many tokens may follow a prompt of that length."""
        return self.spec.max_positions - prompt_length

    @property
    def output_weight(self) -> Tensor:
        """The whole output embedding [rows, D]; the input embedding itself when the two are tied."""
        raise TypeError(f"{type(self).__name__} does not define output_weight")

    @property
    def head_weight(self) -> Tensor:
        """The rows [V, D] of the output embedding that stand for tokens: the head of sampler and trainer alike."""
        weight = self.output_weight
        return weight if len(weight) == self.spec.vocab_size else weight[: self.spec.vocab_size]

    def keep_tokens(self, count: int, where: object) -> int:
        """Predict the first `count` tokens only, those that the tokenizer has; the rows of the head left out.

        Many models have more rows than tokens; such rows are trained on nothing and mean no text. They stay in the
        weights and in what is saved. Raises ModelError, naming `where`, when there are fewer rows than tokens.
        """
        rows = len(self.output_weight)
        check_rows(rows, count, where)
        inputs = self.spec.input_vocab_size
        shared = inputs == self.spec.vocab_size
        self.spec = replace(self.spec, vocab_size=count, input_vocab_size=count if shared else inputs)
        return rows - count

    @property
    def exact(self) -> bool:
        """Whether decoding gives the bits of the packed forward pass: true of upslope's own networks on a CPU."""
        return self.device.type == "cpu"

    def run(self, layer: nn.Module, *args: Any) -> Any:
        """layer(*args), by way of a checkpoint where activations are not to be kept."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(layer, *args, use_reentrant=False)
        return layer(*args)

    def logits(self, hidden_ND: Tensor, packed: PackedWeights | None = None) -> Tensor:
        """Logits [N, V] in the compute dtype; each row is independent of the other rows, bit for bit."""
        weight = self.head_weight
        rows = pad_rows(hidden_ND, least=least_rows(weight.numel()))
        every = F.linear(rows, weight) if packed is None else packed.linear(rows, weight)
        return every[: hidden_ND.shape[0]]


@contextmanager
def evaluating(*modules: torch.nn.Module | None) -> Iterator[None]:
    """Dropout off and no gradient, and the previous modes back afterwards."""
    real = [m for m in modules if m is not None]
    modes = [m.training for m in real]
    for module in real:
        module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in zip(real, modes, strict=True):
            module.train(mode)


class ScalarHead(nn.Module):
    """One number per hidden state, computed in float32: [N, D] -> [N].

    Starts at zero, so that a fresh critic says V = 0 everywhere and the first advantages are the returns. The weight
    has the name and shape [1, D] of Hugging Face's sequence classifiers with one label, so that a reward model's head
    loads as a critic's.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.score = nn.Linear(hidden_size, 1)
        nn.init.zeros_(self.score.weight)
        nn.init.zeros_(self.score.bias)

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def]
        """Move with the model, but stay in float32 (or float64): a value is a regression target, not a logit."""
        super()._apply(fn, recurse)
        for parameter in self.parameters():
            if parameter.dtype in (torch.bfloat16, torch.float16):
                parameter.data = parameter.data.float()
        return self

    def forward(self, hidden_ND: Tensor) -> Tensor:
        """Row by row, as a sum of products: independent of how many rows there are."""
        weight = self.score.weight
        return (hidden_ND.to(weight.dtype) * weight[0]).sum(-1) + self.score.bias

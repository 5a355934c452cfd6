"""Options of pretraining: a tokenizer and a model from text files."""

from typing import Literal

from upslope.config import option
from upslope.errors import ConfigError
from upslope.options.common import BatchOptions, RunOptions


class NetworkOptions(RunOptions):
    """A new network (--model scratch)."""

    tokenizer: str | None = option(None, needs="model=scratch")
    """bpe, word or char, trained on the data; or a folder whose tokenizer is taken; default: bpe."""
    vocab_size: int | None = option(None, 2, needs="model=scratch")
    """Largest number of tokens of a new tokenizer; default: 4096."""
    architecture: Literal["decoder", "lstm", "encoder"] | None = option(None, needs="model=scratch")
    """Transformer decoder (Llama's), LSTM, or encoder (BERT's); default: decoder."""
    hidden_size: int | None = option(None, 1, needs="model=scratch")
    """Width; default: 256."""
    intermediate_size: int | None = option(None, 1, needs="model=scratch")
    """Width of the feed-forward layers; default: 8/3 of the width (decoder), 4 times it (encoder)."""
    num_layers: int | None = option(None, 1, needs="model=scratch")
    """Layers; default: 4, of an LSTM 2."""
    num_heads: int | None = option(None, 1, needs="model=scratch")
    """Attention heads; default: one per 64 of the width, but at least 2."""
    tie_word_embeddings: bool = option(True, needs="model=scratch")
    """Use the input embedding as the head of a new causal model; an encoder's is always tied."""


class PretrainOptions(NetworkOptions, BatchOptions):
    """Pretraining: a tokenizer and a network from random weights, by maximum likelihood of text files."""

    FIRST = (
        "data model architecture hidden_size num_layers context_length learning_rate batch_size max_steps output_dir"
    )

    model: str = "scratch"
    """scratch: new random weights, as described below; else the model to train on: a folder, a hub id, an alias."""
    data: tuple[str, ...] = ()
    """Text: .txt and .jsonl (column "text") files, folders of them, or patterns such as texts/*.txt."""
    eval_data: tuple[str, ...] = ()
    """Held-out text in the same forms; default: the last tenth of the data."""
    objective: Literal["auto", "causal", "masked"] = "auto"
    """causal predicts the next token, masked those that were hidden; auto: masked for an encoder, else causal."""
    context_length: int = option(256, 4)
    """Tokens per window, and the longest text a new decoder or encoder reads."""
    label_smoothing: float = option(0.0, 0, 0.999)
    """Share of every target spread evenly over the vocabulary."""
    mask_probability: float | None = option(None, 1e-3, 0.9, needs="objective=auto,masked")
    """Share of the tokens that the masked objective predicts; default: 0.15."""
    eval_stride: int | None = option(None, 1, also="stride", needs="objective=auto,causal")
    """Tokens that each held-out window scores, those before them are context; default: half the context."""
    cache_dir: str | None = None
    """Where the encoded text is kept; default: upslope's cache."""
    eval_samples: int = 200
    """Held-out windows per evaluation, from the beginning of the held-out text; 0 takes all of it."""
    learning_rate: float = 1e-3
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "cosine"
    weight_decay: float = 0.01

    @property
    def new(self) -> bool:
        """Whether the weights are new."""
        return self.model == "scratch"

    def _check(self) -> None:
        self.within("eval_stride", 1, self.context_length - 1)
        if not self.data:
            raise ConfigError("data is missing: name text files to train on (--data texts/*.txt)")
        if self.new:
            self._validate_new()

    def _validate_new(self) -> None:
        kind = self.architecture or "decoder"
        if self.objective == ("causal" if kind == "encoder" else "masked"):
            raise ConfigError(
                f"objective {self.objective} does not fit architecture {kind}: an encoder is trained masked, "
                "a decoder or an LSTM causal"
            )
        if self.lora_rank:
            raise ConfigError("lora_rank trains adapters of a model that knows something; with --model scratch it is 0")
        if kind == "lstm":
            for name in ("num_heads", "intermediate_size"):
                if getattr(self, name) is not None:
                    raise ConfigError(f"{name} is {getattr(self, name)}, but an LSTM has none; leave it out")
        elif self.num_heads is not None and (self.hidden_size or 256) % self.num_heads:
            raise ConfigError(f"hidden_size {self.hidden_size or 256} is no multiple of num_heads {self.num_heads}")
        if kind == "encoder" and not self.tie_word_embeddings:
            raise ConfigError("tie_word_embeddings = false: an encoder's head is always tied to its embedding")
        if self.vocab_size is not None and self.tokenizer not in (None, "bpe", "word", "char"):
            raise ConfigError(f"vocab_size is {self.vocab_size}, but the tokenizer in {self.tokenizer} has its size")

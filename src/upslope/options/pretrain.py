"""Options of pretraining: a tokenizer and a model from text files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from upslope.errors import ConfigError
from upslope.options.common import RunOptions, check

_OF_NEW = ("vocab_size", "architecture", "hidden_size", "intermediate_size", "num_layers", "num_heads")


@dataclass(frozen=True, kw_only=True)
class PretrainOptions(RunOptions):
    """Pretraining: a tokenizer and a network from random weights, by maximum likelihood of text files."""

    model: str = "scratch"
    """scratch: new random weights, as described below; else the model to train on: a folder, a hub id, an alias."""
    data: tuple[str, ...] = ()
    """Text: .txt and .jsonl (column "text") files, folders of them, or patterns such as texts/*.txt."""
    eval_data: tuple[str, ...] = ()
    """Held-out text in the same forms; left out: the last tenth of the data."""
    tokenizer: str | None = None
    """bpe, word or char, trained on the data; or a folder whose tokenizer is taken. Left out: bpe."""
    vocab_size: int | None = None
    """Largest number of tokens of a new tokenizer. Left out: 4096."""
    architecture: Literal["decoder", "lstm", "encoder"] | None = None
    """Transformer decoder (Llama's), LSTM, or encoder (BERT's). Left out: decoder."""
    objective: Literal["auto", "causal", "masked"] = "auto"
    """causal predicts the next token, masked those that were hidden; auto: masked for an encoder, else causal."""
    hidden_size: int | None = None
    """Width. Left out: 256."""
    intermediate_size: int | None = None
    """Width of the feed-forward layers. Left out: 8/3 of the width (decoder), 4 times it (encoder)."""
    num_layers: int | None = None
    """Layers. Left out: 4, of an LSTM 2."""
    num_heads: int | None = None
    """Attention heads. Left out: one per 64 of the width, but at least 2."""
    tie_word_embeddings: bool = True
    """Use the input embedding as the head of a new causal model; an encoder's is always tied."""
    context_length: int = 256
    """Tokens per window, and the longest text a new decoder or encoder reads."""
    batch_size: int = 16
    """Windows per optimizer step."""
    num_epochs: float | None = None
    """Passes over the data; when given it sets max_steps."""
    label_smoothing: float = 0.0
    """Share of every target spread evenly over the vocabulary."""
    mask_probability: float | None = None
    """Share of the tokens that the masked objective predicts. Left out: 0.15."""
    eval_stride: int | None = None
    """Tokens that each held-out window scores, those before them are context. Left out: half the context."""
    cache_dir: str | None = None
    """Where the encoded text is kept. Left out: upslope's cache."""
    eval_samples: int = 200
    """Held-out windows per evaluation, from the beginning of the held-out text; 0 takes all of it."""
    learning_rate: float = 1e-3
    """Peak learning rate of AdamW."""
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "cosine"
    """Shape of the learning rate after the warm-up, over max_steps."""
    weight_decay: float = 0.01
    """AdamW's decoupled weight decay; norms and biases are exempt."""

    @property
    def new(self) -> bool:
        """Whether the weights are new."""
        return self.model == "scratch"

    def validate(self) -> None:
        """Raise ConfigError for a value out of range, or an option that could do nothing."""
        RunOptions.validate(self)
        check(
            self,
            vocab_size=(2, None),
            hidden_size=(1, None),
            intermediate_size=(1, None),
            num_layers=(1, None),
            num_heads=(1, None),
            context_length=(4, None),
            batch_size=(1, None),
            num_epochs=(0, None),
            label_smoothing=(0, 0.999),
            mask_probability=(1e-3, 0.9),
            eval_stride=(1, self.context_length - 1),
        )
        if not self.data:
            raise ConfigError("data is missing: name text files to train on (--data texts/*.txt)")
        if self.new:
            self._validate_new()
        else:
            self._validate_old()
        if self.objective == "causal" and self.mask_probability is not None:
            raise ConfigError("mask_probability belongs to the masked objective; leave it out")
        if self.objective == "masked" and self.eval_stride is not None:
            raise ConfigError("eval_stride belongs to the causal objective; leave it out")

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

    def _validate_old(self) -> None:
        given = [name for name in (*_OF_NEW, "tokenizer") if getattr(self, name) is not None]
        if given or not self.tie_word_embeddings:
            name = given[0] if given else "tie_word_embeddings"
            raise ConfigError(f"{name} describes a new model, and {self.model} has its own; leave one of the two out")

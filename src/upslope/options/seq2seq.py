"""Options of encoder-decoders trained on pairs of texts."""

from typing import Literal

from upslope.config import option
from upslope.errors import ConfigError
from upslope.options.common import BatchOptions, Named, RowOrTaskOptions, RunOptions

SCRATCH = "scratch"


class Seq2SeqOptions(RowOrTaskOptions, BatchOptions, RunOptions):
    """An encoder-decoder on pairs of texts, by maximum likelihood or by minimum risk, from random weights or on."""

    FIRST = "data task model hidden_size num_layers learning_rate batch_size num_epochs max_steps output_dir"

    model: str = SCRATCH
    """scratch: a new tokenizer and random weights of the sizes below; or an encoder-decoder's folder to go on from."""
    learning_rate: float = 1e-3
    """Peak learning rate of AdamW; from random weights about 1e-3, for minimum risk a tenth of it or less."""
    data: str | None = None
    """Rows with prompt (the source) and completion (the target): .jsonl, .csv, .parquet or a hub id. This or --task."""
    eval_data: str | None = option(None, needs="data")
    """Held-out rows in the same forms; default with --data: a tenth of the sources, chosen by content."""
    task: Named | None = None
    """Train on the demonstrations of a task of plain texts, such as phonemes, and measure on its held-out problems."""
    num_examples: int = option(1000, 1, also="num_train_prompts")
    """How many problems to take from --task."""
    tokenizer: Literal["bpe", "word", "char"] = option("bpe", needs="model=scratch")
    """Kind of tokenizer to train on the pairs; word suits symbols set off by spaces."""
    vocab_size: int = option(4000, 1, needs="model=scratch")
    """Most tokens of each tokenizer to train."""
    shared_vocabulary: bool = option(True, needs="model=scratch")
    """One tokenizer and one embedding for both sides; off: one for each (norm must be post)."""
    hidden_size: int = option(256, 1, needs="model=scratch")
    """Width of a new network; the inner width is four times it."""
    num_layers: int = option(3, 1, needs="model=scratch")
    """Layers of a new network's encoder, and as many of its decoder."""
    num_heads: int = option(4, 1, needs="model=scratch")
    """Attention heads of a new network."""
    norm: Literal["post", "pre"] = option("post", needs="model=scratch")
    """Layer norm after each block (as in the 2017 paper, Marian's form) or before it (Pegasus' form)."""
    dropout: float | None = option(None, 0, 0.99, needs="objective=mle")
    """On embeddings and block outputs in maximum likelihood; default: 0.1 from scratch, else the folder's own."""
    label_smoothing: float = option(0.0, 0, 0.99, needs="objective=mle")
    """Share of the target probability that is spread evenly over the vocabulary."""
    batch_size: int = 64
    max_length: int = 128
    """Longest source, and longest target with its marks, in tokens; longer pairs are left out, counted and reported."""
    max_completion_length: int = option(64, 1)
    """Longest sampled or decoded target in tokens."""
    beam_width: int = option(1, 1, also="num_beams")
    """Beams of held-out decoding; 1 is greedy."""
    objective: Literal["mle", "minimum_risk"] = "mle"
    """mle: likelihood of the references; minimum_risk: expected cost (1 - reward) over sampled targets."""
    num_samples: int = option(16, 1, also="num_generations", needs="objective=minimum_risk")
    """Minimum risk: targets sampled per source; equal ones count once."""
    alpha: float = option(5e-3, 1e-9, needs="objective=minimum_risk")
    """Minimum risk: sharpness of the distribution over the sampled set, proportional to P ** alpha."""
    include_reference: bool = option(True, needs="objective=minimum_risk")
    """Minimum risk: the reference joins the sampled set."""
    reward: tuple[Named, ...] = option((), needs="objective=minimum_risk")
    """Minimum risk: rewards in [0, 1] instead of the task's own (edit_similarity, chrf, bleu), each with a weight."""

    def _check(self) -> None:
        if self.lora_rank or self.lora_alpha is not None:
            raise ConfigError("lora_rank and lora_alpha: seq2seq trains all weights; leave them out")
        if self.hidden_size % self.num_heads:
            raise ConfigError(f"hidden_size is {self.hidden_size}; it must be a multiple of num_heads {self.num_heads}")
        if self.norm == "pre" and not self.shared_vocabulary:
            raise ConfigError("norm = pre needs shared_vocabulary: no published layout has both; take norm = post")

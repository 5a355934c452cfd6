"""Options of what learns from given texts and labels: pretraining, encoder-decoders, encoders."""

from typing import Literal

from upslope.config import option
from upslope.errors import ConfigError
from upslope.options.common import BatchOptions, Named, RowOrTaskOptions, RunOptions


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
        if not self.new:
            return
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


class EncoderOptions(RunOptions, BatchOptions):
    """Data and objective."""

    FIRST = "data model eval_data test_data learning_rate batch_size num_epochs max_steps max_length output_dir"

    model: str = "minilm"
    """Where training starts: an encoder's folder, a hub id, or the alias minilm."""
    data: str = ""
    """Training rows."""
    eval_data: str | None = None
    """Dev rows, which choose the best checkpoint; default: --eval-share of the data."""
    test_data: str | None = None
    """Test rows: checked for errors first, scored once at the end with the best checkpoint, used for nothing else."""
    eval_share: float = option(0.1, 1e-6, 0.9)
    """Share of the data held out, by seed and content, without --eval-data."""
    eval_samples: int = option(5000, 1)
    """Dev rows per evaluation, a choice by seed where there are more."""
    objective: Literal["cross_entropy", "policy_gradient", "policy_gradient_sampled"] = "cross_entropy"
    """Likelihood of the right label; expected reward in closed form; the same from sampled labels (REINFORCE)."""
    rewards: str | None = option(None, needs="objective=cross_entropy,policy_gradient,policy_gradient_sampled")
    """JSON file {right label: {said label: reward}}; default, and where it is silent: 1 for right, 0 for wrong."""
    num_samples: int = option(4, 1)
    """Labels sampled per item (K) by policy_gradient_sampled."""
    baseline: Literal["none", "mean", "leave_one_out"] = "leave_one_out"
    """Subtracted from sampled rewards: nothing, the mean of the item's samples, or that of its other samples."""
    label_smoothing: float = option(0.0, 0, 0.999, needs="objective=cross_entropy")
    """Share of cross_entropy's target spread over all labels."""
    batch_size: int = 32
    head_lr_factor: float = option(1.0, 0)
    """The head's learning rate as a multiple of --learning-rate."""
    learning_rate: float = 1e-4
    weight_decay: float = 0.01
    max_length: int = option(256, 4)
    """Longest input in tokens; longer rows are cut to it in every split, counted and reported."""

    def _check(self) -> None:
        if not self.data:
            raise ConfigError("data is missing: name the file with the training rows (--data train.csv)")
        sampled = self.objective == "policy_gradient_sampled"
        if sampled and self.num_samples < 2 and self.baseline != "none":
            raise ConfigError(f"baseline {self.baseline} needs num_samples of at least 2, it is {self.num_samples}")


class ClassifyOptions(EncoderOptions):
    """Text classification: one label per text or pair of texts."""

    data: str = ""
    """Training rows: a .csv/.jsonl/.parquet file or hub id with text and label; or a GLUE task, cola:CoLA/train.tsv."""
    objective: Literal["cross_entropy", "policy_gradient", "policy_gradient_sampled", "squared_error"] = "cross_entropy"
    """Likelihood of the right label; expected reward in closed form; the same from sampled labels (REINFORCE);
    squared_error: the labels are numbers, and the head is to give the number (regression)."""
    text_column: str = "text"
    """The column of the text."""
    label_column: str = "label"
    """The column of the label."""
    pair_column: str | None = None
    """The column of a second text (a hypothesis after its premise)."""


class TagOptions(EncoderOptions):
    """Tagging: one tag per word, entities in IOB2 or any other tags."""

    data: str = ""
    """Training sentences: a CoNLL file, one word a line with its tag, a blank line between sentences."""
    token_column: int = 0
    """The column of the word; negative counts from the last."""
    tag_column: int = -1
    """The column of the tag; negative counts from the last."""
    tag_scheme: Literal["iob2", "iob1", "none"] = "iob2"
    """iob2: checked; iob1: checked and turned into iob2; none: any tags, measured per token only."""
    max_length: int = 256
    """Longest input in tokens; longer sentences are split between words, counted and reported."""

"""Learners of every supervised recipe in float64, and AdamW by its formula, for tests of whole steps.

`LEARNERS` makes one of each kind from a few small files. A test compares the gradient that its optimizer receives
(`exact_kit.watch`) with autograd's of the definition: plain passes, one sequence at a time.
"""

from __future__ import annotations

import csv
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from encoder_kit import bert_tokenizer, encoder_folder
from exact_kit import Taken
from tiny_model import tiny_folder, tiny_tokenizer
from torch import Tensor

from upslope.build import Policy, load_policy
from upslope.data.train_tokenizer import CAUSAL_SPECIALS, MASKED_SPECIALS, train_tokenizer
from upslope.loop import pairs as pair_learner
from upslope.loop.pairs import PairData
from upslope.loop.texts import start_encoder, start_policy
from upslope.models.attention.context import PackedContext
from upslope.models.encoder.items import Start, load_start
from upslope.models.encoder.network import Kind
from upslope.models.protocol import CausalModel
from upslope.options import ClassifyOptions, PretrainOptions, Seq2SeqOptions, SFTOptions, TagOptions
from upslope.options.common import RunOptions
from upslope.options.supervised import EncoderOptions
from upslope.recipes import classify, tag
from upslope.recipes.pretrain import Pretrain, causal_texts
from upslope.recipes.pretrain_masked import MaskedPretrain
from upslope.recipes.seq2seq import MaximumLikelihood
from upslope.recipes.sft import SFT

Row = tuple[list[int], list[bool]]
"""Tokens, and which of them are trained."""

PAIRS = (("ab", "cde"), ("xyz w", "v"), ("q", "a long reply"), ("so", "be it"), ("mn", "op"))
TEXTS = ("we read this\nand that\n", "a second text, longer than\nthe first one is\n", "third\n")
OPINIONS = (("the film was good", "up"), ("bad", "down"), ("we saw zq film", "up"), ("in the bad visit", "down"))
OPINIONS += (("good and good", "up"), ("the", "none"))
SENTENCES = (
    (("ann", "B-PER"), ("saw", "O"), ("oslo", "B-LOC"), ("and", "O"), ("rome", "B-LOC")),
    (("we", "O"), ("visit", "O")),
    (("bob", "B-PER"), ("bob", "I-PER"), ("was", "O")),
)
REVERSED = (("a b c", "c b a"), ("d", "d"), ("e a", "a e"), ("f b b d", "d b b f"), ("c c", "c c"))


byte_tokenizer = cache(tiny_tokenizer)
word_tokenizer = cache(bert_tokenizer)


@cache
def models() -> tempfile.TemporaryDirectory[str]:
    """Where the folders of the models lie that runs start from, each made once."""
    return tempfile.TemporaryDirectory(prefix="upslope-models-")


def tiny() -> str:
    """A random decoder."""
    path = Path(models().name) / "tiny"
    return str(path if path.is_dir() else tiny_folder(path, initializer_range=0.2))


def bert() -> str:
    """A random encoder."""
    path = Path(models().name) / "bert"
    return str(path if path.is_dir() else encoder_folder(path, width=16))


def ids(text: str) -> list[int]:
    """The bytes' tokens."""
    return byte_tokenizer()(text, add_special_tokens=False)["input_ids"]


def pair_row(prompt: str, completion: str) -> Row:
    """Trained on the reply and its end."""
    head, tail = ids(prompt), [*ids(completion), 1]
    return head + tail, [False] * len(head) + [True] * len(tail)


def jsonl(path: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def pairs_file(path: Path, pairs: Sequence[tuple[str, str]] = PAIRS) -> str:
    return jsonl(path, [{"prompt": p, "completion": c} for p, c in pairs])


def texts_file(path: Path, texts: Sequence[str] = TEXTS) -> str:
    return jsonl(path, [{"text": text} for text in texts])


def table_file(path: Path, rows: Sequence[tuple[str, str]] = OPINIONS) -> str:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *rows])
    return str(path)


def conll_file(path: Path, rows: Sequence[Sequence[tuple[str, str]]] = SENTENCES) -> str:
    path.write_text("\n\n".join("\n".join(f"{w} {t}" for w, t in row) for row in rows) + "\n")
    return str(path)


SHARED: dict[str, Any] = {"dtype": "float32", "eval_every": 0, "max_steps": 4, "learning_rate": 1e-2}


def sft_learner(folder: Path, **changes: Any) -> SFT:
    """Three of five rows a step."""
    data = pairs_file(folder / "rows.jsonl")
    options = SFTOptions(**SHARED | {"data": data, "eval_data": data, "model": tiny(), "batch_size": 3} | changes)
    options.validate()
    return SFT(options, double(load_policy(options), options))


def double(policy: Policy, options: RunOptions) -> Policy:
    """In float64, before an optimizer has it; a run in bfloat16 stays there."""
    if options.dtype == "float32":
        policy.model.double()
    return policy


def pretrain_options(folder: Path, **changes: Any) -> PretrainOptions:
    shared = SHARED | {"data": (texts_file(folder / "texts.jsonl"),), "cache_dir": str(folder / "cache")}
    shared |= {"eval_data": (texts_file(folder / "held.jsonl", ["unseen words\nare here\n", "more\n"]),)}
    shared |= {"tokenizer": "char", "vocab_size": 300, "hidden_size": 16, "num_layers": 1, "context_length": 9}
    options = PretrainOptions(**shared | {"batch_size": 3, "weight_decay": 0.0} | changes)
    options.validate()
    return options


@cache
def letters(specials: tuple[str, ...]) -> Any:
    """One token per letter."""
    return train_tokenizer(TEXTS, "char", 300, special_tokens=specials)


def pretrain_learner(folder: Path, **changes: Any) -> Pretrain:
    """Three windows of nine tokens a step."""
    options = pretrain_options(folder, **changes)
    tokenizer = letters(CAUSAL_SPECIALS)
    (folder / "new").mkdir(exist_ok=True)
    policy = double(start_policy(options, tokenizer, folder / "new"), options)
    return Pretrain(options, policy, causal_texts(options, tokenizer))


def masked_learner(folder: Path, **changes: Any) -> MaskedPretrain:
    """Three windows of nine tokens, two of them the frame, a step."""
    options = pretrain_options(folder, **{"architecture": "encoder", "mask_probability": 0.4} | changes)
    tokenizer = letters(MASKED_SPECIALS)
    encoder = start_encoder(options, tokenizer)
    return MaskedPretrain(options, encoder.double() if options.dtype == "float32" else encoder, tokenizer)


def double_start(options: EncoderOptions, kind: Kind, labels: Sequence[str]) -> Start:
    """The encoder in float64 with a head for the labels; a run in bfloat16 stays there."""
    start = load_start(options, kind, labels)
    if options.dtype == "float32":
        start.encoder.double()
    return start


def classify_learner(folder: Path, **changes: Any) -> classify.Classify:
    """Four of six texts a step."""
    data = table_file(folder / "rows.csv")
    shared = SHARED | {"data": data, "eval_data": data, "model": bert(), "batch_size": 4, "max_length": 32}
    options = ClassifyOptions(**shared | {"weight_decay": 0.0} | changes)
    options.validate()
    labels = ("score",) if options.objective == "squared_error" else ("down", "none", "up")
    return classify.make_learner(options, double_start(options, "classify", labels))


def tag_learner(folder: Path, **changes: Any) -> tag.Tag:
    """Two of three sentences a step, the longest in pieces."""
    data = conll_file(folder / "rows.conll")
    shared = SHARED | {"data": data, "eval_data": data, "model": bert(), "batch_size": 2, "max_length": 9}
    options = TagOptions(**shared | {"weight_decay": 0.0} | changes)
    options.validate()
    return tag.make_learner(options, double_start(options, "tag", ("B-LOC", "B-PER", "I-PER", "O")))


def seq2seq_learner(folder: Path, **changes: Any) -> MaximumLikelihood:
    """Three of five pairs a step; sources and targets of different lengths."""
    data = pairs_file(folder / "pairs.jsonl", REVERSED)
    shared = SHARED | {
        "data": data,
        "eval_data": pairs_file(folder / "held.jsonl", [("a b", "b a"), ("d e f", "f e d")]),
    }
    shared |= {"tokenizer": "word", "hidden_size": 16, "num_layers": 1, "num_heads": 2, "max_length": 12}
    shared |= {"max_completion_length": 6, "batch_size": 3, "dropout": 0.0}
    options = Seq2SeqOptions(**shared | changes)
    options.validate()
    read = PairData.of(options)
    return MaximumLikelihood(
        options, double(pair_learner.start_policy(options, read, folder / "network"), options), read
    )


LEARNERS: dict[str, Callable[..., Any]] = {
    "sft": sft_learner,
    "pretrain": pretrain_learner,
    "masked": masked_learner,
    "classify": classify_learner,
    "tag": tag_learner,
    "seq2seq": seq2seq_learner,
}


def network_of(learner: Any) -> torch.nn.Module:
    """What is trained."""
    return learner.encoder if hasattr(learner, "encoder") else learner.policy.model


def logp_of(model: CausalModel, row: Sequence[int]) -> Tensor:
    """log pi(v | tokens before) at every token but the first, of one sequence alone: [T - 1, V]."""
    hidden = model(torch.tensor(row), PackedContext([len(row)]))
    return torch.log_softmax(hidden @ model.head_weight.T, -1)[:-1]


def trained_logp(model: CausalModel, row: Row) -> tuple[Tensor, Tensor]:
    """(log pi of each trained token, the mean of log pi over the vocabulary there), of one sequence alone."""
    tokens, mask = row
    keep = torch.tensor(mask[1:])
    logp_NV, chosen_N = logp_of(model, tokens)[keep], torch.tensor(tokens[1:])[keep]
    return logp_NV.gather(1, chosen_N[:, None])[:, 0], logp_NV.mean(-1)


def smoothed(logp: Tensor, mean: Tensor, share: float) -> Tensor:
    """Cross-entropy with a target of which `share` is spread evenly over the vocabulary."""
    return -(1 - share) * logp - share * mean


def rows_of_step(learner: Any, step: int = 0) -> list[int]:
    """Which training rows a step takes: the next batch_size of the endless order."""
    size = learner.options.batch_size
    return [learner.order.at(step * size + i) for i in range(size)]


def assert_adamw(
    steps: Sequence[Taken],
    after: Mapping[str, Tensor],
    *,
    max_norm: float,
    decay: float,
    factor: Callable[[str], float] = lambda name: 1.0,
) -> None:
    """Every step made of its gradient what AdamW (1711.05101, algorithm 2) makes of it, clipped as one vector.

    factor: what a parameter's learning rate is multiplied by. Matrices decay, vectors do not.
    """
    mean = {name: torch.zeros_like(w) for name, w in after.items()}
    square = {name: torch.zeros_like(w) for name, w in after.items()}
    for number, taken in enumerate(steps, 1):
        norm = torch.stack([g.square().sum() for g in taken.gradients.values()]).sum().sqrt()
        scale = min(1.0, max_norm / float(norm)) if max_norm else 1.0
        found = steps[number].weights if number < len(steps) else after
        for name, gradient in taken.gradients.items():
            g, w = gradient * scale, taken.weights[name]
            mean[name] = 0.9 * mean[name] + 0.1 * g
            square[name] = 0.999 * square[name] + 0.001 * g.square()
            rate = taken.learning_rate * factor(name)
            ratio = mean[name] / (1 - 0.9**number) / ((square[name] / (1 - 0.999**number)).sqrt() + 1e-8)
            wanted = w - rate * ratio - rate * (decay if w.dim() > 1 else 0.0) * w
            torch.testing.assert_close(found[name], wanted, rtol=1e-9, atol=1e-12, msg=f"{name}, step {number}")

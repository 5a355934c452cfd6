"""Names in sentences: does a tagger learn from context what it cannot know by heart, by likelihood and by reward?

A synthetic CoNLL corpus drawn from the seed: sentences out of templates, with persons, places and organisations whose
names are made of the same syllables in all three kinds, as are some common words; so only the words around a name tell
its kind, and where it begins and ends. Names of dev and test never occur in training. 2,000 training sentences, 300 of
dev (choose the checkpoint) and 500 of test (scored once).

A BERT of two layers from scratch learns by cross-entropy for 200 steps of 16 sentences; from that start (trained once
per seed and process, not timed) each learner goes on for 300. cross_entropy raises the likelihood of the right tags,
policy_gradient the expected reward (1 for the right tag of a word) in closed form, policy_gradient_sampled the same
from four sampled tags a word. policy_gradient_fresh has no start: two words in three are O, so it is paid for tagging
every word O, and its gradient vanishes there. `entity_f1` on test is strict: type and both ends; `gain` is over the
start's.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from benchmarks.cases.held_out import held_out_curve
from benchmarks.harness import Expectation, Outcome
from upslope.models.encoder.network import new_encoder
from upslope.options import TagOptions
from upslope.recipes.tag import tag

NAME = "tagging"
LEARNERS = ("cross_entropy", "policy_gradient", "policy_gradient_sampled", "policy_gradient_fresh")
SEEDS = (0, 1, 2, 3, 4)
SENTENCES = {"train": 2000, "dev": 300, "test": 500}
START_STEPS = 200
STEPS = 300
LEARNING_RATE = 2e-3
BATCH = 16

EXPECTED: dict[str, dict[str, Expectation]] = {
    # Seed 100, on which steps and learning rate were chosen, from a start at 0.56: 0.954, 0.927, 0.909; without it 0.
    "cross_entropy": {"entity_f1": (">=", 0.88), "gain": (">=", 0.15), "token_accuracy": None},
    "policy_gradient": {"entity_f1": (">=", 0.8), "gain": (">=", 0.1), "token_accuracy": None},
    "policy_gradient_sampled": {"entity_f1": (">=", 0.75), "gain": (">=", 0.1), "token_accuracy": None},
    "policy_gradient_fresh": {"entity_f1": None, "token_accuracy": None},
}

SYLLABLES = tuple(a + b for a in "bdfgklmnprstv" for b in "aeiou")
TEMPLATES = (
    "PER met PER in LOC",
    "PER of ORG flew from LOC to LOC",
    "shares of ORG rose after PER left",
    "ORG hired PER as a NOUN",
    "ORG opened a NOUN near LOC",
    "the NOUN of LOC thanked PER",
    "rain fell on LOC and LOC",
    "PER said the NOUN in LOC was closed",
    "the lawyers of ORG sued ORG",
    "PER , who lives in LOC , works for ORG",
    "profits at ORG fell , said PER",
    "the road between LOC and LOC is closed",
    "a NOUN was found by PER",
    "ORG bought the NOUN from ORG",
    "the NOUN saw the NOUN",
)
"""A word in capitals is filled: a name of its kind, or a common word (NOUN, tagged O)."""
OPENINGS = ("", "yesterday", "on monday", "last week ,", "it seems that")
NAMED = ("PER", "LOC", "ORG")
LONGEST_NAME = {"PER": 2, "LOC": 2, "ORG": 3}
"""Words in a name: one up to so many."""

Sentence = list[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Start:
    """The corpus of a seed, a fresh encoder, and the tagger that cross-entropy made of it."""

    data: dict[str, str]
    fresh: str
    model: str
    entity_f1: float


_STARTS: dict[int, Start] = {}
_FOLDERS: list[tempfile.TemporaryDirectory[str]] = []


def run(learner: str, seed: int, folder: Path) -> Outcome:
    """One learner from the seed's start, scored once on test; only its own training is timed."""
    start, fresh = start_of(seed), learner.endswith("_fresh")
    model, steps = (start.fresh, START_STEPS + STEPS) if fresh else (start.model, STEPS)
    summary = _train(model, learner.removesuffix("_fresh"), start.data, steps, seed, folder / "run")
    found: Mapping[str, Any] = summary["test"]
    metrics = {"entity_f1": found["f1"], "token_accuracy": found["token_accuracy"]["value"]}
    if not fresh:
        metrics["gain"] = found["f1"] - start.entity_f1
    return Outcome(metrics, summary["steps"] * BATCH, summary["seconds"], held_out_curve(folder / "run", "f1", BATCH))


def start_of(seed: int) -> Start:
    """What all learners of a seed share."""
    if seed not in _STARTS:
        _FOLDERS.append(tempfile.TemporaryDirectory(prefix="upslope-tagging-"))
        folder = Path(_FOLDERS[-1].name)
        data = {split: write(folder / f"{split}.conll", rows) for split, rows in corpus(seed).items()}
        fresh = str(fresh_encoder(folder / "fresh", seed))
        summary = _train(fresh, "cross_entropy", data, START_STEPS, seed, folder / "start")
        _STARTS[seed] = Start(data, fresh, summary["best_model"], summary["test"]["f1"])
    return _STARTS[seed]


def _train(model: str, objective: str, data: Mapping[str, str], steps: int, seed: int, folder: Path) -> dict[str, Any]:
    options = TagOptions(
        model=model,
        data=data["train"],
        eval_data=data["dev"],
        test_data=data["test"],
        output_dir=str(folder),
        objective=objective,  # type: ignore[arg-type]
        seed=seed,
        dtype="float32",
        batch_size=BATCH,
        max_steps=steps,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="linear",
        warmup_steps=20,
        max_length=64,
        eval_every=50,
        save_every=10_000,
    )
    options.validate()
    return tag(options)


def corpus(seed: int) -> dict[str, list[Sentence]]:
    """Sentences of each split; a name's words are never shared between training and the other two."""
    rng = random.Random(f"names {seed}")
    words = ["".join(s) for s in {(a, b, c) for a in SYLLABLES for b in SYLLABLES for c in ("", *SYLLABLES)}]
    words.sort()
    rng.shuffle(words)
    half = len(words) // 2
    pools = {"train": words[:half], "dev": words[half:], "test": words[half:]}
    made: dict[str, list[Sentence]] = {}
    for split, count in SENTENCES.items():
        draw = random.Random(f"{split} {seed}")
        made[split] = [sentence(draw, pools[split]) for _ in range(count)]
    return made


def sentence(rng: random.Random, words: Sequence[str]) -> Sentence:
    """One template, filled."""
    made: Sentence = [(word, "O") for word in rng.choice(OPENINGS).split()]
    for word in rng.choice(TEMPLATES).split():
        if word in NAMED:
            name = rng.choices(words, k=rng.randint(1, LONGEST_NAME[word]))
            made += [(part, f"{'I' if i else 'B'}-{word}") for i, part in enumerate(name)]
        else:
            made.append((rng.choice(words) if word == "NOUN" else word, "O"))
    return made


def write(path: Path, rows: Iterable[Sentence]) -> str:
    """A CoNLL file: word and tag a line, a blank line between sentences."""
    blocks = ("".join(f"{word} {label}\n" for word, label in row) for row in rows)
    path.write_text("\n".join(blocks), encoding="utf-8")
    return str(path)


def fresh_encoder(path: Path, seed: int) -> Path:
    """A folder with a random two-layer BERT that knows the templates' words and the syllables."""
    tokenizer = syllable_tokenizer()
    encoder = new_encoder(
        "masked",
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_layers=2,
        num_heads=4,
        intermediate_size=128,
        max_positions=64,
        pad_token_id=tokenizer.pad_token_id,
        seed=seed,
        initializer_range=0.1,
    )
    return encoder.save(path, tokenizer=tokenizer)


def syllable_tokenizer() -> PreTrainedTokenizerFast:
    """WordPiece over the templates' words and the syllables, which begin a word or go on with it."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    known = {word for text in (*TEMPLATES, *OPENINGS) for word in text.split() if word not in (*NAMED, "NOUN")}
    pieces = dict.fromkeys([*special, *sorted(known), *SYLLABLES, *(f"##{s}" for s in SYLLABLES)])
    vocab = {piece: i for i, piece in enumerate(pieces)}
    inner = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", vocab["[CLS]"]), ("[SEP]", vocab["[SEP]"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )

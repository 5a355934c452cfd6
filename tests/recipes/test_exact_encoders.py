"""Classifiers, taggers and encoder-decoders: the gradient of a whole step is the definition's, in float64.

The definition is evaluated one text at a time, without padding.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from exact_kit import assert_gradient, at, watch
from supervised_kit import (
    OPINIONS,
    REVERSED,
    SENTENCES,
    Row,
    classify_learner,
    conll_file,
    pairs_file,
    rows_of_step,
    seq2seq_learner,
    smoothed,
    table_file,
    tag_learner,
    trained_logp,
    word_tokenizer,
)
from torch import Tensor

from upslope.engine.sampling import draw, uniforms
from upslope.loop.launch import begin
from upslope.loop.session import train
from upslope.models.encoder.network import Encoder
from upslope.training.stopping import Evaluation
from upslope.types import SamplingParams

pytestmark = pytest.mark.usefixtures("in_float64")

REWARDS = {"up": {"down": -1.0}, "down": {"up": 0.5, "none": 2.0}}
TAG_REWARDS = {"O": {"B-PER": -0.5}, "B-LOC": {"B-PER": 0.25, "O": -1.0}}
CASES: dict[str, dict[str, Any]] = {
    "likelihood": {},
    "smoothing": {"label_smoothing": 0.3},
    "exact": {"objective": "policy_gradient"},
    "rewards": {"objective": "policy_gradient", "rewards": True},
    "sampled": {"objective": "policy_gradient_sampled", "num_samples": 3, "rewards": True},
    "mean": {"objective": "policy_gradient_sampled", "num_samples": 4, "baseline": "mean", "rewards": True},
    "none": {"objective": "policy_gradient_sampled", "num_samples": 5, "baseline": "none", "rewards": True},
}


def reward_table(labels: Sequence[str], given: dict[str, dict[str, float]]) -> Tensor:
    """r(right, said): what the file says; where it is silent 1 for right, 0 for wrong."""
    return torch.tensor([[given.get(y, {}).get(a, float(a == y)) for a in labels] for y in labels])


def objective_of(logits: Tensor, y: int, rewards: Tensor, address: tuple[int, int, int], o: Any) -> Tensor:
    """The loss of one item by its definition; address: step, row, number of the item in its row."""
    logp, r = logits.log_softmax(-1), rewards[y]
    if o.objective == "cross_entropy":
        return smoothed(logp[y], logp.mean(), o.label_smoothing)
    if o.objective == "policy_gradient":
        return -(logp.exp() * r).sum()
    step, row, item = address
    k = o.num_samples
    counters = [item * k + i for i in range(k)]
    uniform = torch.from_numpy(uniforms([o.seed] * k, [step] * k, [row] * k, counters))
    said = draw(logp.detach().expand(k, -1).contiguous(), uniform).tolist()
    total = torch.zeros(())
    for i, a in enumerate(said):
        others = [float(r[b]) for j, b in enumerate(said) if j != i]
        mean = sum(float(r[b]) for b in said) / k
        baseline = {"none": 0.0, "mean": mean, "leave_one_out": sum(others) / len(others)}[o.baseline]
        total = total - (float(r[a]) - baseline) * logp[a] / k
    return total


def alone(encoder: Encoder, tokens: Sequence[int]) -> Tensor:
    """Logits of one input."""
    return encoder(torch.tensor([list(tokens)]), torch.ones(1, len(tokens), dtype=torch.int64))[0]


# One label per text


def text_losses(encoder: Encoder, options: Any, step: int, rows: Sequence[int], rewards: Tensor) -> Tensor:
    """The mean over rows of OPINIONS, one text at a time."""
    labels, tokenizer = list(encoder.labels), word_tokenizer()
    losses = []
    for i in rows:
        text, label = OPINIONS[i]
        logits = alone(encoder, tokenizer(text)["input_ids"])
        losses.append(objective_of(logits, labels.index(label), rewards, (step, i, 0), options))
    return torch.stack(losses).mean()


@pytest.mark.parametrize("case", CASES)
def test_a_classifiers_step_is_the_mean_of_its_objective_over_the_rows(case: str, tmp_path: Path) -> None:
    """Two steps, of four texts of different lengths each, in padded groups of three and of one."""
    changes = dict(CASES[case])
    if changes.pop("rewards", False):
        (tmp_path / "rewards.json").write_text(json.dumps(REWARDS))
        changes["rewards"] = str(tmp_path / "rewards.json")
    learner = classify_learner(tmp_path, micro_batch_tokens=21, seed=3, **changes)
    table = reward_table(learner.encoder.labels, REWARDS if "rewards" in changes else {})
    steps = watch(learner.optimizer)
    for step in (0, 1):
        rows = rows_of_step(learner, step)
        result = learner.step(step)
        with at(learner.encoder, steps[step]):
            loss = text_losses(learner.encoder, learner.options, step, rows, table)
            assert_gradient(steps[step], loss, dict(learner.encoder.named_parameters()))
            with torch.no_grad():
                logits = [alone(learner.encoder, word_tokenizer()(OPINIONS[i][0])["input_ids"]) for i in rows]
        assert result.metrics["loss"] == pytest.approx(float(loss.detach()), rel=1e-9)
        right = [learner.encoder.labels.index(OPINIONS[i][1]) for i in rows]
        gained = [float((z.softmax(-1) * table[y]).sum()) for z, y in zip(logits, right, strict=True)]
        assert result.metrics["reward"] == pytest.approx(sum(gained) / 4)
        assert result.metrics["accuracy"] == sum(int(z.argmax()) == y for z, y in zip(logits, right, strict=True)) / 4
        assert result.tokens == sum(len(word_tokenizer()(OPINIONS[i][0])["input_ids"]) for i in rows)


def test_a_regression_lowers_the_mean_squared_error(tmp_path: Path) -> None:
    numbers = (("the film was good", 4.5), ("bad", 0.25), ("we saw zq film", 3.0), ("the", -1.0), ("good", 2.0))
    data = table_file(tmp_path / "numbers.csv", [(text, str(y)) for text, y in numbers])
    learner = classify_learner(tmp_path, data=data, eval_data=data, objective="squared_error", micro_batch_tokens=8)
    steps = watch(learner.optimizer)
    rows = rows_of_step(learner)
    result = learner.step(0)
    with at(learner.encoder, steps[0]):
        said = [alone(learner.encoder, word_tokenizer()(text)["input_ids"])[0] for text, _ in numbers]
        loss = torch.stack([(said[i] - numbers[i][1]).square() for i in rows]).mean()
        assert_gradient(steps[0], loss, dict(learner.encoder.named_parameters()))
    assert result.metrics["loss"] == pytest.approx(float(loss.detach()), rel=1e-9)
    with torch.no_grad():
        said = torch.stack([alone(learner.encoder, word_tokenizer()(text)["input_ids"])[0] for text, _ in numbers])
    truth = torch.tensor([y for _, y in numbers])
    assert learner.evaluate(1).value == pytest.approx(float(torch.corrcoef(torch.stack([said, truth]))[0, 1]), rel=1e-6)


@pytest.mark.parametrize("rewarded", [False, True])
def test_the_best_classifier_is_the_one_with_most_accuracy_or_reward_on_dev(rewarded: bool, tmp_path: Path) -> None:
    changes = {}
    if rewarded:
        (tmp_path / "rewards.json").write_text(json.dumps(REWARDS))
        changes = {"rewards": str(tmp_path / "rewards.json"), "objective": "policy_gradient"}
    learner = classify_learner(tmp_path, micro_batch_tokens=16, **changes)
    labels = list(learner.encoder.labels)
    with torch.no_grad():
        said = [int(alone(learner.encoder, word_tokenizer()(text)["input_ids"]).argmax()) for text, _ in OPINIONS]
    truth = [labels.index(label) for _, label in OPINIONS]
    table = reward_table(labels, REWARDS)
    right = [y == a for y, a in zip(truth, said, strict=True)]
    gained = [float(table[y, a]) for y, a in zip(truth, said, strict=True)]
    assert sum(right) != sum(gained)
    assert learner.evaluate(0).value == pytest.approx(sum(gained if rewarded else right) / len(OPINIONS))
    assert learner.higher_is_better


def test_dev_rows_are_a_choice_by_seed(tmp_path: Path) -> None:
    chosen = {
        tuple(tuple(x.tokens) for x in classify_learner(tmp_path, eval_samples=3, seed=s).data.dev) for s in range(3)
    }
    assert {len(rows) for rows in chosen} == {3}
    assert len(chosen) > 1
    held = classify_learner(tmp_path, eval_data=None, data=table_file(tmp_path / "x.csv", OPINIONS * 2), eval_share=0.4)
    assert not {tuple(x.tokens) for x in held.data.dev} & {tuple(x.tokens) for row in held.rows for x in row}


# One tag per word

PIECES = ((0, 0, ("ann", "saw")), (0, 2, ("oslo", "and")), (0, 4, ("rome",)), (1, 0, ("we", "visit")))
PIECES += ((2, 0, ("bob", "bob", "was")),)
"""Sentence, first word and words of every input of at most nine tokens, two of them the frame."""


def tag_inputs(tokenizer: Any) -> list[tuple[int, int, list[int], list[int]]]:
    """(sentence, first word, tokens, place of each word's first sub-word)."""
    made = []
    for row, first, words in PIECES:
        tokens, places = [tokenizer.cls_token_id], []
        for word in words:
            places.append(len(tokens))
            tokens += tokenizer(word, add_special_tokens=False)["input_ids"]
        made.append((row, first, [*tokens, tokenizer.sep_token_id], places))
    assert any(len(tokens) > 2 + len(places) for _, _, tokens, places in made)
    return made


@pytest.mark.parametrize("case", CASES)
def test_a_taggers_step_is_the_mean_of_its_objective_over_the_words(case: str, tmp_path: Path) -> None:
    """Only the first sub-word of a word counts, and no padding; a sentence in pieces counts every word once."""
    changes = dict(CASES[case])
    if changes.pop("rewards", False):
        (tmp_path / "rewards.json").write_text(json.dumps(TAG_REWARDS))
        changes["rewards"] = str(tmp_path / "rewards.json")
    learner = tag_learner(tmp_path, micro_batch_tokens=20, seed=3, **changes)
    labels = list(learner.encoder.labels)
    table = reward_table(labels, TAG_REWARDS if "rewards" in changes else {})
    steps, inputs = watch(learner.optimizer), tag_inputs(word_tokenizer())
    for step in (0, 1):
        rows = rows_of_step(learner, step)
        result = learner.step(step)
        losses = []
        with at(learner.encoder, steps[step]):
            for sentence in rows:
                for row, first, tokens, places in inputs:
                    logits = alone(learner.encoder, tokens) if row == sentence else None
                    for i, place in enumerate(places if row == sentence else ()):
                        y = labels.index(SENTENCES[row][first + i][1])
                        address = (step, row, first + i)
                        losses.append(objective_of(logits[place], y, table, address, learner.options))
            loss = torch.stack(losses).mean()
            assert_gradient(steps[step], loss, dict(learner.encoder.named_parameters()))
        assert result.metrics["num_items"] == sum(len(SENTENCES[i]) for i in rows) == len(losses)
        assert result.metrics["loss"] == pytest.approx(float(loss.detach()), rel=1e-9)
        assert result.tokens == sum(len(tokens) for i in rows for row, _, tokens, _ in inputs if row == i)


@pytest.mark.parametrize("rewarded", [False, True])
def test_the_best_tagger_is_the_one_with_most_accuracy_or_reward_on_dev(rewarded: bool, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"tag_scheme": "none"}
    if rewarded:
        (tmp_path / "rewards.json").write_text(json.dumps(TAG_REWARDS))
        changes |= {"rewards": str(tmp_path / "rewards.json"), "objective": "policy_gradient"}
    learner = tag_learner(tmp_path, micro_batch_tokens=20, **changes)
    labels, table = list(learner.encoder.labels), reward_table(learner.encoder.labels, TAG_REWARDS)
    for seed in range(20):  # a head that is right about some words and paid for others
        right, gained, generator = [], [], torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in learner.encoder.named_parameters():
                if learner.encoder.is_head(name):
                    parameter.normal_(generator=generator)
            for row, first, tokens, places in tag_inputs(word_tokenizer()):
                said = alone(learner.encoder, tokens).argmax(-1)
                for i, place in enumerate(places):
                    y = labels.index(SENTENCES[row][first + i][1])
                    right.append(int(said[place]) == y)
                    gained.append(float(table[y, int(said[place])]))
        if sum(right) != sum(gained):
            break
    else:
        pytest.fail("every head earns what it gets right")
    assert learner.evaluate(0).value == pytest.approx(sum(gained if rewarded else right) / len(right))


# Encoder-decoders


def pair_rows(learner: Any, pairs: Sequence[tuple[str, str]]) -> list[Row]:
    """Source and its end, the mark that begins a target, target and its end: the target and its end are trained."""
    tokenizer = learner.policy.tokenizer
    rows = []
    for source, target in pairs:
        sides = [
            t(x, add_special_tokens=False)["input_ids"]
            for t, x in ((tokenizer.source, source), (tokenizer.target, target))
        ]
        head = [tokenizer.source_offset + i for i in (*sides[0], tokenizer.source.eos_token_id)]
        tail = [*sides[1], tokenizer.target.eos_token_id]
        rows.append(([*head, tokenizer.target.pad_token_id, *tail], [False] * (len(head) + 1) + [True] * len(tail)))
    return rows


@pytest.mark.parametrize(
    ("share", "changes"), [(0.0, {}), (0.3, {}), (0.0, {"shared_vocabulary": False}), (0.0, {"norm": "pre"})]
)
def test_seq2seq_steps_on_the_mean_over_the_batchs_target_tokens(
    share: float, changes: dict[str, Any], tmp_path: Path
) -> None:
    learner = seq2seq_learner(tmp_path, label_smoothing=share, micro_batch_tokens=14, **changes)
    model, steps = learner.policy.model, watch(learner.optimizer)
    rows = pair_rows(learner, [(p.text, target) for p, target in learner.data.train])
    assert sorted(rows) == sorted(pair_rows(learner, REVERSED))
    for step in (0, 1):
        taken = [rows[i] for i in rows_of_step(learner, step)]
        result = learner.step(step)
        with at(model, steps[step]):
            parts = [trained_logp(model, row) for row in taken]
            logp, mean = (torch.cat(x) for x in zip(*parts, strict=True))
            assert_gradient(steps[step], smoothed(logp, mean, share).mean(), dict(model.named_parameters()))
        assert result.metrics["loss"] == pytest.approx(float(smoothed(logp, mean, share).mean().detach()), rel=1e-9)
        assert result.tokens == result.metrics["num_tokens"] == len(logp)
        if share:
            assert result.metrics["loss/nll"] == pytest.approx(float(-logp.mean().detach()), rel=1e-9)


def test_dropout_acts_in_every_step_and_in_no_measurement(tmp_path: Path) -> None:
    """With a rate of 0 only dropout makes two losses of the same rows differ."""
    for dropout, losses in ((0.0, 1), (0.4, 3)):
        learner = seq2seq_learner(tmp_path, dropout=dropout, learning_rate=0.0, batch_size=5)
        held = [learner.evaluate(0).metrics["eval_loss"]]
        found = set()
        for step in range(3):
            found.add(round(learner.step(step).metrics["loss"], 9))
            held.append(learner.evaluate(step).metrics["eval_loss"])
        assert len(found) == losses
        assert max(held) - min(held) < 1e-12
        with torch.no_grad():
            rows = pair_rows(learner, [("a b", "b a"), ("d e f", "f e d")])
            wanted = -torch.cat([trained_logp(learner.policy.model, row)[0] for row in rows]).mean()
        assert held[0] == pytest.approx(float(wanted), rel=1e-9)


def replies(learner: Any) -> list[list[int]]:
    groups = learner.decode(learner.held_out, SamplingParams(max_tokens=6, temperature=0.0))
    return [g.rollouts[0].tokens for g in groups]


def test_decoding_after_a_step_is_that_of_the_new_weights(tmp_path: Path) -> None:
    """Nothing that the engine keeps of the sources, longer than a block of its cache, outlives the weights it is of."""
    held = pairs_file(tmp_path / "long.jsonl", [("a b c d e f " * 7, "f"), ("f e d c " * 9, "a b")])
    learner = seq2seq_learner(tmp_path, learning_rate=0.3, eval_data=held, max_length=64)
    before = replies(learner)
    learner.step(0)
    after = replies(learner)
    fresh = seq2seq_learner(tmp_path, eval_data=held, max_length=64)
    fresh.policy.model.load_state_dict(learner.policy.model.state_dict())
    assert before != after == replies(fresh)


class Seen:
    """Keeps what an evaluation decoded."""

    def record_rollouts(self, step: int, groups: Any, *, split: str) -> None:
        self.rollouts = [g.rollouts[0] for g in groups]


def test_held_out_decoding_goes_by_its_width_and_length(tmp_path: Path) -> None:
    """A beam finds what is likelier than the greedy reply; a reply has max_completion_length tokens at most."""
    found = {}
    for width, longest in ((1, 6), (4, 6), (1, 2)):
        learner = seq2seq_learner(tmp_path, beam_width=width, max_completion_length=longest)
        learner.run = Seen()
        learner.evaluate(0)
        found[width, longest] = [(r.tokens, sum(r.policy_logprobs)) for r in learner.run.rollouts]
    assert all(len(tokens) == 2 for tokens, _ in found[1, 2])
    assert [tokens for tokens, _ in found[4, 6]] != [tokens for tokens, _ in found[1, 6]]
    for (_, greedy), (_, beam) in zip(found[1, 6], found[4, 6], strict=True):
        assert beam >= greedy - 1e-9


def test_the_best_encoder_decoder_is_the_one_with_the_fewest_edits(tmp_path: Path) -> None:
    """Edits over the references' lengths, of all problems together: two of one and three of three make 5 / 4."""
    held = pairs_file(tmp_path / "other.jsonl", [("a b", "b"), ("d e f", "f e d")])
    learner = seq2seq_learner(tmp_path, eval_data=held)
    found = learner.evaluate(0)
    groups = learner.decode(learner.held_out, SamplingParams(max_tokens=6, temperature=0.0))
    edits = [g.rollouts[0].reward.parts["edits"] for g in groups]
    lengths = [g.rollouts[0].reward.parts["reference_length"] for g in groups]
    assert found.value == found.metrics["edit_rate"]["value"] == pytest.approx(sum(edits) / sum(lengths))
    assert found.value != pytest.approx(sum(e / n for e, n in zip(edits, lengths, strict=True)) / 2)
    assert not learner.higher_is_better


@pytest.mark.parametrize(
    ("make", "epochs", "steps"), [(classify_learner, 3, 4), (tag_learner, 3, 4), (seq2seq_learner, 2, 3)]
)
def test_passes_over_the_rows_set_the_number_of_steps(make: Any, epochs: float, steps: int, tmp_path: Path) -> None:
    """Six texts in fours, three sentences in twos, five pairs in threes; the schedule ends with them."""
    learner = make(tmp_path, num_epochs=epochs, max_steps=100, lr_scheduler_type="linear")
    assert learner.options.max_steps == steps
    for step in range(steps):
        result = learner.step(step)
    assert result.metrics["learning_rate"] == pytest.approx(1e-2 / steps)


def test_the_share_held_out_is_the_one_asked_for(tmp_path: Path) -> None:
    rows = [(f"the film {a} {b}", label) for a in "abcd" for b in "efg" for label in ("up", "down", "none")]
    texts = table_file(tmp_path / "x.csv", [(f"{text} {label}", label) for text, label in rows])
    named = (("ann", "B-PER"), ("bob", "I-PER"), ("rome", "B-LOC"))
    words = conll_file(tmp_path / "x.conll", [((w, "O"), *named) for w in "abcdefghijklmnopqrst"])
    for share in (0.1, 0.5):
        for make, data in ((classify_learner, texts), (tag_learner, words)):
            learner = make(tmp_path, data=data, eval_data=None, eval_share=share)
            total = len(learner.rows) + len(learner.data.dev)
            assert len(learner.data.dev) / total == pytest.approx(share, abs=0.1)


def test_a_new_encoder_decoder_has_the_sizes_it_was_given(tmp_path: Path) -> None:
    sizes = {"hidden_size": 24, "num_layers": 2, "num_heads": 3, "vocab_size": 6, "norm": "pre", "dropout": None}
    learner = seq2seq_learner(tmp_path, max_length=17, **sizes)
    config = learner.policy.model.config
    assert (config.hidden_size, config.encoder_layers, config.decoder_layers) == (24, 2, 2)
    assert (config.num_attention_heads, config.norm, config.intermediate_size) == (3, "pre", 96)
    assert (config.vocab_size, config.dropout, config.max_position_embeddings) == (6, 0.1, 17)


def test_dev_and_test_are_scored_with_the_best_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of four steps the second is the best by what is said here, whatever the weights."""
    values = iter([1.0, 0.5, 0.9, 0.1, 0.2])
    learner = classify_learner(
        tmp_path, learning_rate=0.3, eval_every=1, output_dir=str(tmp_path / "run"), lr_scheduler_type="constant"
    )
    steps, measured = watch(learner.optimizer), learner.measure
    monkeypatch.setattr(type(learner), "evaluate", lambda self, step: Evaluation("said", {"said": next(values)}))
    with begin(learner.options) as begun:
        summary = train("classify", learner.options, learner, begun)
    learner.data = replace(learner.data, test=learner.data.dev[:4])
    whole = learner.reported(summary)
    last = measured(learner.data.dev)[0]
    with at(learner.encoder, steps[2]):
        wanted = [measured(rows)[0] for rows in (learner.data.dev, learner.data.dev[:4])]
    assert wanted[0] != last
    for found, figures in zip((whole["dev"], whole["test"]), wanted, strict=True):
        assert found.pop("eval_loss") == pytest.approx(figures.pop("eval_loss"), rel=1e-6)
        assert found == figures
    assert whole["best_step"] == 2

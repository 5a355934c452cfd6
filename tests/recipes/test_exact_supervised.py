"""Fine-tuning and pretraining: what a whole step hands its optimizer is the gradient of the definition, in float64."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from exact_kit import assert_gradient, at, watch
from supervised_kit import (
    PAIRS,
    TEXTS,
    ids,
    jsonl,
    logp_of,
    masked_learner,
    pair_row,
    pretrain_learner,
    pretrain_options,
    rows_of_step,
    sft_learner,
    smoothed,
    texts_file,
    trained_logp,
)
from torch import Tensor

from upslope.data.batching import Masking
from upslope.errors import ConfigError
from upslope.loop.texts import objective_of, start_encoder, start_policy, start_tokenizer
from upslope.models.protocol import CausalModel

pytestmark = pytest.mark.usefixtures("in_float64")


def differs(loss: Tensor, other: Tensor, model: torch.nn.Module) -> bool:
    """Whether another objective would have another gradient."""
    named = list(model.parameters())
    a, b = (torch.autograd.grad(x, named, retain_graph=True, allow_unused=True) for x in (loss, other))
    return any(
        x is not None and y is not None and not torch.allclose(x, y, rtol=1e-3) for x, y in zip(a, b, strict=True)
    )


# Fine-tuning

Row = tuple[list[int], list[bool]]
CHATML = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def chat_row(said: str) -> Row:
    """Trained on the answer and the mark that ends it, not on the line break that the template puts behind."""
    head, tail = ids(CHATML), ids(f"{said}<|im_end|>")
    return [*head, *tail, *ids("\n")], [False] * len(head) + [True] * len(tail) + [False]


SAID = ("ok then", "no", "well, yes", "a", "some of it")
FORMS: dict[str, list[tuple[Mapping[str, Any], Row]]] = {
    "pairs": [({"prompt": p, "completion": c}, pair_row(p, c)) for p, c in PAIRS],
    "texts": [({"text": x}, ([*ids(x), 1], [False] + [True] * len(x))) for x in SAID],
    "chats": [
        ({"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": x}]}, chat_row(x))
        for x in SAID
    ],
}
"""Rows and their tokens: a reply is trained with its end, a text but for its first token, of a chat the answers."""


def sft_losses(model: CausalModel, rows: list[Row], share: float = 0.0) -> dict[str, Tensor]:
    """The batch's mean over all its trained tokens, by each loss."""
    parts = [trained_logp(model, row) for row in rows]
    logp, mean = (torch.cat(x) for x in zip(*parts, strict=True))
    return {
        "nll": -logp.mean(),
        "smooth": smoothed(logp, mean, share).mean(),
        "dft": -(logp.exp().detach() * logp).mean(),
    }


@pytest.mark.parametrize(
    ("form", "kind", "budget"),
    [("pairs", "nll", 8), ("pairs", "smooth", 8), ("pairs", "dft", 8), ("texts", "nll", 20), ("chats", "nll", 4096)],
)
def test_sft_steps_on_the_mean_over_the_batchs_trained_tokens(
    form: str, kind: str, budget: int, tmp_path: Path
) -> None:
    """Two steps, of three rows each: the second one takes up where the order was, at the weights of the first."""
    data = jsonl(tmp_path / "form.jsonl", [row for row, _ in FORMS[form]])
    rows = [row for _, row in FORMS[form]]
    changes: dict[str, Any] = {"smooth": {"label_smoothing": 0.3}, "dft": {"loss": "dft"}}.get(kind, {})
    learner = sft_learner(tmp_path, data=data, micro_batch_tokens=budget, **changes)
    model, steps = learner.policy.model, watch(learner.optimizer)
    for step in (0, 1):
        taken = [rows[i] for i in rows_of_step(learner, step)]
        result = learner.step(step)
        with at(model, steps[step]):
            losses = sft_losses(model, taken, 0.3)
            assert_gradient(steps[step], losses[kind], dict(model.named_parameters()))
            assert all(differs(losses[kind], losses[other], model) for other in losses if other != kind)
        assert result.tokens == result.metrics["num_tokens"] == sum(sum(mask) for _, mask in taken)
        assert result.metrics["loss"] == pytest.approx(float(losses[kind].detach()), rel=1e-9)
        if kind != "nll":
            assert result.metrics["loss/nll"] == pytest.approx(float(losses["nll"].detach()), rel=1e-9)


@pytest.mark.parametrize("changes", [{"label_smoothing": 0.3}, {"loss": "dft"}])
def test_sft_measures_the_plain_likelihood_of_held_out_rows(changes: dict[str, Any], tmp_path: Path) -> None:
    held = jsonl(
        tmp_path / "held.jsonl", [{"prompt": p, "completion": c} for p, c in (("k", "lm"), ("no", "p"), ("q", "r"))]
    )
    learner = sft_learner(tmp_path, eval_data=held, eval_samples=2, micro_batch_tokens=5, **changes)
    found = learner.evaluate(0)
    with torch.no_grad():
        wanted = sft_losses(learner.policy.model, [pair_row("k", "lm"), pair_row("no", "p")])["nll"]
    assert found.value == found.metrics["eval_loss"]["value"] == pytest.approx(float(wanted), rel=1e-9)
    assert found.metrics["eval_rows"] == 2
    assert not learner.higher_is_better


def test_sft_leaves_out_what_is_longer_than_max_length_and_holds_out_the_last_tenth(tmp_path: Path) -> None:
    pairs = [("p" * (1 + i % 5), "c" * (1 + i % 3)) for i in range(24)]
    data = jsonl(tmp_path / "many.jsonl", [{"prompt": p, "completion": c} for p, c in pairs])
    learner = sft_learner(tmp_path, data=data, eval_data=None, max_length=8)
    fitting = [pair_row(p, c) for p, c in pairs if len(p) + len(c) + 1 <= 8]
    held = len(fitting) // 10
    assert 0 < held < len(fitting) < len(pairs)
    assert [(e.tokens, e.mask) for e in learner.train_examples] == fitting[:-held]
    assert [(e.tokens, e.mask) for e in learner.eval_examples] == fitting[-held:]


# Pretraining


def stream_of(learner: Any, texts: tuple[str, ...]) -> list[int]:
    """The border, then every document with the border behind it; each letter is one token."""
    tokenizer = learner.policy.tokenizer
    tokens = [tokenizer.eos_token_id]
    for text in texts:
        tokens += [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    assert len(tokens) == 1 + sum(len(text) + 1 for text in texts)
    return tokens


@pytest.mark.parametrize("share", [0.0, 0.3])
@pytest.mark.parametrize("changes", [{}, {"architecture": "lstm"}, {"tie_word_embeddings": False}])
def test_pretraining_predicts_every_token_of_its_windows_once(
    changes: dict[str, Any], share: float, tmp_path: Path
) -> None:
    """Windows of nine tokens overlap by one, which is the context of the second and no target of it."""
    learner = pretrain_learner(tmp_path, label_smoothing=share, micro_batch_tokens=20, **changes)
    model, steps = learner.policy.model, watch(learner.optimizer)
    stream = stream_of(learner, TEXTS)
    windows = [stream[i : i + 9] for i in range(0, len(stream) - 1, 8)]
    assert learner.order.n == len(windows)
    assert len(windows[-1]) not in (1, 9)
    order = rows_of_step(learner, 0) + rows_of_step(learner, 1) + rows_of_step(learner, 2)
    last = order.index(len(windows) - 1) // 3  # the step with the short window
    for step in range(last + 1):
        result = learner.step(step)
    with at(model, steps[last]):
        parts = [
            trained_logp(model, (windows[i], [False] + [True] * (len(windows[i]) - 1)))
            for i in rows_of_step_at(order, last)
        ]
        logp, mean = (torch.cat(x) for x in zip(*parts, strict=True))
        loss = smoothed(logp, mean, share).mean()
        assert_gradient(steps[last], loss, dict(model.named_parameters()))
        assert differs(loss, smoothed(logp, mean, 0.3 - share).mean(), model)
    assert result.tokens == result.metrics["num_tokens"] == len(logp)
    assert result.metrics["loss"] == pytest.approx(float(loss.detach()), rel=1e-9)
    assert ("lm_head.weight" in dict(model.named_parameters())) == (changes == {"tie_word_embeddings": False})


def rows_of_step_at(order: list[int], step: int) -> list[int]:
    """Three windows a step."""
    return order[3 * step : 3 * step + 3]


@pytest.mark.parametrize(("stride", "samples"), [(None, 0), (3, 0), (8, 0), (None, 3)])
def test_held_out_text_is_scored_once_with_as_much_context_as_the_stride_leaves(
    stride: int | None, samples: int, tmp_path: Path
) -> None:
    lines = ("unseen words\n", "are here\n", "and there\n")
    held = texts_file(tmp_path / "other.jsonl", ["".join(lines)])
    changes = {"eval_data": (held,), "eval_stride": stride, "eval_samples": samples, "label_smoothing": 0.2}
    learner = pretrain_learner(tmp_path, micro_batch_tokens=20, **changes)
    stream = stream_of(learner, ("".join(lines),))
    used = "".join(lines)
    if samples:  # whole lines of at most 3 windows x 4 tokens each, but at least one
        used = lines[0]
        stream = stream[: 1 + len(used)]
    step = stride or 4
    total = 0.0
    with torch.no_grad():
        for t in range(1, len(stream)):
            start = next(s for s in range(0, len(stream), step) if t < s + 9)
            total -= float(logp_of(learner.policy.model, stream[start : t + 1])[-1, stream[t]])
    found = learner.evaluate(0).metrics
    assert found["eval_loss"] == pytest.approx(total / (len(stream) - 1), rel=1e-9)
    assert found["perplexity"] == pytest.approx(math.exp(total / (len(stream) - 1)), rel=1e-9)
    assert found["nats_per_byte"] == pytest.approx(total / len(used.encode()), rel=1e-9)
    assert found["bits_per_byte"] == pytest.approx(total / len(used.encode()) / math.log(2), rel=1e-9)
    assert learner.evaluate(0).value == found["perplexity"]
    assert not learner.higher_is_better


# The masked objective


def framed(learner: Any, texts: tuple[str, ...]) -> list[list[int]]:
    """Seven tokens at a time between [CLS] and [SEP]; a document ends with [SEP] too."""
    tokenizer = learner.tokenizer
    stream: list[int] = []
    for text in texts:
        stream += [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.sep_token_id]
    cls, sep = tokenizer.cls_token_id, tokenizer.sep_token_id
    return [[cls, *stream[i : i + 7], sep] for i in range(0, len(stream), 7)]


def masked_losses(learner: Any, numbered: list[tuple[int, list[int]]], *, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """(log pi of each hidden token, the mean over the vocabulary, whether it was the likeliest), one text at a time."""
    tokenizer = learner.tokenizer
    special = set(tokenizer.all_special_ids)
    words = [i for i in range(len(tokenizer)) if i not in special]
    masking = Masking(0.4, mask_id=tokenizer.mask_token_id, words=words, keep=special, seed=seed)
    logps, means, right = [], [], []
    for number, window in numbered:
        changed, places = masking.apply(window, number)
        logits = learner.encoder(torch.tensor([changed]), torch.ones(1, len(changed), dtype=torch.int64))[0, places]
        logp, truth = logits.log_softmax(-1), torch.tensor([window[t] for t in places])
        logps.append(logp.gather(1, truth[:, None])[:, 0])
        means.append(logp.mean(-1))
        right.append(logits.argmax(-1) == truth)
    return torch.cat(logps), torch.cat(means), torch.cat(right)


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_masked_pretraining_predicts_what_was_hidden_and_nothing_else(share: float, tmp_path: Path) -> None:
    """Which tokens are hidden goes by the place in the data order, so a later pass hides others."""
    learner = masked_learner(tmp_path, label_smoothing=share, micro_batch_tokens=20, seed=5)
    model, steps = learner.encoder, watch(learner.optimizer)
    windows = framed(learner, TEXTS)
    assert learner.order.n == len(windows)
    for step in range(5):  # the second pass begins in the fifth step
        numbered = [(3 * step + i, windows[learner.order.at(3 * step + i)]) for i in range(3)]
        result = learner.step(step)
        if step not in (0, 4):
            continue
        with at(model, steps[step]):
            logp, mean, right = masked_losses(learner, numbered, seed=5)
            loss = smoothed(logp, mean, share).mean()
            assert_gradient(steps[step], loss, dict(model.named_parameters()))
            assert differs(loss, smoothed(logp, mean, 0.3 - share).mean(), model)
        assert result.metrics["loss"] == pytest.approx(float(loss.detach()), rel=1e-9)
        assert result.metrics["accuracy"] == pytest.approx(float(right.double().mean()))
        assert result.metrics["num_tokens"] == len(logp)
        assert result.tokens == sum(len(window) for _, window in numbered)


def test_masked_pretraining_measures_held_out_windows_with_the_same_masks_each_time(tmp_path: Path) -> None:
    """Whatever the run's seed, and without label smoothing."""
    learner = masked_learner(tmp_path, label_smoothing=0.3, micro_batch_tokens=20, seed=5, eval_samples=0)
    windows = framed(learner, ("unseen words\nare here\n", "more\n"))
    with torch.no_grad():
        logp, _, right = masked_losses(learner, list(enumerate(windows)), seed=-1)
    found = learner.evaluate(0)
    assert found.metrics["eval_loss"] == pytest.approx(float(-logp.mean()), rel=1e-9)
    assert found.value == found.metrics["masked_perplexity"] == pytest.approx(math.exp(float(-logp.mean())), rel=1e-9)
    assert found.metrics["masked_accuracy"] == pytest.approx(float(right.double().mean()))
    learner.step(0)
    assert learner.held_out == masked_learner(tmp_path, seed=6, eval_samples=0).held_out


# Passes over the data


@pytest.mark.parametrize(
    ("make", "rows", "epochs", "steps"),
    [(sft_learner, 5, 3, 5), (sft_learner, 5, 0.1, 1), (pretrain_learner, 10, 2, 7), (masked_learner, 11, 2.5, 9)],
)
def test_passes_over_the_data_set_the_number_of_steps(
    make: Any, rows: int, epochs: float, steps: int, tmp_path: Path
) -> None:
    """Of three rows each; the schedule ends with them."""
    learner = make(tmp_path, num_epochs=epochs, max_steps=100, lr_scheduler_type="linear")
    assert learner.order.n == rows
    assert learner.options.max_steps == steps
    for step in range(steps):
        result = learner.step(step)
    assert result.metrics["learning_rate"] == pytest.approx(1e-2 / steps)


@pytest.mark.parametrize("make", [sft_learner, pretrain_learner, masked_learner])
def test_the_seed_chooses_the_order_of_the_rows(make: Any, tmp_path: Path) -> None:
    orders = {tuple(make(tmp_path, seed=seed).order.take(10)) for seed in (0, 1, 2)}
    assert len(orders) == 3


def test_dft_with_label_smoothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="label_smoothing belongs to loss = nll, not dft"):
        sft_learner(tmp_path, loss="dft", label_smoothing=0.1)


class Seen:
    """Keeps what an evaluation decoded."""

    def record_rollouts(self, step: int, groups: Any, *, split: str) -> None:
        self.rollouts = [g.rollouts[0] for g in groups]


def test_sft_on_a_task_takes_its_demonstrations_and_measures_greedy_accuracy(tmp_path: Path) -> None:
    task = "chain_sum:min_terms=2,max_terms=2"
    sizes = {"num_examples": 7, "eval_samples": 3, "max_completion_length": 4}
    learner = sft_learner(tmp_path, data=None, eval_data=None, task=task, **sizes)
    assert len(learner.train_examples) == 7
    learner.run = Seen()
    found = learner.evaluate(0)
    assert found.value == found.metrics["accuracy"]["value"]
    assert learner.higher_is_better
    assert [len(r.tokens) for r in learner.run.rollouts] == [4, 4, 4]
    for rollout in learner.run.rollouts:
        row = [*rollout.prompt_tokens, *rollout.tokens]
        with torch.no_grad():
            likeliest = logp_of(learner.policy.model, row).argmax(-1).tolist()
        assert likeliest[-4:] == rollout.tokens


SIZES = {"hidden_size": 24, "num_layers": 3, "tokenizer": "bpe", "vocab_size": 261}


@pytest.mark.parametrize("architecture", ["decoder", "lstm", "encoder"])
def test_a_new_network_has_the_sizes_it_was_given_and_weights_by_the_seed(architecture: str, tmp_path: Path) -> None:
    more = {} if architecture == "lstm" else {"num_heads": 3, "intermediate_size": 40}
    options = pretrain_options(tmp_path, architecture=architecture, **SIZES, **more)
    objective = objective_of(options)
    tokenizer = start_tokenizer(options, objective)
    assert len(tokenizer) == 261

    def started(options: Any) -> Any:
        if objective == "masked":
            return start_encoder(options, tokenizer)
        return start_policy(options, tokenizer, tmp_path).model

    network = started(options)
    config = network.config
    assert (config.vocab_size, config.hidden_size, config.num_hidden_layers) == (261, 24, 3)
    if architecture != "lstm":
        assert (config.num_attention_heads, config.intermediate_size) == (3, 40)
        assert config.max_position_embeddings == 9
    first = next(network.parameters())
    again, other = (next(started(replace(options, seed=seed)).parameters()) for seed in (0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)

"""What a step on pairs or imitated answers is compared with: a plain forward pass per sequence, in float64."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from exact_kit import Taken, assert_gradient, watch
from tiny_model import tiny_tokenizer
from torch import Tensor, nn

from upslope.build import Policy, load_policy
from upslope.data.batching import PromptStream
from upslope.models.attention.context import PackedContext
from upslope.models.files.loading import load_model
from upslope.models.protocol import CausalModel
from upslope.types import RolloutGroup

TOKENIZER = tiny_tokenizer()


def write(path: Path, rows: Iterable[Mapping[str, Any]]) -> str:
    """Rows as a file of JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def asked(i: int) -> list[dict[str, str]]:
    """A prompt."""
    return [{"role": "user", "content": f"Say {i}"}]


def double_policy(options: Any) -> Policy:
    """The policy of the options, before it has an optimizer, in float64."""
    policy = load_policy(options, trunk=True)
    policy.model.double()
    return policy


def double_model(folder: Path) -> CausalModel:
    """What the folder holds, in float64."""
    return load_model(folder, dtype=torch.float32, trunk=True).double()


def ids_of(prompt: Sequence[Mapping[str, str]], answer: str | None = None) -> list[int]:
    """ChatML up to the assistant's turn, and with an `answer` up to the token that ends it."""
    text = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in prompt) + "<|im_start|>assistant\n"
    if answer is not None:
        text += answer + "<|im_end|>"
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def states(model: CausalModel, tokens: Sequence[int]) -> Tensor:
    """The state after every token, alone in its pass."""
    return model(torch.tensor(list(tokens)), PackedContext([len(tokens)]))


def logits(model: CausalModel, tokens: Sequence[int], first: int) -> Tensor:
    """What each of tokens[first:] was chosen from."""
    return states(model, tokens)[first - 1 : -1] @ model.head_weight.T


def logps(model: CausalModel, tokens: Sequence[int], first: int) -> Tensor:
    """Of each of tokens[first:]."""
    chosen = torch.tensor(list(tokens[first:]))
    return logits(model, tokens, first).log_softmax(-1).gather(1, chosen[:, None])[:, 0]


def answer_logps(model: CausalModel, prompt: Sequence[Mapping[str, str]], answer: str) -> Tensor:
    """Of every token of the answer, the one that ends the turn among them."""
    return logps(model, ids_of(prompt, answer), len(ids_of(prompt)))


def trained(*modules: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by name."""
    return {name: p for module in modules for name, p in module.named_parameters() if p.requires_grad}


def taken_by(learner: Any, steps: int) -> tuple[list[Taken], list[dict[str, float]]]:
    """Let the learner make its first steps: what its optimizer took at each, and the metrics."""
    found = watch(learner.optimizer)
    metrics = [dict(learner.step(step).metrics) for step in range(steps)]
    return found, metrics


def sampled_by(learner: Any) -> list[list[RolloutGroup]]:
    """What the learner samples from now on, call by call."""
    seen: list[list[RolloutGroup]] = []
    holder = getattr(learner, "sampler", learner)
    original = holder.sample

    def sample(*given: Any, **named: Any) -> Any:
        found = original(*given, **named)
        seen.append(found[0] if isinstance(found, tuple) else found)
        return found

    holder.sample = sample
    return seen


def return_to(model: nn.Module, taken: Taken) -> None:
    """Give the model back the weights it had before a step, and leave them: a graph over them must live on."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name in taken.weights:
                p.copy_(taken.weights[name])


def batches_of(rows: Sequence[Any], size: int, steps: int, *, seed: int = 0) -> list[list[Any]]:
    """The rows that each step meets."""
    order = PromptStream(len(rows), seed=seed)
    return [[rows[i] for i in order.take(size)] for _ in range(steps)]


def assert_other(taken: Taken, loss: Tensor, named: Mapping[str, nn.Parameter]) -> None:
    """The step's gradient is clearly not that of `loss`: what tells the two apart is at work."""
    with pytest.raises(AssertionError, match="off by"):
        assert_gradient(taken, loss, named, tolerance=1e-3)


def assert_first_update(
    taken: Taken,
    after: Mapping[str, Tensor],
    moments: Mapping[str, Tensor],
    *,
    max_norm: float,
    decay: Callable[[str], float] = lambda _: 0.0,
) -> None:
    """AdamW's first step by hand: the gradient cut to `max_norm`, its sign times the rate, and the decay of weights."""
    norm = torch.stack([g.square().sum() for g in taken.gradients.values()]).sum().sqrt()
    assert norm > 1.5 * max_norm, "nothing is cut here"
    for name, gradient in taken.gradients.items():
        cut = gradient * max_norm / norm
        torch.testing.assert_close(moments[f"{name}|exp_avg"], 0.1 * cut, rtol=1e-6, atol=1e-12)
        before = taken.weights[name] * (1 - taken.learning_rate * decay(name))
        expected = before - taken.learning_rate * cut / (cut.abs() + 1e-8)
        torch.testing.assert_close(after[name], expected, rtol=0, atol=1e-6 * taken.learning_rate)

"""Small preference files, and a float64 oracle of log-probs and scores that uses nothing of upslope."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from plain_kit import asked as asked
from plain_kit import write as write
from torch import Tensor
from torch.func import functional_call
from transformers import AutoModelForCausalLM, PreTrainedModel


def pair_rows(count: int = 60, seed: int = 0) -> list[dict[str, Any]]:
    """'a' is better than 'b', whatever the lengths."""
    rng = random.Random(seed)
    return [
        {"prompt": asked(i), "chosen": "a" * rng.randint(2, 5), "rejected": "b" * rng.randint(2, 5)}
        for i in range(count)
    ]


def wide_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """'a' is better than anything that a random byte model says."""
    rng = random.Random(seed)

    def noise() -> str:
        return "".join(chr(rng.randint(98, 0x2FF)) for _ in range(rng.randint(1, 4)))

    return [{**row, "rejected": noise()} for row in pair_rows(count, seed)]


def labelled_rows(count: int = 60) -> list[dict[str, Any]]:
    return [
        {"prompt": row["prompt"], "completion": row["rejected" if i % 3 else "chosen"], "label": i % 3 == 0}
        for i, row in enumerate(pair_rows(count))
    ]


def step_rows(count: int = 40, seed: int = 0) -> list[dict[str, Any]]:
    """A step of 'a' is right, one of 'b' is not."""
    rng = random.Random(seed)
    rows = []
    for i in range(count):
        labels = [rng.random() < 0.5 for _ in range(rng.randint(1, 4))]
        steps = [("a" if good else "b") * rng.randint(2, 4) for good in labels]
        rows.append({"prompt": asked(i), "steps": steps, "labels": [int(good) for good in labels]})
    return rows


class Oracle:
    """A transformers network in float64 (its norms and rotary tables in float32) under given weights."""

    def __init__(self, folder: Path, tokenizer: Any, weights: Mapping[str, Tensor] | None = None) -> None:
        self.network: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
        self.tokenizer = tokenizer
        named = dict(self.network.named_parameters()) if weights is None else weights
        self.weights = {n: x.detach().double().clone().requires_grad_() for n, x in named.items()}

    def tokens(self, prompt: Any, completion: str) -> tuple[list[int], int]:
        """Ids up to the end of the turn, and where the completion begins."""
        text = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in prompt)
        head = self.tokenizer(text + "<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]
        whole = [*head, *self.tokenizer(completion, add_special_tokens=False)["input_ids"], 1]
        return whole, len(head)

    def logps(self, prompt: Any, completion: str) -> Tensor:
        """Of every completion token."""
        ids, first = self.tokens(prompt, completion)
        logits = functional_call(self.network, self.weights, (torch.tensor([ids]),), tie_weights=True).logits[0]
        logp = logits.log_softmax(-1)
        return torch.stack([logp[t - 1, ids[t]] for t in range(first, len(ids))])

    def hidden(self, prompt: Any, completion: str) -> tuple[Tensor, list[int], int]:
        """Hidden states after the last norm, the ids, and where the completion begins."""
        ids, first = self.tokens(prompt, completion)
        out = functional_call(
            self.network, self.weights, (torch.tensor([ids]),), {"output_hidden_states": True}, tie_weights=True
        )
        return out.hidden_states[-1][0], ids, first

    def gradients(self, loss: Tensor) -> dict[str, Tensor]:
        grads = torch.autograd.grad(loss, list(self.weights.values()), allow_unused=True)
        return {n: g for n, g in zip(self.weights, grads, strict=True) if g is not None}


def relative_gap(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Of two gradients, over all parameters."""
    assert found.keys() >= expected.keys(), expected.keys() - found.keys()
    gap = sum(float((found[n].double() - g.double()).square().sum()) for n, g in expected.items())
    size = sum(float(g.double().square().sum()) for g in expected.values())
    assert size > 0
    return (gap / size) ** 0.5

"""The work that speed is measured on: a network with its optimizer, rollouts of given lengths, GRPO updates.

Everything runs through the library as its recipes do: `Engine`, `Experience`, `training.step.update`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from upslope.devices.hardware import choose_dtype
from upslope.engine.engine import Engine
from upslope.functional.policy_losses import clipped_surrogate
from upslope.models.attention.context import BLOCK
from upslope.models.decoder.network import Decoder, DecoderConfig
from upslope.models.files.loading import load_model
from upslope.models.files.sources import resolve
from upslope.models.protocol import CausalModel
from upslope.training.experience import Experience
from upslope.training.optim import MasterAdamW, decay_groups
from upslope.training.step import Outputs, update
from upslope.types import Batch, Completion, Prompt, Reward, Rollout, RolloutGroup, SamplingParams

MODEL = "smollm2-135m"
MICRO_BATCH_TOKENS = 4096
LEARNING_RATE = 1e-6


def random_decoder(*, quick: bool = False, **changes: Any) -> Decoder:
    """SmolLM2-135M's shape (quick: two thin layers) with random weights."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "vocab_size": 512 if quick else 49152,
        "hidden_size": 64 if quick else 576,
        "intermediate_size": 128 if quick else 1536,
        "num_hidden_layers": 2 if quick else 30,
        "num_attention_heads": 4 if quick else 9,
        "num_key_value_heads": 2 if quick else 3,
        "head_dim": 16 if quick else 64,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    }
    return Decoder(DecoderConfig(**{**shape, **changes}))


def network(*, quick: bool = False) -> CausalModel:
    """SmolLM2-135M (quick: a small random decoder) in float32."""
    return random_decoder(quick=True) if quick else load_model(resolve(MODEL))


@dataclass(slots=True)
class Learner:
    """A network that computes in the machine's dtype, and AdamW on its float32 masters."""

    model: CausalModel
    optimizer: MasterAdamW
    micro_batch_tokens: int = MICRO_BATCH_TOKENS

    @classmethod
    def of(cls, model: CausalModel, *, dtype: torch.dtype | None = None, device: str = "cpu") -> Learner:
        """Take over a float32 network; dtype None: what `--dtype auto` chooses."""
        dtype = choose_dtype("auto", device)[0] if dtype is None else dtype
        model = model.to(device)
        masters = {name: p.detach() for name, p in model.named_parameters()} if dtype != torch.float32 else {}
        model.to(dtype)
        return cls(model, MasterAdamW(decay_groups(model.named_parameters(), weight_decay=0.0), masters=masters))

    def update(self, experience: Experience) -> None:
        """One optimizer step on all of it: micro-batches, forward, backward, clipping, AdamW."""
        self.model.train()
        batches, _ = experience.batches(range(experience.size), self.micro_batch_tokens, device=self.model.device)
        update(self.model, self.optimizer, batches, surrogate, learning_rate=LEARNING_RATE, max_grad_norm=1.0)


def surrogate(batch: Batch, out: Outputs) -> tuple[Tensor, Mapping[str, Tensor]]:
    """GRPO's clipped loss without a reference."""
    f = batch.fields
    return clipped_surrogate(out.logp_N, f["old_logprobs"], f["advantages"], clip_low=0.2, clip_high=0.2), {}


@dataclass(slots=True)
class Task:
    """Random prompts, and how many tokens each of their completions gets; nothing ends one early.

    lengths[p][g]: tokens of sample g of prompt p. Equal lengths go to the engine as one request of G samples, unequal
    ones (and all, with one_by_one) as a request per sample.
    """

    prompts: list[list[int]]
    lengths: list[list[int]]
    one_by_one: bool = False
    _step: int = field(default=0, repr=False)

    @classmethod
    def random(
        cls,
        vocabulary: int,
        prompt_lengths: Sequence[int],
        lengths: Sequence[Sequence[int]],
        *,
        one_by_one: bool = False,
    ) -> Task:
        """Prompts of random tokens."""
        generator = torch.Generator().manual_seed(0)
        prompts = [torch.randint(3, vocabulary, (n,), generator=generator).tolist() for n in prompt_lengths]
        return cls(prompts, [list(each) for each in lengths], one_by_one)

    @property
    def tokens(self) -> int:
        """Prompt tokens of every sequence and generated ones: what a user counts."""
        return sum(len(p) * len(each) + sum(each) for p, each in zip(self.prompts, self.lengths, strict=True))

    def engine(self, model: CausalModel) -> Engine:
        """An engine that holds all sequences at once, a block each in reserve so that none has to wait."""
        blocks = sum(
            1 + -(-(len(p) + n + 1) // BLOCK) for p, each in zip(self.prompts, self.lengths, strict=True) for n in each
        )
        return Engine(model, max_batch=sum(map(len, self.lengths)), num_blocks=blocks)

    def rollout(self, engine: Engine) -> list[RolloutGroup]:
        """Sample with the weights as they are; nothing is left in the cache from the weights before."""
        engine.model.eval()
        engine.set_version(engine.version + 1)
        self._step += 1
        ids = {}
        for p, (prompt, lengths) in enumerate(zip(self.prompts, self.lengths, strict=True)):
            equal = len(set(lengths)) == 1 and not self.one_by_one
            for g, n in enumerate(lengths[:1] if equal else lengths):
                params = SamplingParams(max_tokens=n, n=len(lengths) if equal else 1, ignore_eos=True, seed=self._step)
                ids[engine.add(prompt, params, key=p, sample=g)] = (p, g)
        found: dict[tuple[int, int], Completion] = {}
        while engine.busy:
            for event in engine.step():
                if event.error is not None:
                    raise event.error
                if event.completion is not None:
                    p, g = ids[event.request_id]
                    found[p, g + event.sample] = event.completion
        return [
            RolloutGroup(Prompt(p, text=""), [_judged(prompt, found[p, g], g) for g in range(len(self.lengths[p]))])
            for p, prompt in enumerate(self.prompts)
        ]


def _judged(prompt: list[int], completion: Completion, sample: int) -> Rollout:
    rollout = Rollout.from_completion(prompt, completion, sample)
    rollout.reward = Reward(float(sample))
    return rollout


def experience(groups: Sequence[RolloutGroup], *, old_logprobs: Tensor | None = None) -> Experience:
    """What GRPO's update eats: advantages drawn at random, so that no token is without gradient.

    old_logprobs None: the rollout's own, which on a CPU are the trainer's.
    """
    made = Experience.of(groups)
    generator = torch.Generator().manual_seed(0)
    made.old_logprobs = made.policy_logprobs if old_logprobs is None else old_logprobs
    made.advantages = made.per_sequence(torch.randn(made.size, generator=generator))
    made.set_weights(range(made.size), "token")
    return made


def spread_lengths(low: int, high: int, count: int) -> list[int]:
    """`count` whole numbers spread evenly over [low, high]."""
    return [round(low + (high - low) * i / max(1, count - 1)) for i in range(count)]

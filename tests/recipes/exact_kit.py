"""Exact expectations through whole training steps, in float64.

A policy whose probabilities are fractions of four, and the batch that holds every completion as often as its
probability says: over it a mean is an expectation, and a step's gradient must be that of the exact objective. The
policy is a real decoder whose blocks add nothing yet: what comes next depends on the token before it, through an
output matrix that is the logarithm of a table.

Shapes: S different completions, T tokens of the longest, B completions in the batch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, get_type_hints

import torch
from tiny_model import tiny_folder
from torch import Tensor

from upslope.build import load_policy
from upslope.loop.sampler import Sampled
from upslope.models.attention.context import PackedContext
from upslope.models.protocol import CausalModel, ScalarHead
from upslope.training.optim import MasterAdamW
from upslope.types import Prompt, Reward, Rollout, RolloutGroup

EOS, A, B = 1, 66, 67
PROMPTS = ((40, 41), (42, 43, 44))
"""Two prompts of different length; each begins its completions with a distribution of its own."""
LENGTH = 3
"""The budget in tokens: a completion ends with EOS or is cut there."""
STATES = (PROMPTS[0][-1], PROMPTS[1][-1], EOS, A, B)
ACTIONS = (EOS, A, B)

BATCH = len(PROMPTS) * 4**LENGTH
"""B: as many completions as make every probability a whole number of them."""

Table = Mapping[int, tuple[int, int, int]]
"""For each token that can come before: the quarters of probability of EOS, A and B after it."""
TABLE: Table = {41: (1, 2, 1), 44: (1, 1, 2), A: (2, 1, 1), B: (1, 1, 2), EOS: (2, 1, 1)}
OTHER: Table = {41: (2, 1, 1), 44: (1, 2, 1), A: (1, 1, 2), B: (2, 1, 1), EOS: (1, 1, 2)}
"""Other weights: of a reference model, or of the sampler some updates ago."""
NEVER = -2000.0
"""A logit so low that its probability is 0, whatever the arithmetic."""


@contextmanager
def float64() -> Iterator[None]:
    """Make float64 the default, so that nothing in a step is rounded to float32."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def table_folder(path: Path) -> Path:
    """A model folder with room for the table; `tabulate` fills it in."""
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    return tiny_folder(path, **shape, num_key_value_heads=1, head_dim=4, tie_word_embeddings=False, rms_norm_eps=0.0)


def tabulate(model: CausalModel, table: Table, *, temperature: float = 1.0) -> CausalModel:
    """Give the decoder, in float64, exactly the table's distributions, sampled at this temperature."""
    model.double()
    named = dict(model.named_parameters())
    with torch.no_grad():
        for name, weight in named.items():
            if ("o_proj" in name or "down_proj" in name) and "lora" not in name:
                weight.zero_()
        embedding, head = named["model.embed_tokens.weight"], named["lm_head.weight"]
        embedding.fill_(1.0)  # of tokens outside the table: any one state
        head.fill_(0.0)
        for place, state in enumerate(STATES):
            embedding[state] = torch.eye(8)[place]
            column = torch.full((len(head),), NEVER)
            column[list(ACTIONS)] = torch.tensor(table[state], dtype=torch.float64).div(4).log()
            head[:, place] = temperature * column / math.sqrt(8)  # the norm makes sqrt(8) of a one
    return model


def completions() -> list[tuple[int, ...]]:
    """All S of them."""
    found: list[tuple[int, ...]] = []
    for tokens in itertools.product(ACTIONS, repeat=LENGTH):
        end = tokens.index(EOS) + 1 if EOS in tokens else LENGTH
        if tokens[:end] not in found:
            found.append(tokens[:end])
    return found


def probability(table: Table, prompt: Sequence[int], tokens: Sequence[int]) -> Fraction:
    """The exact probability of one completion."""
    chain = [prompt[-1], *tokens]
    p = Fraction(1)
    for before, token in itertools.pairwise(chain):
        p *= Fraction(table[before][ACTIONS.index(token)], 4)
    return p


def rewards_of(seed: int = 0) -> dict[tuple[int, tuple[int, ...]], float]:
    """A reward for each (prompt, completion)."""
    draw = torch.Generator().manual_seed(seed)
    keys = [(g, tokens) for g in range(len(PROMPTS)) for tokens in completions()]
    values = torch.randn(len(keys), generator=draw, dtype=torch.float64)
    return dict(zip(keys, values.tolist(), strict=True))


def logps(table: Table, prompt: Sequence[int], tokens: Sequence[int]) -> list[float]:
    """The log-prob of each token of a completion."""
    chain = itertools.pairwise([prompt[-1], *tokens])
    return [math.log(table[before][ACTIONS.index(token)] / 4) for before, token in chain]


def sampled(
    rewards: Mapping[tuple[int, tuple[int, ...]], float],
    *,
    table: Table = TABLE,
    policy: Table | None = None,
    steps: Mapping[tuple[int, tuple[int, ...]], list[tuple[int, float]]] | None = None,
) -> list[RolloutGroup]:
    """The batch whose frequencies are the table's probabilities: 64 completions of each prompt.

    policy: the table of the policy itself, where it was sampled through a filter; steps: rewards of single tokens.
    """
    groups = []
    for g, prompt in enumerate(PROMPTS):
        rollouts: list[Rollout] = []
        for tokens in completions():
            times = probability(table, prompt, tokens) * 4**LENGTH
            assert times.denominator == 1
            for _ in range(int(times)):
                rollouts.append(
                    Rollout(
                        prompt_tokens=list(prompt),
                        tokens=list(tokens),
                        mask=[True] * len(tokens),
                        policy_logprobs=logps(policy or table, prompt, tokens),
                        sampling_logprobs=logps(table, prompt, tokens),
                        finish_reason="stop" if tokens[-1] == EOS else "length",
                        text="",
                        sample=len(rollouts),
                        reward=Reward(value=rewards[g, tokens], steps=(steps or {}).get((g, tokens), [])),
                    )
                )
        groups.append(RolloutGroup(Prompt(key=g, text=str(g)), rollouts))
    return groups


def learner_of(make: Any, folder: Path, *, temperature: float = 1.0, **options: Any) -> Any:
    """A recipe's learner over the table policy. Its reference model and its critic have tables of their own."""
    kind = get_type_hints(make)["options"]
    common: dict[str, Any] = {"num_train_prompts": 4, "num_prompts": len(PROMPTS), "num_generations": 4**LENGTH}
    common |= {"max_completion_length": LENGTH, "eval_samples": 0, "dtype": "float32", "activations_gb": 0.0}
    # float32 is what the weights are loaded in; `tabulate` then writes them anew in float64
    common |= {"learning_rate": 1e-2, "lr_scheduler_type": "constant", "micro_batch_tokens": 150}
    chosen = kind(model=str(folder), temperature=temperature, **common | options)
    chosen.validate()
    policy = load_policy(chosen)
    tabulate(policy.model, TABLE, temperature=temperature)
    learner = make(chosen, policy)
    if getattr(getattr(learner, "reference", None), "model", None) is not None:
        tabulate(learner.reference.model, OTHER, temperature=temperature)
    critic = network_of(learner)
    if critic is not None:
        draw = torch.Generator().manual_seed(1)
        critic.head.double()
        critic.head.score.weight.data = torch.randn(1, 8, generator=draw, dtype=torch.float64)
        critic.head.score.bias.data.fill_(0.25)
        if critic.model is not None:
            tabulate(critic.model, OTHER)
            states = critic.model.model.embed_tokens.weight  # it sees the same tokens, and not the policy's states
            states.data = states.data.roll(1, dims=1)
    return learner


def feed(learner: Any, groups: list[RolloutGroup], greedy: Sequence[RolloutGroup] = ()) -> None:
    """Let every step of the learner train on these rollouts."""
    learner.sampler.next = lambda step: Sampled(groups, {"seconds/rollout": 0.0}, list(greedy))


def estimated(learner: Any, groups: list[RolloutGroup], greedy: Sequence[RolloutGroup] = ()) -> tuple[Any, Any]:
    """The experience that a step makes of these rollouts, and its metrics; nothing is updated."""
    feed(learner, groups, greedy)
    learner.updater.update_on = lambda *_, **__: {}
    if hasattr(learner, "critic"):
        learner.critic.update = lambda *_: {}
    learner.finish = lambda step, groups, x, metrics, started: (x, metrics)
    return learner.step(0)


def network_of(learner: Any) -> Any:
    """The learner's critic as `build.load_critic` made it, or None."""
    return getattr(getattr(learner, "critic", None), "network", None)


@dataclass
class Taken:
    """One optimizer step: the weights before it, the gradient it was made of, and its rate."""

    weights: dict[str, Tensor]
    gradients: dict[str, Tensor]
    learning_rate: float


def stepped(learner: Any, groups: list[RolloutGroup], *, steps: int = 1, **more: Any) -> tuple[list[Taken], list[Any]]:
    """The policy's optimizer steps and the metrics of the first steps of a run on these rollouts."""
    feed(learner, groups, **more)
    taken = watch(learner.optimizer)
    return taken, [learner.step(step).metrics for step in range(steps)]


def watch(optimizer: MasterAdamW) -> list[Taken]:
    """Every step the optimizer makes from now on."""
    steps: list[Taken] = []
    original = optimizer.step

    def step(learning_rate: float, *, max_norm: float) -> float:
        weights = {name: w.clone() for name, w in optimizer.weights().items()}
        gradients = {name: g.clone() for name, g in optimizer.gradients().items()}
        steps.append(Taken(weights, gradients, learning_rate))
        return original(learning_rate, max_norm=max_norm)

    optimizer.step = step  # type: ignore[method-assign]
    return steps


@dataclass
class Exact:
    """Each completion once, as a model sees it, whole and unshared, and differentiable.

    logp_ST, mask_ST: of each completion; weight_S: its probability under the table that sampled, the prompts equally
    likely; logits_STV: what each of its tokens was chosen from; hidden_STD: where a value is read; finals_SD: after it.
    """

    keys: list[tuple[int, tuple[int, ...]]]
    logp_ST: Tensor
    mask_ST: Tensor
    weight_S: Tensor
    logits_STV: Tensor
    hidden_STD: Tensor
    finals_SD: Tensor
    cut_S: Tensor
    lengths_S: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.lengths_S = self.mask_ST.sum(1)

    def of(self, values: Mapping[tuple[int, tuple[int, ...]], float]) -> Tensor:
        """A number for each completion as [S]."""
        return torch.tensor([values[key] for key in self.keys], dtype=torch.float64)

    def logps(self, table: Table) -> Tensor:
        """What other weights say of each token, [S, T]."""
        rows = [torch.tensor(logps(table, PROMPTS[g], tokens)) for g, tokens in self.keys]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)

    def importance(self, table: Table, level: str, cap: float) -> Tensor:
        """min(cap, pi / mu), mu the table that sampled: of a token, of all tokens, of their geometric mean [S, T]."""
        log_ratio = (self.logp_ST.detach() - self.logps(table)) * self.mask_ST
        if level == "sequence":
            log_ratio = log_ratio.sum(1, keepdim=True).expand(self.mask_ST.shape)
        if level == "geometric":
            log_ratio = (log_ratio.sum(1) / self.lengths_S)[:, None].expand(self.mask_ST.shape)
        return log_ratio.exp().clamp(max=cap)

    def expected(self, x_S: Tensor) -> Tensor:
        """The mean over the batch of something that each completion has."""
        return (self.weight_S * x_S).sum()

    def token_mean(self, x_ST: Tensor, counted_S: Tensor | None = None) -> Tensor:
        """The mean over the batch's tokens."""
        weight_S = self.weight_S if counted_S is None else self.weight_S * counted_S
        mask_ST = self.mask_ST.double()
        return (weight_S[:, None] * x_ST * mask_ST).sum() / (weight_S[:, None] * mask_ST).sum()

    def sequence_mean(self, x_ST: Tensor) -> Tensor:
        """The mean over completions of the mean over their tokens."""
        return self.expected((x_ST * self.mask_ST).sum(1) / self.lengths_S)

    def to_go(self, r_ST: Tensor, gamma: float = 1.0) -> Tensor:
        """sum_{k >= t} gamma^(k - t) r_k, by its definition."""
        T = r_ST.shape[1]
        k, t = torch.arange(T)[None, :], torch.arange(T)[:, None]
        powers = torch.where(k >= t, gamma ** (k - t).clamp(min=0).double(), 0.0)
        return (r_ST * self.mask_ST) @ powers.T

    def gae(self, r_ST: Tensor, v_ST: Tensor, *, gamma: float, lam: float, after_S: Tensor | float = 0.0) -> Tensor:
        """sum_{k >= t} (gamma lam)^(k - t) (r_k + gamma V_{k + 1} - V_k); after_S: V after the last token."""
        following_ST = torch.cat([v_ST[:, 1:], torch.zeros(len(v_ST), 1)], 1)
        last_ST = self.last(torch.ones(len(v_ST))) > 0
        following_ST = torch.where(last_ST, torch.as_tensor(after_S).view(-1, 1), following_ST)
        return self.to_go(r_ST + gamma * following_ST - v_ST, gamma * lam)

    def whitened(self, x_ST: Tensor) -> Tensor:
        """Mean 0 and variance 1 (Bessel's) over the tokens of the batch."""
        n_ST = self.weight_S[:, None] * BATCH * self.mask_ST
        mean = (n_ST * x_ST).sum() / n_ST.sum()
        variance = (n_ST * (x_ST - mean) ** 2).sum() / (n_ST.sum() - 1)
        return (x_ST - mean) / (variance + 1e-8).sqrt()

    def entropies(self) -> Tensor:
        """Of the distribution each token was chosen from, [S, T]."""
        logp = torch.log_softmax(self.logits_STV, -1)
        return -(logp.exp() * logp).sum(-1)

    def divergences(self, other: Exact) -> Tensor:
        """KL(this || other) of the distributions each token was chosen from, [S, T]."""
        p, q = torch.log_softmax(self.logits_STV, -1), torch.log_softmax(other.logits_STV, -1).detach()
        return (p.exp() * (p - q)).sum(-1)

    def values(self, head: ScalarHead) -> tuple[Tensor, Tensor]:
        """What a head says of the states [S, T], and of those after the last tokens [S]."""
        w, b = head.score.weight[0], head.score.bias
        return self.hidden_STD @ w + b, self.finals_SD @ w + b

    def last(self, x_S: Tensor) -> Tensor:
        """A number of each completion put at its last token, [S, T]."""
        out = torch.zeros(self.mask_ST.shape, dtype=torch.float64)
        out[torch.arange(len(x_S)), self.lengths_S - 1] = x_S
        return out


def exact(model: CausalModel, *, table: Table = TABLE, temperature: float = 1.0) -> Exact:
    """Everything a step's objective can be written in, differentiable in the model's parameters."""
    keys = [(g, tokens) for g in range(len(PROMPTS)) for tokens in completions()]
    rows = [torch.tensor([*PROMPTS[g], *tokens]) for g, tokens in keys]
    hidden = model(torch.cat(rows), PackedContext([len(row) for row in rows])).split([len(row) for row in rows])
    columns = []
    for (g, tokens), hidden_TD in zip(keys, hidden, strict=True):
        states = hidden_TD[len(PROMPTS[g]) - 1 :][: len(tokens)]
        logits = states @ model.head_weight.T / temperature
        logp = torch.log_softmax(logits, -1)[torch.arange(len(tokens)), torch.tensor(tokens)]
        columns.append((logp, logits, states, hidden_TD[-1]))

    def padded(place: int) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence([c[place] for c in columns], batch_first=True)

    lengths = torch.tensor([len(tokens) for _, tokens in keys])
    return Exact(
        keys=keys,
        logp_ST=padded(0),
        mask_ST=torch.arange(int(lengths.max())) < lengths[:, None],
        weight_S=torch.tensor([float(probability(table, PROMPTS[g], tokens)) / len(PROMPTS) for g, tokens in keys]),
        logits_STV=padded(1),
        hidden_STD=padded(2),
        finals_SD=torch.stack([c[3] for c in columns]),
        cut_S=torch.tensor([tokens[-1] != EOS for _, tokens in keys]),
    )


@contextmanager
def at(model: torch.nn.Module, taken: Taken, prefix: str = "") -> Iterator[None]:
    """The model with the weights it had before a step."""
    named = {f"{prefix}{name}": p for name, p in model.named_parameters()}
    with torch.no_grad():
        now = {name: p.clone() for name, p in named.items()}
        for name, p in named.items():
            if name in taken.weights:
                p.copy_(taken.weights[name])
    try:
        yield
    finally:
        with torch.no_grad():
            for name, p in named.items():
                p.copy_(now[name])


@contextmanager
def before(
    learner: Any, taken: Taken, *, table: Table = TABLE, temperature: float = 1.0
) -> Iterator[tuple[Exact, dict[str, torch.nn.Parameter]]]:
    """What the policy said before an optimizer step; its parameters, and those of a head that shares its trunk."""
    model, critic = learner.policy.model, network_of(learner)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with ExitStack() as stack:
        stack.enter_context(at(model, taken))
        if critic is not None and critic.model is None:
            stack.enter_context(at(critic.head, taken, "critic."))
            named |= {f"critic.{name}": p for name, p in critic.head.named_parameters()}
        yield exact(model, table=table, temperature=temperature), named


@contextmanager
def critic_before(learner: Any, taken: Taken) -> Iterator[tuple[Exact, dict[str, torch.nn.Parameter]]]:
    """What a critic that stands apart saw before one of its own steps, and its parameters."""
    critic = learner.critic.network
    with at(critic.model, taken, "critic."), at(critic.head, taken, "critic."):
        yield exact(critic.model), critic.named_parameters()


def assert_gradient(
    taken: Taken, loss: Tensor, named: Mapping[str, torch.nn.Parameter], *, tolerance: float = 1e-9
) -> None:
    """The step's gradient is that of `loss` in every parameter, and not zero altogether."""
    wanted = torch.autograd.grad(loss, list(named.values()), retain_graph=True, allow_unused=True)
    largest = max(float(g.abs().max()) for g in wanted if g is not None)
    assert largest > 1e-6, "this objective has no gradient: the test would say nothing"
    for name, g in zip(named, wanted, strict=True):
        found = taken.gradients.get(name)
        expected = torch.zeros_like(named[name]) if g is None else g
        found = torch.zeros_like(expected) if found is None else found
        gap = float((found - expected).abs().max())
        assert gap <= tolerance * largest, f"{name}: off by {gap:.3g}, the largest gradient is {largest:.3g}"

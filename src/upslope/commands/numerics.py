"""`upslope doctor --numerics`: the product's own checks, run on the user's machine with the user's torch.

Of the formulas: gradients by finite differences, estimators against their definitions, in float64. Of one small random
network: sampler against trainer, invariances of engine and update, resume.
"""

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from upslope.data.batching import PromptStream, collate, split_by_tokens
from upslope.engine.engine import Engine
from upslope.functional import kl, logprobs, policy_losses, returns, supervised_losses
from upslope.functional.supervised_losses import nll
from upslope.models.decoder.network import Decoder, DecoderConfig
from upslope.training import checkpoint
from upslope.training.optim import MasterAdamW, decay_groups
from upslope.training.step import Outputs, accumulate, score, update
from upslope.types import Batch, Completion, Example, SamplingParams


class Finding(NamedTuple):
    """Whether a check holds, and the figure that says so."""

    passed: bool
    detail: str


CheckFunction = Callable[[], Finding]


def at_most(value: float, bound: float, what: str) -> Finding:
    """Passed when `value` (NaN never is) does not exceed `bound`."""
    return Finding(value <= bound, f"{what} {value:.2g} (at most {bound:.2g})")


STEP = 1e-6


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def _logp(*shape: int) -> Tensor:
    """Log-probs well below 0, where no clip of a loss has its kink."""
    return -0.3 - torch.rand(*shape, dtype=torch.float64)


def _gradient(function: Callable[..., Tensor], *inputs: Callable[[], Tensor]) -> Finding:
    """Autograd's gradient in the first input against central differences, of a random weighting of the outputs."""
    x, *others = (make() for make in inputs)
    x.requires_grad_(True)
    weights = torch.randn_like(function(x, *others).detach())
    (exact,) = torch.autograd.grad((function(x, *others) * weights).sum(), x)
    measured = torch.zeros_like(exact)
    with torch.no_grad():
        flat, out = x.view(-1), measured.view(-1)
        for i in range(flat.numel()):
            for sign in (1.0, -1.0):
                flat[i] += sign * STEP
                out[i] += sign * float((function(x, *others) * weights).sum()) / (2 * STEP)
                flat[i] -= sign * STEP
    gap = float((exact - measured).abs().max() / measured.abs().max().clamp(min=1e-12))
    return at_most(gap, 1e-6, "relative gap to finite differences")


LOGP = partial(_logp, 6)
REAL = partial(_random, 6)
ROWS = partial(_random, 6, 5)
HIDDEN = partial(_random, 6, 4)

GRADIENTS: dict[str, tuple[Callable[..., Tensor], tuple[Callable[[], Tensor], ...]]] = {
    "token_logprobs": (logprobs.token_logprobs, (partial(_random, 2, 3, 5), partial(torch.randint, 5, (2, 3)))),
    "entropy": (logprobs.entropy, (ROWS,)),
    "linear_token_logprobs": (
        partial(logprobs.linear_token_logprobs, chunk=4, temperature=0.7),
        (HIDDEN, partial(_random, 5, 4), partial(torch.randint, 5, (6,))),
    ),
    "nll": (supervised_losses.nll, (LOGP,)),
    "value_loss": (supervised_losses.value_loss, (REAL, REAL)),
    "bradley_terry": (partial(supervised_losses.bradley_terry, margin=0.1, centering=0.01), (REAL, REAL)),
    "dpo": (partial(supervised_losses.dpo, beta=0.5, label_smoothing=0.1), (LOGP, LOGP, LOGP, LOGP)),
    "ipo": (partial(supervised_losses.ipo, beta=0.5), (LOGP, LOGP, LOGP, LOGP)),
    "orpo": (partial(supervised_losses.orpo, lam=0.5), (LOGP, LOGP)),
    "simpo": (partial(supervised_losses.simpo, beta=2.0, margin=0.5), (LOGP, LOGP)),
    "minimum_risk": (
        partial(supervised_losses.minimum_risk, alpha=0.5),
        (partial(_logp, 2, 4), partial(_random, 2, 4)),
    ),
    "divergence": (partial(supervised_losses.divergence, kind="jsd", weight=0.3), (ROWS, ROWS)),
    "classification_policy_gradient": (supervised_losses.classification_policy_gradient, (ROWS, ROWS)),
    "categorical_kl": (kl.categorical_kl, (ROWS, ROWS)),
    "k3": (kl.k3, (LOGP, LOGP)),
    "reinforce": (policy_losses.reinforce, (LOGP, REAL)),
    "clipped_surrogate": (partial(policy_losses.clipped_surrogate, clip_low=0.2, clip_high=0.3), (LOGP, LOGP, REAL)),
}
"""Functions whose gradient is the derivative of their value; those with a stopped gradient are in the test suite."""


def gae_by_definition() -> Finding:
    """A_t = sum_l (gamma lam)^l delta_{t+l} over the unmasked tokens, with and without a bootstrap value."""
    gamma, lam, worst = 0.97, 0.9, 0.0
    rewards_BT, values_BT, bootstrap_B = _random(5, 9), _random(5, 9), _random(5)
    mask_BT = torch.rand(5, 9) > 0.3
    for bootstrap in (None, bootstrap_B):
        found_BT = returns.gae(rewards_BT, values_BT, mask_BT, gamma=gamma, lam=lam, bootstrap_B=bootstrap)
        for b in range(5):
            steps = mask_BT[b].nonzero().flatten().tolist()
            values = [float(values_BT[b, t]) for t in steps] + [float(bootstrap_B[b]) if bootstrap is not None else 0.0]
            deltas = [float(rewards_BT[b, t]) + gamma * values[i + 1] - values[i] for i, t in enumerate(steps)]
            for i, t in enumerate(steps):
                expected = sum((gamma * lam) ** (j - i) * deltas[j] for j in range(i, len(steps)))
                worst = max(worst, abs(expected - float(found_BT[b, t])))
        worst = max(worst, float(found_BT[~mask_BT].abs().max()))
    return at_most(worst, 1e-12, "largest gap")


def masked_values_do_nothing() -> Finding:
    """NaN at masked positions changes no advantage."""
    rewards_BT, values_BT = _random(4, 7), _random(4, 7)
    mask_BT = torch.rand(4, 7) > 0.4
    clean = returns.gae(rewards_BT, values_BT, mask_BT, gamma=0.9, lam=0.8)
    nan = torch.full_like(rewards_BT, float("nan"))
    dirty = returns.gae(
        torch.where(mask_BT, rewards_BT, nan), torch.where(mask_BT, values_BT, nan), mask_BT, gamma=0.9, lam=0.8
    )
    return Finding(torch.equal(clean, dirty), f"{int((clean != dirty).sum())} of {clean.numel()} advantages differ")


VOCABULARY = 97
DTYPES = (torch.float32, torch.bfloat16)


def _network(dtype: torch.dtype) -> Decoder:
    """Grouped heads, a width that is no multiple of a vector register, distributions far from uniform."""
    torch.manual_seed(7)
    config = DecoderConfig(
        vocab_size=VOCABULARY,
        hidden_size=72,
        intermediate_size=67,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=16,
        initializer_range=0.3,
        tie_word_embeddings=True,
    )
    return Decoder(config).to(dtype)


def _prompts(count: int = 5) -> list[list[int]]:
    """Prompts of 3 to 130 tokens: within a cache block, across one, across two."""
    return [torch.randint(VOCABULARY, (length,)).tolist() for length in [3, 130, 17, 64, 70, 9][:count]]


def _generate(model: Decoder, prompts: Sequence[list[int]], keys: Sequence[int], blocks: int = 64) -> list[Completion]:
    engine = Engine(model, num_blocks=blocks, max_batch=32)
    params = SamplingParams(max_tokens=16, n=2, seed=11)
    return [one for group in engine.generate(list(prompts), params, keys=list(keys)) for one in group]


def _same(a: Sequence[Completion], b: Sequence[Completion]) -> tuple[int, int]:
    """(completions that differ in a token or in a bit of a log-prob, completions)."""
    pairs = list(zip(a, b, strict=True))
    return sum(x.tokens != y.tokens or x.policy_logprobs != y.policy_logprobs for x, y in pairs), len(pairs)


def _differing(count: int, total: int, what: str) -> Finding:
    return Finding(count == 0, f"{count} of {total} {what} differ")


def sampler_is_trainer() -> Finding:
    """Log-probs of sampled tokens equal the trainer's of a packed forward, bit for bit."""
    differing = total = 0
    largest = 0.0
    for dtype in DTYPES:
        model, prompts = _network(dtype), _prompts()
        completions = _generate(model, prompts, range(len(prompts)))
        owners = [prompt for prompt in prompts for _ in range(2)]
        pairs = zip(owners, completions, strict=True)
        examples = [Example(p + c.tokens, [False] * len(p) + [True] * len(c.tokens)) for p, c in pairs]
        sampled = torch.tensor([x for one in completions for x in one.policy_logprobs])
        scored = score(model, [collate(examples)]).logp_N
        assert scored is not None
        gap = (scored.float() - sampled).abs()
        differing, total = differing + int((gap != 0).sum()), total + gap.numel()
        largest = max(largest, float(gap.max()))
    found = _differing(differing, total, "tokens")
    return Finding(found.passed, f"{found.detail}, largest gap {largest:.2g} (float32 and bfloat16)")


def batch_does_not_matter() -> Finding:
    """A request gives the same tokens and log-probs alone and among others."""
    differing = total = 0
    for dtype in DTYPES:
        model, prompts = _network(dtype), _prompts()
        together = _generate(model, prompts, range(len(prompts)))
        alone = [one for key, prompt in enumerate(prompts) for one in _generate(model, [prompt], [key])]
        counts = _same(together, alone)
        differing, total = differing + counts[0], total + counts[1]
    return _differing(differing, total, "completions")


def cache_does_not_matter() -> Finding:
    """Preemption and recomputation under a cache that is too small change nothing."""
    model, prompts = _network(torch.float32), _prompts()
    roomy = _generate(model, prompts, range(len(prompts)))
    tight = _generate(model, prompts, range(len(prompts)), blocks=5)
    return _differing(*_same(roomy, tight), "completions")


def packing_does_not_matter() -> Finding:
    """Log-probs of sequences scored in one pack equal those scored one by one, bit for bit."""
    differing = total = 0
    for dtype in DTYPES:
        model = _network(dtype)
        examples = [Example(tokens, [False] + [True] * (len(tokens) - 1)) for tokens in _prompts()]
        packed = score(model, [collate(examples)]).logp_N
        single = score(model, [collate([example]) for example in examples]).logp_N
        assert packed is not None
        assert single is not None
        differing, total = differing + int((packed != single).sum()), total + packed.numel()
    return _differing(differing, total, "tokens")


def _weighted(examples: Sequence[Example]) -> list[Example]:
    trained = sum(sum(example.mask) for example in examples)
    return [Example(e.tokens, e.mask, {"weight": torch.full((sum(e.mask),), 1 / trained)}) for e in examples]


def _loss(batch: Batch, out: Outputs) -> tuple[Tensor, Mapping[str, Tensor]]:
    return nll(out.logp_N), {}


def _step_gradient(dtype: torch.dtype, parts: Sequence[Sequence[Example]]) -> Tensor:
    model = _network(dtype)
    accumulate(model, [collate(part) for part in parts], _loss)
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def splitting_does_not_matter() -> Finding:
    """The gradient of a step is the same for every micro-batch split and order."""
    examples = _weighted([Example(tokens, [False] + [True] * (len(tokens) - 1)) for tokens in _prompts(6)])
    whole = _step_gradient(torch.float32, [examples])
    lengths = [len(example.tokens) for example in examples]
    worst = 0.0
    for budget in (130, 200):
        parts = [[examples[i] for i in part] for part in split_by_tokens(lengths, budget)]
        for ordered in (parts, parts[::-1]):
            worst = max(worst, float((_step_gradient(torch.float32, ordered) - whole).norm() / whole.norm()))
    return at_most(worst, 1e-6, "relative gap")


class _Trainer:
    """A few supervised steps with everything a checkpoint must carry."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.model = _network(dtype)
        self.optimizer = MasterAdamW(decay_groups(self.model.named_parameters(), weight_decay=0.01))
        generator = torch.Generator().manual_seed(3)
        rows = [torch.randint(VOCABULARY, (12,), generator=generator).tolist() for _ in range(10)]
        self.rows = [Example(row, [False] + [True] * 11) for row in rows]
        self.order = PromptStream(len(self.rows), seed=5)

    def train(self, steps: int) -> None:
        for _ in range(steps):
            batch = collate(_weighted([self.rows[i] for i in self.order.take(4)]))
            update(self.model, self.optimizer, [batch], _loss, learning_rate=1e-2, max_grad_norm=1.0)

    def save(self, folder: Path) -> Path:
        tensors = {"weights": self.optimizer.weights(), "optimizer": self.optimizer.state()}
        return checkpoint.save(folder, 2, tensors=tensors, state={"order": self.order.state_dict()})

    def load(self, path: Path) -> None:
        tensors, state = checkpoint.load(path)
        self.optimizer.load(tensors["weights"], tensors["optimizer"])
        self.order.load_state_dict(state["order"])

    def everything(self) -> dict[str, Tensor]:
        return {**self.optimizer.weights(), **self.optimizer.state()}


def resume_is_exact() -> Finding:
    """Two steps, a checkpoint, two more in a fresh trainer: the same bits as four steps without a stop."""
    differing = total = 0
    for dtype in DTYPES:
        straight, first, second = _Trainer(dtype), _Trainer(dtype), _Trainer(dtype)
        straight.train(4)
        first.train(2)
        with tempfile.TemporaryDirectory() as folder:
            second.load(first.save(Path(folder)))
        second.train(2)
        expected, found = straight.everything(), second.everything()
        differing += sum(not torch.equal(expected[name], found[name]) for name in expected)
        total += len(expected)
    return _differing(differing, total, "tensors")


NETWORK_CHECKS: dict[str, CheckFunction] = {
    "sampler against trainer": sampler_is_trainer,
    "batch invariance": batch_does_not_matter,
    "cache invariance": cache_does_not_matter,
    "packing invariance": packing_does_not_matter,
    "micro-batch invariance": splitting_does_not_matter,
    "resume equality": resume_is_exact,
}
CHECKS: dict[str, CheckFunction] = {
    **{f"gradient of {name}": partial(_gradient, function, *inputs) for name, (function, inputs) in GRADIENTS.items()},
    "GAE against its definition": gae_by_definition,
    "NaN under the mask": masked_values_do_nothing,
    **NETWORK_CHECKS,
}
"""Every check by name, cheapest first."""


def run_checks(
    announce: Callable[[str], None] = lambda name: None, checks: dict[str, CheckFunction] | None = None
) -> dict[str, Any]:
    """{"passed": n, "failed": n, "checks": [{name, passed, detail, seconds}]}; a check that raises has failed.

    Takes some ten seconds on an idle machine. The global random state is left as it was.
    """
    outcomes: list[dict[str, Any]] = []
    with torch.random.fork_rng(devices=[]):
        for name, check in (CHECKS if checks is None else checks).items():
            announce(name)
            torch.manual_seed(0)
            start = time.perf_counter()
            try:
                finding = check()
            except Exception as error:  # the report is the boundary: whatever a check dies of is its finding
                finding = Finding(False, f"{type(error).__name__}: {' '.join(str(error).split())}")
            outcomes.append({"name": name, **finding._asdict(), "seconds": round(time.perf_counter() - start, 3)})
    passed = sum(outcome["passed"] for outcome in outcomes)
    return {"passed": passed, "failed": len(outcomes) - passed, "checks": outcomes}

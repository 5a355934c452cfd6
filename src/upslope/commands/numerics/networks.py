"""Checks of one small random network: sampler against trainer, invariances of engine and update, resume."""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from upslope.commands.numerics.result import CheckFunction, Finding, at_most
from upslope.data.batching import PromptStream, collate, split_by_tokens
from upslope.engine.engine import Engine
from upslope.functional.supervised_losses import nll
from upslope.models.decoder.network import Decoder, DecoderConfig
from upslope.training import checkpoint
from upslope.training.optim import MasterAdamW, decay_groups
from upslope.training.step import Outputs, accumulate, score, update
from upslope.types import Batch, Completion, Example, SamplingParams

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
    lengths = [3, 130, 17, 64, 70, 9][:count]
    return [torch.randint(VOCABULARY, (length,)).tolist() for length in lengths]


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
        examples = [_example(prompt, one) for prompt, one in zip(owners, completions, strict=True)]
        sampled = torch.tensor([x for one in completions for x in one.policy_logprobs])
        scored = score(model, [collate(examples)]).logp_N
        assert scored is not None
        gap = (scored.float() - sampled).abs()
        differing, total = differing + int((gap != 0).sum()), total + gap.numel()
        largest = max(largest, float(gap.max()))
    found = _differing(differing, total, "tokens")
    return Finding(found.passed, f"{found.detail}, largest gap {largest:.2g} (float32 and bfloat16)")


def _example(prompt: list[int], completion: Completion) -> Example:
    tokens = prompt + completion.tokens
    return Example(tokens, [False] * len(prompt) + [True] * len(completion.tokens))


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


def _gradient(dtype: torch.dtype, parts: Sequence[Sequence[Example]]) -> Tensor:
    model = _network(dtype)
    accumulate(model, [collate(part) for part in parts], _loss)
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def splitting_does_not_matter() -> Finding:
    """The gradient of a step is the same for every micro-batch split and order."""
    examples = _weighted([Example(tokens, [False] + [True] * (len(tokens) - 1)) for tokens in _prompts(6)])
    whole = _gradient(torch.float32, [examples])
    lengths = [len(example.tokens) for example in examples]
    worst = 0.0
    for budget in (130, 200):
        parts = [[examples[i] for i in part] for part in split_by_tokens(lengths, budget)]
        for ordered in (parts, parts[::-1]):
            gap = (_gradient(torch.float32, ordered) - whole).norm() / whole.norm()
            worst = max(worst, float(gap))
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

    def step(self) -> None:
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
        for _ in range(4):
            straight.step()
        with tempfile.TemporaryDirectory() as folder:
            for _ in range(2):
                first.step()
            second.load(first.save(Path(folder)))
        for _ in range(2):
            second.step()
        expected, found = straight.everything(), second.everything()
        differing += sum(not torch.equal(expected[name], found[name]) for name in expected)
        total += len(expected)
    return _differing(differing, total, "tensors")


CHECKS: dict[str, CheckFunction] = {
    "sampler against trainer": sampler_is_trainer,
    "batch invariance": batch_does_not_matter,
    "cache invariance": cache_does_not_matter,
    "packing invariance": packing_does_not_matter,
    "micro-batch invariance": splitting_does_not_matter,
    "resume equality": resume_is_exact,
}

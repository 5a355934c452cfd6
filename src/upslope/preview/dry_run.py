"""`--dry-run`: look at data, mask, shapes, memory and time before a run is paid for.

The data is really read and encoded, the model really loaded, and one small piece of the work really done; memory and
time are extrapolated from that.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from upslope.build import Policy, load_critic, load_policy, make_engine
from upslope.data.batching import collate
from upslope.data.chat import encode_prompt
from upslope.loop.kept import NO_DATA, DataAccount, within_context
from upslope.loop.plan import Plan, plan_of
from upslope.loop.prompts import Asked, ask
from upslope.loop.session import resident_memory_gb
from upslope.models.attention.context import BLOCK, KVCache
from upslope.models.decoder.activations import bytes_per_token
from upslope.models.heads import ScalarHead
from upslope.options import DistillOptions, GRPOOptions, PPOOptions, ReinforceOptions, RLOptions, RunOptions, SFTOptions
from upslope.preview.rows import mask_view, statistics
from upslope.preview.task import Judged, check_held_out, judge_one
from upslope.recipes.policy_gradient import judge_of, room_for_activations, samples_on_policy
from upslope.training.step import forward
from upslope.types import Completion, Example, SamplingParams

__all__ = ["Prediction", "predict_policy_gradient", "predict_sft", "show_policy_gradient", "show_sft"]


@dataclass(frozen=True, slots=True)
class Prediction:
    """Peak memory of the process (1e9 bytes), seconds of one training step, and of the whole run without evaluation."""

    memory_gb: float
    step_seconds: float
    run_seconds: float


@dataclass(frozen=True, slots=True)
class Probe:
    """What a small piece of work cost: seconds per token forward and backward, kept bytes per token."""

    train_seconds: float
    forward_seconds: float
    activation_bytes: float


def probe(policy: Policy, examples: Sequence[Example], *, head: ScalarHead | None, budget: int) -> Probe:
    """Time one forward and backward pass over a few real examples and count the bytes autograd keeps."""
    chosen: list[Example] = []
    for example in examples:
        if chosen and sum(len(e.tokens) for e in chosen) + len(example.tokens) > min(budget, 512):
            break
        chosen.append(example)
    batch = collate([Example(e.tokens, e.mask) for e in chosen], device=policy.model.device)
    tokens = sum(batch.lengths)
    with torch.no_grad():
        forward(policy.model, batch, head=head)
        started = time.perf_counter()
        forward(policy.model, batch, head=head)
        forward_seconds = time.perf_counter() - started
    times = []
    for _ in range(2):
        started = time.perf_counter()
        with counting_kept(policy.model) as kept:
            out = forward(policy.model, batch, head=head)
        assert out.logp_N is not None
        loss = out.logp_N.sum() if out.values_N is None else out.logp_N.sum() + out.values_N.sum()
        loss.backward()
        times.append(time.perf_counter() - started)
        policy.model.zero_grad(set_to_none=True)
        if head is not None:
            head.zero_grad(set_to_none=True)
    return Probe(min(times) / tokens, forward_seconds / tokens, sum(kept.values()) / tokens)


@contextmanager
def counting_kept(network: nn.Module) -> Iterator[dict[int, int]]:
    """Gives the bytes, by storage, of what autograd keeps for the backward pass besides the network's parameters."""
    kept: dict[int, int] = {}
    parameters = {p.untyped_storage().data_ptr() for p in network.parameters()}

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        yield kept


def weight_bytes(policy: Policy) -> float:
    """Bytes still to come for masters, gradients and moments of what is trained (the compute copy is loaded)."""
    trained = sum(p.numel() for p in policy.model.parameters() if p.requires_grad)
    return trained * (4 + 8)


def head_bytes(policy: Policy) -> float:
    """The head's chunk: logits, their softmax and gradient, and the gradient of its weight in float32."""
    spec = policy.model.spec
    return 256 * spec.vocab_size * 14 + spec.vocab_size * spec.hidden_size * 6


def update_memory_gb(policy: Policy, cost: Probe, tokens: float, *, more: float = 0.0) -> float:
    """What this process has now, all that an update of micro-batches of `tokens` needs, and `more` bytes."""
    needed = weight_bytes(policy) + head_bytes(policy) + tokens * cost.activation_bytes + more
    return resident_memory_gb() + needed / 1e9


def predict_sft(options: SFTOptions, policy: Policy, examples: Sequence[Example]) -> Prediction:
    """Memory and time of an sft run, from a probe on its own examples."""
    cost = probe(policy, examples, head=None, budget=options.micro_batch_tokens)
    mean = sum(len(e.tokens) for e in examples) / len(examples)
    per_step = mean * options.batch_size
    plan = plan_of(options, examples=len(examples))
    memory = update_memory_gb(policy, cost, min(options.micro_batch_tokens, per_step))
    step = per_step * cost.train_seconds + update_seconds(policy)
    return Prediction(memory, step, step * plan.optimizer_steps)


def predict_policy_gradient(
    options: RLOptions, policy: Policy, prompts: Sequence[Sequence[int]]
) -> tuple[Prediction, list[list[Completion]]]:
    """Memory and time of a ppo or grpo run, from a probe that samples a few completions and trains on them.

    Also these completions, of the first prompts.
    """
    choice = _critic_choice(options)
    critic = load_critic(policy, choice, options) if choice is not None else None
    shared = critic.head if critic is not None and critic.model is None else None
    loaded = resident_memory_gb()
    rollout_seconds, sampled = probe_sampling(options, policy, prompts)
    examples = sampled_examples(prompts, sampled)
    longest = max(map(len, prompts)) + options.max_completion_length
    plan = plan_of(options)
    cost = probe(policy, examples, head=shared, budget=options.micro_batch_tokens)
    prompt = sum(map(len, prompts)) / len(prompts)
    completion = sum(len(c.tokens) for group in sampled for c in group) / len(examples)
    # A prompt's tokens are computed once for all its completions.
    per_step = options.num_prompts * prompt + plan.sequences_per_step * completion
    kept = room_for_activations(options, policy, max(map(len, prompts)))
    own = kept is None and (shared is not None or not samples_on_policy(options, policy))
    scoring = own + bool(_kl_weight(options)) + (critic is not None and critic.model is not None)
    training = 1 + (critic is not None and critic.model is not None)
    step = (
        rollout_seconds
        + per_step * (cost.forward_seconds * scoring + cost.train_seconds * training * plan.passes_per_sequence)
        + update_seconds(policy) * plan.optimizer_steps_per_step * training
    )
    first = 1 / plan.optimizer_steps_per_step  # the share of the passes that starts from the sampler's activations
    kept_bytes, activation_bytes = 0.0, cost.activation_bytes
    if kept is not None:
        each = bytes_per_token(kept.decoder.config, policy.model.dtype)
        kept_bytes = min(kept.capacity, per_step) * each
        step -= per_step * cost.forward_seconds * plan.passes_per_sequence * first
        activation_bytes -= each if first == 1 else 0
    # The engine sleeps while the weights are trained: the larger of the two counts.
    copies = policy.model.spec.parameters * policy.model.dtype.itemsize
    sampling = copies + cache_bytes(policy, plan, longest)
    update = head_bytes(policy) + min(options.micro_batch_tokens, per_step) * max(0.0, activation_bytes)
    weights = weight_bytes(policy) * training + _reference_bytes(policy, options)
    memory = loaded + (weights + kept_bytes + max(sampling, update)) / 1e9
    return Prediction(memory, step, step * options.max_steps), sampled


def probe_sampling(
    options: RLOptions | DistillOptions, policy: Policy, prompts: Sequence[Sequence[int]]
) -> tuple[float, list[list[Completion]]]:
    """Seconds to sample all of a step's (or an expert's round's) completions, and some of the first prompts."""
    count, width = min(8, len(prompts)), min(options.num_generations, 4)
    longest = max(map(len, prompts)) + options.max_completion_length
    engine = make_engine(policy, sequences=count * width, longest=longest)
    params = SamplingParams(
        max_tokens=options.max_completion_length, n=width, temperature=options.temperature, seed=options.seed
    )
    with torch.no_grad():
        engine.generate([list(p) for p in prompts[:2]], params)
        started = time.perf_counter()
        sampled = engine.generate([list(p) for p in prompts[:count]], params)
        seconds = time.perf_counter() - started
    share = options.on_policy_fraction if isinstance(options, DistillOptions) else 1.0
    total = options.num_prompts * options.num_generations * share
    # Decoding more rows costs less than in proportion: the weights are read once per token whatever the batch.
    return seconds * (total / (count * width)) ** 0.75, sampled


def sampled_examples(prompts: Sequence[Sequence[int]], sampled: Sequence[Sequence[Completion]]) -> list[Example]:
    """The completions of the first prompts as training sequences."""
    return [
        Example([*p, *c.tokens], [False] * len(p) + [True] * len(c.tokens))
        for p, group in zip(prompts, sampled, strict=False)
        for c in group
    ]


def _critic_choice(options: RLOptions) -> str | None:
    if isinstance(options, ReinforceOptions):
        return options.critic if options.baseline == "learned" else None
    return options.critic if isinstance(options, PPOOptions) else None


def _kl_weight(options: RLOptions) -> float:
    if isinstance(options, PPOOptions | ReinforceOptions):
        return options.kl_coef
    return options.beta if isinstance(options, GRPOOptions) else 0.0


def _reference_bytes(policy: Policy, options: RLOptions) -> float:
    loaded = _kl_weight(options) and not options.lora_rank
    return policy.model.spec.parameters * policy.model.dtype.itemsize if loaded else 0.0


def cache_bytes(policy: Policy, plan: Plan, longest: int) -> float:
    """What the engine's cache takes while a step's sequences are sampled."""
    blocks = min(plan.sequences_per_step, 256) * math.ceil((longest + 1) / BLOCK)
    per_block = KVCache.bytes_per_block(policy.model.spec, policy.model.dtype)
    return min(blocks * per_block, 1e9)


def update_seconds(policy: Policy) -> float:
    """Clipping, AdamW and the renewed copies move about 40 bytes per trained weight; measure the machine on a copy."""
    trained = sum(p.numel() for p in policy.model.parameters() if p.requires_grad)
    x = torch.ones(4_000_000)
    started = time.perf_counter()
    x.add_(1.0)
    rate = 8 * x.numel() / (time.perf_counter() - started)
    return 40 * trained / rate


def show_sft(options: SFTOptions) -> int:
    """Print what an sft run would do."""
    from upslope.recipes.sft import load_examples
    from upslope.tasks.loading import load_task

    policy = load_policy(options)
    task = load_task(options.task) if options.task else None
    examples, rows, account = load_examples(within_context(options, policy), policy.tokenizer, task)
    held = check_held_out(options, policy, task) if task is not None else None
    held_out, account = len(rows if held is None else held.rows), account.and_held_out(held)
    prediction = predict_sft(options, policy, examples)
    print(statistics(examples), file=sys.stderr)
    report(options, policy, examples[0], plan_of(options, examples=len(examples)), prediction, held_out, account)
    return 0


def show_policy_gradient(options: RLOptions) -> int:
    """Print what a ppo or grpo run would do."""
    from upslope.tasks.loading import load_task

    policy = load_policy(options)
    task = load_task(options.task)
    with judge_of(options, policy, task) as judge:
        asked = ask(options, policy, task)
        tokens = [encode_prompt(policy.tokenizer, prompt) for prompt in asked.train[: options.num_prompts]]
        prediction, sampled = predict_policy_gradient(options, policy, tokens)
        judged = judge_one(judge, asked.train[0], tokens[0], sampled[0])
    example, held_out = Example(tokens[0], [False] * len(tokens[0])), len(asked.held_out)
    plan = plan_of(options)
    report(options, policy, example, plan, prediction, held_out, asked.account, asked=asked, judged=judged)
    return 0


def report(
    options: RunOptions,
    policy: Policy,
    example: Example,
    plan: Plan,
    prediction: Prediction,
    held_out: int,
    account: DataAccount = NO_DATA,
    *,
    asked: Asked | None = None,
    judged: Judged | None = None,
) -> None:
    """On standard output, in words or as JSON; `asked` and `judged` of a run that asks a task and judges replies."""
    spec = policy.model.spec
    if options.json:
        said: dict[str, Any] = {"prediction": asdict(prediction), "plan": asdict(plan), "model": asdict(spec)}
        said |= {"held_out": held_out, "data": account.facts()}
        said |= {"train_prompts": len(asked.train)} if asked is not None else {}
        said |= {"judged": judged.as_json()} if judged is not None else {}
        print(json.dumps(said))
        return
    from rich.console import Console

    console = Console()
    console.print(mask_view(example, policy.tokenizer))
    console.print(
        f"model: {spec.parameters:,} parameters, {spec.num_layers} layers, width {spec.hidden_size}, "
        f"{policy.model.dtype}".replace("torch.", "")
    )
    held = f"{held_out:,} held-out sample{'s' * (held_out != 1)}" if held_out else "nothing: no rows are held out"
    for line in plan.words:
        console.print(f"- {line.replace(f'up to {options.eval_samples} samples', held)}")
    for line in [*account.lines(), *(asked.words if asked else ()), *(judged.words if judged else ())]:
        console.print(f"- {line}", markup=False, soft_wrap=True)
    console.print(
        f"- Predicted: {prediction.memory_gb:.1f} GB at the peak, {prediction.step_seconds:.1f} s per step, "
        f"{prediction.run_seconds / 60:.1f} min without evaluation."
    )

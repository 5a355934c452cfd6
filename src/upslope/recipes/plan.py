"""The arithmetic of a configuration, in numbers and in words: what one step does and what the whole run adds up to."""

from __future__ import annotations

from dataclasses import dataclass

from upslope.options import GRPOOptions, PPOOptions, RLOptions, RunOptions, SFTOptions

__all__ = ["CLASSES", "Plan", "plan_of"]

CLASSES: dict[str, type[RunOptions]] = {
    "sft": SFTOptions,
    "ppo": PPOOptions,
    "grpo": GRPOOptions,
}
"""The options class of every training verb; configs/VERB_*.toml and `upslope explain --verb VERB` go by it."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Sizes of a run before anything is loaded. Counts are upper bounds where lengths are not known yet."""

    sequences_per_step: int
    optimizer_steps_per_step: int
    optimizer_steps: int
    passes_per_sequence: int
    new_tokens_per_step: int
    words: tuple[str, ...]


def plan_of(options: RunOptions, *, examples: int | None = None) -> Plan:
    """The plan of a training configuration; `examples` is the size of the supervised data where known."""
    if isinstance(options, SFTOptions):
        return _sft(options, examples)
    assert isinstance(options, RLOptions)
    return _policy_gradient(options)


def _sft(o: SFTOptions, examples: int | None) -> Plan:
    words = [f"Each step trains on {o.batch_size} sequences and makes one optimizer step."]
    steps = o.max_steps
    if examples:
        if o.num_epochs is not None:
            steps = max(1, round(o.num_epochs * examples / o.batch_size))
            words.append(f"num_epochs = {o.num_epochs:g} over {examples:,} sequences sets max_steps to {steps:,}.")
        passes = steps * o.batch_size / examples
        words.append(f"{steps:,} steps see {steps * o.batch_size:,} sequences: {passes:.2g} passes over the data.")
    return Plan(o.batch_size, 1, steps, 1, 0, tuple(words + _common(o)))


def _policy_gradient(o: RLOptions) -> Plan:
    sequences = o.num_prompts * o.num_generations
    epochs = o.num_epochs if isinstance(o, PPOOptions) else o.num_iterations if isinstance(o, GRPOOptions) else 1
    minibatches = min(o.num_minibatches, o.num_prompts) if isinstance(o, PPOOptions | GRPOOptions) else 1
    updates = epochs * minibatches
    words = [
        f"Each step samples {o.num_prompts} prompts x {o.num_generations} completions = {sequences} sequences of at "
        f"most {o.max_completion_length} new tokens, from the weights as they are at that moment.",
        f"The step passes over them {epochs} time{'s' * (epochs > 1)} in {minibatches} "
        f"minibatch{'es' * (minibatches > 1)} of about {sequences // minibatches} sequences: "
        f"{updates} optimizer step{'s' * (updates > 1)}.",
        f"{o.max_steps:,} steps draw {o.max_steps * o.num_prompts:,} prompts: "
        f"{o.max_steps * o.num_prompts / o.num_train_prompts:.2g} passes over {o.num_train_prompts:,} problems.",
    ]
    if updates == 1:
        words.append("One optimizer step per batch: every ratio is 1 and clipping never acts (plain policy gradient).")
    if isinstance(o, PPOOptions):
        words += _ppo_words(o)
    if isinstance(o, GRPOOptions):
        words.append(_reference_words(o.beta, "beta", o.lora_rank))
        if o.dynamic_sampling:
            words.append(
                "Prompts whose rewards are all equal are replaced, so a step may sample several times as many."
            )
    return Plan(
        sequences_per_step=sequences,
        optimizer_steps_per_step=updates,
        optimizer_steps=updates * o.max_steps,
        passes_per_sequence=epochs,
        new_tokens_per_step=sequences * o.max_completion_length,
        words=tuple(words + _common(o)),
    )


def _ppo_words(o: PPOOptions) -> list[str]:
    critic = {
        "shared": "The critic is a head on the policy's own trunk: one forward pass gives log-probs and values.",
        "separate": "The critic is a second copy of the model with its own optimizer: twice the memory and time.",
    }.get(o.critic, f"The critic starts from the reward model {o.critic}, with its own optimizer.")
    words = [critic, _reference_words(o.kl_coef, "kl_coef", o.lora_rank)]
    if o.gamma == 1 and o.lam == 1:
        words.append("gamma = lam = 1: the advantage is the whole later reward minus the value.")
    if o.value_pretraining_steps:
        words.append(f"The first {o.value_pretraining_steps} steps train the critic only.")
    return words


def _reference_words(weight: float, name: str, lora_rank: int) -> str:
    if not weight:
        return f"{name} = 0: no reference model is loaded."
    if lora_rank:
        return "The reference model is the policy with its adapters switched off."
    return "The reference model is a frozen copy of the start model, in the compute dtype."


def _common(o: RunOptions) -> list[str]:
    words = [
        f"Micro-batches hold at most {o.micro_batch_tokens:,} packed tokens; their number does not change the gradient."
    ]
    if o.lora_rank:
        words.append(f"Only adapters of rank {o.lora_rank} are trained.")
    evaluations = o.max_steps // o.eval_every + (o.max_steps % o.eval_every != 0) if o.eval_every else 1
    words.append(
        f"Held-out evaluation runs {evaluations} time{'s' * (evaluations != 1)} on up to {o.eval_samples} samples; "
        f"a checkpoint is written every {o.save_every} steps and at the end, {o.keep_last} are kept besides the best."
    )
    limits = [f"{o.max_steps:,} steps"]
    limits += [f"{o.max_tokens:,} trained tokens"] if o.max_tokens else []
    limits += [f"{o.max_seconds:,g} seconds"] if o.max_seconds else []
    limits += [f"{o.patience} evaluations without improvement"] if o.patience else []
    limits += [f"a held-out measure of {o.target:g}"] if o.target is not None else []
    words.append(f"It stops after {' or '.join(limits)}, whichever comes first.")
    return words

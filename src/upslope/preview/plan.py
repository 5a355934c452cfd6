"""The arithmetic of a configuration, in numbers and in words: what one step does and what the whole run adds up to."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from upslope import options as kinds
from upslope.options import RLOptions, RunOptions
from upslope.training.optim import in_steps


@dataclass(frozen=True, slots=True)
class Plan:
    """Sizes of a run before anything is loaded. Counts are upper bounds where lengths are not known yet."""

    sequences_per_step: int
    optimizer_steps_per_step: int
    optimizer_steps: int
    passes_per_sequence: int
    new_tokens_per_step: int
    words: Sequence[str]


def plan_of(options: RunOptions, *, examples: int | None = None) -> Plan:
    """The plan of a training configuration; `examples` is the size of the supervised data where known."""
    plan = next(planner for kind, planner in _PLANS.items() if isinstance(options, kind))(options, examples)
    steps = plan.optimizer_steps // plan.optimizer_steps_per_step
    return replace(plan, words=(*plan.words, *_common(options, steps)))


def _steps(o: Any, examples: int | None, words: list[str], items: str, whole: str = "the data") -> int:
    """Optimizer steps of a pass over data; what is known of them goes to `words`."""
    steps = o.max_steps
    if examples:
        if o.num_epochs is not None:
            steps = in_steps(o, examples).max_steps
            words.append(f"num_epochs = {o.num_epochs:g} over {examples:,} {items} sets max_steps to {steps:,}.")
        passes = steps * o.batch_size / examples
        see = "steps see" if steps > 1 else "step sees"
        words.append(f"{steps:,} {see} {steps * o.batch_size:,} {items}: {passes:.2g} passes over {whole}.")
    return steps


def _pretrain(o: kinds.PretrainOptions, examples: int | None) -> Plan:
    words = [
        f"Each step reads {o.batch_size} windows of {o.context_length} tokens, {o.batch_size * o.context_length:,} in "
        "all, and makes one optimizer step.",
        f"The {o.architecture or 'decoder'} starts from random weights." if o.new else f"It starts from {o.model}.",
    ]
    if o.label_smoothing:
        words.append(f"{o.label_smoothing:.0%} of every target is spread evenly over the vocabulary.")
    steps = _steps(o, examples, words, "windows", "the text")
    return Plan(o.batch_size, 1, steps, 1, 0, words)


def _sft(o: kinds.SFTOptions, examples: int | None) -> Plan:
    words = [f"Each step trains on {o.batch_size} sequences and makes one optimizer step."]
    if o.loss == "dft":
        words.append("The loss of every token is weighted by the probability the model gives it (dynamic fine-tuning).")
    if o.label_smoothing:
        words.append(f"{o.label_smoothing:.0%} of every target is spread evenly over the vocabulary.")
    steps = _steps(o, examples, words, "sequences")
    return Plan(o.batch_size, 1, steps, 1, 0, words)


def _encoder(o: kinds.EncoderOptions, examples: int | None) -> Plan:
    item = "word" if isinstance(o, kinds.TagOptions) else "text"
    reward = f"the rewards in {o.rewards}" if o.rewards else "reward 1 for the right label, 0 for another"
    words = [
        f"Each step trains on {o.batch_size} rows and makes one optimizer step.",
        {
            "cross_entropy": f"It raises the likelihood of every {item}'s right label.",
            "squared_error": f"It lowers the squared error of the number given to every {item}.",
            "policy_gradient": f"It raises the expected reward of every {item} in closed form: {reward}.",
            "policy_gradient_sampled": f"It samples {o.num_samples} labels per {item}, baseline {o.baseline}; {reward}",
        }[o.objective],
    ]
    steps = _steps(o, examples, words, "rows")
    if o.eval_data is None:
        words.append(f"{o.eval_share:.0%} of the data, chosen by seed and content, is held out as dev rows.")
    if o.test_data is not None:
        words.append("The test rows are scored once, at the end, with the checkpoint that was best on dev.")
    if o.lora_rank:
        words.append("The head is trained in full beside the adapters.")
    return Plan(o.batch_size, 1, steps, 1, 0, words)


def _preference(o: kinds.DPOOptions | kinds.RewardOptions, examples: int | None) -> Plan:
    labelled = (isinstance(o, kinds.DPOOptions) and o.loss == "kto") or (
        isinstance(o, kinds.RewardOptions) and o.kind == "process"
    )
    rows, width = ("rows", 1) if labelled else ("pairs", 2)
    words = [f"Each step trains on {o.batch_size} {rows} ({width * o.batch_size} sequences), one optimizer step."]
    steps = _steps(o, examples, words, rows)
    if isinstance(o, kinds.DPOOptions):
        if o.loss in ("orpo", "simpo"):
            words.append(f"{o.loss} has no reference model.")
        else:
            words.append("The start model reads every row once before the first step; no second model is kept.")
        if o.loss == "kto":
            words.append("Each step first reads as many mismatched pairs, without gradient, to estimate the KL.")
    else:
        words.append(
            "The language head is left out; a scalar head is read at the end of each "
            + ("step." if o.kind == "process" else "answer.")
        )
    return Plan(width * o.batch_size, 1, steps, 1, 0, words)


def _expert(o: kinds.ExpertOptions, _: int | None) -> Plan:
    o = in_steps(o)
    rounds = -(-o.max_steps // o.train_steps)
    samples = o.num_prompts * o.num_generations
    kept = {
        "threshold": "those the task calls correct" if o.threshold is None else f"those with reward >= {o.threshold:g}",
        "best": "the best sample of each prompt",
        "top": f"the best {o.keep_share:.0%} of the round",
    }[o.keep]
    words = [
        f"Each of {rounds} rounds samples {o.num_prompts} prompts x {o.num_generations} completions = {samples} "
        f"sequences of at most {o.max_completion_length} new tokens and keeps {kept}, {o.max_per_prompt} of a prompt "
        f"at most; then it trains on them for {o.train_steps} steps of {o.batch_size} sequences.",
        "Every round trains from the start model." if o.restart else "Every round goes on from the last one's weights.",
    ]
    if o.from_run is not None:
        words.append(f"The first round samples nothing: it takes the rollouts of {o.from_run}.")
    if o.mix_data is not None:
        words.append(f"{o.mix_ratio:.0%} of each batch are rows of {o.mix_data}.")
    return Plan(o.batch_size, 1, o.max_steps, 1, samples * o.max_completion_length, words)


def _distill(o: kinds.DistillOptions, _: int | None) -> Plan:
    own = o.num_prompts * o.on_policy_fraction
    sequences = round(own * o.num_generations + o.num_prompts - own)
    loss = {"forward": "KL(teacher || student)", "reverse": "KL(student || teacher)", "jsd": "the generalised JSD"}
    words = [
        f"Each step takes {o.num_prompts} prompts; the student answers {o.on_policy_fraction:.0%} of them "
        f"{o.num_generations} time{'s' * (o.num_generations > 1)} with at most {o.max_completion_length} new tokens, "
        f"the others come with the data's completions: {sequences} sequences, one optimizer step.",
        f"The loss is {loss[o.divergence]} per token, exact over the vocabulary, at temperature {o.temperature:g}.",
        f"The teacher {o.teacher} is loaded beside the student, frozen, in its compute dtype.",
    ]
    return Plan(sequences, 1, o.max_steps, 1, round(own * o.num_generations) * o.max_completion_length, words)


def _seq2seq(o: kinds.Seq2SeqOptions, examples: int | None) -> Plan:
    risk = o.objective == "minimum_risk"
    if risk:
        words = [
            f"Each step samples {o.num_samples} targets for each of {o.batch_size} sources"
            f"{', adds the reference' if o.include_reference else ''}, counts equal ones once, scores the sets without "
            "gradient, and makes one optimizer step."
        ]
    else:
        words = [f"Each step trains on {o.batch_size} pairs and makes one optimizer step."]
    steps = _steps(o, examples, words, "sources" if risk else "pairs")
    sequences = o.batch_size * (o.num_samples + o.include_reference if risk else 1)
    new_tokens = o.batch_size * o.num_samples * o.max_completion_length if risk else 0
    return Plan(sequences, 1, steps, 1 + risk, new_tokens, words)


def _policy_gradient(o: RLOptions, _: int | None) -> Plan:
    sequences = o.num_prompts * o.num_generations
    epochs = (
        o.num_epochs if isinstance(o, kinds.PPOOptions) else o.num_iterations if isinstance(o, kinds.GRPOOptions) else 1
    )
    minibatches = min(o.num_minibatches, o.num_prompts) if isinstance(o, kinds.PPOOptions | kinds.GRPOOptions) else 1
    updates = epochs * minibatches
    lag = [f"It trains on what was sampled {o.rollout_lag} step{'s' * (o.rollout_lag > 1)} before."]
    words = [
        f"Each step samples {o.num_prompts} prompts x {o.num_generations} completions = {sequences} sequences of at "
        f"most {o.max_completion_length} new tokens, from the weights as they are at that moment.",
        *(lag if o.rollout_lag else []),
        f"The step passes over them {epochs} time{'s' * (epochs > 1)} in {minibatches} "
        f"minibatch{'es' * (minibatches > 1)} of about {sequences // minibatches} sequences: "
        f"{updates} optimizer step{'s' * (updates > 1)}.",
        f"{o.max_steps:,} step{'s draw' if o.max_steps != 1 else ' draws'} {o.max_steps * o.num_prompts:,} prompts: "
        f"{o.max_steps * o.num_prompts / o.num_train_prompts:.2g} passes over {o.num_train_prompts:,} problems.",
    ]
    if updates == 1 and not isinstance(o, kinds.ReinforceOptions):
        words.append("One optimizer step per batch: every ratio is 1 and clipping never acts (plain policy gradient).")
    if isinstance(o, kinds.ReinforceOptions):
        words += [_baseline_words(o), _reference_words(o.kl_coef, "kl_coef", o.lora_rank)]
    if isinstance(o, kinds.PPOOptions):
        words += [_critic_words(o.critic), _reference_words(o.kl_coef, "kl_coef", o.lora_rank)]
        if o.gamma == 1 and o.lam == 1:
            words.append("gamma = lam = 1: the advantage is the whole later reward minus the value.")
        if o.value_pretraining_steps:
            words.append(f"The first {o.value_pretraining_steps} steps train the critic only.")
    if isinstance(o, kinds.GRPOOptions):
        words.append(_reference_words(o.beta, "beta", o.lora_rank))
        if o.dynamic_sampling:
            words.append(
                "Prompts whose rewards are all equal are replaced, so a step may sample several times as many."
            )
    return Plan(sequences, updates, updates * o.max_steps, epochs, sequences * o.max_completion_length, words)


def _critic_words(critic: str) -> str:
    return {
        "shared": "The critic is a head on the policy's own trunk: one forward pass gives log-probs and values.",
        "separate": "The critic is a second copy of the model with its own optimizer: twice the memory and time.",
    }.get(critic, f"The critic starts from the reward model {critic}, with its own optimizer.")


def _baseline_words(o: kinds.ReinforceOptions) -> str:
    return {
        "none": "Nothing is subtracted from the return.",
        "moving": "The baseline is a moving mean of past rewards.",
        "learned": _critic_words(o.critic),
        "greedy": f"The baseline is the reward of a greedy reply: {o.num_prompts} more completions per step.",
        "reinforce++": "The returns are whitened over all tokens of the step.",
    }[o.baseline]


def _reference_words(weight: float, name: str, lora_rank: int) -> str:
    if not weight:
        return f"{name} = 0: no reference model is loaded."
    if lora_rank:
        return "The reference model is the policy with its adapters switched off."
    return "The reference model is a frozen copy of the start model, in the compute dtype."


def _common(o: RunOptions, steps: int) -> list[str]:
    """What is said of every run."""
    words = [
        f"Micro-batches hold at most {o.micro_batch_tokens:,} packed tokens; their number does not change the gradient."
    ]
    if o.lora_rank:
        words.append(f"Only adapters of rank {o.lora_rank} are trained.")
    evaluations = steps // o.eval_every + (steps % o.eval_every != 0) if o.eval_every else 1
    words.append(
        f"Held-out evaluation runs {evaluations} time{'s' * (evaluations != 1)} on up to {o.eval_samples} samples; "
        f"a checkpoint is written every {o.save_every} steps and at the end, {o.keep_last} are kept besides the best."
    )
    limits = [f"{steps:,} step{'s' * (steps != 1)}"]
    limits += [f"{o.max_tokens:,} trained tokens"] if o.max_tokens else []
    limits += [f"{o.max_seconds:,g} seconds"] if o.max_seconds else []
    limits += [f"{o.patience} evaluations without improvement"] if o.patience else []
    limits += [f"a held-out measure of {o.target:g}"] if o.target is not None else []
    words.append(f"It stops after {' or '.join(limits)}{', whichever comes first' * (len(limits) > 1)}.")
    return words


_PLANS: dict[type[RunOptions], Callable[[Any, int | None], Plan]] = {
    kinds.PretrainOptions: _pretrain,
    kinds.SFTOptions: _sft,
    kinds.Seq2SeqOptions: _seq2seq,
    kinds.EncoderOptions: _encoder,
    kinds.ExpertOptions: _expert,
    kinds.DistillOptions: _distill,
    **dict.fromkeys((kinds.DPOOptions, kinds.RewardOptions), _preference),
    RLOptions: _policy_gradient,
}
"""Whose plan is made by what; the first that fits."""

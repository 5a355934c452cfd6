"""Every option of every verb, free of torch, so that --help is instant.

One frozen dataclass per verb. What all training verbs share is in RunOptions, what all verbs that sample share in
RLOptions; a recipe's own class adds what its paper has. The string under a field is its help text. Keys in a TOML
file and options on the command line are these names (on the command line with dashes).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from upslope.errors import ConfigError

Dtype = Literal["auto", "float32", "bfloat16"]


def _check(options: Any, **bounds: tuple[float | None, float | None]) -> None:
    """Raise ConfigError for the first option outside its closed bounds; None is no bound."""
    for name, (low, high) in bounds.items():
        value = getattr(options, name)
        if value is None:
            continue
        if not math.isfinite(value) or (low is not None and value < low) or (high is not None and value > high):
            wanted = f"at least {low:g}" if high is None else f"between {low:g} and {high:g}"
            raise ConfigError(f"{name} is {value}; it must be {wanted}")


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What every training verb shares: the model, the run folder, the optimizer, the budget."""

    model: str = "smollm2-135m"
    """Where training starts: a folder, a hub id, a .gguf file, or the alias smollm2-135m."""
    output_dir: str | None = None
    """The run folder. Left out: a new folder under runs/."""
    resume: bool = False
    """Continue the run in --output-dir from its last checkpoint, bit for bit."""
    dry_run: bool = False
    """Check data, tokenizer and shapes, show one example with its mask, predict memory and time, then stop."""
    json: bool = False
    """Print the summary as one JSON object on standard output."""
    seed: int = 0
    """Of data order, sampling and initial values; the same seed repeats the run bit for bit."""
    dtype: Dtype = "auto"
    """Compute dtype; auto is bfloat16 where this processor is faster in it. Master weights are float32."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    lora_rank: int = 0
    """Train adapters of this rank instead of all weights; 0 trains all."""
    lora_alpha: float | None = None
    """Scale of the adapters; left out: twice the rank."""
    learning_rate: float = 1e-5
    """Peak learning rate of AdamW."""
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "linear"
    """Shape of the learning rate after the warm-up, over max_steps."""
    warmup_steps: int = 0
    """Optimizer steps over which the learning rate rises from 0."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay; norms and biases are exempt."""
    max_grad_norm: float = 1.0
    """Global gradient norm above which the whole gradient is scaled down."""
    micro_batch_tokens: int = 4096
    """Packed tokens per forward and backward pass; changes memory and speed, not the gradient."""
    max_steps: int = 100
    """Stop after this many steps."""
    max_tokens: int | None = None
    """Stop after this many trained tokens."""
    max_seconds: float | None = None
    """Stop after this many seconds of training."""
    target: float | None = None
    """Stop when the held-out measure reaches this value."""
    patience: int | None = None
    """Stop when this many evaluations in a row brought no improvement."""
    eval_every: int = 10
    """Steps between held-out evaluations; 0 evaluates only at the end."""
    eval_samples: int = 200
    """Held-out problems (or rows) per evaluation."""
    save_every: int = 50
    """Steps between checkpoints; the last step always saves."""
    keep_last: int = 2
    """Checkpoints kept besides the best one."""

    def validate(self) -> None:
        """Raise ConfigError for a value out of range."""
        _check(
            self,
            lora_rank=(0, None),
            learning_rate=(0, None),
            warmup_steps=(0, None),
            weight_decay=(0, None),
            max_grad_norm=(0, None),
            micro_batch_tokens=(1, None),
            max_steps=(0, None),
            max_tokens=(1, None),
            max_seconds=(0, None),
            patience=(1, None),
            eval_every=(0, None),
            eval_samples=(0, None),
            save_every=(1, None),
            keep_last=(1, None),
        )
        if self.resume and self.output_dir is None:
            raise ConfigError("resume needs output_dir: name the run folder to continue")


@dataclass(frozen=True, kw_only=True)
class SFTOptions(RunOptions):
    """Supervised fine-tuning: maximum likelihood of completions, token-masked and packed."""

    data: str | None = None
    """Training rows: a .jsonl/.csv/.parquet/.txt file or a hub id. Give this or --task."""
    eval_data: str | None = None
    """Held-out rows in the same forms; left out with --data: the last tenth of the data."""
    task: str | None = None
    """Train on the demonstrations of a task, and measure its accuracy on held-out problems."""
    num_examples: int = 1000
    """How many demonstrations to take from --task."""
    batch_size: int = 16
    """Sequences per optimizer step."""
    num_epochs: float | None = None
    """Passes over the data; when given it sets max_steps."""
    max_length: int = 1024
    """Longest sequence in tokens; longer rows are dropped, counted and reported."""
    max_completion_length: int = 32
    """Longest reply in tokens when --task accuracy is measured."""

    def validate(self) -> None:
        """Raise ConfigError for a value out of range."""
        RunOptions.validate(self)
        _check(
            self,
            num_examples=(1, None),
            batch_size=(1, None),
            max_length=(2, None),
            max_completion_length=(1, None),
            num_epochs=(0, None),
        )
        if (self.data is None) == (self.task is None):
            raise ConfigError("give exactly one of data and task")


@dataclass(frozen=True, kw_only=True)
class RLOptions(RunOptions):
    """What every recipe that samples shares: the task, the rewards, the sampling."""

    task: str = "chain_sum:min_terms=2,max_terms=2,min_digits=1,max_digits=2"
    """Name of a task with parameters, or a file: chain_sum:min_terms=2, gsm8k:path=x.jsonl, my_task.py:MyTask."""
    reward: tuple[str, ...] = ()
    """Rewards instead of the task's own: names or my_rewards.py:fn, each with a weight (length:target=20@0.5)."""
    reward_workers: int = 0
    """Processes that compute rewards; 0 computes them in this process where they are safe, else in one worker."""
    reward_timeout: float = 10.0
    """Seconds after which one reward call is killed and counted as an error."""
    num_train_prompts: int = 2000
    """Different problems drawn from the task; the order begins anew, reshuffled, after each pass."""
    num_prompts: int = 32
    """Prompts per step (P)."""
    num_generations: int = 4
    """Completions per prompt (G)."""
    max_completion_length: int = 32
    """Longest completion in tokens."""
    temperature: float = 1.0
    """Sampling temperature, in the rollout and in the loss."""
    top_k: int = 0
    """Sample from the k likeliest tokens; 0 is off. Needs --rollout-correction."""
    top_p: float = 1.0
    """Sample from the smallest set with this probability; 1 is off. Needs --rollout-correction."""
    min_p: float = 0.0
    """Drop tokens below this share of the likeliest one; 0 is off. Needs --rollout-correction."""
    rollout_correction: Literal["auto", "none", "token", "sequence", "geometric"] = "auto"
    """Importance weights between trainer and sampler, capped; auto: token where the two differ in a bit, else none."""
    rollout_correction_cap: float = 2.0
    """Largest importance weight."""
    truncated: Literal["terminate", "bootstrap", "mask"] = "terminate"
    """A completion cut by its budget: ends there, bootstraps from the critic, or is left out of the loss."""
    missing_eos_penalty: float = 0.0
    """Subtracted from the reward of a completion that did not end by itself."""
    overlong_buffer: int = 0
    """Last tokens of the budget over which a penalty grows from 0 to 1 (DAPO); 0 is off."""
    eval_temperature: float = 0.0
    """Temperature of held-out evaluation; 0 is greedy."""

    def validate(self) -> None:
        """Raise ConfigError for a value out of range or a sampling filter without its correction."""
        RunOptions.validate(self)
        _check(
            self,
            reward_workers=(0, None),
            reward_timeout=(0.01, None),
            num_train_prompts=(1, None),
            num_prompts=(1, None),
            num_generations=(1, None),
            max_completion_length=(1, None),
            temperature=(1e-3, 100),
            top_k=(0, None),
            top_p=(1e-6, 1),
            min_p=(0, 1),
            rollout_correction_cap=(1, None),
            missing_eos_penalty=(0, None),
            overlong_buffer=(0, self.max_completion_length),
            eval_temperature=(0, 100),
        )
        if (self.top_k or self.top_p < 1 or self.min_p > 0) and self.rollout_correction in ("auto", "none"):
            raise ConfigError(
                "top_k, top_p or min_p makes the sampled distribution another than the policy's: "
                "name the correction (rollout_correction = token, sequence or geometric) or switch the filter off"
            )


@dataclass(frozen=True, kw_only=True)
class PPOOptions(RLOptions):
    """Proximal policy optimization with a critic (Schulman et al. 2017, arXiv 1707.06347), token by token."""

    gamma: float = 1.0
    """Discount per token."""
    lam: float = 0.95
    """Lambda of generalized advantage estimation."""
    epsilon: float = 0.2
    """Clip range of the ratio, downwards and (unless epsilon_high is given) upwards."""
    epsilon_high: float | None = None
    """Clip range upwards."""
    dual_clip: float | None = None
    """Bound on the loss of bad actions whose ratio has grown (arXiv 1912.09729); left out: off."""
    num_epochs: int = 2
    """Passes over each batch of rollouts."""
    num_minibatches: int = 1
    """Optimizer steps per pass."""
    critic: str = "shared"
    """shared: a value head on the policy's trunk; separate: a copy of the model; or a reward model's folder."""
    critic_learning_rate: float | None = None
    """Of the critic's own parameters (the value head when shared); left out: ten times learning_rate."""
    vf_coef: float = 0.1
    """Weight of the value loss where it reaches the shared trunk."""
    value_clip: float | None = None
    """Clip range of the value around the rollout's value; left out: off."""
    value_pretraining_steps: int = 0
    """Steps that train only the critic before the policy moves."""
    kl_coef: float = 0.0
    """Weight of the KL divergence to the reference model; at 0 no reference is loaded."""
    kl_placement: Literal["reward", "loss"] = "reward"
    """reward: subtracted per token before GAE (k1); loss: added to the loss with its exact gradient."""
    kl_target: float | None = None
    """Adapt kl_coef so that the KL per completion stays here (arXiv 1909.08593)."""
    kl_horizon: int = 10000
    """Samples over which kl_coef adapts."""
    rollout_kl_coef: float = 0.0
    """Weight of a KL penalty to the policy that sampled (PPO's penalty form)."""
    target_kl: float | None = None
    """End the passes over a batch when the KL to the sampling policy exceeds 1.5 times this."""
    entropy_coef: float = 0.0
    """Weight of an entropy bonus."""
    whiten_advantages: bool = True
    """Give the advantages of a step mean 0 and variance 1."""

    def validate(self) -> None:
        """Raise ConfigError for a value out of range."""
        RLOptions.validate(self)
        _check(
            self,
            gamma=(0, 1),
            lam=(0, 1),
            epsilon=(0, None),
            epsilon_high=(0, None),
            dual_clip=(1, None),
            num_epochs=(1, None),
            num_minibatches=(1, None),
            critic_learning_rate=(0, None),
            vf_coef=(0, None),
            value_clip=(0, None),
            value_pretraining_steps=(0, None),
            kl_coef=(0, None),
            kl_target=(0, None),
            kl_horizon=(1, None),
            rollout_kl_coef=(0, None),
            target_kl=(0, None),
            entropy_coef=(0, None),
        )
        if self.kl_target is not None and self.kl_coef == 0:
            raise ConfigError("kl_target adapts kl_coef: give kl_coef a start value above 0")


@dataclass(frozen=True, kw_only=True)
class GRPOOptions(RLOptions):
    """Policy gradient with the group as baseline: GRPO, Dr. GRPO, RLOO, REINFORCE++; DAPO, GSPO, CISPO."""

    num_prompts: int = 16
    """Prompts per step (P)."""
    num_generations: int = 8
    """Completions per prompt (G)."""
    advantage: Literal["grpo", "dr_grpo", "rloo", "reinforce++"] = "grpo"
    """grpo: centred, divided by the group's deviation; dr_grpo: centred; rloo: leave-one-out; reinforce++: centred,
    then whitened over the batch."""
    loss: Literal["clipped", "gspo", "cispo"] = "clipped"
    """clipped: PPO's per token; gspo: per sequence; cispo: clipped weights, every token keeps its gradient."""
    normalizer: Literal["auto", "token", "sequence", "constant"] = "auto"
    """Divide by all trained tokens (DAPO), average each sequence first (GRPO paper), or by a constant (Dr. GRPO);
    auto: sequence with gspo, else token."""
    epsilon: float = 0.2
    """Clip range of the ratio downwards and (unless epsilon_high is given) upwards."""
    epsilon_high: float | None = None
    """Clip range upwards (DAPO: 0.28)."""
    num_iterations: int = 1
    """Passes over each batch of rollouts."""
    num_minibatches: int = 1
    """Optimizer steps per pass."""
    beta: float = 0.0
    """Weight of the KL divergence to the reference model in the loss; at 0 no reference is loaded."""
    entropy_coef: float = 0.0
    """Weight of an entropy bonus."""
    dynamic_sampling: bool = False
    """Replace prompts whose rewards are all equal by fresh ones until the batch is full (DAPO)."""
    dynamic_sampling_rounds: int = 8
    """Give up with an error after this many rounds."""

    def validate(self) -> None:
        """Raise ConfigError for a value out of range."""
        RLOptions.validate(self)
        _check(
            self,
            num_generations=(2, None),
            epsilon=(0, None),
            epsilon_high=(0, None),
            num_iterations=(1, None),
            num_minibatches=(1, None),
            beta=(0, None),
            entropy_coef=(0, None),
            dynamic_sampling_rounds=(1, None),
        )
        if self.loss == "gspo" and self.normalizer not in ("auto", "sequence"):
            raise ConfigError(f"normalizer = {self.normalizer}: gspo has one loss per sequence; use auto or sequence")
        if self.truncated == "bootstrap":
            raise ConfigError("truncated = bootstrap needs a critic: use terminate or mask, or the ppo verb")


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """Base model, then supervised learning, then PPO on one verifiable task, with held-out accuracy of each."""

    output_dir: str | None = None
    """Folder of the demo; left out: a new folder under runs/."""
    model: str = "smollm2-135m"
    """Where the demo starts."""
    task: str = (
        "chain_sum:min_terms=2,max_terms=2,min_digits=1,max_digits=2,ask={expression} =,system=Calculate.,instruction="
    )
    """A task with demonstrations and a verdict."""
    eval_samples: int = 512
    """Held-out problems on which every stage is measured (at least 500 for the intervals to mean something)."""
    sft_steps: int = 12
    """Supervised steps of 16 demonstrations."""
    ppo_steps: int = 28
    """PPO steps."""
    seed: int = 0
    """Of everything."""
    json: bool = False
    """Print summary.json on standard output."""

    def validate(self) -> None:
        """Raise ConfigError for a value out of range."""
        _check(self, eval_samples=(1, None), sft_steps=(1, None), ppo_steps=(1, None))


@dataclass(frozen=True, kw_only=True)
class FetchOptions:
    """Bring a model into the cache."""

    model: str = "smollm2-135m"
    """A hub id, a .gguf file, or the alias smollm2-135m."""
    json: bool = False
    """Print the folder and where it came from as JSON."""

    def validate(self) -> None:
        """Nothing to check."""


@dataclass(frozen=True, kw_only=True)
class DoctorOptions:
    """What this machine has, what would run on it, and whether the numbers hold here."""

    numerics: bool = False
    """Run the product's own checks: gradients, GAE, invariances, sampler against trainer, resume."""
    json: bool = False
    """Print one JSON object."""

    def validate(self) -> None:
        """Nothing to check."""


@dataclass(frozen=True, kw_only=True)
class ExplainOptions:
    """Say in words what a configuration would do: batch arithmetic, passes, what is loaded."""

    verb: Literal["sft", "ppo", "grpo"] = "ppo"
    """Which recipe the configuration is for."""
    config: str | None = None
    """Its TOML file; left out: the defaults."""
    json: bool = False
    """Print one JSON object."""

    def validate(self) -> None:
        """Nothing to check."""


@dataclass(frozen=True, kw_only=True)
class RunsOptions:
    """List runs, or show one."""

    folder: str = "runs"
    """A folder of runs, or one run."""
    json: bool = False
    """Print one JSON object."""

    def validate(self) -> None:
        """Nothing to check."""

"""upslope's side: GRPO or PPO steps in the library's own training loop, or rollouts of its engine."""

from __future__ import annotations

import time
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from benchmarks.speed import protocol
from upslope.build import Policy, load_policy, make_engine
from upslope.loop.launch import begin
from upslope.loop.session import train
from upslope.options import GRPOOptions, PPOOptions
from upslope.recipes.grpo import GRPO
from upslope.recipes.ppo import PPO
from upslope.training.stopping import StepResult
from upslope.types import RolloutGroup, SamplingParams

TASK = f"{Path(__file__).with_name('task.py')}:Stories"


def watch(learner: GRPO | PPO, steps: protocol.Steps, *, fixed: bool) -> None:
    """Report the learner's sampling and its steps to `steps`; `fixed` lets no token end a completion."""
    if fixed:
        learner.engine.eos_token_ids = frozenset()
    sample, step = learner.sampler.sample, learner.step

    def reported(
        index: int, *, round_: int = 0, count: int | None = None
    ) -> tuple[list[RolloutGroup], dict[str, float]]:
        groups, metrics = sample(index, round_=round_, count=count)
        rollouts = [r for g in groups for r in g.rollouts]
        steps.add("rollout", metrics["seconds/rollout"])
        steps.add("reward", metrics["seconds/reward"])
        steps.note(prompt_tokens=sum(len(r.prompt_tokens) for r in rollouts), lengths=[len(r.tokens) for r in rollouts])
        return groups, metrics

    def stepped(index: int) -> StepResult:
        result = step(index)
        steps.end()
        return result

    learner.sampler.sample, learner.step = reported, stepped  # type: ignore[method-assign]


def shared_options(asked: dict[str, Any]) -> dict[str, Any]:
    """What both learners get: the work, and nothing besides steps (no evaluation, no checkpoint on the way)."""
    steps = asked["warmup"] + asked["steps"]
    return {
        "model": asked["model"],
        "task": TASK,
        "output_dir": str(Path(asked["folder"]) / "run"),
        "num_train_prompts": asked["num_prompts"] * steps,
        "num_prompts": asked["num_prompts"],
        "num_generations": asked["num_generations"],
        "max_completion_length": asked["max_completion_length"],
        "learning_rate": asked["learning_rate"],
        "lr_scheduler_type": "constant",
        "max_steps": steps,
        "eval_every": 0,
        "eval_samples": 0,
        "save_every": steps,
        "seed": asked["seed"],
        **asked["options"],
    }


def train_steps(asked: dict[str, Any], steps: protocol.Steps) -> None:
    """Steps of GRPO, or of PPO with the reward network as reward and as the critic's start."""
    learner: GRPO | PPO
    if asked["kind"] == "grpo":
        options = GRPOOptions(**shared_options(asked))
        learner = GRPO(options, load_policy(options))
    else:
        options = PPOOptions(
            **shared_options(asked),
            reward=(f"reward_model:path={asked['reward_model']}",),
            critic=asked["reward_model"],
            critic_learning_rate=asked["learning_rate"],
            num_epochs=asked["num_epochs"],
            kl_coef=asked["kl_coef"],
            value_clip=0.2,
        )
        learner = PPO(options, load_policy(options))
    watch(learner, steps, fixed=asked["fixed"])
    with begin(options) as begun, closing(learner):
        steps.begin()
        train(asked["kind"], options, learner, begun)


def roll_out(asked: dict[str, Any], steps: protocol.Steps) -> None:
    """Rounds of generation with log-probs from token ids, every completion of full length."""
    policy: Policy = load_policy(GRPOOptions(model=asked["model"], dtype="bfloat16"))
    rounds = asked["prompts"]
    longest = len(rounds[0][0]) + asked["max_completion_length"]
    engine = make_engine(policy, sequences=len(rounds[0]), longest=longest)
    policy.model.eval()
    for seed, prompts in enumerate(rounds):
        params = SamplingParams(max_tokens=asked["max_completion_length"], ignore_eos=True, seed=seed)
        steps.begin()
        began = time.perf_counter()
        with torch.no_grad():
            done = engine.generate(prompts, params)
        steps.add("rollout", time.perf_counter() - began)
        assert all(len(c[0].policy_logprobs) == len(c[0].tokens) for c in done)
        steps.note(prompt_tokens=sum(map(len, prompts)), lengths=[len(c[0].tokens) for c in done])
        steps.end()


def main() -> None:
    """Do what was asked and write the result."""
    asked, steps = protocol.settings(), protocol.Steps()
    torch.set_num_threads(asked["threads"])
    (roll_out if asked["kind"] == "rollout" else train_steps)(asked, steps)
    protocol.answer(steps, ["torch", "transformers"], threads=torch.get_num_threads())


if __name__ == "__main__":
    main()

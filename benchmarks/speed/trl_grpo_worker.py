"""TRL's GRPO on the shared work, in its own process and environment. Knows nothing of upslope.

rollout: `GRPOTrainer._generate` (tokenization, generation, decoding). reward: `_calculate_rewards`. update: the rest of
the step. settings["options"] are GRPOConfig's, on top of what the work demands.
"""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from benchmarks.speed import protocol, work


def length_options(asked: dict[str, Any]) -> dict[str, Any]:
    """How TRL is told to ignore the end of sequence: by a least length, which continuous batching does not know."""
    if not asked["fixed"]:
        return {}
    if asked["options"].get("use_transformers_continuous_batching"):
        return {"generation_kwargs": {"eos_token_id": -1}}
    return {"generation_kwargs": {"min_new_tokens": asked["max_completion_length"]}}


def main() -> None:
    """Train and write the result."""
    asked, steps = protocol.settings(), protocol.Steps()
    torch.set_num_threads(asked["threads"])
    total = asked["warmup"] + asked["steps"]
    samples = asked["num_prompts"] * asked["num_generations"]
    options = {"per_device_train_batch_size": 8, **asked["options"]}
    micro = options["per_device_train_batch_size"] = min(options["per_device_train_batch_size"], samples)

    class Watch(TrainerCallback):
        def on_train_begin(self, *_: object, **__: object) -> None:
            steps.begin()

        def on_step_end(self, *_: object, **__: object) -> None:
            steps.end()

    def reward(completions: list[str], **_: object) -> list[float]:
        return [work.reward(text) for text in completions]

    config = GRPOConfig(
        output_dir=asked["folder"],
        use_cpu=True,
        gradient_accumulation_steps=samples // micro,
        num_generations=asked["num_generations"],
        max_completion_length=asked["max_completion_length"],
        learning_rate=asked["learning_rate"],
        lr_scheduler_type="constant",
        max_steps=total,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        beta=0.0,
        seed=asked["seed"],
        **length_options(asked),
        **options,
    )
    trainer = GRPOTrainer(
        model=asked["model"],
        reward_funcs=reward,
        args=config,
        train_dataset=Dataset.from_list([{"prompt": p} for p in work.prompts(asked["num_prompts"] * total)]),
        callbacks=[Watch()],
    )
    generate = trainer._generate

    def noted(prompts: list) -> tuple:
        made = generate(prompts)
        steps.note(prompt_tokens=sum(map(len, made[0])), lengths=[len(ids) for ids in made[1]])
        return made

    trainer._generate = steps.timed("rollout", noted)
    trainer._calculate_rewards = steps.timed("reward", trainer._calculate_rewards)
    trainer.train()
    protocol.answer(steps, ["torch", "trl", "transformers", "accelerate"], threads=torch.get_num_threads())


if __name__ == "__main__":
    main()

"""PPO of TRL 1.12, the last with one, on the shared work, in its own process and environment.

Policy, reference, reward and value are four networks; reward and value start from one folder. The generation has the
full length: TRL's `stop_token` stays None, its default. settings["precision"]: float32; autocast (TRL's `bf16` reaches
its Accelerator only through the environment); or bfloat16 weights. rollout: `batch_generation`. reward: `get_reward` of
the reward network. update: the rest, the reference's and the critic's scores included.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

from benchmarks.speed import protocol, work


def main() -> None:
    """Train and write the result."""
    asked, steps = protocol.settings(), protocol.Steps()
    torch.set_num_threads(asked["threads"])
    options = dict(asked["options"])
    precision = options.pop("precision")
    if precision == "autocast":
        os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    total = asked["warmup"] + asked["steps"]
    micro = min(8, asked["num_prompts"])
    tokenizer = AutoTokenizer.from_pretrained(asked["model"], padding_side="left")
    if tokenizer.pad_token_id == tokenizer.eos_token_id:  # else an end inside a completion would count as padding
        tokenizer.pad_token = tokenizer.unk_token

    class Watch(TrainerCallback):
        def on_train_begin(self, *_: object, **__: object) -> None:
            steps.begin()

        def on_step_end(self, *_: object, **__: object) -> None:
            steps.end()

    config = PPOConfig(
        output_dir=asked["folder"],
        use_cpu=True,
        bf16=precision == "autocast",
        gradient_checkpointing=False,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=asked["num_prompts"] // micro,
        num_ppo_epochs=asked["num_epochs"],
        num_mini_batches=1,
        total_episodes=asked["num_prompts"] * total,
        response_length=asked["max_completion_length"],
        learning_rate=asked["learning_rate"],
        lr_scheduler_type="constant",
        kl_coef=asked["kl_coef"],
        temperature=1.0,
        num_sample_generations=0,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        seed=asked["seed"],
        **options,
    )

    def classifier() -> Any:
        return AutoModelForSequenceClassification.from_pretrained(asked["reward_model"], num_labels=1, dtype=dtype)

    reward_model = classifier()
    generate, score = ppo_trainer.batch_generation, ppo_trainer.get_reward
    score_reward = steps.timed("reward", score)

    def noted(model: Any, queries: torch.Tensor, *more: Any) -> tuple[torch.Tensor, torch.Tensor]:
        made = generate(model, queries, *more)
        length = made[0].shape[1] - queries.shape[1]
        steps.note(prompt_tokens=int((queries != tokenizer.pad_token_id).sum()), lengths=[length] * queries.shape[0])
        return made

    def get_reward(model: Any, *more: Any) -> Any:
        return (score_reward if model is reward_model else score)(model, *more)

    ppo_trainer.batch_generation = steps.timed("rollout", noted)
    ppo_trainer.get_reward = get_reward
    encoded = [{"input_ids": tokenizer(p)["input_ids"]} for p in work.prompts(asked["num_prompts"] * total)]
    trainer = PPOTrainer(
        args=config,
        processing_class=tokenizer,
        model=AutoModelForCausalLM.from_pretrained(asked["model"], dtype=dtype),
        ref_model=AutoModelForCausalLM.from_pretrained(asked["model"], dtype=dtype),
        reward_model=reward_model,
        value_model=classifier(),
        train_dataset=Dataset.from_list(encoded),
        callbacks=[Watch()],
    )
    trainer.train()
    protocol.answer(steps, ["torch", "trl", "transformers", "accelerate"], threads=torch.get_num_threads())


if __name__ == "__main__":
    main()

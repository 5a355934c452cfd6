"""One training run of TRL in its own process and environment; talks JSON files. Knows nothing of upslope.

    python benchmarks/trl_worker.py settings.json result.json

settings: trainer (grpo | rloo), model, prompts, reward (a function of benchmarks/sums_task.py), and the options below.
result: {"steps": [{"reward", "seconds"}]}: mean reward of the step's samples, seconds since training began.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from pathlib import Path


def main() -> None:
    """Train and write the result."""
    settings = json.loads(Path(sys.argv[1]).read_text())
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

    torch.set_num_threads(settings["threads"])
    spec = importlib.util.spec_from_file_location("sums_task", Path(__file__).parent / "sums_task.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    judge = getattr(module, settings["reward"])

    def reward(prompts: list[str], completions: list[str], **_: object) -> list[float]:
        return [judge(p, c) for p, c in zip(prompts, completions, strict=True)]

    steps: list[dict[str, float]] = []

    class Watch(TrainerCallback):
        def on_train_begin(self, *_: object, **__: object) -> None:
            self.started = time.perf_counter()

        def on_log(self, args: object, state: object, control: object, logs: dict | None = None, **_: object) -> None:
            if logs and "reward" in logs:
                steps.append({"reward": float(logs["reward"]), "seconds": time.perf_counter() - self.started})

    grpo = settings["trainer"] == "grpo"
    config = (GRPOConfig if grpo else RLOOConfig)(
        output_dir=settings["folder"],
        use_cpu=True,
        bf16=settings["bf16"],
        gradient_checkpointing=False,
        per_device_train_batch_size=settings["num_prompts"] * settings["num_generations"],
        num_generations=settings["num_generations"],
        max_completion_length=settings["max_completion_length"],
        learning_rate=settings["learning_rate"],
        lr_scheduler_type="constant",
        max_grad_norm=1e6,
        weight_decay=0.0,
        max_steps=settings["max_steps"],
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        beta=0.0,
        seed=settings["seed"],
    )
    trainer = (GRPOTrainer if grpo else RLOOTrainer)(
        model=settings["model"],
        reward_funcs=reward,
        args=config,
        train_dataset=Dataset.from_list([{"prompt": p} for p in settings["prompts"]]),
        callbacks=[Watch()],
    )
    trainer.train()
    Path(sys.argv[2]).write_text(json.dumps({"steps": steps}))


if __name__ == "__main__":
    main()

"""TRL's GRPO on a GPU, in its own process and environment: benchmarks/speed/trl_grpo_worker.py off the processor.

python -m benchmarks.gpu_trl settings.json result.json
"""

from __future__ import annotations

from typing import Any

import torch
from trl import GRPOConfig

from benchmarks.speed import trl_grpo_worker


def config(**options: Any) -> GRPOConfig:
    """GRPOConfig with the accelerator that there is."""
    return GRPOConfig(**{**options, "use_cpu": not torch.cuda.is_available()})


if __name__ == "__main__":
    trl_grpo_worker.GRPOConfig = config
    trl_grpo_worker.main()

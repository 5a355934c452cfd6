"""Rollouts of vLLM on a CPU with the log-prob of every sampled token, in its own process and environment.

Its engine runs in this process (no second one to talk to) and computes on as many cores as ours; `logprobs=0` asks for
the sampled token's alone. Compilation happens before the first round.
"""

from __future__ import annotations

import os
import time

from benchmarks.speed import protocol


def main() -> None:
    """Generate each round of prompts and write the result."""
    asked, steps = protocol.settings(), protocol.Steps()
    cores = sorted(os.sched_getaffinity(0))[: asked["threads"]]
    os.environ |= {
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
    }
    from vllm import LLM, SamplingParams

    rounds = asked["prompts"]
    llm = LLM(
        model=asked["model"],
        dtype="bfloat16",
        max_model_len=2 * (len(rounds[0][0]) + asked["max_completion_length"]),
        seed=asked["seed"],
        disable_log_stats=True,
        **asked["options"],
    )
    params = SamplingParams(temperature=1.0, max_tokens=asked["max_completion_length"], ignore_eos=True, logprobs=0)
    for prompts in rounds:
        given = [{"prompt_token_ids": ids} for ids in prompts]
        steps.begin()
        began = time.perf_counter()
        done = llm.generate(given, params, use_tqdm=False)
        steps.add("rollout", time.perf_counter() - began)
        outputs = [one.outputs[0] for one in done]
        assert all(len(o.logprobs) == len(o.token_ids) for o in outputs)
        steps.note(prompt_tokens=sum(map(len, prompts)), lengths=[len(o.token_ids) for o in outputs])
        steps.end()
    import torch

    protocol.answer(steps, ["torch", "vllm-cpu", "transformers"], threads=torch.get_num_threads())


if __name__ == "__main__":
    main()

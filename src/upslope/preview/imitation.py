"""`--dry-run` of the recipes that imitate samples: expert iteration and distillation."""

from __future__ import annotations

from collections.abc import Sequence

from upslope.build import Policy, load_policy
from upslope.data.chat import encode_prompt
from upslope.loop.kept import DataAccount, within_context
from upslope.loop.plan import in_steps, plan_of
from upslope.loop.prompts import ask
from upslope.options import DistillOptions, ExpertOptions
from upslope.preview import dry_run
from upslope.preview.dry_run import Prediction, probe
from upslope.preview.task import check_held_out, judge_one
from upslope.recipes.expert_data import groups_of_run, load_mix
from upslope.recipes.policy_gradient import judge_of
from upslope.tasks.loading import load_task
from upslope.types import Completion, Example

__all__ = ["predict_imitation", "show_imitation"]


def show_imitation(options: ExpertOptions | DistillOptions) -> int:
    """Print what an expert or distill run would do."""
    options = in_steps(options)
    policy = load_policy(options)
    if isinstance(options, ExpertOptions):
        return _show_expert(options, policy)
    prompts, given, held_out, account = _material(options, policy)
    prediction, _ = predict_imitation(options, policy, prompts, given)
    example = given[0] if given else Example(prompts[0], [False] * len(prompts[0]))
    dry_run.report(options, policy, example, plan_of(options), prediction, held_out, account)
    return 0


def _show_expert(options: ExpertOptions, policy: Policy) -> int:
    task = load_task(options.task)
    with judge_of(options, policy, task) as judge:
        asked = ask(options, policy, task)
        _, mixed = load_mix(within_context(options, policy), policy.tokenizer)
        if options.from_run is not None:
            vocabulary = policy.model.spec.vocab_size
            groups_of_run(options.from_run, vocabulary=vocabulary, tokenizer=policy.tokenizer)
        prompts = [encode_prompt(policy.tokenizer, prompt) for prompt in asked.train[: options.num_prompts]]
        prediction, sampled = predict_imitation(options, policy, prompts, [])
        judged = judge_one(judge, asked.train[0], prompts[0], sampled[0])
    example, held_out = Example(prompts[0], [False] * len(prompts[0])), len(asked.held_out)
    account = DataAccount({**asked.account.splits, **mixed.splits})
    dry_run.report(
        options, policy, example, plan_of(options), prediction, held_out, account, asked=asked, judged=judged
    )
    return 0


def _material(options: DistillOptions, policy: Policy) -> tuple[list[list[int]], list[Example], int, DataAccount]:
    """Encoded prompts to answer, given training sequences, the number of held-out problems or rows, the account."""
    from upslope.recipes.distill_data import load_items, with_room

    task = load_task(options.task) if options.task is not None else None
    found = load_items(within_context(options, policy), policy.tokenizer, task)
    items, held_out, account, _ = with_room(options, policy, *found)
    asked = items[: options.num_prompts] if options.on_policy_fraction else []
    prompts = [encode_prompt(policy.tokenizer, i.prompt, tools=i.tools) for i in asked if i.prompt is not None]
    given = [item.example for item in items if item.example is not None]
    held = check_held_out(options, policy, task) if task is not None else None
    return prompts, given, len(held_out if held is None else held.rows), account.and_held_out(held)


def predict_imitation(
    options: ExpertOptions | DistillOptions, policy: Policy, prompts: Sequence[list[int]], given: Sequence[Example]
) -> tuple[Prediction, list[list[Completion]]]:
    """Memory and time per optimizer step, from a probe that samples a few completions and trains on them; these, too.

    Sampling of an expert's round is spread over its steps; a teacher's forward pass is taken to cost as much per
    parameter as the student's.
    """
    plan = plan_of(options)
    seconds, sampled = dry_run.probe_sampling(options, policy, prompts) if prompts else (0.0, [])
    examples = dry_run.sampled_examples(prompts, sampled) if sampled else list(given[:64])
    cost = probe(policy, examples, head=None, budget=options.micro_batch_tokens)
    per_step = plan.sequences_per_step * sum(len(e.tokens) for e in examples) / len(examples)
    step = per_step * cost.train_seconds + dry_run.update_seconds(policy)
    extra = 0.0
    if isinstance(options, ExpertOptions):
        step += seconds / options.train_steps
        extra = 4.0 * sum(p.numel() for p in policy.model.parameters() if p.requires_grad) if options.restart else 0.0
    else:
        from upslope.recipes.distill import load_teacher

        teacher = load_teacher(str(options.teacher), policy)
        ratio = teacher.spec.parameters / policy.model.spec.parameters
        step += seconds + per_step * cost.forward_seconds * ratio
    longest = max(map(len, prompts), default=0) + options.max_completion_length
    extra += dry_run.cache_bytes(policy, plan, longest)
    memory = dry_run.update_memory_gb(policy, cost, min(options.micro_batch_tokens, per_step), more=extra)
    return Prediction(memory, step, step * options.max_steps), sampled

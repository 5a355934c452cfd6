"""`--dry-run`: look at data, mask, shapes, memory and time before a run is paid for.

The learner is made as the run makes it, for steps of a few rows or prompts; one of them is really made, and memory
and time are extrapolated from it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain, groupby
from math import ceil
from typing import TYPE_CHECKING, Any

from upslope.data.chat import encode_prompt
from upslope.evaluation.verdicts import evaluate
from upslope.loop.expert_rows import groups_of_run
from upslope.loop.launch import begin
from upslope.loop.prompts import held_out_groups
from upslope.options import DistillOptions, ExpertOptions, PretrainOptions, RLOptions, RunOptions, SFTOptions
from upslope.preview.plan import plan_of
from upslope.preview.probe import Trial
from upslope.recipes import recipe_of
from upslope.types import Example

Items = list[list[Example]]

_LITTLE = {"batch_size": 8, "num_prompts": 4, "num_generations": 4, "train_steps": 1}
_LITTLE |= {"num_iterations": 1, "num_minibatches": 1, "value_pretraining_steps": 0, "rollout_lag": 1}
"""The most that the small run has of what an option counts."""


def run(options: RunOptions) -> int:
    """Print what a run would do: on standard output, in words or as JSON. The run folder is left alone."""
    recipe, small = recipe_of(options), little(options)
    with begin(options), recipe.make_learner(small) as learner:
        items = _SHOWN.get(recipe.verb, _prompts)(learner)
        judged = _judged(learner) if isinstance(options, RLOptions) else None
        _check(options, learner)
        prediction = Trial(options, small, learner, items).predict()
    account, plan = learner.account, plan_of(options, examples=learner.order.n)
    held_out = sum(split.rows for name, split in account.splits.items() if name in ("eval", "dev"))
    model, tokenizer, facts = _model(learner)
    if options.json:
        said: dict[str, Any] = {"prediction": asdict(prediction), "plan": asdict(plan), "model": facts}
        said |= {"parameters": facts["parameters"], "held_out": held_out, "data": account.facts()}
        said |= {"train_prompts": len(items), "judged": judged} if judged is not None else {}
        print(json.dumps(said))
        return 0
    from rich.console import Console

    console = Console()
    if any(any(example.mask) for example in items[0]):
        print(statistics([*chain.from_iterable(items)]), file=sys.stderr)
    console.print(mask_view(items[0][0], tokenizer))
    console.print(model)
    held = f"{held_out:,} held-out sample{'s' * (held_out != 1)}" if held_out else "nothing: no rows are held out"
    for line in plan.words:
        console.print(f"- {line.replace(f'up to {options.eval_samples} samples', held)}")
    facts = account.facts() if account.further else {}
    lines = [*(f"{name}: {value}" for name, value in facts.items()), *account.lines(), *_words(learner, items)]
    for line in [*lines, *(_judgement(judged) if judged is not None else ())]:
        console.print(f"- {line}", markup=False, soft_wrap=True)
    console.print(
        f"- Predicted: {prediction.memory_gb:.1f} GB at the peak, {prediction.step_seconds:.2f} s per step, "
        f"{prediction.run_seconds / 60:.1f} min without evaluation."
    )
    return 0


def little(options: Any) -> Any:
    """The options of a run of the same data and models whose first step is small, and meets no bad luck.

    A few completions may all be cut off, or none be good enough to imitate: none of them is left out.
    """
    changes: dict[str, Any] = {n: min(most, getattr(options, n)) for n, most in _LITTLE.items() if hasattr(options, n)}
    changes["max_steps"] = 2
    if hasattr(options, "num_epochs"):
        changes["num_epochs"] = 1 if isinstance(options, RLOptions) else None
    if isinstance(options, PretrainOptions):
        changes["batch_size"] = min(options.batch_size, max(1, 512 // options.context_length))
    if isinstance(options, DistillOptions) and options.on_policy_fraction:
        changes["num_prompts"] = min(options.num_prompts, max(4, ceil(1 / options.on_policy_fraction)))
    if getattr(options, "objective", None) == "minimum_risk":
        changes["num_samples"] = min(options.num_samples, 4)
    if getattr(options, "truncated", None) == "mask":
        changes["truncated"] = "terminate"
    if hasattr(options, "dynamic_sampling"):
        changes["dynamic_sampling"] = False
    if isinstance(options, ExpertOptions):
        changes |= {"num_rounds": None, "from_run": None, "keep": "best", "threshold": None}
    return replace(options, **changes)


def _check(options: RunOptions, learner: Any) -> None:
    """What the run will ask for later than its first step: rollouts of another run, the task's verdicts.

    DataError, in place of the run's: the rollouts are not the model's, or there is no verdict.
    """
    if isinstance(options, ExpertOptions) and options.from_run is not None:
        policy = learner.policy
        groups_of_run(options.from_run, vocabulary=policy.model.spec.vocab_size, tokenizer=policy.tokenizer)
    if isinstance(options, SFTOptions | DistillOptions) and options.task is not None and options.eval_samples:
        samples = min(2, options.eval_samples)
        evaluate(held_out_groups(learner.policy, learner.task, samples, options.max_completion_length))


def _prompts(learner: Any) -> Items:
    """Prompts as sequences of which nothing is trained on yet."""
    return [[_asked(learner, prompt)] for prompt in learner.sampler.prompts]


def _asked(learner: Any, prompt: Any, **more: Any) -> Example:
    tokens = encode_prompt(learner.policy.tokenizer, prompt, **more)
    return Example(tokens, [False] * len(tokens))


def _windows(learner: Any) -> Items:
    """A few windows of text; of an encoder with their hidden tokens as what is trained on."""
    if hasattr(learner, "encoder"):
        return [[_labelled(x)] for x in learner.inputs()]
    o, texts = learner.options, learner.texts.train
    windows = [texts.window(i, o.context_length) for i in range(min(learner.order.n, o.batch_size))]
    return [[Example(tokens, [place > 0 for place in range(len(tokens))])] for tokens in windows]


def _labelled(x: Any) -> Example:
    """The tokens that carry a label are the trained ones (the first where the text carries it)."""
    carrying = set(x.places or [0])
    return Example(x.tokens, [i in carrying for i in range(len(x.tokens))])


def _answered(learner: Any) -> Items:
    """Given training sequences where there are some, else prompts."""
    given = [[item.example] for item in learner.items if item.example is not None]
    return given or [[_asked(learner, item.prompt, tools=item.tools)] for item in learner.items]


_SHOWN: dict[str, Callable[[Any], Items]] = {
    "pretrain": _windows,
    "sft": lambda learner: [[example] for example in learner.train_examples],
    "seq2seq": lambda learner: [[example] for example in learner.examples],
    "distill": _answered,
    **dict.fromkeys(("dpo", "reward"), lambda learner: [list(unit.examples) for unit in learner.units]),
    **dict.fromkeys(("classify", "tag"), lambda learner: [[_labelled(x) for x in row] for row in learner.rows]),
}
"""What is shown of a verb's learner: its rows, each with its sequences (prompts where nothing is said)."""


def _words(learner: Any, items: Items) -> list[str]:
    """Further lines about the data."""
    if hasattr(learner, "sampler"):
        held_out = [_asked(learner, prompt) for prompt in learner.sampler.eval_prompts]
        longest = max(len(example.tokens) for example in [*chain.from_iterable(items), *held_out])
        return [f"{len(items):,} problems to train on and {len(held_out):,} held out; the longest: {longest} tokens."]
    if hasattr(learner, "rows"):
        return [f"labels of these items: {' '.join(map(learner.name_of, learner.rows[0][0].targets))}"]
    return []


def _model(learner: Any) -> tuple[str, Any, dict[str, Any]]:
    """The network in words, its tokenizer, and its sizes."""
    encoder = getattr(learner, "encoder", None)
    if encoder is None:
        model, tokenizer = learner.policy.model, learner.policy.tokenizer
        spec, dtype = model.spec, str(model.dtype).removeprefix("torch.")
        said = f"{spec.parameters:,} parameters, {spec.num_layers} layers, width {spec.hidden_size}, {dtype}"
        return f"model: {said}", tokenizer, asdict(spec)
    parameters, dtype = sum(p.numel() for p in encoder.parameters()), str(encoder.dtype).removeprefix("torch.")
    facts = {"parameters": parameters, "vocab_size": len(learner.tokenizer)}
    return f"model: {encoder.config.model_type}, {parameters:,} parameters, {dtype}", learner.tokenizer, facts


def _judged(learner: Any) -> dict[str, Any]:
    """One prompt's completions, sampled and judged as the run will: the first that was judged, how many could not be.

    DataError: not one of them could be.
    """
    (group,), said = learner.sampler.sample(0, count=1)
    known = next(r for r in group.rollouts if r.reward.value is not None)
    errors = [r.reward.error or "not judged" for r in group.rollouts if r.reward.value is None]
    found = {"completion": known.text, "reward": known.reward.value, "parts": dict(known.reward.parts)}
    counts = {"judged": len(group.rollouts), "errors": len(errors), "first_error": "".join(errors[:1])}
    return {**found, **counts, "seconds": said["seconds/reward"]}


def _judgement(found: Mapping[str, Any]) -> list[str]:
    """What `_judged` found, in words."""
    parts = ", ".join(f"{name} {value:.4g}" for name, value in found["parts"].items())
    said = f"Reward of the completion {found['completion']!r:.80}: {found['reward']:.4g}" + f" ({parts})" * bool(parts)
    lines = [f"{said}; {found['judged']} judged in {found['seconds']:.2f} s."]
    lost = f"{found['errors']} of them could not be judged: {found['first_error']}"
    return [*lines, lost] if found["errors"] else lines


if TYPE_CHECKING:
    from rich.text import Text
    from transformers import PreTrainedTokenizerBase

OPEN, CLOSE, BORDER = "⟦", "⟧", "·"


def mask_view(example: Example, tokenizer: PreTrainedTokenizerBase) -> Text:
    """Every token of an example, trained ones bold green between ⟦ and ⟧, others dim; "·" stands between tokens.

    The brackets tell them apart where there is no colour; `str(mask_view(...))` is that text.
    """
    from rich.text import Text

    view = Text()
    shown = [_shown(token, tokenizer) for token in example.tokens]
    for trained, run in groupby(zip(example.mask, shown, strict=True), key=lambda pair: bool(pair[0])):
        pieces = [piece for _, piece in run]
        if trained:
            view.append(OPEN + BORDER.join(pieces) + CLOSE, style="bold green")
        else:
            view.append(BORDER.join(pieces), style="dim")
    return view


def _shown(token: int, tokenizer: PreTrainedTokenizerBase) -> str:
    text = tokenizer.decode([token])
    if "\ufffd" in text or not text:  # part of a character, or a token that is no text by itself
        text = str(tokenizer.convert_ids_to_tokens(token))
    return text.replace("\r", "␍").replace("\t", "⇥").replace("\n", "⏎\n")


@dataclass(frozen=True, slots=True)
class DataStatistics:
    """Sizes of a list of examples. `histogram`: (lowest length, highest length, number of sequences) per bin."""

    sequences: int
    tokens: int
    trained: int
    shortest: int
    mean: float
    longest: int
    histogram: list[tuple[int, int, int]]

    @property
    def trained_share(self) -> float:
        """Trained tokens over all tokens."""
        return self.trained / self.tokens

    def __str__(self) -> str:
        most = max(count for _, _, count in self.histogram)
        width = len(str(self.longest))
        bars = [
            f"  {low:>{width}}-{high:<{width}} {'█' * round(30 * count / most):<30} {count}"
            for low, high, count in self.histogram
        ]
        return "\n".join(
            [
                f"{self.sequences:,} sequences, {self.tokens:,} tokens, {self.trained:,} trained "
                f"({100 * self.trained_share:.1f}%)",
                f"length {self.shortest} to {self.longest}, mean {self.mean:.1f}",
                *bars,
            ]
        )


def statistics(examples: Sequence[Example], *, bins: int = 8) -> DataStatistics:
    """Length histogram (at most `bins` equally wide bins) and trained share. Raises ValueError without examples."""
    if not examples or bins < 1:
        raise ValueError(f"statistics: {len(examples)} examples in {bins} bins")
    lengths = [len(example.tokens) for example in examples]
    low, high = min(lengths), max(lengths)
    width = -(-(high - low + 1) // bins)
    histogram = []
    for start in range(low, high + 1, width):
        end = min(start + width - 1, high)
        histogram.append((start, end, sum(start <= length <= end for length in lengths)))
    return DataStatistics(
        sequences=len(examples),
        tokens=sum(lengths),
        trained=sum(sum(map(bool, example.mask)) for example in examples),
        shortest=low,
        mean=sum(lengths) / len(lengths),
        longest=high,
        histogram=histogram,
    )

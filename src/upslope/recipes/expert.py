"""Expert iteration: imitate the best of one's own samples (1705.08439; RAFT 2304.06767; RFT 2308.01825).

    for each round:
        sample K completions of each of P prompts from pi; judge them
        keep = those with R >= threshold, or the best of each prompt, or the best share of all;
               equal ones once, at most max_per_prompt of a prompt
        if restart: pi = the start model                                  (ReST-EM, 2312.06585)
        for each of train_steps batches of kept samples (and mix_data):
            loss = -sum_t log pi(a_t | s_t) / N                           N trained tokens of the batch
            AdamW step

With 0/1 rewards and normalizer = sample, a step over all kept samples has the gradient of REINFORCE without baseline:
there is no negative signal, and prompts weigh by how many of their samples are right.

Every training row and where it came from is in samples_round_K.jsonl of the run folder.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from upslope.build import Policy
from upslope.data.batching import PromptStream
from upslope.errors import DataError
from upslope.evaluation.behaviour import diversity
from upslope.loop.expert_rows import Candidate, Row, groups_of_run, load_mix, read_rows, row_of, select, write_rows
from upslope.loop.kept import DataAccount, within_context
from upslope.loop.learner import RolloutLearner
from upslope.loop.session import Recipe
from upslope.options import ExpertOptions
from upslope.rewards.judge import reward_metrics
from upslope.training.experience import Experience, shaped_rewards
from upslope.training.optim import rate_at
from upslope.training.stopping import StepResult
from upslope.types import Batch, Example, RolloutGroup


class Expert(RolloutLearner):
    """A step is one optimizer step; a round's sampling and selection happen inside its first step."""

    options: ExpertOptions

    def __init__(self, options: ExpertOptions, policy: Policy) -> None:
        super().__init__(options, policy)
        self.updater.learning_rate = self.learning_rate
        self.kept: list[Row] = []
        self.corpus: list[Row] = []
        self.acceptance = 1.0
        self.file: dict[str, str] = {}
        self.mix, mixed = load_mix(within_context(options, policy), policy.tokenizer)
        self.account = DataAccount({**self.account.splits, **mixed.splits})
        self.mix_order = PromptStream(len(self.mix), seed=options.seed) if self.mix else None
        self.start = {n: x.clone() for n, x in self.optimizer.weights().items()} if options.restart else {}

    def step(self, step: int) -> StepResult:
        """At a round's first step: sample, select. Then one batch of kept samples, one update."""
        o = self.options
        round_, place = divmod(step, o.train_steps)
        metrics = self.begin_round(step, round_) if place == 0 else {}
        started = time.perf_counter()
        rows, new = self._rows_of_batch(round_, place)
        trained = sum(sum(row.example.mask) for row in rows)
        metrics |= self.update(step, self._batches(rows, new, trained), self.likelihood)
        self.weights_moved()
        metrics["round"] = round_ + 1.0
        metrics["seconds/update"] = time.perf_counter() - started
        tokens = sum(len(row.example.tokens) for row in rows)
        return StepResult(
            {**metrics, "num_tokens": float(trained), "tokens_per_second": tokens / metrics["seconds/update"]}, trained
        )

    def learning_rate(self, step: int) -> float:
        """The schedule over the whole run, or, where every round starts anew, over the round."""
        o = self.options
        if not o.restart:
            return rate_at(o, step)
        return rate_at(replace(o, max_steps=min(o.train_steps, o.max_steps)), step % o.train_steps)

    def begin_round(self, step: int, round_: int) -> dict[str, float]:
        """Sample and judge, keep what is good, write it down; with `restart` go back to the start model."""
        o = self.options
        groups, places, metrics = self._samples(step, round_)
        experience = Experience.of(groups)
        values_B, shaping = shaped_rewards(experience, self.options)
        candidates = [
            Candidate(groups[g].prompt, rollout, value)
            for g, rollout, value in zip(experience.group_B, experience.rollouts, values_B.tolist(), strict=True)
        ]
        chosen = select(candidates, o)
        metrics |= reward_metrics(groups) | shaping | _report(candidates, chosen, seed=o.seed)
        if not chosen:
            cut = sum(c.rollout.finish_reason == "length" for c in candidates)
            raise DataError(
                f"round {round_ + 1}: none of {len(candidates)} samples is good enough to imitate (best reward "
                f"{max(c.value for c in candidates):.4g}, {cut} cut off by max_completion_length): lower threshold, "
                "sample more, or start from a model that gets some right"
            )
        origin = {id(r): place for r, place in zip((r for g in groups for r in g.rollouts), places, strict=False)}
        self.kept = [row_of(c, round_ + 1, **origin.get(id(c.rollout), {})) for c in chosen]
        self.acceptance = len(chosen) / len(candidates)
        self.corpus = []
        if self.mix_order is not None:
            drawn = [self.mix[i] for i in self.mix_order.take(self._mixed(o.train_steps))]
            self.corpus = [Row(row.example, {**row.origin, "round": round_ + 1}) for row in drawn]
        self._write(round_)
        if self.run is not None and not places:
            imitated = {id(c.rollout) for c in chosen}
            flags = [float(id(r) in imitated) for g in groups for r in g.rollouts]
            self.run.record_rollouts(step + 1, groups, advantages=flags)
        if o.restart and round_:
            self.optimizer.load(self.start, {})
            self.weights_moved()
        return metrics

    def _samples(self, step: int, round_: int) -> tuple[list[RolloutGroup], list[dict[str, Any]], dict[str, float]]:
        """Judged groups; from another run also where each rollout stands in it."""
        folder = self.options.from_run
        if folder is None or round_:
            groups, metrics = self.sampler.sample(step)
            return groups, [], metrics
        vocabulary = self.policy.model.spec.vocab_size
        groups, places = groups_of_run(folder, vocabulary=vocabulary, tokenizer=self.policy.tokenizer)
        return groups, places, {}

    def _mixed(self, batches: int) -> int:
        """How many corpus rows the first `batches` batches of a round hold together."""
        return int(batches * self.options.batch_size * self.options.mix_ratio + 1e-9)

    def _rows_of_batch(self, round_: int, place: int) -> tuple[list[Row], int]:
        """Batch `place` of the round, a pure function of the round's rows; its first `new` rows are samples."""
        o = self.options
        low, high = self._mixed(place), self._mixed(place + 1)
        new = o.batch_size - (high - low)
        order = PromptStream(len(self.kept), seed=o.seed * 1009 + round_)
        before = place * o.batch_size - low
        rows = [self.kept[order.at(before + i)] for i in range(new)]
        return rows + self.corpus[low:high], new

    def _batches(self, rows: Sequence[Row], new: int, trained: int) -> list[Batch]:
        o = self.options
        examples = []
        for i, row in enumerate(rows):
            count = sum(row.example.mask)
            # The kept stand for all candidates: those left out have reward 0 and add nothing but their number.
            weight = (self.acceptance if i < new else 1.0) / len(rows) if o.normalizer == "sample" else 1 / trained
            examples.append(Example(row.example.tokens, row.example.mask, {"weight": torch.full((count,), weight)}))
        return self.micro_batches(examples)[0]

    def _write(self, round_: int) -> None:
        if self.run is None:
            return
        name = f"samples_round_{round_ + 1}.jsonl"
        self.file = {"name": name, "sha256": write_rows(self.run.folder / name, [*self.kept, *self.corpus])}

    def trained_on(self) -> tuple[Any, Iterator[Any]]:
        """The tokenizer, the prompts and the rows of mix_data, for the fingerprint."""
        tokenizer, prompts = super().trained_on()
        return tokenizer, chain(prompts, ((row.example.tokens, row.example.mask) for row in self.mix))

    def state(self) -> dict[str, Any]:
        """Data positions, weight version, and the file with the round's rows."""
        mix = self.mix_order.state_dict() if self.mix_order is not None else None
        return {**super().state(), "mix": mix, "file": self.file, "acceptance": self.acceptance}

    def load(self, model: Path, tensors: dict[str, dict[str, Tensor]], state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint, the round's rows from their file."""
        super().load(model, tensors, state)
        if self.mix_order is not None:
            self.mix_order.load_state_dict(state["mix"])
        self.acceptance, self.file = state["acceptance"], dict(state["file"])
        if self.file:
            assert self.run is not None
            rows = read_rows(self.run.folder / self.file["name"], self.file["sha256"])
            self.kept = [row for row in rows if row.origin["source"] == "sample"]
            self.corpus = [row for row in rows if row.origin["source"] == "corpus"]


def _report(candidates: Sequence[Candidate], chosen: Sequence[Candidate], *, seed: int) -> dict[str, float]:
    """How good and how varied the kept samples are beside all of them."""
    prompts = {c.prompt.key for c in candidates}
    metrics = {
        "expert/candidates": float(len(candidates)),
        "expert/kept": float(len(chosen)),
        "expert/kept_share": len(chosen) / len(candidates),
        "expert/prompts_kept": len({c.prompt.key for c in chosen}) / len(prompts),
        "expert/reward_all": sum(c.value for c in candidates) / len(candidates),
    }
    if chosen:
        metrics["expert/reward_kept"] = sum(c.value for c in chosen) / len(chosen)
    for name, some in (("all", candidates), ("kept", chosen)):
        numbers = diversity([c.rollout.text for c in some], seed=seed)
        metrics |= {f"expert/{name}/{key}": value for key, value in numbers.items()}
    return metrics


expert = Recipe("expert", Expert.of)

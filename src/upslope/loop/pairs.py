"""What both objectives of `upslope seq2seq` share: the pairs, the network from random weights, held-out measurement."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from upslope.build import Policy, load_policy, make_engine
from upslope.data.chat import encode_completion
from upslope.data.pieces import PairTokenizer
from upslope.data.train_tokenizer import train_tokenizer
from upslope.errors import ConfigError, DataError
from upslope.evaluation.measurement import Measurement
from upslope.evaluation.verdicts import evaluate
from upslope.loop.fingerprint import prompt_row
from upslope.loop.kept import BEYOND, DataAccount, Split, tell_task, too_long
from upslope.loop.learner import PolicyLearner
from upslope.models.files.loading import save_model
from upslope.models.seq2seq.layers import Seq2SeqConfig
from upslope.models.seq2seq.network import Seq2Seq
from upslope.options.supervised import SCRATCH, Seq2SeqOptions
from upslope.rewards.functions import nearest, references_of, similarity
from upslope.rewards.judge import Judge
from upslope.rollout import collect
from upslope.runs.progress import counted
from upslope.tasks.base import Task, load_task, prompts_of
from upslope.tasks.pairs import Pairs, count_pairs
from upslope.training import checkpoint
from upslope.training.step import score
from upslope.training.stopping import Evaluation
from upslope.types import Example, Prompt, Reward, RolloutGroup, SamplingParams
from upslope.workers.rewards import make_scorer

_DROPOUT = 0.1
_SPECIALS = ("</s>", "<pad>")
"""The end of either side, and the padding token, which also begins the target as in Marian."""


@dataclass(frozen=True, slots=True)
class PairData:
    """The task, its training pairs (problem, one target each), its held-out problems, and what it left out of both.

    lent: pairs of the training source that are held out.
    """

    task: Task
    train: list[tuple[Prompt, str]]
    held_out: list[Prompt]
    sources: tuple[str, str]
    dropped: Mapping[str, Mapping[str, int]] = field(default_factory=lambda: {"train": {}, "eval": {}})
    lent: int = 0

    @classmethod
    def of(cls, options: Seq2SeqOptions) -> PairData:
        """Read `--data` (every row; a source with several targets gives several pairs) or take from `--task`."""
        o = options
        if o.task is not None:
            task = load_task(o.task)
            train = [(p, _target(task, p)) for p in prompts_of(task, "train", o.num_examples, seed=o.seed)]
            held_out = prompts_of(task, "eval", o.eval_samples, seed=0) if o.eval_samples else []
            tell_task(task, o.eval_samples)
            return cls(task, train, held_out, (f"task {task.name}", f"task {task.name}, held out"))
        files = {"path": o.data} | ({"eval_path": o.eval_data} if o.eval_data else {})
        files |= {"columns": ";".join(o.columns)} if o.columns else {}
        pairs = load_task("pairs", **files)
        assert isinstance(pairs, Pairs)
        prompts = pairs.prompts("train", max(1, pairs.size("train")), seed=o.seed)
        aside = pairs.prompts("eval", pairs.size("eval"), seed=0)
        held_out = aside[: o.eval_samples]
        lost = {"train": pairs.dropped("train"), "eval": dict(pairs.dropped("eval"))}
        if len(aside) > len(held_out):
            lost["eval"][BEYOND] = len(aside) - len(held_out)
        train = [(p, target) for p in prompts for target in references_of(p)]
        sources = (str(o.data), o.eval_data or f"{o.data}, held out")
        return cls(pairs, train, held_out, sources, lost, 0 if o.eval_data else count_pairs(aside))


def _target(task: Task, prompt: Prompt) -> str:
    if prompt.text is None:
        raise ConfigError(
            f"task '{task.name}' asks in conversations; an encoder-decoder reads plain texts: take a task such as "
            "phonemes or pairs:path=..., or fine-tune a decoder with upslope sft"
        )
    return task.demonstration(prompt)[-1].content


def start_policy(options: Seq2SeqOptions, data: PairData, folder: Path) -> Policy:
    """The encoder-decoder to train: of `--model`, of the run that is resumed, or random, made in `folder`."""
    if options.model != SCRATCH:
        policy = load_policy(options)
    else:
        if not _copy_of_run(options, folder):
            _random_model(options, data, folder)
        policy = load_policy(replace(options, model=str(folder)))
    if options.dropout is not None:
        model = network_of(policy)
        model.config = replace(model.config, dropout=options.dropout)
    return policy


def network_of(policy: Policy) -> Seq2Seq:
    """The policy's encoder-decoder; ConfigError where it is another kind of network."""
    if not isinstance(policy.model, Seq2Seq):
        raise ConfigError(f"{policy.folder} is no encoder-decoder of Marian's or Pegasus' kind; use upslope sft for it")
    return policy.model


def _copy_of_run(options: Seq2SeqOptions, folder: Path) -> bool:
    """Take tokenizer and sizes from the run that is resumed, not from data that may have changed since."""
    if not options.resume or not checkpoint.list_checkpoints(Path(options.output_dir or "") / "checkpoints"):
        return False
    source = checkpoint.resolve(Path(options.output_dir or "") / "checkpoints").path
    shutil.copytree(source / "model", folder, dirs_exist_ok=True)
    return True


def _random_model(options: Seq2SeqOptions, data: PairData, folder: Path) -> None:
    """Train the tokenizers on the training pairs and write a network of random weights beside them."""
    o = options
    tokenizer = _pair_tokenizer(o, [p.text or "" for p, _ in data.train], [target for _, target in data.train])
    config = Seq2SeqConfig(
        vocab_size=len(tokenizer),
        source_vocab_size=None if o.shared_vocabulary else len(tokenizer.source),
        hidden_size=o.hidden_size,
        intermediate_size=4 * o.hidden_size,
        encoder_layers=o.num_layers,
        decoder_layers=o.num_layers,
        num_attention_heads=o.num_heads,
        max_position_embeddings=o.max_length,
        norm=o.norm,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.decoder_start_token_id,
        dropout=_DROPOUT if o.dropout is None else o.dropout,
    )
    torch.manual_seed(o.seed)
    save_model(Seq2Seq(config), folder, tokenizer=tokenizer, overwrite=True)


def _pair_tokenizer(o: Seq2SeqOptions, sources: list[str], targets: list[str]) -> PairTokenizer:
    def trained(texts: list[str]) -> Any:
        return train_tokenizer(texts, o.tokenizer, o.vocab_size, special_tokens=_SPECIALS)

    target = trained([*sources, *targets] if o.shared_vocabulary else targets)
    return PairTokenizer(
        target,
        None if o.shared_vocabulary else trained(sources),
        decoder_start_token_id=target.pad_token_id,
        source_offset=0 if o.shared_vocabulary else len(target),
    )


class PairLearner(PolicyLearner):
    """Policy, optimizer, engine and pairs; measures held-out loss, accuracy and edit rate.

    `value`, which best, patience and target go by, is the edit rate: edits to the nearest reference over its length,
    summed over all held-out problems (for phonemes the phoneme error rate). Lower is better.
    """

    higher_is_better = False

    def __init__(self, options: Seq2SeqOptions, policy: Policy, data: PairData, *, sequences: int = 0) -> None:
        self.policy, self.data = policy, data
        network_of(policy).use_dropout = options.objective == "mle"
        self.examples, self.prompts, trained = self._fitting(options)
        self.held_out, self.eval_examples, measured = self._fitting_held_out(options)
        self.account = DataAccount({"train": trained, "eval": measured})
        super().__init__(options, policy, len(self.examples if options.objective == "mle" else self.prompts))
        self.engine = make_engine(
            policy,
            sequences=max(sequences, len(self.held_out) * options.beam_width, 1),
            longest=max(len(e.tokens) for e in [*self.examples, *self.eval_examples]) + options.max_completion_length,
        )
        self.task_judge = make_scorer(data.task) if data.task.has_reward else _Unjudged()

    def _fitting(self, o: Seq2SeqOptions) -> tuple[list[Example], list[tuple[Prompt, list[int]]], Split]:
        """Encoded training pairs, and each different source with its first target's tokens; too long ones left out."""
        examples: list[Example] = []
        sources: dict[int, tuple[Prompt, list[int]]] = {}
        lengths: list[int] = []
        for prompt, target in counted(self.data.train, f"encoding {self.data.sources[0]}", unit="pair"):
            example = encode_pair(self.policy, prompt, target, o.max_length)
            if isinstance(example, int):
                lengths.append(example)
                continue
            examples.append(example)
            completion = [t for t, trained in zip(example.tokens, example.mask, strict=True) if trained]
            sources.setdefault(prompt.key, (prompt, completion))
        if not examples:
            raise ConfigError(
                f"{self.data.sources[0]}: none of {len(lengths)} pairs fits max_length {o.max_length} "
                f"(the longest side has {max(lengths)} tokens): raise it"
            )
        return examples, list(sources.values()), self._split("train", len(examples), lengths, o.max_length)

    def _fitting_held_out(self, o: Seq2SeqOptions) -> tuple[list[Prompt], list[Example], Split]:
        prompts, examples, lengths = [], [], []
        for prompt in self.data.held_out:
            example = encode_pair(self.policy, prompt, _target(self.data.task, prompt), o.max_length)
            if isinstance(example, int):
                lengths.append(example)
                continue
            prompts.append(prompt)
            examples.append(example)
        return prompts, examples, self._split("eval", len(prompts), lengths, o.max_length)

    def _split(self, name: str, kept: int, lengths: Sequence[int], max_length: int) -> Split:
        dropped, notes = too_long(lengths, max_length)
        source, lent = (self.data.sources[0], self.data.lent) if name == "train" else (self.data.sources[1], 0)
        return Split(source, kept, {**self.data.dropped[name], **dropped}, notes, lent)

    def evaluate(self, step: int) -> Evaluation | None:
        """Loss per token of the first references; accuracy and edit rate of greedy (or beam) decoding."""
        if not self.held_out:
            return None
        o = self.options
        out = score(self.policy.model, self.micro_batches(self.eval_examples, feed_last=True)[0])
        params = SamplingParams(max_tokens=o.max_completion_length, temperature=0.0, beam_width=o.beam_width)
        groups = self.decode(self.held_out, params)
        if self.run is not None:
            self.run.record_rollouts(step, groups, split="eval")
        parts = [g.rollouts[0].reward.parts for g in groups]
        edits_N2 = [(float(part["edits"]), float(part["reference_length"])) for part in parts]
        metrics: dict[str, Any] = {
            "eval_loss": float(-out.logp_N.double().mean()),
            "edit_rate": Measurement("edit_rate", np.asarray(edits_N2), _edit_rate).interval(),
            "accuracy": evaluate(groups),
        }
        return Evaluation("edit_rate", metrics, loss=metrics["eval_loss"])

    def decode(self, prompts: list[Prompt], params: SamplingParams) -> list[RolloutGroup]:
        """Judged replies; every judgement has a verdict, "edits" and "reference_length"."""
        self.policy.model.eval()
        with torch.no_grad():
            groups, _ = collect(self.engine, self.policy.tokenizer, self.task_judge, prompts, params)
        for group in groups:
            references = references_of(group.prompt) or (_target(self.data.task, group.prompt),)
            for rollout in group.rollouts:
                rollout.reward = _with_edits(rollout.reward, rollout.text, references)
        return groups

    def trained_on(self) -> tuple[Any, Iterator[Any]]:
        """The tokenizer and the training rows, for the fingerprint."""
        if self.options.objective == "mle":
            return self.policy.tokenizer, ((e.tokens, e.mask) for e in self.examples)
        return self.policy.tokenizer, ((prompt_row(prompt), tokens) for prompt, tokens in self.prompts)

    def close(self) -> None:
        """End the reward workers; dropout is for this recipe alone."""
        network_of(self.policy).use_dropout = False
        self.task_judge.close()


def _edit_rate(sums_2: np.ndarray) -> float:
    """Edits over the references' length."""
    return float(sums_2[0] / max(1.0, sums_2[1]))


class _Unjudged(Judge):
    """For a task without a reward: the comparison with its demonstration is the whole judgement."""

    def judge(self, groups: Any) -> dict[str, float]:
        return {}


def _with_edits(reward: Reward, text: str, references: tuple[str, ...]) -> Reward:
    """The task's judgement, completed from the references where it has no verdict or no edits."""
    edits, length = nearest(text, references)
    parts = {"edits": float(edits), "reference_length": float(length), **reward.parts}
    if reward.value is None and reward.error is None:
        return Reward(value=similarity(edits, length), parts=parts, correct=edits == 0)
    return replace(reward, parts=parts, correct=edits == 0 if reward.correct is None else reward.correct)


def encode_pair(policy: Policy, prompt: Prompt, target: str, max_length: int) -> Example | int:
    """The training sequence of a pair, or the tokens of its longer side where that is over `max_length`.

    The source's end and the target's beginning and end count.
    """
    try:
        example = encode_completion(policy.tokenizer, prompt.text or "", target)
    except DataError as error:
        raise DataError(f"the pair with the source {(prompt.text or '')[:60]!r}: {error}") from error
    trained = sum(example.mask)
    longer = max(len(example.tokens) - trained - 1, trained + 1)
    return longer if longer > min(max_length, network_of(policy).config.max_position_embeddings) else example

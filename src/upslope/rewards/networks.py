"""Rewards that are frozen networks: how likely, how fluent, how much about the prompt a completion is, or learned.

    --reward likelihood:path=FOLDER      mean log p(completion | prompt) per token
    --reward fluency:path=FOLDER         exp(mean log p(completion)) x share of distinct word n-grams
    --reward coherence:path=FOLDER       (log p(completion | prompt) - log p(completion)) per token
    --reward similarity:path=minilm      cosine of the embeddings of completion and the prompt's answer
    --reward relevance:path=minilm       cosine of the embeddings of completion and prompt
    --reward reward_model:path=FOLDER    what a reward model says: runs/rm/checkpoints/last/model, say

Where the frozen model has the policy's tokenizer, the sampled tokens are scored as they are. Where it has another, the
text is tokenised again by its own (and a chat goes through its own template), and means are over its tokens;
per=character divides by the characters of the text instead, which compares across tokenizers. A reward model of another
tokenizer reads the text when retokenize=true says so.

The end token counts in likelihood, where the policy sampled it; fluency and coherence are about the text without it.
A language model likes repetition, so fluency counts it; likelihood alone is easily gamed.

An outcome model gives the score after the last token; a process model gives each step's probability (Reward.steps) and
puts them together. All read packed batches that share prompts, on the policy's device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch.nn.utils.rnn import pad_sequence

from upslope.data.batching import collate, split_by_tokens
from upslope.data.chat import encode_completion, load_tokenizer, token_count, turn_ends
from upslope.data.examples import answer, step_ends
from upslope.devices.hardware import choose_dtype
from upslope.errors import ConfigError, DataError, ModelError
from upslope.models.encoder.network import Encoder, load_encoder
from upslope.models.files.loading import RewardSettings, load_model, load_reward_folder
from upslope.models.files.sources import resolve
from upslope.models.protocol import CausalModel, ScalarHead
from upslope.rewards.functions import distinct_share
from upslope.rewards.summands import Surroundings
from upslope.training.step import Forward, after_tokens, score
from upslope.types import Example, Prompt, Reward, Rollout, RolloutGroup

Kind = Literal["likelihood", "fluency", "coherence"]
Likeness = Literal["similarity", "relevance"]
AGGREGATES: dict[str, Callable[[Sequence[float]], float]] = {
    "min": min,
    "prod": math.prod,
    "last": lambda steps: steps[-1],
    "mean": lambda steps: math.fsum(steps) / len(steps),
}
"""From the probabilities of a solution's steps to its reward (2305.20050 multiplies; Math-Shepherd takes the least)."""


def load_likelihood(
    path: str,
    scale: str = "log",
    per: str = "token",
    floor: float = -20.0,
    dtype: str = "auto",
    *,
    around: Surroundings,
) -> LikelihoodReward:
    """The reward `likelihood:path=FOLDER`: scale log gives nats per token, prob their exponential in [0, 1]."""
    return _load("likelihood", path, dtype, around, scale=scale, per=per, floor=floor)


def load_fluency(
    path: str,
    scale: str = "prob",
    per: str = "token",
    ngram: int = 3,
    floor: float = -20.0,
    dtype: str = "auto",
    *,
    around: Surroundings,
) -> LikelihoodReward:
    """The reward `fluency:path=FOLDER`; ngram=0 switches the count of repetitions off."""
    return _load("fluency", path, dtype, around, scale=scale, per=per, floor=floor, ngram=ngram)


def load_coherence(path: str, per: str = "token", dtype: str = "auto", *, around: Surroundings) -> LikelihoodReward:
    """The reward `coherence:path=FOLDER`: pointwise mutual information of prompt and completion, nats per token."""
    return _load("coherence", path, dtype, around, per=per, floor=-math.inf)


def _load(kind: Kind, path: str, dtype: str, around: Surroundings, **how: Any) -> LikelihoodReward:
    """`how`: what the reward's own settings are (see LikelihoodReward)."""
    for name, known in (("scale", ("log", "prob")), ("per", ("token", "character"))):
        if how.get(name, known[0]) not in known:
            raise ConfigError(f"{kind}: {name} is {how[name]!r}; it must be {' or '.join(known)}")
    ngram, floor = how.get("ngram", 0), how["floor"]
    if ngram < 0 or floor > 0:
        raise ConfigError(f"{kind}: ngram must be 0 or more and floor 0 or less, got {ngram} and {floor}")
    folder = resolve(path)
    compute, _ = choose_dtype(dtype, around.device)
    model = load_model(folder, dtype=compute).to(around.device).requires_grad_(False)
    own = load_tokenizer(folder)
    model.keep_tokens(token_count(own), folder)
    same = _same_vocabulary(own, around.tokenizer)
    ends = turn_ends(around.policy_folder, around.tokenizer) if same else ()
    return LikelihoodReward(kind, model, own, same_tokenizer=same, ends=ends, **how)


def _same_vocabulary(one: Any, other: Any) -> bool:
    return hasattr(other, "get_vocab") and one.get_vocab() == other.get_vocab()


def _asked(prompt: Prompt) -> Any:
    return prompt.text if prompt.text is not None else prompt.messages


def _too_long(model: CausalModel, example: Example, room: int = 0) -> str:
    """What is wrong with a sequence that leaves no such room in the context, if anything is."""
    tokens, longest = len(example.tokens), model.spec.max_positions
    return "" if tokens + room <= longest else f"{tokens} tokens are more than the judging model's context of {longest}"


@dataclass(eq=False)
class LikelihoodReward:
    """Judges rollouts by a frozen language model.

    floor: nats per unit below which no value falls; an empty completion has it (coherence of nothing is 0). ends: the
    tokens that end the policy's turns, where its tokens are read as they are.
    """

    kind: Kind
    model: CausalModel
    tokenizer: Any
    same_tokenizer: bool
    ends: Sequence[int] = ()
    scale: str = "log"
    per: str = "token"
    floor: float = -20.0
    ngram: int = 0
    batch_tokens: int = 8192

    def __post_init__(self) -> None:
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        self.start = bos if bos is not None else eos
        if self.start is None and self.kind != "likelihood":
            raise ModelError(
                f"{self.kind}: the model's tokenizer has neither a first nor a last token to begin a text with"
            )

    def rewards(self, groups: Sequence[RolloutGroup]) -> list[Reward]:
        """One Reward per rollout; a text longer than the model's context is an error of its own."""
        asked = [(group.prompt, rollout) for group in groups for rollout in group.rollouts]
        read = [self._example(prompt, rollout) for prompt, rollout in asked]
        wanted = [[] if isinstance(one, str) else self._to_score(one) for one in read]
        scored = iter(self._totals([example for some in wanted for example in some]))
        return [
            Reward(value=None, error=one)
            if isinstance(one, str)
            else Reward(self._value(rollout, one, [next(scored) for _ in some]))
            for (_, rollout), one, some in zip(asked, read, wanted, strict=True)
        ]

    def _example(self, prompt: Prompt, rollout: Rollout) -> Example | str:
        """Prompt and completion in this model's tokens, or why they cannot be read."""
        if self.same_tokenizer:
            mask = [False] * len(rollout.prompt_tokens) + list(rollout.mask)
            example = Example([*rollout.prompt_tokens, *rollout.tokens], mask)
        else:
            try:
                example = encode_completion(self.tokenizer, _asked(prompt), rollout.text)
            except DataError as error:
                return str(error)
        stopped = rollout.finish_reason == "stop"
        if any(example.mask) and (self.kind != "likelihood" or not stopped):
            last = max(t for t, real in enumerate(example.mask) if real)
            # whether the last trained token is the end token and not the text's own
            if not self.same_tokenizer or (stopped and example.tokens[last] in self.ends):
                example = Example(example.tokens[:last], example.mask[:last])
        return _too_long(self.model, example, 1) or example

    def _to_score(self, example: Example) -> list[Example]:
        """What has to be scored: with the prompt, without it, or both; nothing where nothing is left."""
        if not any(example.mask):
            return []
        alone = [token for token, real in zip(example.tokens, example.mask, strict=True) if real]
        bare = Example([self.start, *alone], [False] + [True] * len(alone))
        return {"likelihood": [example], "fluency": [bare], "coherence": [example, bare]}[self.kind]

    def _totals(self, examples: Sequence[Example]) -> list[float]:
        """log p of each example's trained tokens, summed."""
        totals = [0.0] * len(examples)
        for part in split_by_tokens([len(e.tokens) for e in examples], self.batch_tokens):
            batch = collate([examples[i] for i in part], share_prompts=True, device=self.model.device)
            logp_N = score(self.model, [batch]).logp_N
            assert logp_N is not None
            pieces = logp_N.double().cpu().split([sum(examples[i].mask) for i in part])
            for i, piece in zip(part, pieces, strict=True):
                totals[i] = float(piece.sum())
        return totals

    def _value(self, rollout: Rollout, example: Example, totals: Sequence[float]) -> float:
        units = sum(example.mask) if self.per == "token" else len(rollout.text)
        scored = totals and units
        if self.kind == "coherence":
            return (totals[0] - totals[1]) / units if scored else 0.0
        value = max(self.floor, totals[0] / units) if scored else self.floor
        if scored and self.ngram:
            value = max(self.floor, value + math.log(distinct_share(rollout.text, self.ngram)))
        return math.exp(value) if self.scale == "prob" else value


def _load_encoder(
    kind: Likeness, path: str = "minilm", dtype: str = "float32", *, around: Surroundings
) -> EmbeddingReward:
    """`similarity`: completion beside the prompt's answer; `relevance`: beside the prompt (a chat's last user turn)."""
    folder = resolve(path)
    compute, _ = choose_dtype(dtype, around.device)
    # The head is not read, so that any labels do.
    encoder = load_encoder(folder, "classify", labels=("0", "1"), dtype=compute).to(around.device).requires_grad_(False)
    tokenizer = load_tokenizer(folder)
    encoder.check_tokens(token_count(tokenizer), folder)
    return EmbeddingReward(kind, encoder, tokenizer)


load_similarity, load_relevance = partial(_load_encoder, "similarity"), partial(_load_encoder, "relevance")


@dataclass(eq=False)
class EmbeddingReward:
    """Cosine in [-1, 1] of mean-pooled embeddings; an empty text is like nothing (0).

    Texts beyond the encoder's context are cut to it.
    """

    kind: Likeness
    encoder: Encoder
    tokenizer: Any

    def rewards(self, groups: Sequence[RolloutGroup]) -> list[Reward]:
        """One Reward per rollout; for similarity, a prompt without an answer has no verdict."""
        pairs = [(rollout.text, self._other(group.prompt)) for group in groups for rollout in group.rollouts]
        texts = list(dict.fromkeys(text for pair in pairs for text in pair if text is not None and text.strip()))
        place = {text: i for i, text in enumerate(texts)}
        vectors = embeddings(self.encoder, self.tokenizer, texts)
        made = []
        for text, other in pairs:
            both = text in place and other in place
            cosine = float(vectors[place[text]] @ vectors[place[other]]) if both else 0.0
            unasked = Reward(value=None, error="the prompt has no answer to compare with")
            made.append(unasked if other is None else Reward(cosine))
        return made

    def _other(self, prompt: Prompt) -> str | None:
        said = [message.content for message in prompt.messages if message.role == "user"] or [""]
        asked = said[-1] if prompt.text is None else prompt.text
        return prompt.answer if self.kind == "similarity" else asked


@torch.no_grad()
def embeddings(encoder: Encoder, tokenizer: Any, texts: Sequence[str], *, batch_tokens: int = 8192) -> torch.Tensor:
    """Unit vectors [len(texts), D], float32: the mean of the last hidden states over a text's tokens, normalised.

    The pooling of Sentence-BERT (arXiv 1908.10084).
    """
    vectors = torch.zeros(len(texts), encoder.config.hidden_size)
    encoder.eval()
    ids = [tokenizer(text, truncation=encoder.max_positions is not None, max_length=encoder.max_positions)["input_ids"]
           for text in texts]  # fmt: skip
    for part in split_by_tokens([len(one) for one in ids], batch_tokens):
        rows = [torch.tensor(ids[i]) for i in part]
        tokens = pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id or 0)
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        network = encoder.network.base_model
        hidden = network(input_ids=tokens.to(encoder.device), attention_mask=mask.to(encoder.device)).last_hidden_state
        weights = mask.to(hidden.device)[..., None].float()
        mean = (hidden.float() * weights).sum(1) / weights.sum(1)
        vectors[list(part)] = torch.nn.functional.normalize(mean, dim=-1).cpu()
    return vectors


def load_reward_model(
    path: str,
    aggregate: str = "",
    retokenize: bool = False,
    dtype: str = "auto",
    batch_tokens: int = 8192,
    *,
    around: Surroundings,
) -> RewardModel:
    """The reward `reward_model:path=FOLDER`; `aggregate` goes over what a process model was trained with.

    ModelError: the folder is no reward model, or has another tokenizer than the policy (unless retokenize).
    """
    folder = resolve(path)
    compute, _ = choose_dtype(dtype, around.device)
    model, head, settings = load_reward_folder(folder, dtype=compute)
    if aggregate and settings.kind == "outcome":
        raise ConfigError(f"reward_model: {path} scores whole answers; aggregate is for models that score steps")
    if aggregate and aggregate not in AGGREGATES:
        raise ConfigError(f"reward_model: aggregate is {aggregate!r}; it must be one of {', '.join(AGGREGATES)}")
    if batch_tokens < 1:
        raise ConfigError(f"reward_model: batch_tokens is {batch_tokens}; it must be at least 1")
    own = load_tokenizer(folder)
    model.keep_tokens(token_count(own), folder)
    if not retokenize and not _same_vocabulary(own, around.tokenizer):
        raise ModelError(
            f"the reward model {path} and the policy {around.policy_folder} have different tokenizers; "
            "add retokenize=true to its spec, and it reads the text through its own chat template"
        )
    if aggregate:
        settings = RewardSettings("process", aggregate)  # type: ignore[arg-type]
    model.to(around.device).requires_grad_(False)
    return RewardModel(model, head.to(around.device), settings, own, retokenize, batch_tokens)


@dataclass(eq=False)
class RewardModel:
    """Judges rollouts by a network with a scalar head."""

    model: CausalModel
    head: ScalarHead
    settings: RewardSettings
    tokenizer: Any
    retokenize: bool = False
    batch_tokens: int = 8192

    def rewards(self, groups: Sequence[RolloutGroup]) -> list[Reward]:
        """The score of every rollout; one longer than the network's context, or without a step, is an error."""
        read = [self._example(group.prompt, rollout) for group in groups for rollout in group.rollouts]
        scores = iter(self.scores([one for one in read if isinstance(one, Example)]))
        return [
            Reward(value=None, error=one) if isinstance(one, str) else self._reward(one, next(scores)) for one in read
        ]

    def scores(self, examples: Sequence[Example]) -> list[list[float]]:
        """What the head says after every completion token of each sequence (outcome: after the last one only)."""
        found: dict[int, list[float]] = {}
        for part in split_by_tokens([len(e.tokens) for e in examples], self.batch_tokens):
            batch = collate([examples[i] for i in part], share_prompts=True, device=self.model.device)
            out = score(self.model, [batch], Forward(logp=False, head=self.head))
            if self.settings.kind == "outcome":
                found |= {i: [value] for i, value in zip(part, out.final_B.tolist(), strict=True)}
                continue
            after = after_tokens(out.values_N, out.final_B, batch).cpu()
            pieces = after.split([sum(examples[i].mask) for i in part])
            found |= {i: piece.tolist() for i, piece in zip(part, pieces, strict=True)}
        return [found[i] for i in range(len(examples))]

    def _example(self, prompt: Prompt, rollout: Rollout) -> Example | str:
        """The tokens to read: those sampled, or the text's in the reward model's own template; or why not."""
        if self.retokenize:
            try:
                example = answer(self.tokenizer, _asked(prompt), rollout.text, max_length=None)
            except DataError as error:
                return str(error)
        elif not rollout.tokens:
            return "an empty completion has no last token"
        else:
            mask = [False] * len(rollout.prompt_tokens) + [True] * len(rollout.tokens)
            example = Example([*rollout.prompt_tokens, *rollout.tokens], mask)
        return _too_long(self.model, example) or example

    def _reward(self, example: Example, values: list[float]) -> Reward:
        if self.settings.kind == "outcome":
            return Reward(value=values[0])
        first = example.mask.index(True)
        ends = step_ends(example.tokens[first:], self.tokenizer)
        if not ends:
            return Reward(value=None, error="the completion has no step: it is empty or white space")
        steps = [(end, float(torch.tensor(values[end]).sigmoid())) for end in ends]
        value = AGGREGATES[self.settings.aggregate]([p for _, p in steps])
        # places in another tokenizer's tokens say nothing about the rollout's
        return Reward(value=value, steps=[] if self.retokenize else steps)

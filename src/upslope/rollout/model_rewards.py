"""Rewards read off frozen networks: how likely, how fluent, how much about the prompt a completion is.

    --reward likelihood:path=FOLDER      mean log p(completion | prompt) per token
    --reward fluency:path=FOLDER         exp(mean log p(completion)) x share of distinct word n-grams
    --reward coherence:path=FOLDER       (log p(completion | prompt) - log p(completion)) per token
    --reward similarity:path=minilm      cosine of the embeddings of completion and the prompt's answer
    --reward relevance:path=minilm       cosine of the embeddings of completion and prompt

Where the frozen model has the policy's tokenizer, the sampled tokens are scored as they are. Where it has another, the
text is tokenised again by its own (and a chat goes through its own template), and means are over its tokens;
per=character divides by the characters of the text instead, which compares across tokenizers.

The end token counts in likelihood, where the policy sampled it; fluency and coherence are about the text without it.
A language model likes repetition, so fluency counts it; likelihood alone is easily gamed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from upslope.data.batching import collate, split_by_tokens
from upslope.data.chat import encode_completion, load_tokenizer, token_count
from upslope.data.ends import turn_ends
from upslope.devices.hardware import choose_dtype
from upslope.errors import ConfigError, DataError, ModelError
from upslope.models.encoder.network import Encoder, load_encoder
from upslope.models.files.loading import load_model
from upslope.models.files.sources import resolve
from upslope.models.protocol import CausalModel
from upslope.training.step import score
from upslope.types import Example, Prompt, Reward, Rollout, RolloutGroup

__all__ = [
    "EmbeddingReward",
    "LikelihoodReward",
    "embeddings",
    "load_coherence",
    "load_fluency",
    "load_likelihood",
    "load_relevance",
    "load_similarity",
]

Kind = Literal["likelihood", "fluency", "coherence"]


def load_likelihood(
    path: str,
    scale: str = "log",
    per: str = "token",
    floor: float = -20.0,
    dtype: str = "auto",
    *,
    tokenizer: Any,
    device: Any,
    policy_folder: Path,
) -> LikelihoodReward:
    """The reward `likelihood:path=FOLDER`: scale log gives nats per token, prob their exponential in [0, 1]."""
    return _load("likelihood", path, dtype, tokenizer, device, policy_folder, scale=scale, per=per, floor=floor)


def load_fluency(
    path: str,
    scale: str = "prob",
    per: str = "token",
    ngram: int = 3,
    floor: float = -20.0,
    dtype: str = "auto",
    *,
    tokenizer: Any,
    device: Any,
    policy_folder: Path,
) -> LikelihoodReward:
    """The reward `fluency:path=FOLDER`; ngram=0 switches the count of repetitions off."""
    how = {"scale": scale, "per": per, "floor": floor, "ngram": ngram}
    return _load("fluency", path, dtype, tokenizer, device, policy_folder, **how)


def load_coherence(
    path: str, per: str = "token", dtype: str = "auto", *, tokenizer: Any, device: Any, policy_folder: Path
) -> LikelihoodReward:
    """The reward `coherence:path=FOLDER`: pointwise mutual information of prompt and completion, nats per token."""
    return _load("coherence", path, dtype, tokenizer, device, policy_folder, per=per, floor=-math.inf)


def _load(
    kind: Kind, path: str, dtype: str, tokenizer: Any, device: Any, policy_folder: Path, **how: Any
) -> LikelihoodReward:
    """`how`: what the reward's own settings are (see LikelihoodReward)."""
    for name, known in (("scale", ("log", "prob")), ("per", ("token", "character"))):
        if how.get(name, known[0]) not in known:
            raise ConfigError(f"{kind}: {name} is {how[name]!r}; it must be {' or '.join(known)}")
    ngram, floor = how.get("ngram", 0), how["floor"]
    if ngram < 0 or floor > 0:
        raise ConfigError(f"{kind}: ngram must be 0 or more and floor 0 or less, got {ngram} and {floor}")
    folder = resolve(path)
    compute, _ = choose_dtype(dtype, device)
    model = load_model(folder, dtype=compute).to(device).requires_grad_(False)
    own = load_tokenizer(folder)
    model.keep_tokens(token_count(own), folder)
    same = hasattr(tokenizer, "get_vocab") and own.get_vocab() == tokenizer.get_vocab()
    ends = turn_ends(policy_folder, tokenizer) if same else ()
    return LikelihoodReward(kind, model, own, same_tokenizer=same, ends=ends, **how)


class LikelihoodReward:
    """Judges rollouts by a frozen language model.

    floor: nats per unit below which no value falls; an empty completion has it (coherence of nothing is 0). ends: the
    tokens that end the policy's turns, where its tokens are read as they are.
    """

    def __init__(
        self,
        kind: Kind,
        model: CausalModel,
        tokenizer: Any,
        *,
        same_tokenizer: bool,
        ends: Sequence[int] = (),
        scale: str = "log",
        per: str = "token",
        floor: float = -20.0,
        ngram: int = 0,
        batch_tokens: int = 8192,
    ) -> None:
        self.kind, self.model, self.tokenizer, self.same_tokenizer = kind, model, tokenizer, same_tokenizer
        self.ends = frozenset(ends)
        self.scale, self.per, self.floor, self.ngram, self.batch_tokens = scale, per, floor, ngram, batch_tokens
        self.start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if self.start is None and kind != "likelihood":
            raise ModelError(f"{kind}: the model's tokenizer has neither a first nor a last token to begin a text with")

    def rewards(self, groups: Sequence[RolloutGroup]) -> list[Reward]:
        """One Reward per rollout; a text longer than the model's context is an error of its own."""
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        prompts = [group.prompt for group in groups for _ in group.rollouts]
        read = [self._example(p, r) for p, r in zip(prompts, rollouts, strict=True)]
        wanted: list[Example] = []
        for one in read:
            if isinstance(one, Example):
                wanted += self._to_score(one)
        scored = iter(self._totals(wanted))
        made = []
        for rollout, one in zip(rollouts, read, strict=True):
            if isinstance(one, str):
                made.append(Reward(value=None, error=one))
            else:
                made.append(Reward(self._value(rollout, one, [next(scored) for _ in self._to_score(one)])))
        return made

    def _example(self, prompt: Prompt, rollout: Rollout) -> Example | str:
        """Prompt and completion in this model's tokens, or why they cannot be read."""
        if self.same_tokenizer:
            mask = [False] * len(rollout.prompt_tokens) + list(rollout.mask)
            example = Example([*rollout.prompt_tokens, *rollout.tokens], mask)
        else:
            try:
                asked = prompt.text if prompt.text is not None else prompt.messages
                example = encode_completion(self.tokenizer, asked, rollout.text)
            except DataError as error:
                return str(error)
        if self._ends(rollout, example) and (self.kind != "likelihood" or rollout.finish_reason != "stop"):
            example = _without_last(example)
        longest = self.model.spec.max_positions
        if len(example.tokens) + 1 > longest:
            return f"{len(example.tokens)} tokens are more than the context of {longest} of the model that judges"
        return example

    def _ends(self, rollout: Rollout, example: Example) -> bool:
        """Whether the last trained token is the end token and not the text's own."""
        if not any(example.mask):
            return False
        if not self.same_tokenizer:
            return True
        last = max(t for t, real in enumerate(example.mask) if real)
        return rollout.finish_reason == "stop" and example.tokens[last] in self.ends

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
        if not totals or units == 0:
            return 0.0 if self.kind == "coherence" else self._scaled(self.floor)
        if self.kind == "coherence":
            return (totals[0] - totals[1]) / units
        value = max(self.floor, totals[0] / units)
        if self.ngram:
            value = max(self.floor, value + math.log(_distinct_share(rollout.text, self.ngram)))
        return self._scaled(value)

    def _scaled(self, value: float) -> float:
        return math.exp(value) if self.scale == "prob" else value


def _without_last(example: Example) -> Example:
    """The sequence up to its last trained token, that one left out."""
    last = max(t for t, real in enumerate(example.mask) if real)
    return Example(example.tokens[:last], example.mask[:last])


def _distinct_share(text: str, n: int) -> float:
    words = text.casefold().split()
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0


def load_similarity(
    path: str = "minilm", dtype: str = "float32", *, tokenizer: Any, device: Any, policy_folder: Path
) -> EmbeddingReward:
    """The reward `similarity:path=minilm`: completion beside the prompt's answer."""
    return _load_encoder("similarity", path, dtype, device)


def load_relevance(
    path: str = "minilm", dtype: str = "float32", *, tokenizer: Any, device: Any, policy_folder: Path
) -> EmbeddingReward:
    """The reward `relevance:path=minilm`: completion beside the prompt (of a chat, its last user turn)."""
    return _load_encoder("relevance", path, dtype, device)


def _load_encoder(kind: Literal["similarity", "relevance"], path: str, dtype: str, device: Any) -> EmbeddingReward:
    folder = resolve(path)
    compute, _ = choose_dtype(dtype, device)
    # The head is not read, so that any labels do.
    encoder = load_encoder(folder, "classify", labels=("0", "1"), dtype=compute).to(device).requires_grad_(False)
    tokenizer = load_tokenizer(folder)
    encoder.check_tokens(token_count(tokenizer), folder)
    return EmbeddingReward(kind, encoder, tokenizer)


class EmbeddingReward:
    """Cosine in [-1, 1] of mean-pooled embeddings; an empty text is like nothing (0).

    Texts beyond the encoder's context are cut to it.
    """

    def __init__(self, kind: Literal["similarity", "relevance"], encoder: Encoder, tokenizer: Any) -> None:
        self.kind, self.encoder, self.tokenizer = kind, encoder, tokenizer

    def rewards(self, groups: Sequence[RolloutGroup]) -> list[Reward]:
        """One Reward per rollout; for similarity, a prompt without an answer has no verdict."""
        pairs = [(rollout.text, self._other(group.prompt)) for group in groups for rollout in group.rollouts]
        texts = list(dict.fromkeys(text for pair in pairs for text in pair if text is not None and text.strip()))
        place = {text: i for i, text in enumerate(texts)}
        vectors = embeddings(self.encoder, self.tokenizer, texts)
        made = []
        for text, other in pairs:
            if other is None:
                made.append(Reward(value=None, error="the prompt has no answer to compare with"))
            elif text not in place or other not in place:
                made.append(Reward(0.0))
            else:
                made.append(Reward(float(vectors[place[text]] @ vectors[place[other]])))
        return made

    def _other(self, prompt: Prompt) -> str | None:
        if self.kind == "similarity":
            return prompt.answer
        if prompt.text is not None:
            return prompt.text
        return next((m.content for m in reversed(prompt.messages) if m.role == "user"), "")


@torch.no_grad()
def embeddings(encoder: Encoder, tokenizer: Any, texts: Sequence[str], *, batch_tokens: int = 8192) -> torch.Tensor:
    """Unit vectors [len(texts), D], float32: the mean of the last hidden states over a text's tokens, normalised.

    The pooling of Sentence-BERT (arXiv 1908.10084).
    """
    width = encoder.config.hidden_size
    vectors = torch.zeros(len(texts), width)
    if not texts:
        return vectors
    encoder.eval()
    ids = [tokenizer(text, truncation=encoder.max_positions is not None, max_length=encoder.max_positions)["input_ids"]
           for text in texts]  # fmt: skip
    for part in split_by_tokens([len(one) for one in ids], batch_tokens):
        longest = max(len(ids[i]) for i in part)
        tokens = torch.full((len(part), longest), tokenizer.pad_token_id or 0)
        mask = torch.zeros(len(part), longest, dtype=torch.long)
        for row, i in enumerate(part):
            tokens[row, : len(ids[i])] = torch.tensor(ids[i])
            mask[row, : len(ids[i])] = 1
        network = encoder.network.base_model
        hidden = network(input_ids=tokens.to(encoder.device), attention_mask=mask.to(encoder.device)).last_hidden_state
        weights = mask.to(hidden.device)[..., None].float()
        mean = (hidden.float() * weights).sum(1) / weights.sum(1)
        vectors[list(part)] = torch.nn.functional.normalize(mean, dim=-1).cpu()
    return vectors

"""The few records that cross rooms. Free of torch, so that reward workers start fast.

Notation (docs/notation.md): P prompts, G completions per prompt, B = P * G sequences, T tokens,
N trained tokens. Token-level lists of a completion all have the completion's length.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation.

    `tool_calls` are in transformers' form, arguments an object; `tool_call_id` names the call that a tool's turn
    answers. `train` overrides whether an assistant turn is trained on; None means: assistant turns are, others not.
    """

    role: str
    content: str
    name: str | None = None
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    train: bool | None = None
    tool_call_id: str | None = None

    def as_mapping(self) -> dict[str, Any]:
        """The turn as data files and chat templates write it, what it does not have left out."""
        given = {"name": self.name, "tool_calls": _plain(self.tool_calls) or None, "tool_call_id": self.tool_call_id}
        more = {key: value for key, value in {**given, "train": self.train}.items() if value is not None}
        return {"role": self.role, "content": self.content, **more}


def storable(text: str) -> str:
    """The text as UTF-8 can hold it: half a surrogate pair is written as \\udXXX."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _plain(value: Any) -> Any:
    """Mappings and sequences inside a value as dicts and lists."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a policy is asked, with what its task needs to judge the reply.

    `key` identifies the prompt within its task (it seeds the sampling); `answer` and `metadata` are the task's own.
    Exactly one of `messages` and `text` is given; `text` is used as it stands, without a chat template.
    """

    key: int
    messages: tuple[Message, ...] = ()
    text: str | None = None
    answer: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one request is decoded. Names and meanings follow the field's serving conventions.

    temperature 0 is greedy. top_k 0, top_p 1 and min_p 0 switch a filter off. `stop` strings end the text before
    the match (the tokens that produced it stay in `tokens`); `stop_token_ids` end it after the token, which belongs
    to the completion. `logprobs` asks for that many alternatives per position, `prompt_logprobs` the same for the
    prompt. `beam_width` > 1 switches to beam search with `length_penalty`.

    `repetition_penalty` divides positive and multiplies negative logits of tokens in the prompt or the completion;
    `frequency_penalty` and `presence_penalty` look at the completion alone: a token that occurs c > 0 times in it
    loses c * frequency_penalty + presence_penalty of its logit (both in -2..2, as in OpenAI's API).
    """

    max_tokens: int = 256
    n: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    seed: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    beam_width: int = 1
    length_penalty: float = 1.0

    @property
    def filtered(self) -> bool:
        """True when the sampled distribution is not the policy's own at this temperature."""
        return bool(
            self.top_k
            or self.top_p < 1.0
            or self.min_p > 0.0
            or self.repetition_penalty != 1.0
            or self.counted
            or self.logit_bias
        )

    @property
    def counted(self) -> bool:
        """True when the distribution depends on how often a token was generated before."""
        return self.frequency_penalty != 0.0 or self.presence_penalty != 0.0


@dataclass(slots=True)
class Completion:
    """What the engine returned for one sample.

    `sampling_logprobs` are of the distribution sampled from (temperature and every filter); `policy_logprobs` of the
    policy at this temperature, unfiltered (temperature 1 when decoding is greedy). `version` is the weight version
    that produced each token's distribution (one number: a completion never spans a swap unless `mixed_versions`).
    """

    tokens: list[int]
    sampling_logprobs: list[float]
    policy_logprobs: list[float]
    finish_reason: FinishReason
    version: int = 0
    text: str = ""
    top_logprobs: list[dict[int, float]] | None = None
    prompt_logprobs: list[float | None] | None = None
    prompt_top_logprobs: list[dict[int, float] | None] | None = None
    mixed_versions: bool = False
    cumulative_logprob: float = 0.0


@dataclass(slots=True)
class Reward:
    """A task's judgement of one completion.

    `value` is the scalar trained on (None when judging failed: then `error` says why and the sample is excluded).
    `parts` holds the named summands before weighting. `correct` is the verdict where the task has one.
    `steps` gives process rewards as (token index, value) pairs.
    """

    value: float | None
    parts: dict[str, float] = field(default_factory=dict)
    correct: bool | None = None
    error: str | None = None
    seconds: float = 0.0
    steps: list[tuple[int, float]] = field(default_factory=list)


@dataclass(slots=True)
class Rollout:
    """One trajectory: the prompt's tokens and everything after them, sampled or observed.

    `mask[t]` is True where the policy sampled `tokens[t]`, False where the environment (a tool, a user turn) put it.
    Log-probs at observed tokens are NaN: nothing may read them.
    """

    prompt_tokens: list[int]
    tokens: list[int]
    mask: list[bool]
    sampling_logprobs: list[float]
    policy_logprobs: list[float]
    finish_reason: FinishReason
    text: str
    sample: int
    version: int = 0
    reward: Reward = field(default_factory=lambda: Reward(value=None))

    @classmethod
    def from_completion(cls, prompt_tokens: Sequence[int], completion: Completion, sample: int) -> Rollout:
        """The single-turn trajectory: every token after the prompt was sampled."""
        return cls(
            prompt_tokens=list(prompt_tokens),
            tokens=list(completion.tokens),
            mask=[True] * len(completion.tokens),
            sampling_logprobs=list(completion.sampling_logprobs),
            policy_logprobs=list(completion.policy_logprobs),
            finish_reason=completion.finish_reason,
            text=completion.text,
            sample=sample,
            version=completion.version,
        )


@dataclass(slots=True)
class RolloutGroup:
    """The G rollouts of one prompt, in sample order."""

    prompt: Prompt
    rollouts: list[Rollout]


@dataclass(slots=True)
class Example:
    """One training sequence: token ids, which of them are trained on, and per-trained-token numbers.

    `mask[t]` says that tokens[t] is a target (t = 0 never is: nothing predicts it). Every entry of `fields` has as
    many values as the mask has True entries, in order.
    """

    tokens: list[int]
    mask: list[bool]
    fields: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Batch:
    """A packed micro-batch: segments laid end to end, no padding.

    A segment is a whole sequence, or, where sequences share a prompt, the prompt once and each continuation:
    parents[i] is the segment that segment i continues (-1: none), lengths[i] its own tokens. tokens_T and positions_T
    (of the token in its sequence, from 0) are int64. rows_N: the row in T whose output predicts the n-th trained
    token; targets_N that token; sequence_N the sequence it belongs to (0..B-1). ends_B: the row of each sequence's
    last token; None where it was not fed. fields: per-trained-token tensors [N], aligned with targets_N. replay: the
    forward pass as a look-up, where the sampler's activations were kept (models.decoder.activations).
    """

    tokens_T: Tensor
    positions_T: Tensor
    lengths: list[int]
    parents: list[int]
    rows_N: Tensor
    targets_N: Tensor
    sequence_N: Tensor
    ends_B: Tensor | None
    fields: dict[str, Tensor]
    replay: Any = None

    @property
    def num_trained(self) -> int:
        """N of this micro-batch."""
        return int(self.targets_N.shape[0])

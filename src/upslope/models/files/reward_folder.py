"""A reward model on disk: transformers' sequence classifier with one label.

`model.*` and `score.weight` [1, D] in place of the language head; config.json names the architecture
(LlamaForSequenceClassification and its like) and, under "upslope_reward", what the numbers mean. There is no bias:
the layout has none, and a comparison of two answers does not see one.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from upslope.errors import ModelError
from upslope.models.decoder.network import Decoder
from upslope.models.files.config_json import SCORE
from upslope.models.files.folders import read_config
from upslope.models.files.loading import load_model
from upslope.models.files.weights import check_shapes, load, read_shapes, save_folder
from upslope.models.protocol import CausalModel, ScalarHead

_HEAD = "lm_head.weight"
_KEY = "upslope_reward"

Aggregate = Literal["min", "prod", "last", "mean"]


@dataclass(frozen=True, slots=True)
class RewardSettings:
    """outcome: one score after the last token. process: a logit at each step's end, put together by `aggregate`."""

    kind: Literal["outcome", "process"] = "outcome"
    aggregate: Aggregate = "min"


def score_head(hidden_size: int, weight: Tensor) -> ScalarHead:
    """A scalar head without a (trained) bias, starting from `weight` [1, D]."""
    head = ScalarHead(hidden_size)
    head.score.weight.data.copy_(weight)
    head.score.bias.requires_grad_(False)
    return head


def stored_score(folder: Path | str) -> Tensor | None:
    """The scalar head of a folder in float32 [1, D], or None where it has none. ModelError: it has several labels."""
    shape = read_shapes(folder).get(SCORE)
    if shape is None:
        return None
    if len(shape) != 2 or shape[0] != 1:
        raise ModelError(f"{folder}: {SCORE} is {list(shape)}; a reward model has one label, so [1, width]")
    return load(folder, torch.float32, names=[SCORE])[SCORE]


def load_reward_folder(
    folder: Path | str, *, dtype: torch.dtype = torch.float32
) -> tuple[CausalModel, ScalarHead, RewardSettings]:
    """Network, head and settings of a reward model's folder (ours, or a sequence classifier with one label).

    Raises ModelError, naming the folder, where there is no scalar head.
    """
    weight = stored_score(folder)
    if weight is None:
        raise ModelError(f"{folder}: no {SCORE} in it, so it is no reward model; make one with upslope reward")
    model = load_model(folder, dtype=dtype, trunk=True)
    settings = read_config(folder).get(_KEY) or {}
    try:
        return model, score_head(model.spec.hidden_size, weight), RewardSettings(**settings)
    except (TypeError, RuntimeError) as error:
        raise ModelError(f"{folder}: its {SCORE} or {_KEY} in config.json does not fit ({error})") from error


def check_can_be_saved(model: CausalModel) -> Decoder:
    """Our decoder, whose family has the layout. ModelError for any other network."""
    if not isinstance(model, Decoder):
        name = getattr(model, "architecture", type(model).__name__)
        raise ModelError(f"{name} cannot become a reward model here: llama, mistral, qwen2 and qwen3 networks can")
    return model


def save_reward_folder(
    model: CausalModel,
    tensors: Mapping[str, Tensor],
    folder: Path | str,
    settings: RewardSettings,
    *,
    source_folder: Path | str,
    pad_token_id: int | None,
) -> Path:
    """Write network and head (`tensors`, float32 masters with score.weight) as a sequence classifier's folder.

    transformers reads the score at the last token that is not `pad_token_id`; give None where padding and the end of
    a turn are one token, so that it refuses a padded batch and does not silently read one token too early.
    """
    decoder = check_can_be_saved(model)
    with torch.device("meta"):  # its own parameters may carry adapters' names
        expected = {n: tuple(p.shape) for n, p in Decoder(decoder.config).named_parameters() if n != _HEAD}
    state = {name: x for name, x in tensors.items() if name != _HEAD}
    width = decoder.spec.hidden_size
    check_shapes({**expected, SCORE: (1, width)}, {n: tuple(t.shape) for n, t in state.items()}, where="reward model")
    config: dict[str, Any] = decoder.config.to_hf()
    config |= {
        "architectures": [config["architectures"][0].replace("ForCausalLM", "ForSequenceClassification")],
        "id2label": {"0": "reward"},
        "label2id": {"reward": 0},
        "num_labels": 1,
        "problem_type": "regression",
        "pad_token_id": pad_token_id,
        _KEY: asdict(settings),
    }
    return save_folder(folder, config, state, source_folder=source_folder, overwrite=True)

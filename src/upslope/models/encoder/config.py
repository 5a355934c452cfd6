"""What an encoder's configuration says: which head, which labels, how long an input may be, which dropout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import transformers
from transformers import PretrainedConfig
from transformers.models.auto import modeling_auto

from upslope.errors import ModelError

Kind = Literal["classify", "tag", "masked"]

AUTO = {
    "classify": ("AutoModelForSequenceClassification", "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES"),
    "tag": ("AutoModelForTokenClassification", "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES"),
    "masked": ("AutoModelForMaskedLM", "MODEL_FOR_MASKED_LM_MAPPING_NAMES"),
}
_ALSO_ENCODERS = {"xlnet"}  # looks both ways, but its own head on words predicts a permutation
OFFSET_POSITIONS = {"roberta", "xlm-roberta", "xlm-roberta-xl", "roberta-prelayernorm", "camembert", "mpnet"}
SIZES = {
    "distilbert": {"intermediate_size": "hidden_dim"},
    "xlnet": {"intermediate_size": "d_inner", "max_positions": None},
}


def auto_class(kind: Kind) -> Any:
    return getattr(transformers, AUTO[kind][0])


def check_kind(config: PretrainedConfig, kind: Kind, where: str) -> None:
    masked = getattr(modeling_auto, AUTO["masked"][1])
    known = getattr(modeling_auto, AUTO[kind][1])
    if config.model_type not in known or config.model_type not in {*masked, *_ALSO_ENCODERS}:
        raise ModelError(
            f"{where}: model type {config.model_type!r} is no encoder that can {kind}; give a BERT, RoBERTa, "
            "DistilBERT, XLNet or like folder, or the alias minilm"
        )


def has_head(raw: Mapping[str, Any], config: PretrainedConfig, kind: Kind) -> bool:
    """Whether the folder was saved with a head of this kind."""
    wanted = getattr(modeling_auto, AUTO[kind][1]).get(config.model_type)
    return kind != "masked" and wanted in (raw.get("architectures") or ())


def with_labels(config: PretrainedConfig, labels: Sequence[str]) -> PretrainedConfig:
    if len(set(labels)) != len(labels):
        raise ModelError("two labels of the head are the same")
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: i for i, label in enumerate(labels)}
    config.problem_type = None
    return config


def switch_off_dropout(config: PretrainedConfig, raw: Mapping[str, Any]) -> dict[str, Any]:
    """Set every dropout rate to 0; returns what is to be written back into a saved config.json."""
    rates = {
        name: value
        for name, value in config.to_dict().items()
        if "drop" in name and isinstance(value, int | float) and not isinstance(value, bool) and value > 0
    }
    for name in rates:
        setattr(config, name, 0.0)
    return {name: raw.get(name, value) for name, value in rates.items()}


def longest_input(config: PretrainedConfig) -> int | None:
    longest = getattr(config, "max_position_embeddings", None)
    if longest is None or longest <= 0 or config.model_type == "xlnet":
        return None
    return longest - config.pad_token_id - 1 if config.model_type in OFFSET_POSITIONS else longest

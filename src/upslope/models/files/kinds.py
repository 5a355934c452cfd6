"""What a model folder holds, and which verb takes it. Free of the networks."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from upslope.errors import ModelError
from upslope.models.files.weights import read_config, read_shapes

__all__ = ["SCORE", "ModelKind", "check_writes", "kind_of"]

ModelKind = Literal["language model", "classifier", "tagger", "reward model", "encoder"]

SCORE = "score.weight"
_WRITERS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "MTModel")
_TAKEN_BY: dict[ModelKind, str] = {
    "classifier": "upslope eval {0} --data FILE measures it",
    "tagger": "upslope eval {0} --data FILE measures it",
    "reward model": "upslope eval {0} --preferences FILE measures it, and --reward reward_model:path={0} trains on it",
    "encoder": "upslope classify or tag --model {0} gives it a head",
}


def kind_of(folder: Path | str) -> ModelKind:
    """By the architecture that config.json names, and the scalar head of a reward model."""
    config = read_config(folder)
    named = config.get("architectures")
    name = str(named[0]) if isinstance(named, list) and named else ""
    if name.endswith("ForTokenClassification"):
        return "tagger"
    if name.endswith("ForSequenceClassification") or not name.endswith(_WRITERS):
        shape = read_shapes(folder).get(SCORE)
        if shape is not None and shape[0] == 1:
            return "reward model"
        if shape is not None or name.endswith("ForSequenceClassification"):
            return "classifier"
    return "encoder" if not name.endswith(_WRITERS) and _looks_both_ways(config) else "language model"


def check_writes(folder: Path | str) -> None:
    """ModelError, with the verb that takes it, for a model that gives no text."""
    kind = kind_of(folder)
    if kind != "language model":
        article = "an" if kind == "encoder" else "a"
        raise ModelError(f"{folder}: is {article} {kind} and writes no text; {_TAKEN_BY[kind].format(folder)}")


def _looks_both_ways(config: dict[str, object]) -> bool:
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    both = config.get("is_decoder") or config.get("is_encoder_decoder")
    return config.get("model_type") in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not both

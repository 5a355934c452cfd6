"""What the values of a config.json may be, before any library or network sees them; the one door to transformers; and
which kind of model it describes, with the verbs that take it.

A table of keys: what kind of value, and from where to where. The range is that of anything a network could be, so that
a wrong value is named here in one line; whether the sizes are those of the weights is for `check_sizes` to say.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from huggingface_hub.errors import StrictDataclassError

from upslope.errors import ModelError, UpslopeError, is_rust_error, one_line
from upslope.models.files.folders import read_config
from upslope.models.files.weights import read_shapes

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

LIBRARY_ERRORS = (
    *(ValueError, TypeError, LookupError, AttributeError, ArithmeticError, OSError, RuntimeError, ImportError),
    *(AssertionError, MemoryError, StrictDataclassError),
)
"""What transformers raises over a configuration or weights that it cannot make a network of."""

_Range = tuple[type, float, float]
_LAYERS = "num_hidden_layers encoder_layers decoder_layers n_layer n_layers num_layers"
_SLACK = 1 << 24  # elements of a new head, which no file holds


def _all(keys: str, kind: type, low: float, high: float) -> dict[str, _Range]:
    return dict.fromkeys(keys.split(), (kind, low, high))


TABLE: dict[str, _Range] = {
    **_all("vocab_size decoder_vocab_size", int, 1, 2**24),
    **_all("hidden_size d_model n_embd dim embedding_size", int, 1, 2**17),
    **_all("intermediate_size encoder_ffn_dim decoder_ffn_dim ffn_dim n_inner hidden_dim d_inner", int, 1, 2**20),
    **_all(_LAYERS, int, 1, 4096),
    **_all("num_attention_heads encoder_attention_heads decoder_attention_heads n_head n_heads", int, 1, 4096),
    **_all("num_key_value_heads", int, 1, 4096),
    **_all("head_dim", int, 1, 2**13),
    **_all("max_position_embeddings n_positions n_ctx original_max_position_embeddings", int, 1, 2**27),
    **_all("type_vocab_size", int, 0, 2**16),
    **_all("num_labels", int, 0, 10**6),
    **_all("pad_token_id bos_token_id eos_token_id decoder_start_token_id", int, -1, 2**24),
    **_all("rms_norm_eps layer_norm_eps layer_norm_epsilon", float, 0, 1),
    **_all("initializer_range", float, 0, 1000),
    **_all("dropout attention_dropout activation_dropout hidden_dropout_prob", float, 0, 1),
    **_all("rope_theta", float, 1e-3, 1e15),
    **_all("factor low_freq_factor high_freq_factor", float, 1e-6, 1e6),
}
_SINUSOIDS = 2**16  # positions of an encoder-decoder, whose table is computed
_ROTARY = ("rope_parameters", "rope_scaling")


def check_config(raw: Mapping[str, Any], where: Path | str) -> None:
    """Raise ModelError, naming file, key, value and range, for the first value that no network can have.

    null stands for a key that is not there. A list of sizes, one per layer, is left to transformers.
    """
    if (kind := raw.get("model_type")) is not None and not isinstance(kind, str):
        raise ModelError(f"{where}: model_type = {kind!r:.60}; it must be a text")
    table = TABLE | ({"max_position_embeddings": (int, 1, _SINUSOIDS)} if raw.get("is_encoder_decoder") is True else {})
    _check(raw, table, where, "")
    for key in _ROTARY:
        if (rope := raw.get(key)) is not None and not isinstance(rope, dict):
            raise ModelError(f"{where}: {key} = {rope!r:.60}; it must be an object")
        _check(rope or {}, TABLE, where, f"{key}.")
    listed = raw.get("architectures")
    if listed is not None and not (isinstance(listed, list) and all(isinstance(name, str) for name in listed)):
        raise ModelError(f"{where}: architectures = {listed!r:.60}; it must be a list of names")


def _check(values: Mapping[str, Any], table: Mapping[str, _Range], where: Path | str, prefix: str) -> None:
    for key, (kind, low, high) in table.items():
        value = values.get(key)
        if value is None or (isinstance(value, list) and value and all(type(x) is int for x in value)):
            continue
        if not (type(value) is int or (kind is float and type(value) is float)) or not low <= value <= high:
            name = "a whole number" if kind is int else "a number"
            raise ModelError(
                f"{where}: {prefix}{key} = {value!r:.60}; it must be {name} from {low:g} to {high:,.15g}; "
                "correct it, or get the file again"
            )


def transformers_config(folder: Path | str) -> PreTrainedConfig:
    """The folder's config.json as transformers reads it, once its values are known to be possible.

    Raises ModelError, naming the file, for a value out of its range and for whatever transformers does not take.
    """
    from transformers import AutoConfig

    path = Path(folder) / "config.json"
    check_config(read_config(folder), path)
    with one_model_error(f"{folder}: config.json is not one transformers can run"):
        return AutoConfig.from_pretrained(str(folder), trust_remote_code=False)


@contextmanager
def one_model_error(said: str) -> Iterator[None]:
    """Whatever a library raises over the files in the block becomes a ModelError of what is said and its own word."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, UpslopeError) or not (isinstance(error, LIBRARY_ERRORS) or is_rust_error(error)):
            raise
        raise ModelError(f"{said} ({one_line(error)})") from error


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and no report of fresh heads from transformers: what did not fit, its callers say."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def check_sizes(
    raw: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], where: Path | str, *, elements: int = 0
) -> None:
    """Raise ModelError where config.json describes a larger network than the weight files can hold.

    Every layer has a tensor; `elements`: of the network built without memory, against those in the files.
    """
    for key in _LAYERS.split():
        layers = raw.get(key)
        if type(layers) is int and layers > len(shapes):
            raise ModelError(
                f"{where}: {key} = {layers}, but the weight files hold {len(shapes)} tensors; "
                "correct it, or get the folder again"
            )
    held = sum(math.prod(shape) for shape in shapes.values())
    if elements > 2 * held + _SLACK:
        raise ModelError(
            f"{where}: describes {elements:,} weights, but the weight files hold {held:,}; correct it, or "
            "get the folder again"
        )


ModelKind = Literal["language model", "classifier", "tagger", "reward model", "encoder"]

SCORE = "score.weight"
_WRITERS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "MTModel")
_TAKEN_BY: dict[ModelKind, str] = {
    "classifier": "upslope eval {0} --data FILE measures it",
    "tagger": "upslope eval {0} --data FILE measures it",
    "reward model": "upslope eval {0} --preferences FILE measures it, and --reward reward_model:path={0} trains on it",
    "encoder": "upslope classify or tag --model {0} gives it a head",
}


def architecture(config: Mapping[str, Any]) -> str:
    """The network's class by config.json, as transformers calls it; "" where it names none."""
    named = config.get("architectures")
    return str(named[0]) if isinstance(named, list) and named else ""


def kind_of(folder: Path | str) -> ModelKind:
    """By the architecture that config.json names, and the scalar head of a reward model."""
    config = read_config(folder)
    if (name := architecture(config)).endswith("ForTokenClassification"):
        return "tagger"
    if name.endswith("ForSequenceClassification") or not name.endswith(_WRITERS):
        if (shape := read_shapes(folder).get(SCORE)) is not None and shape[0] == 1:
            return "reward model"
        if shape is not None or name.endswith("ForSequenceClassification"):
            return "classifier"
    return "encoder" if not name.endswith(_WRITERS) and is_encoder(config) else "language model"


def check_writes(folder: Path | str) -> None:
    """ModelError, with the verb that takes it, for a model that gives no text."""
    if (kind := kind_of(folder)) != "language model":
        article = "an" if kind == "encoder" else "a"
        raise ModelError(f"{folder}: is {article} {kind} and writes no text; {_TAKEN_BY[kind].format(folder)}")


def is_encoder(config: Mapping[str, Any]) -> bool:
    """Whether the network looks both ways: of a kind that fills masks, and no decoder."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    both = config.get("is_decoder") or config.get("is_encoder_decoder")
    return config.get("model_type") in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not both

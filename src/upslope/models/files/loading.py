"""A folder into a network and back: our decoder where it can run the model exactly, the adapter elsewhere.

A reward model is transformers' sequence classifier with one label: `model.*` and `score.weight` [1, D] in place of the
language head; config.json names the architecture (LlamaForSequenceClassification and its like) and, under
"upslope_reward", what the numbers mean. There is no bias: the layout has none, and a comparison of two answers does not
see one.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from upslope.errors import ModelError
from upslope.models.decoder.network import MODEL_TYPES, Decoder, DecoderConfig, rope_frequencies
from upslope.models.files.config_json import SCORE, check_config, check_sizes, check_writes, transformers_config
from upslope.models.files.folders import (
    GENERATION_CONFIG,
    check_intact,
    copy_companions,
    new_folder,
    read_config,
    write_json,
)
from upslope.models.files.weights import Tokenizer, check_shapes, load, read_shapes, save_folder
from upslope.models.lstm import LSTM, LSTMConfig
from upslope.models.lstm import MODEL_TYPE as LSTM_TYPE
from upslope.models.protocol import CausalModel, ScalarHead
from upslope.models.seq2seq.layers import is_seq2seq
from upslope.models.seq2seq.network import Seq2Seq, load_seq2seq, stored_tensors

_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_IGNORED_ENDINGS = (".rotary_emb.inv_freq",)  # tables that old checkpoints stored; they are computed here
# Keys whose absence in config.json means the library's default for the architecture, not ours.
_DEFAULTED = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "hidden_act", "attention_bias"),
    *("mlp_bias", "tie_word_embeddings", "initializer_range", "rope_parameters", "sliding_window"),
)


def load_model(
    folder: Path | str, *, dtype: torch.dtype = torch.float32, gradient_checkpointing: bool = False, trunk: bool = False
) -> CausalModel:
    """The network of a model folder with its weights in `dtype`.

    Decoder for llama, mistral, qwen2 and qwen3 folders it can run exactly, LSTM for its own, Seq2Seq for marian and
    pegasus, TransformersModel for any other causal architecture. With `trunk` a reward model's folder (a `score.weight`
    in place of the head) gives what is under it; its logits then mean nothing. Raises ModelError, naming the folder and
    what is missing, misshapen, damaged or unsupported, or which verb takes a model that writes no text.
    """
    check_intact(folder)
    raw = read_config(folder)
    check_config(raw, Path(folder) / "config.json")
    if not trunk:
        check_writes(folder)
    if raw.get("model_type") == LSTM_TYPE:
        return _filled(LSTM, LSTMConfig.from_hf(raw), folder, dtype, gradient_checkpointing)
    if is_seq2seq(raw):
        return load_seq2seq(folder, dtype=dtype, gradient_checkpointing=gradient_checkpointing)
    if (config := decoder_config(folder)) is None:
        from upslope.models.transformers_model import TransformersModel

        return TransformersModel.from_folder(folder, dtype=dtype, gradient_checkpointing=gradient_checkpointing)
    model = _filled(Decoder, config, folder, dtype, gradient_checkpointing)
    model.rope_inverse = rope_frequencies(config.rope, config.head_dim)
    return model


def _filled(network: type[Any], config: Any, folder: Path | str, dtype: torch.dtype, checkpointing: bool) -> Any:
    """The network of a configuration with the folder's weights, every one of which must be there and fit."""
    found = {n: shape for n, shape in read_shapes(folder).items() if not n.endswith(_IGNORED_ENDINGS)}
    check_sizes(vars(config), found, Path(folder) / "config.json")
    if found.pop(SCORE, None) and _HEAD not in found:
        config = replace(config, tie_word_embeddings=True)
    with torch.device("meta"):
        model = network(config, gradient_checkpointing=checkpointing)
    expected = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    if config.tie_word_embeddings and _HEAD in found and _EMBEDDING in found:
        pair = load(folder, names=[_HEAD, _EMBEDDING])
        if not torch.equal(pair[_HEAD], pair[_EMBEDDING]):
            raise ModelError(
                f"{folder}: config.json ties the head to the embedding but {_HEAD} differs from {_EMBEDDING}; "
                "set tie_word_embeddings to false to use both"
            )
        del found[_HEAD]
    check_shapes(expected, found, where=folder)
    model.load_state_dict(load(folder, dtype=dtype, names=list(expected)), assign=True)
    if isinstance(model, Decoder):
        model.join_projections()
    return model


def decoder_config(folder: Path | str) -> DecoderConfig | None:
    """The folder's configuration for our decoder, or None when the adapter has to run it.

    Keys that config.json leaves out get transformers' defaults for the architecture.
    """
    if (raw := read_config(folder)).get("quantization_config"):
        raise ModelError(f"{folder}: holds quantised weights; training needs the unquantised model")
    if raw.get("model_type") not in MODEL_TYPES:
        return None
    from upslope.models.transformers_model import sliding_window

    full = transformers_config(folder)
    if sliding_window(full) is not None:
        return None
    values: dict[str, Any] = full.to_dict()
    filled = {key: values[key] for key in _DEFAULTED if key in values and raw.get(key) is None}
    if values.get("rope_parameters"):
        filled["rope_parameters"] = values["rope_parameters"]
    try:
        return DecoderConfig.from_hf({**raw, **filled})
    except ModelError:  # a variant of the family (biases, activations, rotary scalings) that transformers can run
        return None


def save_model(
    model: CausalModel,
    folder: Path | str,
    *,
    tensors: Mapping[str, Tensor] | None = None,
    source_folder: Path | str | None = None,
    tokenizer: Tokenizer | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: float = 5e9,
    overwrite: bool = False,
) -> Path:
    """Write `model` as a folder that transformers loads (an LSTM: only upslope); atomic (weights.save_folder).

    `tensors` (float32 master weights, say) take the place of the model's own parameters; names and shapes are
    checked. Tokenizer, chat template and generation config are copied from `source_folder`.
    """
    expected = {name: tuple(p.shape) for name, p in model.named_parameters()}
    state = dict(model.named_parameters()) if tensors is None else dict(tensors)
    check_shapes(expected, {name: tuple(t.shape) for name, t in state.items()}, where="weights to save")
    if isinstance(model, Decoder | LSTM | Seq2Seq):
        generation = None
        if isinstance(model, Seq2Seq):
            state = stored_tensors(model, state)
            if source_folder is None or not (Path(source_folder) / GENERATION_CONFIG).is_file():
                generation = model.config.generation_config()
        return save_folder(
            folder,
            model.config.to_hf(),
            state,
            dtype=dtype,
            max_shard_bytes=max_shard_bytes,
            source_folder=source_folder,
            tokenizer=tokenizer,
            generation_config=generation,
            overwrite=overwrite,
        )
    from upslope.models.transformers_model import TransformersModel

    if not isinstance(model, TransformersModel):
        raise ModelError(f"{type(model).__name__} is not a model that can be saved as a folder")
    # transformers writes its own model: it knows how the names in memory differ from those on disk
    kept = {name: b for name, b in model.named_buffers() if name in model.state_dict()}
    state = {
        name: t.detach().to("cpu", dtype if dtype is not None and t.is_floating_point() else t.dtype).contiguous()
        for name, t in {**kept, **state}.items()
    }
    written = next(t.dtype for t in state.values() if t.is_floating_point())
    with new_folder(folder, overwrite=overwrite) as temp:
        model.network.save_pretrained(str(temp), state_dict=state, max_shard_size=int(max_shard_bytes))
        config = read_config(temp)
        if source_folder is not None:  # the network's own has dropout switched off
            config = {k: v for k, v in read_config(source_folder).items() if k != "torch_dtype"}
            (temp / GENERATION_CONFIG).unlink(missing_ok=True)
            copy_companions(Path(source_folder), temp)
        write_json(temp / "config.json", {**config, "dtype": str(written).removeprefix("torch.")})
        if tokenizer is not None:
            tokenizer.save_pretrained(str(temp))
    return Path(folder)


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
    if (shape := read_shapes(folder).get(SCORE)) is None:
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
    if (weight := stored_score(folder)) is None:
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

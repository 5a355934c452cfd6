"""New weights for a network that runs: read, found to fit it, copied in."""

import logging
from collections.abc import Callable
from typing import Any, Protocol

import torch

from upslope.data.pieces import PairTokenizer
from upslope.engine import Engine
from upslope.errors import ModelError, UpslopeError
from upslope.models.files.weights import check_shapes
from upslope.models.protocol import CausalModel

log = logging.getLogger("upslope.serving")

# Keys of a configuration that say nothing about what the network computes.
_ACCIDENTAL = frozenset(
    {"_name_or_path", "architectures", "dtype", "initializer_range", "torch_dtype", "transformers_version", "use_cache"}
)


class Loaded(Protocol):
    """A network read from somewhere, with its tokenizer."""

    model: CausalModel
    tokenizer: Any

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The ids that end a completion."""
        ...


def read_fitting(load: Callable[[str], Loaded], source: str, engine: Engine, tokenizer: Any) -> Loaded:
    """What `load` reads from the source, when it can take the place of the engine's network.

    UpslopeError or OSError where it cannot be read or does not fit.
    """
    try:
        loaded = load(source)
        _check_fits(loaded, engine, tokenizer, source)
    except (UpslopeError, OSError):
        raise
    except Exception as error:  # whatever a broken folder makes the libraries raise, bare Exceptions too
        log.error("new weights cannot be read", exc_info=error)
        raise ModelError(f"{source}: no model can be read from it: {type(error).__name__}: {error}") from error
    return loaded


def _check_fits(loaded: Loaded, engine: Engine, tokenizer: Any, source: str) -> None:
    """Raise ModelError where the loaded weights are not of the same network, vocabulary and ends of a turn."""
    model = engine.model
    if type(loaded.model) is not type(model):
        raise ModelError(f"{source}: a {type(loaded.model).__name__}, but a {type(model).__name__} is being served")
    shapes = [{name: tuple(t.shape) for name, t in m.state_dict().items()} for m in (model, loaded.model)]
    check_shapes(shapes[0], shapes[1], where=f"{source} in place of the model being served")
    ours, theirs = _meaning(model), _meaning(loaded.model)
    changed = sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))
    if changed:
        raise ModelError(f"{source}: its config.json differs from the served model's in {', '.join(changed)}")
    if _vocabularies(loaded.tokenizer) != _vocabularies(tokenizer):
        raise ModelError(f"{source}: its tokenizer has another vocabulary than the served model's")
    if set(loaded.eos_token_ids) != engine.eos_token_ids:
        raise ModelError(
            f"{source}: its turns end at tokens {sorted(loaded.eos_token_ids)}, the served model's at "
            f"{sorted(engine.eos_token_ids)}; start a server with it"
        )


@torch.no_grad()
def copy_weights(source: CausalModel, target: CausalModel) -> None:
    """Copy every parameter and buffer in place; names and shapes have been checked."""
    fresh = source.state_dict()
    for name, tensor in target.state_dict().items():
        tensor.copy_(fresh[name])


def _vocabularies(tokenizer: Any) -> list[dict[str, int]]:
    sides = [tokenizer.target, tokenizer.source] if isinstance(tokenizer, PairTokenizer) else [tokenizer]
    return [side.get_vocab() for side in sides]


def _meaning(model: Any) -> dict[str, Any]:
    config = model.config.to_hf() if hasattr(model.config, "to_hf") else model.config.to_dict()
    return {key: value for key, value in config.items() if key not in _ACCIDENTAL}

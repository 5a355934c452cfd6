"""Networks as they are in use and not in training."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def evaluating(*modules: torch.nn.Module | None) -> Iterator[None]:
    """Dropout off and no gradient, and the previous modes back afterwards."""
    real = [m for m in modules if m is not None]
    modes = [m.training for m in real]
    for module in real:
        module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in zip(real, modes, strict=True):
            module.train(mode)

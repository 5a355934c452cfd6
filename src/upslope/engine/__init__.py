"""Generation: continuous batching over a block cache, exact log-probs, beam search, streaming.

request     what is asked and how far each sample has come; beam search
scheduler   which sequences run in the next step, and who owns which block
runner      the plan on the model
sampling    from logits to tokens
outputs     what a step brings forth, and its text
engine      the engine: add, step, generate, stream, cancel
"""

from upslope.engine.engine import Engine
from upslope.engine.request import Event, TokenMask
from upslope.engine.runner import Stats

__all__ = ["Engine", "Event", "Stats", "TokenMask"]

"""Generation: continuous batching over a block cache, exact log-probs, beam search, streaming.

request     what is asked and how far each sample has come
blocks      who owns which block: sharing, copy-on-write, prefix cache
scheduler   which sequences run in the next step
runner      the plan on the model
sampling    from logits to tokens
beam        beam search
text        tokens to text while they arrive
outputs     what a step brings forth
engine      the engine: add, step, generate, stream, cancel
"""

from upslope.engine.engine import Engine
from upslope.engine.request import Event, TokenMask
from upslope.engine.runner import Stats

__all__ = ["Engine", "Event", "Stats", "TokenMask"]

"""The causal decoder and its fast paths."""

"""The encoder-decoder."""

"""The bidirectional encoder."""

"""How tokens attend: packed sequences, cached blocks, padded batches."""

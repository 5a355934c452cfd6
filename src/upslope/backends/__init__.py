"""What the computation runs on: the processor and its dtypes."""

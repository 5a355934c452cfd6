"""What the computation runs on: the processor, its dtypes, threads."""

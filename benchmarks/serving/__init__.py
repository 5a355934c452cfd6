"""The parts of benchmarks/serve.py: servers, the load on them, and what is made of it."""

"""Benchmarks: what is claimed about learning and speed, as scripts that anybody can run again."""

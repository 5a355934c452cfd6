"""The cases of benchmarks/learning.py, one file each."""

"""Prompts x engine x judge -> judged groups of rollouts."""

"""What `--dry-run` shows: the learner as it would be made, one small real step, and what it needs."""

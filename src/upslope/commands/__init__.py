"""The verbs; the training verbs are recipes that `train` runs."""

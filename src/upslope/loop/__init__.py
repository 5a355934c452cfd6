"""What turns around a recipe: the training loop, and the parts that recipes hold."""

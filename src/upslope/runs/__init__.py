"""The run folder: what a training writes, what a viewer reads. Free of torch."""

"""Training: the loop, checkpoints, metrics, evaluation."""

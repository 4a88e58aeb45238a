"""A finished model measured: bits per byte of held-out text by domain, and the tasks of the lm-evaluation-harness."""

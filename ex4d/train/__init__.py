"""Training: the loop, the one gate to DeepSpeed, rank-independent checkpoints, the run log."""

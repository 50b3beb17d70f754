"""Training: what a run is made of, its optimizers, checkpoints, processes and log."""

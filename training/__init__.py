"""Training: a run's setup, optimizers, checkpoints, processes and logs."""

"""What every training loop shares: the run folder, state, checkpoints, optimizers, averages, processes."""

"""Parts of every training loop: run folder, state, checkpoints, optimizers, averages, processes."""

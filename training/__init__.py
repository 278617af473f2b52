"""Training: one visible loop a stage (`train_autoencoder.py`, `train_diffusion.py`) over small tested parts."""

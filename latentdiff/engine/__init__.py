"""Execution of networks, applied from outside: offload, attention, tiled decoding, tiled denoising."""

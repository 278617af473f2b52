"""Execution of networks, applied from outside: engines, offload, attention, tiled decoding, tiled denoising."""

"""Comparisons with diffusers and transformers: the same weights must give the same numbers."""

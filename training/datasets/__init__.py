"""Datasets and weights that recipes of this repository start from."""

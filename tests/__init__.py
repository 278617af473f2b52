"""Tests, in the order of the package; `python -m pytest` runs them all."""

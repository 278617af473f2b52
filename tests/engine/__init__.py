"""Tests of latentdiff.engine."""

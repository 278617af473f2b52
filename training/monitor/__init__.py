"""Monitoring of a run: logs, trackers, validation, speed, sample grids."""

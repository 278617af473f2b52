"""What is said of a run while it trains: logs, trackers, validation, speed, pictures."""

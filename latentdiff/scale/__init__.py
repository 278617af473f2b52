"""Draw tables of any length, each row exactly once, on one machine or many; `batch.run_batch` is the door."""

"""Draw pictures for many clients at once with one model on one device; `scheduler.Scheduler` is the door."""

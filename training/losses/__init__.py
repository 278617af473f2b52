"""The training objectives, term by term."""

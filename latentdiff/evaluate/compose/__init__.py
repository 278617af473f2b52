"""The compositional benchmark: prompts whose truth a program can check, and the checker with its own error rates."""

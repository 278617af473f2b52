"""Scenes composed of the emoji drawings: what is in each, how it is drawn, and what captions say of it."""

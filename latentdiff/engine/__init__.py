"""How a model is run: decoded in tiles, with another attention, from CPU memory. Applied from outside."""

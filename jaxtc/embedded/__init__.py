"""The model and transcoders that ship with jaxtc, and the recipe that made them."""

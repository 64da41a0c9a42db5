"""Training transcoders: activations, packing, the loop."""

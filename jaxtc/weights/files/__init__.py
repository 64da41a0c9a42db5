"""File formats: safetensors, npz, and what is in them."""

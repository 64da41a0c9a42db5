"""Gemma-2: its config, prompts, parameters and forward pass."""

"""Converted checkpoints: orbax's, with one sidecar of ours."""

"""The compiled entry points: run and generate."""

"""Numerical parity with PyTorch, on anyone's own weights: :func:`certify`."""

"""Numerical parity with PyTorch, on anyone's own weights: :func:`certify`."""

from jaxtc.parity.certificate import Certificate
from jaxtc.parity.flow import certify

__all__ = ["Certificate", "certify"]

"""Whole numbers as users give them."""

import numbers
from typing import Any


def is_whole(value: Any, least: int = 0) -> bool:
    """Whether this is a whole number of at least ``least``, of Python's or NumPy's; no bool is."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and value >= least

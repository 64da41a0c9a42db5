"""How well a transcoder imitates its MLP.

The public name of :mod:`jaxtc.transcoders.metrics`.
"""

from jaxtc.transcoders.metrics import *  # noqa: F403
from jaxtc.transcoders.metrics import __all__ as __all__

"""Pictures of experiments.

The public name of :mod:`jaxtc.experiments.plots`.
"""

from jaxtc.experiments.plots import *  # noqa: F403
from jaxtc.experiments.plots import __all__ as __all__

"""Numbers to explain: what of a run's logits an experiment looks at.

The public name of :mod:`jaxtc.experiments.scores`.
"""

from jaxtc.experiments.scores import *  # noqa: F403
from jaxtc.experiments.scores import __all__ as __all__

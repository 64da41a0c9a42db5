"""What to keep of a site in place of all of it.

The public name of :mod:`jaxtc.captures.reducers`.
"""

from jaxtc.captures.reducers import *  # noqa: F403
from jaxtc.captures.reducers import __all__ as __all__

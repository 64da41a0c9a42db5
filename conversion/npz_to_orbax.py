"""Transcoders, one params.npz or a release with a folder a layer, to an orbax tree.

    python conversion/npz_to_orbax.py SOURCE OUT

The same as `jaxtc convert SOURCE OUT --to orbax`, which has more options.
"""

import sys

from jaxtc.errors import JaxtcError
from jaxtc.weights.conversion.convert import convert

if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    try:
        print(convert(sys.argv[1], sys.argv[2], "orbax", kind="transcoders"))
    except JaxtcError as error:
        sys.exit(f"Error: {error}")

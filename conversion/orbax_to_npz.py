"""Converted transcoders (or any that jaxtc reads) to Gemma Scope's params.npz.

    python conversion/orbax_to_npz.py SOURCE OUT

The same as `jaxtc convert SOURCE OUT --to npz`, which has more options.
"""

import sys

from jaxtc.errors import JaxtcError
from jaxtc.weights.conversion.convert import convert

if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    try:
        print(convert(sys.argv[1], sys.argv[2], "npz", kind="transcoders"))
    except JaxtcError as error:
        sys.exit(f"Error: {error}")

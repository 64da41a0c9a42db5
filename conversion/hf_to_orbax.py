"""A model in Hugging Face's format (a hub id or a folder) to an orbax tree.

    python conversion/hf_to_orbax.py SOURCE OUT

The same as `jaxtc convert SOURCE OUT --to orbax`, which has more options.
"""

import sys

from jaxtc.errors import JaxtcError
from jaxtc.weights.conversion.convert import convert

if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    try:
        print(convert(sys.argv[1], sys.argv[2], "orbax", kind="model"))
    except JaxtcError as error:
        sys.exit(f"Error: {error}")

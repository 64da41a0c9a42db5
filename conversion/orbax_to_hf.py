"""A converted model to the safetensors that transformers loads.

    python conversion/orbax_to_hf.py SOURCE OUT

The same as `jaxtc convert SOURCE OUT --to safetensors`, which has more options.
"""

import sys

from jaxtc.errors import JaxtcError
from jaxtc.weights.conversion.convert import convert

if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    try:
        print(convert(sys.argv[1], sys.argv[2], "safetensors", kind="model"))
    except JaxtcError as error:
        sys.exit(f"Error: {error}")

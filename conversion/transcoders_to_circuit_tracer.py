"""Transcoders (converted, npz, or any that jaxtc reads) to circuit-tracer's files.

    python conversion/transcoders_to_circuit_tracer.py SOURCE OUT

The same as `jaxtc convert SOURCE OUT --to circuit-tracer`, which has more options.
"""

import sys

from jaxtc.errors import JaxtcError
from jaxtc.weights.conversion.convert import convert

if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    try:
        print(convert(sys.argv[1], sys.argv[2], "circuit-tracer", kind="transcoders"))
    except JaxtcError as error:
        sys.exit(f"Error: {error}")

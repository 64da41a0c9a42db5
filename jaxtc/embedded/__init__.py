"""The model and transcoders that ship with jaxtc, and the recipe that made them.

The shipped files, in the public formats, are ``data/model`` and ``data/transcoders`` beside this
file, and ``data/text.json`` says what they were trained on; ``jaxtc embedded train`` makes such a
folder and ``jaxtc embedded report`` measures one.
"""

from pathlib import Path

from jaxtc.weights.sources.resolve import EMBEDDED_DATA as DATA


def model_folder(root: Path = DATA) -> Path:
    """The model, as ``transformers`` writes them, of a folder that the recipe made."""
    return root / "model"


def transcoder_folder(root: Path = DATA) -> Path:
    """The transcoders, laid out as Gemma Scope's, of a folder that the recipe made."""
    return root / "transcoders"

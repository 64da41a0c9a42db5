"""The model and transcoders that ship with jaxtc, and the recipe that made them.

The shipped files, in the public formats, are ``data/model`` and ``data/transcoders`` beside this
file; ``jaxtc embedded train`` makes such a folder and ``jaxtc embedded report`` measures one.
"""

from pathlib import Path

#: Folder of the shipped model and transcoders.
DATA = Path(__file__).parent / "data"


def model_folder(root: Path = DATA) -> Path:
    """The model's folder, as ``transformers`` writes them, of a folder that the recipe made."""
    return root / "model"


def transcoder_files(root: Path = DATA) -> dict[int, Path]:
    """``params.npz`` by layer, of a folder that the recipe made; empty when it has none."""
    files = (root / "transcoders").glob("layer_*/width_*/average_l0_*/params.npz")
    found = {int(path.parts[-4].removeprefix("layer_")): path for path in files}
    return dict(sorted(found.items()))

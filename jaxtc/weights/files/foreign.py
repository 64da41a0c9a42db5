"""Files of weights that jaxtc does not read, named for what they are."""

import os
from pathlib import Path

from jaxtc.errors import SourceError, WeightsError
from jaxtc.weights.files import local

_PICKLE = (
    "a PyTorch pickle, which can run code when it is loaded, so jaxtc reads none. In PyTorch, load "
    "it with torch.load(path, weights_only=True) and write its tensors with "
    "safetensors.torch.save_file; keep the config that belongs to it beside them"
)
_GGUF = (
    "a GGUF file, whose weights are mostly quantised; give the safetensors or npz that it was made "
    "from"
)
_OTHER = "give the same weights as safetensors or npz"
_BY_SUFFIX = {
    **dict.fromkeys((".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle"), _PICKLE),
    ".gguf": _GGUF, ".ggml": _GGUF, ".h5": f"an HDF5 file: {_OTHER}",
    ".onnx": f"an ONNX file: {_OTHER}", ".msgpack": f"a Flax msgpack file: {_OTHER}",
    ".npy": f"a single NumPy array, not the arrays of a transcoder: {_OTHER}",
}  # fmt: skip


def refuse_foreign(path: Path) -> None:
    """Raise WeightsError for a file that jaxtc never reads, by its content or its name."""
    with local.open_plain(path) as file:
        try:
            start = os.pread(file.fileno(), 256, 0)
        except OSError as error:
            raise WeightsError(f"{path} cannot be read: {error.strerror}.") from error
    what = _BY_SUFFIX.get(path.suffix.lower(), "")
    # Of safetensors, the first 8 bytes are a length, so of zeros from the third on.
    bare = start[:1] == b"\x80" and start[1:2] in b"\x02\x03\x04\x05" and start[2:8].strip(b"\0")
    if bare or (start[:2] == b"PK" and b"data.pkl" in start):
        what = _PICKLE
    elif start[:4] == b"GGUF":
        what = _GGUF
    if what:
        raise WeightsError(f"{path} is {what}.")


def refuse_foreign_folder(folder: Path) -> None:
    """Raise SourceError for a folder that has no transcoders but files that jaxtc never reads."""
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _BY_SUFFIX)
    if found:
        raise SourceError(
            f"{folder} holds no transcoders that jaxtc reads; {found[0].relative_to(folder)} is "
            f"{_BY_SUFFIX[found[0].suffix.lower()]}."
        )

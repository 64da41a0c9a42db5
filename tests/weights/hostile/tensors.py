"""Safetensors files: of a model, and of a transcoder in the two formats that have one."""

import json
import math
import os
from pathlib import Path

import numpy as np
import safetensors.numpy
from flax import nnx

import jaxtc
from jaxtc.errors import WeightsError
from jaxtc.weights.files.safetensors import SafetensorsFile
from jaxtc.weights.files.transcoder import open_transcoder
from tests.weights.hostile.mutate import ODD, dump, mutate_bytes, mutate_json, pick, whole

CONFIG = jaxtc.Gemma2Config(
    vocab_size=6, hidden_size=4, intermediate_size=5, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=1, head_dim=2, sliding_window=4, query_pre_attn_scalar=2,
    max_position_embeddings=8,
)  # fmt: skip
HUGE = (2**31, 2**40, 2**62, 2**63, 2**64, 10**25)
FLOAT32 = np.dtype(np.float32)
SITES = {"input_site": "mlp_in", "output_site": "mlp_out"}
# What a load is given as mesh: through the readers alone, through load_model, and through a mesh.
MESHES = (None, None, "model=1")


def split(raw: bytes) -> tuple[dict, bytes]:
    """Header and data."""
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def join(header: bytes, data: bytes, length: int | None = None) -> bytes:
    length = len(header) if length is None else length
    return (length % 2**64).to_bytes(8, "little") + header + data


def says(path: Path) -> dict[str, np.ndarray]:
    """Every tensor of a file, by the safetensors library."""
    return safetensors.numpy.load_file(path)


def header_mutant(header: dict, data: bytes, rng: np.random.Generator) -> tuple[str, bytes]:
    """One lie in a header, or one kind of damage to it, by name."""
    names = [name for name in header if name != "__metadata__"]
    name = pick(rng, names)
    entry = dict(header[name])
    start, stop = entry["data_offsets"]
    kind = pick(rng, ["offsets", "shape", "dtype", "names", "length", "order", "json", "field",
                      "trade", "empty", "hole"])  # fmt: skip
    encoded = None
    if kind == "offsets":
        entry["data_offsets"] = pick(rng, [
            [start + 4, stop + 4], [start - 4, stop - 4], [stop, start], [start, stop + 4],
            [start, stop - 4], [start, start], [0, stop - start], [-start, -stop],
            [start, stop, stop], [start], [], [float(start), float(stop)], [str(start), str(stop)],
            [start, pick(rng, HUGE)], [pick(rng, HUGE), stop], pick(rng, ODD), [start, None],
            [len(data), len(data) + stop - start], [-(stop - start), 0], [True, stop],
        ])  # fmt: skip
    elif kind == "shape":
        shape = entry["shape"]
        entry["shape"] = pick(rng, [
            shape[::-1], [math.prod(shape)], [1, *shape], [*shape, 1], [], [0], [*shape, 0],
            [-size for size in shape], [pick(rng, HUGE), *shape], [pick(rng, HUGE)] * 2,
            [2**32, 2**32], [2**61, 8], [float(size) for size in shape], [True] * len(shape),
            [str(size) for size in shape], [shape], [10**300, 10**300], [1] * 70 + shape,
            pick(rng, ODD), [size + 1 for size in shape],
        ])  # fmt: skip
    elif kind == "dtype":
        entry["dtype"] = pick(rng, [
            "BF16", "F16", "F64", "I32", "U32", "F8_E4M3", "BOOL", "f32", "F32 ", "F4", "C64",
            "object", "O", "float32", *ODD[:8],
        ])  # fmt: skip
        if rng.random() < 0.5 and entry["dtype"] in ("BF16", "F16", "F64"):
            # And a shape that fills the same bytes.
            size = {"F64": 8}.get(entry["dtype"], 2)
            entry["shape"] = [(stop - start) // size]
    elif kind == "field":
        entry = pick(rng, [
            {**entry, "extra": 1}, {key: entry[key] for key in ("dtype", "shape")}, {}, [], None,
            [entry], {**entry, "shape": None}, {"Dtype": "F32", **entry}, list(entry.values()),
        ])  # fmt: skip
    made = {**header, name: entry}
    if kind == "names":
        made = mutate_json({**header}, rng, [*names, "__metadata__", "a.b", "x" * 5000])
    elif kind == "order":
        keys = list(rng.permutation(list(header)))
        made = {str(key): header[str(key)] for key in keys}
    elif kind == "trade":  # two tensors' bytes, which is a sound file
        other = pick(rng, names)
        made = {**header, name: header[other], other: header[name]}
    elif kind == "empty":
        made = {key: header[key] for key in names[: int(rng.integers(len(names)))]}
        data = data[: max([made[key]["data_offsets"][1] for key in made], default=0)]
    elif kind == "hole":
        made = {key: header[key] for key in header if key != name}
    encoded = dump(made, rng) if kind == "json" else json.dumps(made).encode("utf-8")
    if kind == "length":
        size, end = len(encoded), len(encoded) + len(data)
        lengths = [0, 1, 2, size - 1, size + 1, end, end + 1, 10**8, 10**8 + 1, 2**31, 2**64 - 1]
        return kind, join(encoded, data, pick(rng, lengths))
    return kind, join(encoded, data)


def file_mutant(raw: bytes, rng: np.random.Generator) -> tuple[str, bytes]:
    """A mutant of a whole file, and what was done to it."""
    header, data = split(raw)
    draw = rng.random()
    if draw < 0.6:
        return header_mutant(header, data, rng)
    if draw < 0.9:
        return "bytes", mutate_bytes(raw, rng, len(raw) - len(data))
    if draw < 0.95:
        return "whole", whole(raw, rng)
    values = np.frombuffer(data, np.float32).copy()
    values[int(rng.integers(values.size))] = pick(rng, [np.nan, np.inf, -np.inf, 1e38, 0])
    return "values", join(raw[8 : len(raw) - len(data)], values.tobytes())


def put(path: Path, what: str, outside: Path | None = None) -> None:
    """Something that is not a plain file in the place of one."""
    path.unlink(missing_ok=True)
    if what == "fifo":
        os.mkfifo(path)
    elif what == "folder":
        path.mkdir()
    elif what != "missing":
        targets = {"loop": path.name, "device": "/dev/zero", "outside": outside, "dangling": "x"}
        path.symlink_to(targets[what])


class OneFile:
    """An honest file, put back before each mutant of it."""

    kind = ""

    def __init__(self, path: Path):
        self.path, self.raw = path, path.read_bytes()

    def restore(self) -> None:
        """The honest file."""
        self.path.unlink(missing_ok=True)
        self.path.write_bytes(self.raw)

    def warranted(self) -> int:
        """Bytes on the disk."""
        return self.path.stat().st_size if self.path.is_file() else 0


class Tensors(OneFile):
    """A model's folder with one safetensors file."""

    def __init__(self, folder: Path):
        rng = np.random.default_rng(1)
        model = jaxtc.Gemma2(CONFIG, rngs=nnx.Rngs(0))
        for _, param in nnx.iter_graph(model):
            if isinstance(param, nnx.Param):
                param[...] = rng.standard_normal(param.shape).astype(np.float32)
        self.folder = jaxtc.save_model(model, folder / "model")
        super().__init__(self.folder / "model.safetensors")

    def mutate(self, rng: np.random.Generator) -> str:
        """Put a mutant in its place."""
        self.restore()
        if rng.random() < 0.01:
            self.kind = "special"
            put(self.path, pick(rng, ["fifo", "device", "loop", "missing"]))
            return self.kind
        self.kind, content = file_mutant(self.raw, rng)
        self.path.write_bytes(content)
        return self.kind

    def load(self, deep: int) -> dict[str, np.ndarray]:
        """Every tensor that jaxtc can read, as float32; the model's own when ``deep``."""
        if deep:
            model = jaxtc.load_model(self.folder, dtype="float32", mesh=MESHES[deep])
            embedding = np.asarray(model.embed.weight[...])
            return {"model.embed_tokens.weight": embedding}
        found = {}
        with SafetensorsFile(self.path) as file:
            for name, entry in file.entries.items():
                if not entry.fault:
                    array, problem = file.read(name, FLOAT32)
                    found[name] = None if problem else array
        return found

    def check(self, loaded: dict[str, np.ndarray]) -> None:
        """Compare with what the safetensors library reads."""
        known = says(self.path)
        for name, array in loaded.items():
            same(name, array, known[name])


def same(name: str, ours: np.ndarray | None, theirs: np.ndarray) -> None:
    """Ours is theirs as float32; None where that is not finite."""
    with np.errstate(over="ignore"):
        theirs = np.asarray(theirs).astype(np.float32)
    if ours is None:
        assert not np.isfinite(theirs).all(), f"{name} was called not finite"
        return
    ours = np.asarray(ours)
    assert ours.shape == theirs.shape, f"{name}: {ours.shape}, not {theirs.shape}"
    assert np.array_equal(ours, theirs), f"{name} has other values than the file"


def read_all(opened) -> dict[str, np.ndarray]:
    """The parameters of an open file of a transcoder."""
    found = {name: opened.read(name, FLOAT32) for name in opened.shapes}
    problems = [problem for _, problem in found.values() if problem]
    if problems:
        raise WeightsError(f"{opened.path} cannot be used: {', '.join(problems)}.")
    return {name: array for name, (array, _) in found.items()}


class Transcoders(Tensors):
    """A transcoder's file, in turns circuit-tracer's and Gemma Scope 2's."""

    def __init__(self, folder: Path):
        made = jaxtc.Transcoder(5, 7, 3, skip=True, layer=2, rngs=nnx.Rngs(0))
        made.b_enc[...] = np.random.default_rng(0).standard_normal(7)
        self.files = {}
        for format in ("circuit-tracer", "gemma-scope-2"):
            path = folder / format / "layer_2.safetensors"
            jaxtc.save_transcoder(made, path, format=format)
            self.files[path] = path.read_bytes()
        OneFile.__init__(self, path)

    def mutate(self, rng: np.random.Generator) -> str:
        """Of either file."""
        self.restore()
        self.path = pick(rng, list(self.files))
        self.raw = self.files[self.path]
        return super().mutate(rng)

    def load(self, deep: int) -> dict[str, np.ndarray]:
        """Its parameters by our names."""
        if deep:
            made = jaxtc.load_transcoder(self.path, mesh=MESHES[deep], **SITES)
            held = {name: getattr(made, name) for name in NAMES}
            return {name: np.asarray(p[...]) for name, p in held.items() if p is not None}
        with open_transcoder(self.path) as opened:
            return read_all(opened)

    def check(self, loaded: dict[str, np.ndarray]) -> None:
        """Compare with the safetensors library, keys and transposes by hand."""
        known = says(self.path)
        if "w_enc" in known:
            theirs = {"W_enc": known.pop("w_enc"), "W_dec": known.pop("w_dec")}
            skip = known.pop("affine_skip_connection", None)
            theirs["W_skip"] = None if skip is None else skip.T
            theirs["threshold"] = known.pop("threshold", None)
        else:
            theirs = {"W_enc": known.pop("W_enc").T, "W_dec": known.pop("W_dec")}
            theirs["W_skip"] = known.pop("W_skip", None)
            theirs["threshold"] = known.pop("activation_function.threshold", None)
        theirs |= {"b_enc": known.pop("b_enc"), "b_dec": known.pop("b_dec")}
        assert not known, f"{[*known]} was left out"
        theirs = {name: array for name, array in theirs.items() if array is not None}
        assert set(theirs) == set(loaded)
        for name, array in loaded.items():
            same(name, array, theirs[name])


NAMES = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold", "W_skip")
CASES = {"safetensors": Tensors, "transcoder": Transcoders}

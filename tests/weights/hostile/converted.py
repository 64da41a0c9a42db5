"""Converted checkpoints: a manifest, the hash of every file, and the chunks of arrays."""

import hashlib
import json
from pathlib import Path

import jax
import numpy as np
from flax import nnx

import jaxtc
from jaxtc.sharding.rules import variables
from jaxtc.tap.sites import parse
from jaxtc.weights.checkpoints.read import Converted
from jaxtc.weights.conversion.convert import convert
from jaxtc.weights.load_transcoder import available_layers
from tests.weights.hostile.folders import Folder, model, put
from tests.weights.hostile.mutate import ODD, dump, mutate_bytes, mutate_json, pick, whole
from tests.weights.hostile.tensors import FLOAT32, MESHES, same


class ConvertedFolder(Folder):
    """Every byte has a hash; and a manifest may lie, with hashes that fit."""

    def build(self, folder: Path) -> Path:
        """Of a model."""
        jaxtc.save_checkpoint(model(), folder / "model")
        return folder / "model"

    def mutate(self, rng: np.random.Generator) -> str:
        """Damage; things added, missing or linked; lies about arrays, with and without hashes."""
        self.restore()
        names = [name for name in self.honest if name != "jaxtc.json"]
        name = pick(rng, names)
        raw = json.loads(self.honest["jaxtc.json"])
        self.kind = pick(
            rng,
            [
                "damage",
                "damage",
                "place",
                "more",
                "manifest",
                "text",
                "bytes",
                "whole",
                "lie",
                "lie",
                "forged",
                "exchange",
            ],
        )
        manifest = None
        if self.kind == "damage":
            self.write(name, mutate_bytes(self.honest[name], rng))
        elif self.kind == "place":
            what = pick(rng, ["fifo", "folder", "missing", "loop", "device", "outside", "dangling"])
            put(self.folder / pick(rng, [name, name, "jaxtc.json"]), what, self.outside)
        elif self.kind == "more":
            self.write(pick(rng, ["x", "orbax/x", f"{name}.bak", "orbax/embed.weight/9.9"]), b"x")
        elif self.kind == "exchange":
            other = pick(rng, names)
            self.write(name, self.honest[other])
            self.write(other, self.honest[name])
        elif self.kind == "manifest":
            manifest = json.dumps(mutate_json(raw, rng, [*names, *raw["arrays"], "../x", "/x"]))
        elif self.kind == "text":
            manifest = dump(raw, rng)
        elif self.kind == "bytes":
            manifest = mutate_bytes(self.honest["jaxtc.json"], rng)
        elif self.kind == "whole":
            manifest = whole(self.honest["jaxtc.json"], rng)
        elif self.kind == "forged":  # other contents, and hashes that fit them
            content = mutate_bytes(self.honest[name], rng)
            self.write(name, content)
            raw["files"][name] = {
                "size": len(content),
                "sha256": hashlib.sha256(content).hexdigest(),
            }
            manifest = json.dumps(sealed(raw))
        else:
            array = pick(rng, list(raw["arrays"]))
            entry = raw["arrays"][array]
            key = pick(rng, list(entry))
            old = entry[key]
            sizes = (
                [
                    old[::-1],
                    [1],
                    [],
                    [*old, 1],
                    [2**62, 2**62],
                    [0],
                    [-1],
                    [10**30],
                    old * 2,
                    [size + 1 for size in old],
                    [size * 2 for size in old],
                ]
                if key != "dtype"
                else []
            )
            entry[key] = pick(rng, [*sizes, *sizes, "float16", "bfloat16", "float64", *ODD])
            if rng.random() < 0.3:
                raw["arrays"][pick(rng, ["x", "../x", "embed", "layers.9.attn.q"])] = entry
            if rng.random() < 0.3:
                raw["files"][pick(rng, ["../x", "/etc/passwd", "a/../b", "x\x00", ""])] = raw[
                    "files"
                ][name]
            manifest = json.dumps(sealed(raw))
        if manifest is not None:
            self.write("jaxtc.json", manifest.encode() if isinstance(manifest, str) else manifest)
        return self.kind

    def load(self, deep: int) -> dict[str, np.ndarray]:
        """Every array of the tree, as float32; through the model when ``deep``."""
        if deep:
            return {"": self.whole(deep)}
        opened = Converted(self.folder)
        found = {}
        for name in opened.manifest.arrays:
            array, problem = opened.array(name, FLOAT32, None)
            found[name] = None if problem else np.asarray(array)
        opened.verify()
        return found

    def whole(self, deep: int) -> dict[str, np.ndarray]:
        """The parameters of the model of this folder."""
        made = variables(jaxtc.load_model(self.folder, dtype="float32", mesh=MESHES[deep]))
        return {name: np.asarray(leaf[...]) for name, leaf in made}

    def check(self, loaded: dict) -> None:
        """Compare with the chunks on the disk, put together by hand as the manifest says."""
        raw = json.loads((self.folder / "jaxtc.json").read_text(encoding="utf-8"))
        read = [f"orbax/{name}/" for name in raw["arrays"]] if "" in loaded else [""]
        for name, one in raw["files"].items():
            # What describes the arrays to orbax is not read here: the manifest says it too.
            if name.startswith(tuple(read)) and (not read[0] or not name.endswith(".zarray")):
                content = (self.folder / name).read_bytes()
                found = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
                assert found.items() <= one.items(), name
        if "" in loaded:
            known = self.arrays(raw)
            for name, array in loaded[""].items():
                same(name, array, known[name])
            return
        known = self.arrays(raw)
        assert set(loaded) == set(known)
        for name, array in loaded.items():
            same(name, array, known[name])

    def arrays(self, raw: dict) -> dict[str, np.ndarray]:
        """Every array, from its chunks."""
        found = {}
        for name, entry in raw["arrays"].items():
            dtype = jax.numpy.dtype(entry["dtype"])
            shape, chunks = entry["shape"], entry["chunks"]
            whole = np.empty(shape, dtype)
            for index in np.ndindex(*(-(-n // c) for n, c in zip(shape, chunks, strict=True))):
                file = self.folder / "orbax" / name / ".".join(map(str, index))
                part = np.frombuffer(file.read_bytes(), dtype).reshape(chunks)
                where = tuple(slice(i * c, (i + 1) * c) for i, c in zip(index, chunks, strict=True))
                room = whole[where].shape
                whole[where] = part[tuple(map(slice, room))]
            found[name] = whole
        return found


def sealed(raw: dict) -> dict:
    """A manifest whose hash of hashes fits, where it can."""
    lines = (f"{one['sha256']}  {file}\n" for file, one in sorted(raw["files"].items()))
    text = "".join(lines).encode("utf-8", "surrogatepass")
    return {**raw, "content_sha256": hashlib.sha256(text).hexdigest()}


class ConvertedTranscoders(ConvertedFolder):
    """Two layers of transcoders, one with a skip connection, one a ReLU."""

    def build(self, folder: Path) -> Path:
        """From circuit-tracer's files."""
        options = {"input_site": "mlp_in", "rngs": nnx.Rngs(0)}
        for made in (
            jaxtc.Transcoder(5, 7, 3, layer=0, skip=True, **options),
            jaxtc.Transcoder(5, 6, layer=3, activation="relu", **options),
        ):
            jaxtc.save_transcoder(made, folder / "files", format="circuit-tracer")
        return convert(folder / "files", folder / "made", "orbax")

    def whole(self, deep: int) -> dict[str, np.ndarray]:
        """The parameters of all layers, and their sites."""
        found, self.sites = {}, {}
        for layer in available_layers(self.folder):
            made = jaxtc.load_transcoder(self.folder, layer, mesh=MESHES[deep])
            self.sites[str(layer)] = (made.input_site, made.output_site)
            for name, leaf in variables(made):
                found[f"layers.{layer}.{name}"] = np.asarray(leaf[...])
        return found

    def check(self, loaded: dict) -> None:
        """Compare the sites too."""
        super().check(loaded)
        if "" in loaded:
            raw = json.loads((self.folder / "jaxtc.json").read_text(encoding="utf-8"))
            told = {str(int(layer)): one for layer, one in raw["transcoders"].items()}
            assert set(told) == set(self.sites)
            for layer, (reads, writes) in self.sites.items():
                assert reads == parse(told[layer]["input_site"])[0]
                assert writes == parse(told[layer]["output_site"])[0]


CASES = {"converted": ConvertedFolder, "converted-transcoders": ConvertedTranscoders}

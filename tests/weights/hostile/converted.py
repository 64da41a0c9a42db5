"""Converted checkpoints: a sidecar with the hash of each array, and orbax's tree."""

import hashlib
import json
from pathlib import Path

import numpy as np
from flax import nnx

import jaxtc
from jaxtc.sharding.rules import variables
from jaxtc.tap.sites import parse
from jaxtc.weights.checkpoints.read import Converted
from jaxtc.weights.conversion.convert import convert
from tests.support.weights_files import available_layers
from tests.weights.hostile.folders import Folder, model, put
from tests.weights.hostile.mutate import ODD, dump, mutate_bytes, mutate_json, pick, whole
from tests.weights.hostile.tensors import MESHES

KINDS = ["damage", "damage", "place", "more", "sidecar", "text", "bytes", "whole", "lie", "lie",
         "forged", "exchange", "described"]  # fmt: skip


class ConvertedFolder(Folder):
    """Every array has a hash; and a sidecar may lie, with hashes that fit."""

    def build(self, folder: Path) -> Path:
        """Of a model."""
        jaxtc.save_checkpoint(model(), folder / "model")
        return folder / "model"

    def mutate(self, rng: np.random.Generator) -> str:
        """Damage; things added, missing or linked; lies about arrays, with and without hashes."""
        self.restore()
        names = [name for name in self.honest if name != "jaxtc.json"]
        name, self.kind, told = pick(rng, names), pick(rng, KINDS), None
        raw = json.loads(self.honest["jaxtc.json"])
        if self.kind == "damage":
            self.write(name, mutate_bytes(self.honest[name], rng))
        elif self.kind == "place":
            what = pick(rng, ["fifo", "folder", "missing", "loop", "device", "outside", "dangling"])
            put(self.folder / pick(rng, [name, name, "jaxtc.json"]), what, self.outside)
        elif self.kind == "more":
            self.write(pick(rng, ["x", "state/x", f"{name}.bak", "state/embed.weight/9.9"]), b"x")
        elif self.kind == "exchange":
            other = pick(rng, names)
            self.write(name, self.honest[other])
            self.write(other, self.honest[name])
        elif self.kind == "described":  # orbax's and zarr's own words about the arrays
            name = pick(rng, [name for name in names if name.endswith((".zarray", "_METADATA"))])
            self.write(name, json.dumps(mutate_json(json.loads(self.honest[name]), rng)).encode())
        elif self.kind == "sidecar":
            told = json.dumps(mutate_json(raw, rng, [*names, *raw["arrays"], "../x", "/x"]))
        elif self.kind == "text":
            told = dump(raw, rng)
        elif self.kind == "bytes":
            told = mutate_bytes(self.honest["jaxtc.json"], rng)
        elif self.kind == "whole":
            told = whole(self.honest["jaxtc.json"], rng)
        elif self.kind == "forged":  # other contents, and hashes that fit them
            array = pick(rng, list(raw["arrays"]))
            [name] = [n for n in names if n.startswith(f"state/{array}/") and n[-1].isdigit()]
            content = mutate_bytes(self.honest[name], rng)
            self.write(name, content)
            raw["arrays"][array]["sha256"] = hashlib.sha256(content).hexdigest()
            told = json.dumps(sealed(raw))
        else:
            array = pick(rng, list(raw["arrays"]))
            entry = raw["arrays"][array]
            key = pick(rng, list(entry))
            if key == "shape":
                old = entry[key]
                sizes = [old[::-1], [1], [], [*old, 1], [2**62, 2**62], [0], [-1], [10**30],
                         old * 2, [size + 1 for size in old]]  # fmt: skip
            else:
                sizes = ["0" * 64, "float16", "bfloat16", "float64"]
            entry[key] = pick(rng, [*sizes, *sizes, *ODD])
            if rng.random() < 0.3:
                raw["arrays"][pick(rng, ["x", "../x", "embed", "layers.9.attn.q"])] = entry
            if rng.random() < 0.3:
                raw["files"][pick(rng, ["../x", "/etc/passwd", "a/../b", "x\x00", ""])] = "0" * 64
            told = json.dumps(sealed(raw))
        if told is not None:
            self.write("jaxtc.json", told.encode() if isinstance(told, str) else told)
        return self.kind

    def load(self, deep: int) -> dict[str, np.ndarray]:
        """Every array of the tree, compared with its hash; through the model when ``deep``."""
        if deep:
            return self.whole(deep)
        opened = Converted(self.folder)
        return opened.fetch(opened.sidecar.arrays)

    def whole(self, deep: int) -> dict[str, np.ndarray]:
        """The parameters of the model of this folder."""
        made = jaxtc.load_model(self.folder, dtype="float32", mesh=MESHES[deep], verify=True)
        return {name: np.asarray(leaf[...]) for name, leaf in variables(made)}

    def check(self, loaded: dict) -> None:
        """Every array is the one whose hash the sidecar has."""
        said = json.loads((self.folder / "jaxtc.json").read_text(encoding="utf-8"))["arrays"]
        assert set(loaded) == set(said)
        for name, array in loaded.items():
            assert list(array.shape) == said[name]["shape"] and array.dtype == said[name]["dtype"]
            assert hashlib.sha256(array.tobytes()).hexdigest() == said[name]["sha256"], name


def sealed(raw: dict) -> dict:
    """A sidecar whose hash of hashes fits, where it can."""
    hashes = {name: one["sha256"] for name, one in raw["arrays"].items()} | raw["files"]
    text = "".join(f"{digest}  {name}\n" for name, digest in sorted(hashes.items()))
    sha256 = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    return {**raw, "content_sha256": sha256}


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

    sites: dict = {}

    def load(self, deep: int) -> dict[str, np.ndarray]:
        """As above."""
        self.sites = {}
        return super().load(deep)

    def whole(self, deep: int) -> dict[str, np.ndarray]:
        """The parameters of all layers, and their sites."""
        Converted(self.folder, verify=True)
        found = {}
        for layer in available_layers(self.folder):
            made = jaxtc.load_transcoder(self.folder, layer, mesh=MESHES[deep])
            self.sites[str(layer)] = (made.input_site, made.output_site)
            for name, leaf in variables(made):
                found[f"layers.{layer}.{name}"] = np.asarray(leaf[...])
        return found

    def check(self, loaded: dict) -> None:
        """Compare the sites too."""
        super().check(loaded)
        if self.sites:
            raw = json.loads((self.folder / "jaxtc.json").read_text(encoding="utf-8"))
            told = {str(int(layer)): one for layer, one in raw["transcoders"].items()}
            assert set(told) == set(self.sites)
            for layer, (reads, writes) in self.sites.items():
                assert reads == parse(told[layer]["input_site"])[0]
                assert writes == parse(told[layer]["output_site"])[0]


CASES = {"converted": ConvertedFolder, "converted-transcoders": ConvertedTranscoders}

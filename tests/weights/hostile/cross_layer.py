"""The folder of a cross-layer transcoder: its files, its config.yaml, which of them there are."""

from pathlib import Path

import numpy as np

import jaxtc
from jaxtc.sharding.rules import variables
from tests.support import cross_layer
from tests.weights.hostile.folders import Folder
from tests.weights.hostile.mutate import MARKS, mutate_bytes, pick, whole
from tests.weights.hostile.tensors import MESHES, file_mutant, put, same, says

LAYERS = 3
VALUES = (
    "transcoder_set", "cross_layer_transcoder", "", "null", "hook_mlp_out", "ln2.hook_normalized",
    "hook_tokens", "blocks.1.hook_resid_mid", "mlp_in", "1", "[1]", "{a: 1}", "*x", "&x y", "!!x y",
    "'", "relu", "jump_relu", "topk", "x" * 5000, "2026-11-26", "0x10", ".inf", "\ud800",
)  # fmt: skip
KEYS = (
    "model_kind", "feature_input_hook", "feature_output_hook", "activation", "k", "transcoders",
    "normalize", "scan", "<<", "",
)  # fmt: skip


class CrossLayer(Folder):
    """Three layers with thresholds and skip connections."""

    def build(self, folder: Path) -> Path:
        """As circuit-tracer writes it."""
        (folder / "other.safetensors").write_bytes(b"\x00" * 100)
        arrays = cross_layer.arrays(LAYERS, 4, 5, skip=True)
        return cross_layer.write(folder / "clt", arrays)

    def mutate(self, rng: np.random.Generator) -> str:
        """A lie in a file or about which there are."""
        self.restore()
        names = [name for name in self.honest if name.endswith(".safetensors")]
        name, other = pick(rng, names), pick(rng, names)
        kind = pick(rng, ["file", "file", "file", "config", "config", "place", "swap", "more"])
        if kind == "file":
            kind, content = file_mutant(self.honest[name], rng)
            self.write(name, content)
        elif kind == "config":
            self.write("config.yaml", self.config(rng))
        elif kind == "place":
            what = pick(rng, ["fifo", "folder", "missing", "loop", "device", "dangling", "outside"])
            put(self.folder / pick(rng, [name, name, "config.yaml"]), what, self.outside)
        elif kind == "swap":
            self.write(name, self.honest[other])
        else:
            more = ("W_enc_3", "W_dec_999999", "W_enc_03", "W_dec_-1", "W_enc_1000000", "layer_1")
            self.write(f"{pick(rng, more)}.safetensors", self.honest[name])
        self.kind = kind
        return kind

    def config(self, rng: np.random.Generator) -> bytes:
        """Another config.yaml."""
        raw = self.honest["config.yaml"]
        draw = rng.random()
        if draw < 0.3:
            return mutate_bytes(raw, rng)
        if draw < 0.4:
            return whole(raw, rng)
        lines = raw.decode().splitlines()
        if draw < 0.5:
            lines.remove(pick(rng, lines))
        elif draw < 0.6:
            place, mark = int(rng.integers(len(raw))), bytes([pick(rng, MARKS)])
            return raw[:place] + mark + raw[place:]
        else:
            line = f"{pick(rng, KEYS)}: {pick(rng, VALUES)}"
            lines.insert(int(rng.integers(len(lines) + 1)), line)
            if rng.random() < 0.7:  # in the place of what it says
                key = line.partition(":")[0]
                lines = [one for one in lines if one is line or not one.startswith(key + ":")]
        return "\n".join(lines).encode("utf-8", "surrogatepass")

    def load(self, deep: int) -> dict[str, np.ndarray]:
        """All of it, or one layer now and then; by name."""
        if deep:
            one = jaxtc.load_transcoder(self.folder, 1, mesh=MESHES[deep])
            return {f"layers.1.{name}": np.asarray(x[...]) for name, x in variables(one)}
        made = jaxtc.load_transcoders(self.folder)
        assert isinstance(made, jaxtc.CrossLayerTranscoder)
        return {name: np.asarray(x[...]) for name, x in variables(made)}

    def check(self, loaded: dict[str, np.ndarray]) -> None:
        """Every array is that of the file of its layer, by the safetensors library."""
        for name, array in loaded.items():
            _, layer, ours = name.split(".")
            part = "dec" if ours == "W_dec" else "enc"
            file = self.folder / f"W_{part}_{layer}.safetensors"
            theirs = says(file)[f"{ours}_{layer}"]
            theirs = theirs.T if ours in ("W_enc", "W_skip") else theirs
            same(name, array, theirs.reshape(array.shape) if ours == "threshold" else theirs)
        layers = {name.split(".")[1] for name in loaded}
        for layer in layers:
            enc, dec = (says(self.folder / f"W_{p}_{layer}.safetensors") for p in ("enc", "dec"))
            held = sum(name.startswith(f"layers.{layer}.") for name in loaded)
            assert held == len(enc) + len(dec), "something was left out"


CASES = {"cross-layer": CrossLayer}

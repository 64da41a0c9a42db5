"""Google's Flax tree: orbax's metadata, and the files of its arrays, which have no hashes."""

import json
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict

import jaxtc
from jaxtc.sharding.rules import variables
from tests.weights.hostile.folders import Folder, put
from tests.weights.hostile.mutate import mutate_bytes, mutate_json, pick, whole
from tests.weights.hostile.tensors import CONFIG, MESHES

CONFIG = jaxtc.Gemma2Config(**{**vars(CONFIG), "num_key_value_heads": 1, "layer_types": None})
SHAPES = {
    "transformer/embedder/input_embedding": "V D", "transformer/final_norm/scale": "D",
    "transformer/layer_0/attn/q_einsum/w": "N D H",
    "transformer/layer_0/attn/kv_einsum/w": "2 K D H",
    "transformer/layer_0/attn/attn_vec_einsum/w": "N H D", "transformer/layer_0/mlp/linear": "F D",
    "transformer/layer_0/mlp/gating_einsum": "2 D F",
    **{f"transformer/layer_0/{name}/scale": "D" for name in (
        "pre_attention_norm", "post_attention_norm", "pre_ffw_norm", "post_ffw_norm")},
}  # fmt: skip


class GoogleFolder(Folder):
    """The tree of a model of one layer, each array a zarr folder of its own."""

    def build(self, folder: Path) -> Path:
        """With orbax's own writer, and a config beside it."""
        rng, tree = np.random.default_rng(4), {}
        sizes = {key: str(size) for key, size in CONFIG.sizes.items()}
        for name, axes in SHAPES.items():
            shape = [int(sizes.get(axis, axis)) for axis in axes.split()]
            *path, leaf = name.split("/")
            inner = tree
            for key in path:
                inner = inner.setdefault(key, {})
            inner[leaf] = rng.normal(size=shape).astype(np.float32)
        ocp.PyTreeCheckpointer(use_ocdbt=False).save(folder / "tree", tree)
        (folder / "tree/config.json").write_text(json.dumps(CONFIG.to_dict()))
        return folder / "tree"

    def mutate(self, rng: np.random.Generator) -> str:
        """Lies of the metadata, damage, and things in the place of files."""
        self.restore()
        names = [name for name in self.honest if name != "config.json"]
        name, self.kind = pick(rng, names), pick(rng, [
            "metadata", "metadata", "metadata", "described", "described", "damage", "damage",
            "bytes", "whole", "place", "more", "exchange",
        ])  # fmt: skip
        raw = json.loads(self.honest["_METADATA"])
        if self.kind == "metadata":
            keys = ["layer_0", "../x", "x", "params", "_query_norm", "w"]
            self.write("_METADATA", json.dumps(mutate_json(raw, rng, keys)).encode())
        elif self.kind == "described":
            name = pick(rng, [name for name in names if name.endswith(".zarray")])
            self.write(name, json.dumps(mutate_json(json.loads(self.honest[name]), rng)).encode())
        elif self.kind == "damage":
            self.write(name, mutate_bytes(self.honest[name], rng))
        elif self.kind == "bytes":
            self.write("_METADATA", mutate_bytes(self.honest["_METADATA"], rng))
        elif self.kind == "whole":
            self.write("_METADATA", whole(self.honest["_METADATA"], rng))
        elif self.kind == "place":
            what = pick(rng, ["fifo", "folder", "missing", "loop", "device", "outside", "dangling"])
            put(self.folder / pick(rng, [name, name, "_METADATA"]), what, self.outside)
        elif self.kind == "exchange":
            other = pick(rng, names)
            self.write(name, self.honest[other])
            self.write(other, self.honest[name])
        else:
            self.write(pick(rng, ["x", "transformer.x/.zarray", f"{name}.bak"]), b"x")
        return self.kind

    def load(self, deep: int) -> dict[str, np.ndarray]:
        """The model."""
        made = jaxtc.load_model(self.folder, dtype="float32", mesh=MESHES[deep])
        return {name: np.asarray(leaf[...]) for name, leaf in variables(made)}

    def check(self, loaded: dict[str, np.ndarray]) -> None:
        """The numbers are those that orbax itself restores."""
        known = flatten_dict(ocp.PyTreeCheckpointer().restore(self.folder), sep="/")
        below = "transformer/layer_0/"
        linear = np.asarray(known[f"{below}mlp/linear"], np.float32)
        assert np.array_equal(loaded["layers.0.mlp.down"], linear.T)
        k, v = np.asarray(known[f"{below}attn/kv_einsum/w"], np.float32)
        assert np.array_equal(loaded["layers.0.attn.k"], k.transpose(0, 2, 1))
        assert np.array_equal(loaded["layers.0.attn.v"], v.transpose(0, 2, 1))
        table = known["transformer/embedder/input_embedding"]
        assert np.array_equal(loaded["embed.weight"], np.asarray(table, np.float32))
        assert all(np.isfinite(array).all() for array in loaded.values())


CASES = {"google": GoogleFolder}

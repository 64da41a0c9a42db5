"""Folders: shards and their index, a config, a converted checkpoint with its manifest."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import safetensors.numpy
from flax import nnx

import jaxtc
from jaxtc.weights.files.model import open_checkpoint
from tests.weights.hostile.mutate import ODD, dump, mutate_bytes, mutate_json, pick, whole
from tests.weights.hostile.tensors import CONFIG, FLOAT32, MESHES, put, same

INDEX = "model.safetensors.index.json"
OUTSIDE = (
    "../other.safetensors", "/etc/passwd", "/dev/zero", "..", ".", "", "a/b.safetensors",
    "..\\other.safetensors", "C:\\x.safetensors", "C:x.safetensors", "x.safetensors\x00.bin",
    "x" * 300 + ".safetensors", "~/x.safetensors", "//host/x.safetensors", "config.json",
    "\ud800.safetensors", "./model-00001-of-00003.safetensors", "con.safetensors",
)  # fmt: skip


def model() -> jaxtc.Gemma2:
    made = jaxtc.Gemma2(CONFIG, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(1)
    for _, param in nnx.iter_graph(made):
        if isinstance(param, nnx.Param):
            param[...] = rng.standard_normal(param.shape).astype(np.float32)
    return made


def leaves(module) -> dict[str, np.ndarray]:
    """Every parameter of a module, by its path."""
    pairs, _ = jax.tree_util.tree_flatten_with_path(module)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in pairs}


class Folder:
    """An honest folder, copied anew for each mutant that it differs from.

    Attributes:
        honest: the contents of its files, by path below it.
    """

    def __init__(self, folder: Path):
        self.folder, self.kind = self.build(folder), ""
        self.outside = folder / "other.safetensors"
        files = [path for path in self.folder.rglob("*") if path.is_file()]
        self.honest = {p.relative_to(self.folder).as_posix(): p.read_bytes() for p in files}

    def build(self, folder: Path) -> Path:
        """Make the honest folder."""
        raise NotImplementedError

    def restore(self) -> None:
        """Only what is honest."""
        shutil.rmtree(self.folder)
        for name, content in self.honest.items():
            self.write(name, content)

    def write(self, name: str, content: bytes) -> None:
        """One file, and its folders."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

    def warranted(self) -> int:
        """Bytes on the disk."""
        return sum(p.stat().st_size for p in self.folder.rglob("*") if p.is_file())


class Index(Folder):
    """A model in shards; what is mutated is their index, or what lies in their place."""

    def build(self, folder: Path) -> Path:
        """Three shards or so."""
        made = jaxtc.save_model(model(), folder / "model", max_shard_size=300)
        first = next(made.glob("*.safetensors"))
        shutil.copy(first, folder / "other.safetensors")
        return made

    def mutate(self, rng: np.random.Generator) -> str:
        """A lie of the index about tensors or files, or another thing where a shard was."""
        self.restore()
        raw = json.loads(self.honest[INDEX])
        names = [name for name in self.honest if name.endswith(".safetensors")]
        shards, shard = raw["weight_map"], pick(rng, names)
        tensor = pick(rng, list(shards))
        self.kind = pick(rng, [
            "outside", "swap", "json", "text", "bytes", "whole", "shard", "place", "tensors", "odd",
        ])  # fmt: skip
        content = None
        if self.kind == "outside":
            many = [tensor] if rng.random() < 0.5 else [t for t in shards if shards[t] == shard]
            shards |= dict.fromkeys(many, pick(rng, OUTSIDE))
        elif self.kind == "swap":
            shards[tensor] = pick(rng, [*names, "missing.safetensors", shard.upper()])
        elif self.kind == "odd":
            shards[tensor] = pick(rng, ODD)
        elif self.kind == "tensors":
            shards.pop(tensor)
            shards |= pick(rng, [{}, {"": shard}, {"x" * 9999: shard}, {tensor + ".more": shard}])
        elif self.kind == "json":
            raw = mutate_json(raw, rng, names)
        elif self.kind == "text":
            content = dump(raw, rng)
        elif self.kind == "bytes":
            content = mutate_bytes(self.honest[INDEX], rng)
        elif self.kind == "whole":
            content = whole(self.honest[INDEX], rng)
        elif self.kind == "shard":
            choice = pick(
                rng, [mutate_bytes(self.honest[shard], rng), self.honest[pick(rng, names)]]
            )
            self.write(shard, choice)
        else:
            put(
                self.folder / pick(rng, [shard, shard, INDEX]),
                pick(rng, ["fifo", "folder", "missing", "loop", "device", "outside", "dangling"]),
                self.outside,
            )
            return self.kind
        self.write(INDEX, content if content is not None else json.dumps(raw).encode())
        return self.kind

    def load(self, deep: int) -> dict[str, np.ndarray]:
        """Every tensor by its name in the files; of the model when ``deep``."""
        if deep:
            made = jaxtc.load_model(self.folder, dtype="float32", mesh=MESHES[deep])
            return {"model.embed_tokens.weight": np.asarray(made.embed.weight[...])}
        with open_checkpoint(self.folder) as checkpoint:
            found = {}
            for name, file in checkpoint.files.items():
                if not checkpoint.entry(name).fault:
                    array, problem = file.read(name, FLOAT32)
                    found[name] = None if problem else array
            return found

    def check(self, loaded: dict[str, np.ndarray]) -> None:
        """Each tensor is that of the file in this folder that the index names."""
        if not (self.folder / INDEX).exists():
            raise AssertionError("loaded without an index")
        shards = json.loads((self.folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        for name, array in loaded.items():
            file = self.folder / shards[name]
            assert file.parent == self.folder and not file.is_symlink()
            same(name, array, safetensors.numpy.load_file(file)[name])


class Config(Folder):
    """A model's folder; what is mutated is its config."""

    def build(self, folder: Path) -> Path:
        """One file of weights."""
        return jaxtc.save_model(model(), folder / "model")

    def mutate(self, rng: np.random.Generator) -> str:
        """A lie about a size, or anything else where a config was."""
        self.restore()
        raw = json.loads(self.honest["config.json"])
        self.kind = pick(rng, ["field", "field", "size", "size", "text", "bytes", "whole", "place"])
        content = None
        if self.kind == "size":
            key = pick(rng, [key for key, value in raw.items() if type(value) in (int, float)])
            raw[key] = pick(rng, [
                0, 1, 2, 3, 7, 64, raw[key] * 2, 10**4, 10**5, 2**31, 2**63, 10**30, -1, 1.5,
                float(raw[key]), str(raw[key]), 1e300, True,
            ])  # fmt: skip
        elif self.kind == "field":
            raw = mutate_json(raw, rng, [*raw, "sliding_attention", "full_attention"])
        elif self.kind == "text":
            content = dump(raw, rng)
        elif self.kind == "bytes":
            content = mutate_bytes(self.honest["config.json"], rng)
        elif self.kind == "whole":
            content = whole(self.honest["config.json"], rng)
        else:
            what = pick(rng, ["fifo", "folder", "missing", "loop", "device", "dangling"])
            put(self.folder / "config.json", what, self.outside)
            return self.kind
        self.write("config.json", content if content is not None else json.dumps(raw).encode())
        return self.kind

    def load(self, deep: int) -> dict[str, np.ndarray]:
        """The config; the weights are there, so a wrong size is found when ``deep``."""
        if deep or self.kind == "place":
            made = jaxtc.load_model(self.folder, dtype="float32", mesh=MESHES[deep])
            return {"config": made.config, "weights": leaves(made)}
        return {"config": jaxtc.Gemma2Config.from_file(self.folder / "config.json")}

    def check(self, loaded: dict) -> None:
        """Every field of the config is what the JSON says; the weights are what they were."""
        raw = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
        config = loaded["config"].to_dict()
        rope = {**(raw.get("rope_scaling") or {}), **(raw.get("rope_parameters") or {})}
        raw["rope_theta"] = rope.get("rope_theta", raw.get("rope_theta"))
        defaults = jaxtc.Gemma2Config().to_dict()
        for key in config:
            if key in (
                "architectures",
                "hidden_act",
                "attention_dropout",
                "initializer_range",
                "use_cache",
                "rope_parameters",
                "layer_types",
                "attention_bias",
            ):
                continue
            said = raw.get(key)
            said = said if said is not None or key in ("eos_token_id", "pad_token_id") else None
            if key not in raw or (said is None and config[key] is not None):
                said = defaults[key]
            assert config[key] == said and isinstance(config[key], bool) == isinstance(
                said, bool
            ), f"{key} is {config[key]!r}, the file says {said!r}"
        if raw.get("layer_types") is not None:
            assert list(config["layer_types"]) == raw["layer_types"]
        for name, array in loaded.get("weights", {}).items():
            same(name, array, leaves(self.truth())[name])

    def truth(self) -> jaxtc.Gemma2:
        """The honest model."""
        return model()


CASES = {"index": Index, "config": Config}

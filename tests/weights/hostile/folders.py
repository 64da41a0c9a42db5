"""Folders: shards and their index, a config, a converted checkpoint with its manifest."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import safetensors.numpy
from flax import nnx

import jaxtc
from jaxtc.sharding.rules import variables
from jaxtc.weights.files.generation import read_config
from jaxtc.weights.files.model import open_checkpoint
from jaxtc.weights.names import parameter_names
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


class Generation(Config):
    """A model's folder; what is mutated is its generation_config.json."""

    file = "generation_config.json"

    def mutate(self, rng: np.random.Generator) -> str:
        """Odd stop tokens, or anything else in the place of the file."""
        self.restore()
        raw = {"eos_token_id": [1, 3], "bos_token_id": 2, "do_sample": True, "top_k": 5}
        self.kind = pick(rng, ["eos", "eos", "field", "text", "bytes", "whole", "place"])
        content = None
        if self.kind == "eos":
            one = pick(rng, [*ODD, 4, 5, 6, 7, 256000, "1", [1, 1, 1], list(range(6))])
            raw["eos_token_id"] = pick(rng, [one, [one], [1, one], [one] * 3])
        elif self.kind == "field":
            raw = mutate_json(raw, rng, [*raw, "pad_token_id"])
        elif self.kind == "text":
            content = dump(raw, rng)
        elif self.kind == "bytes":
            content = mutate_bytes(json.dumps(raw).encode(), rng)
        elif self.kind == "whole":
            content = whole(self.honest[self.file], rng)
        else:
            what = pick(rng, ["fifo", "folder", "missing", "loop", "device", "dangling"])
            put(self.folder / self.file, what, self.outside)
            return self.kind
        self.write(self.file, content if content is not None else json.dumps(raw).encode())
        return self.kind

    def load(self, deep: int) -> dict[str, np.ndarray]:
        """The config with its stop tokens; with the weights when ``deep``."""
        if deep:
            made = jaxtc.load_model(self.folder, dtype="float32", mesh=MESHES[deep])
            return {"config": made.config, "weights": leaves(made)}
        return {"config": read_config(self.folder)}

    def check(self, loaded: dict) -> None:
        """The stop tokens are the config's and those that this file says; nothing else changed."""
        path, known = self.folder / self.file, {1}
        if path.exists():
            eos = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
            said = eos if isinstance(eos, list) else [] if eos is None else [eos]
            assert all(type(one) is int and 0 <= one < CONFIG.vocab_size for one in said), said
            known |= set(said)
        eos = loaded["config"].eos_token_id
        assert set(eos if isinstance(eos, tuple) else [eos]) == known
        assert dataclasses.replace(loaded["config"], eos_token_id=1) == CONFIG
        for name, array in loaded.get("weights", {}).items():
            same(name, array, leaves(self.truth())[name])


class Metadata(Folder):
    """A file whose tied matrix is stored as lm_head.weight, as its metadata and its index say."""

    head, embedding = "lm_head.weight", "model.embed_tokens.weight"

    def build(self, folder: Path) -> Path:
        """Of one shard."""
        made = jaxtc.save_model(model(), folder / "model")
        (made / "model.safetensors").unlink()
        self.tensors = {
            self.head if name == self.embedding else name: array
            for name, array in named(model()).items()
        }
        self.metadata = {"format": "pt", self.embedding: self.head}
        self.put(made, self.tensors, self.metadata, self.metadata)
        return made

    def put(self, folder, tensors, metadata, said) -> None:
        """Write the shard and the index."""
        safetensors.numpy.save_file(tensors, folder / "model-1.safetensors", metadata)
        index = {"metadata": said, "weight_map": dict.fromkeys(tensors, "model-1.safetensors")}
        (folder / INDEX).write_bytes(json.dumps(index).encode())

    def mutate(self, rng: np.random.Generator) -> str:
        """Another story of what shares its memory, other names, or another matrix beside it."""
        self.restore()
        tensors, metadata, said = dict(self.tensors), dict(self.metadata), dict(self.metadata)
        names = [*tensors, self.embedding, "", "x" * 999, "model.head.weight"]
        self.kind = pick(rng, ["metadata", "index", "names", "prefix", "both", "header"])
        if self.kind == "metadata":
            metadata[pick(rng, [self.embedding, pick(rng, names)])] = pick(rng, names)
        elif self.kind == "index":
            metadata = {"format": "pt"}
            said = pick(rng, [*ODD, {pick(rng, names): pick(rng, [*names, *ODD])}])
        elif self.kind == "names":
            old, new = pick(rng, list(tensors)), pick(rng, names)
            tensors[new] = tensors.pop(old)
        elif self.kind == "prefix":
            prefixes = ["module.", "_orig_mod.", "model.", "x.", ".", "..", "layers.", "norm."]
            many = pick(rng, [list(tensors), [pick(rng, list(tensors))]])
            first = pick(rng, prefixes)
            tensors = {first + k if k in many else k: v for k, v in tensors.items()}
        elif self.kind == "both":
            other = pick(rng, [tensors[self.head], -tensors[self.head], tensors[self.head][:-1],
                               tensors[self.head].astype(np.float16), np.zeros(0, np.float32),
                               np.full_like(tensors[self.head], np.nan)])  # fmt: skip
            tensors[pick(rng, [self.embedding, f"module.{self.embedding}"])] = other
        self.put(self.folder, tensors, metadata, said)
        if self.kind == "header":
            path = self.folder / "model-1.safetensors"
            raw = path.read_bytes()
            path.write_bytes(mutate_bytes(raw, rng, int.from_bytes(raw[:8], "little")))
        return self.kind

    def load(self, deep: int) -> dict[str, np.ndarray]:
        """The model's parameters by their published names."""
        mesh = MESHES[deep]
        return named(jaxtc.load_model(self.folder, dtype="float32", mesh=mesh))

    def check(self, loaded: dict[str, np.ndarray]) -> None:
        """Each is what the file has under a name that ends like its own, or the head's if tied."""
        file = safetensors.numpy.load_file(self.folder / "model-1.safetensors")
        for name, array in loaded.items():
            ends = [name.removeprefix("model.")]
            if name == self.embedding and self.head not in loaded:
                ends.append(self.head)
            found = [v for k, v in file.items() if f".{k}".endswith(tuple(f".{x}" for x in ends))]
            assert found, f"{name} is in no file"
            for one in found:
                same(name, array, one)


def named(made: jaxtc.Gemma2) -> dict[str, np.ndarray]:
    """The parameters of a model as a checkpoint has them."""
    values = dict(variables(made))
    return {
        name.hf: np.asarray(values[name.ours][...]).reshape(name.hf_shape)
        for name in parameter_names(made.config)
    }


CASES = {"index": Index, "config": Config, "generation": Generation, "metadata": Metadata}

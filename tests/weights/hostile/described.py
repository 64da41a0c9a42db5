"""Transcoders that a file beside the weights describes: JSON and YAML that may say anything."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import yaml

import jaxtc
from jaxtc.tap.sites import BY_NAME
from tests.weights.hostile.folders import OUTSIDE, Folder
from tests.weights.hostile.mutate import dump, mutate_bytes, mutate_json, pick, whole
from tests.weights.hostile.tensors import MESHES, file_mutant, put, same

D, M = 5, 7
SAELENS = Path(__file__).parents[1] / "saelens"
NAMES = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold", "W_skip")


def draw(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def plain(raw: Any) -> bytes:
    """JSON as it is usually written."""
    return json.dumps(raw).encode("utf-8", "surrogatepass")


class Described(Folder):
    """A folder of one transcoder's weights and the file that describes them."""

    weights, config, yaml = "", "", False
    # What would mean something in a field of text.
    words: tuple[str, ...] = ()

    def parse(self, content: bytes) -> dict[str, Any]:
        """The config as this format's own language has it."""
        return json.loads(content)

    def unparse(self, raw: Any, rng: np.random.Generator) -> bytes:
        """And back, now and then as careless writers do it."""
        return dump(raw, rng)

    def mutate(self, rng: np.random.Generator) -> str:
        """A lie of the config, mostly; or of the weights; or another thing in either's place."""
        self.restore()
        raw = self.parse(self.honest[self.config])
        self.kind = pick(rng, ["field"] * 6 + ["text", "bytes", "whole", "place", "weights"])
        content = None
        if self.kind == "field":
            raw = mutate_json(raw, rng, [*raw, *self.words, *OUTSIDE])
            content = yaml.safe_dump(raw).encode() if self.yaml else plain(raw)
        elif self.kind == "text":
            content = self.unparse(raw, rng)
        elif self.kind == "bytes":
            content = mutate_bytes(self.honest[self.config], rng)
        elif self.kind == "whole":
            content = whole(self.honest[self.config], rng)
        elif self.kind == "weights":
            self.kind, content = file_mutant(self.honest[self.weights], rng)
            self.write(self.weights, content)
            return f"weights {self.kind}"
        else:
            what = pick(rng, ["fifo", "folder", "missing", "loop", "device", "dangling"])
            put(self.folder / self.config, what, self.outside)
            return self.kind
        self.write(self.config, content)
        return self.kind

    def load(self, deep: int) -> dict[str, Any]:
        """Its facts and its parameters."""
        made = jaxtc.load_transcoder(self.folder, mesh=MESHES[deep])
        held = {name: getattr(made, name) for name in NAMES}
        arrays = {name: np.asarray(p[...]) for name, p in held.items() if p is not None}
        return {"facts": made.facts(), **arrays}

    def check(self, loaded: dict[str, Any]) -> None:
        """Facts as the config says them by another reading; arrays as the library reads them."""
        raw = self.parse((self.folder / self.config).read_bytes())
        arrays = safetensors.numpy.load_file(self.folder / self.weights)
        facts = loaded.pop("facts")
        for name, array in self.arrays(arrays, raw).items():
            same(name, loaded.pop(name), array)
        assert not loaded, f"{[*loaded]} are not in the file"
        said = self.facts(raw)
        assert {key: facts[key] for key in said} == said, f"{facts} are not {said}"
        assert {facts["input_site"], facts["output_site"]} <= BY_NAME.keys()

    def arrays(self, held: dict[str, np.ndarray], raw: dict[str, Any]) -> dict[str, np.ndarray]:
        """What our parameters should be."""
        raise NotImplementedError

    def facts(self, raw: dict[str, Any]) -> dict[str, Any]:
        """Of our facts, those that the config says."""
        raise NotImplementedError


class SAELens(Described):
    """What SAELens wrote itself: TopK, whose decoder norms are folded in, and a transcoder."""

    weights, config = "sae_weights.safetensors", "cfg.json"
    words = (
        "standard", "topk", "jumprelu", "gated", "transcoder", "none", "layer_norm", "hook_z",
        "blocks.2.hook_resid_post", "blocks.1.hook_mlp_in", "hook_embed", "relu",
        "normalize_activations", "hook_head_index", "finetuning_scaling_factor", "gain",
    )  # fmt: skip

    def build(self, folder: Path) -> Path:
        return Path(shutil.copytree(SAELENS / "topk_rescaled", folder / "sae"))

    def arrays(self, held, raw):
        if raw.get("rescale_acts_by_decoder_norm"):
            norm = np.maximum(np.linalg.norm(held["W_dec"].astype(np.float64), axis=-1), 1e-8)
            held["W_enc"] = held["W_enc"] * norm.astype(np.float32)
            held["b_enc"] = held["b_enc"] * norm.astype(np.float32)
            held["W_dec"] = held["W_dec"] * (1 / norm).astype(np.float32)[:, None]
        return held

    def facts(self, raw):
        kind = raw.get("architecture") or "standard"
        kind = "topk" if raw.get("activation_fn") == "topk" else kind
        activation = {"topk": {"name": "topk", "k": raw.get("k")}, "standard": {"name": "relu"},
                      "transcoder": {"name": "relu"}}[kind]  # fmt: skip
        centred = raw.get("apply_b_dec_to_input")
        centred = (kind != "transcoder") if centred is None else centred
        hook = (raw.get("metadata") or {}).get("hook_name") or raw.get("hook_name")
        hook = hook or raw.get("hook_point")
        said = {"activation": activation, "subtract_b_dec": centred, "skip": False}
        if hook == "blocks.1.hook_resid_post":
            said |= {"layer": 1, "input_site": "resid_post"}
        assert raw.get("normalize_activations") in (None, "none", False)
        assert raw.get("hook_head_index") is None
        return said


class Sparsify(Described):
    """A skip transcoder of sparsify."""

    weights, config = "sae.safetensors", "cfg.json"
    words = ("topk", "groupmax", "signed", "embed_skip", "transcode", "gain")

    def build(self, folder: Path) -> Path:
        made = folder / "layers.3.mlp"
        made.mkdir()
        arrays = {"encoder.weight": draw(M, D), "encoder.bias": draw(M), "W_dec": draw(M, D),
                  "b_dec": draw(D), "W_skip": draw(D, D)}  # fmt: skip
        safetensors.numpy.save_file(arrays, made / self.weights)
        cfg = {"activation": "topk", "k": 3, "num_latents": M, "d_in": D, "expansion_factor": 2,
               "transcode": True, "skip_connection": True, "multi_topk": False}  # fmt: skip
        (made / self.config).write_text(json.dumps(cfg))
        return made

    def arrays(self, held, raw):
        held["W_enc"], held["b_enc"] = held.pop("encoder.weight").T, held.pop("encoder.bias")
        return held

    def facts(self, raw):
        transcode = bool(raw.get("transcode"))
        assert not raw.get("signed") and not raw.get("embed_skip") and raw["skip_connection"]
        return {"activation": {"name": "topk", "k": raw["k"]}, "subtract_b_dec": not transcode,
                "layer": 3, "input_site": "mlp_in" if transcode else "mlp_proj",
                "output_site": "mlp_proj"}  # fmt: skip


class ConfigYaml(Described):
    """A set of circuit-tracer with one transcoder in it."""

    weights, config, yaml = "layer_0.safetensors", "config.yaml", True
    words = (
        "topk", "relu", "transcoder_set", "cross_layer_transcoder", "hook_mlp_in", "gain",
        "hook_resid_mid", "mlp.hook_in", "transcoders", "activation", "hf://a/b/c",
    )  # fmt: skip

    def build(self, folder: Path) -> Path:
        made = folder / "set"
        made.mkdir()
        arrays = {"W_enc": draw(M, D), "W_dec": draw(M, D), "b_enc": draw(M), "b_dec": draw(D)}
        safetensors.numpy.save_file(arrays, made / self.weights)
        cfg = {"model_name": "google/gemma-2-2b", "model_kind": "transcoder_set",
               "feature_input_hook": "hook_resid_mid", "feature_output_hook": "hook_mlp_out",
               "activation": "topk", "k": 3, "transcoders": ["layer_0.safetensors"]}  # fmt: skip
        (made / self.config).write_text(yaml.safe_dump(cfg))
        return made

    def parse(self, content):
        return yaml.safe_load(content)

    def unparse(self, raw, rng):
        choice = int(rng.integers(6))
        if choice == 0:
            return b"a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n" + yaml.safe_dump(raw).encode()
        if choice == 1:
            return yaml.safe_dump(raw).encode() + b"k: !!python/object/apply:os.abort []\n"
        if choice == 2:
            return yaml.safe_dump(raw).encode() * 2
        if choice == 3:
            return yaml.safe_dump(raw).encode() + b"deep: " + b"[" * 9000
        if choice == 4:
            return json.dumps(raw).encode()  # which YAML holds
        return yaml.safe_dump(raw, default_flow_style=True).encode()

    def arrays(self, held, raw):
        held["W_enc"] = held["W_enc"].T
        return held

    def facts(self, raw):
        sites = {"hook_resid_mid": "resid_mid", "hook_mlp_out": "mlp_out", "mlp.hook_in": "mlp_in"}
        said = {"activation": {"name": "topk", "k": raw["k"]}} if raw.get("k") else {}
        for key, ours in (
            ("feature_input_hook", "input_site"),
            ("feature_output_hook", "output_site"),
        ):
            said[ours] = sites.get(raw[key], raw[key])
        assert raw["model_kind"] == "transcoder_set" and "gain" not in raw
        return {**said, "subtract_b_dec": False, "skip": False, "layer": 0}


class GemmaScope2(Described):
    """A transcoder with an affine skip connection."""

    weights, config = "params.safetensors", "config.json"
    words = ("sae", "clt", "jump_relu", "topk", "model.layers.17.output", "gain", "type")

    def build(self, folder: Path) -> Path:
        made = folder / "layer_17_width_16k_l0_big"
        made.mkdir()
        arrays = {"w_enc": draw(D, M), "w_dec": draw(M, D), "b_enc": draw(M), "b_dec": draw(D),
                  "threshold": draw(M), "affine_skip_connection": draw(D, D)}  # fmt: skip
        safetensors.numpy.save_file(arrays, made / self.weights)
        at = "model.layers.17.{}_feedforward_layernorm.output"
        cfg = {"hf_hook_point_in": at.format("pre"), "hf_hook_point_out": at.format("post"),
               "width": M, "l0": 20, "model_name": "m", "architecture": "jump_relu",
               "affine_connection": True, "type": "transcoder"}  # fmt: skip
        (made / self.config).write_text(json.dumps(cfg))
        return made

    def arrays(self, held, raw):
        held["W_enc"], held["W_dec"] = held.pop("w_enc"), held.pop("w_dec")
        held["W_skip"] = held.pop("affine_skip_connection").T
        return held

    def facts(self, raw):
        assert raw.get("architecture") in ("jump_relu", "jumprelu", None) and "gain" not in raw
        assert raw.get("affine_connection") in (True, None)
        said = {"activation": {"name": "jumprelu"}, "layer": 17, "subtract_b_dec": False}
        sites = {"pre": "mlp_in", "post": "mlp_out", "layers.17.output": "resid_post"}
        for key, ours in (("hf_hook_point_in", "input_site"), ("hf_hook_point_out", "output_site")):
            hook = raw.get(key) or ""
            found = [site for part, site in sites.items() if part in hook]
            said |= {ours: found[0]} if found else {}
        return said


CASES = {"saelens": SAELens, "sparsify": Sparsify, "config.yaml": ConfigYaml,
         "gemma-scope-2": GemmaScope2}  # fmt: skip

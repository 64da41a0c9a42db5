"""Adapters of PEFT: settings and tensors that may lie about each other and about the base model."""

import json
import math
import re
from pathlib import Path

import numpy as np
import safetensors.numpy

import jaxtc
from jaxtc.sharding.rules import variables
from jaxtc.weights.names import parameter_names
from tests.weights.hostile.folders import Folder, model, put
from tests.weights.hostile.mutate import ODD, dump, mutate_bytes, mutate_json, pick, whole
from tests.weights.hostile.tensors import MESHES, file_mutant

SETTINGS, TENSORS = "adapter_config.json", "adapter_model.safetensors"
# What a match of them could take years for, or what no reader should follow.
WORDS = (
    r"(.*.*)*x", r"(a+)+$", r"((a{1,999}){1,999}){1,999}", "[", "(?P<a>", "\\", ".*", "q_proj",
    "all-linear", "../base", "/etc", "~root", "gs://bucket/x", "C:\\x", "x" * 20_000, "LOHA",
    "PREFIX_TUNING", "lora", "embed_tokens", "*",
)  # fmt: skip


class AdapterFolder(Folder):
    """A LoRA with a pattern, a saved norm and trained tokens, beside its base model."""

    def build(self, folder: Path) -> Path:
        """As PEFT names its tensors."""
        made, self.base = model(), folder / "base"
        jaxtc.save_model(made, self.base)
        self.plain = {name: np.asarray(leaf[...]) for name, leaf in variables(made)}
        self.names = {name.hf: name for name in parameter_names(made.config)}
        rng = np.random.default_rng(3)
        tensors = {"base_model.model.model.norm.weight": rng.normal(size=4)}
        tensors["base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"] = (
            rng.normal(size=(2, 4))
        )
        for hf, name in self.names.items():
            if hf.endswith(("q_proj.weight", "down_proj.weight")):
                (out, inner), module = name.hf_shape, hf.removesuffix(".weight")
                for part, shape in (("lora_A", (2, inner)), ("lora_B", (out, 2))):
                    tensors[f"base_model.model.{module}.{part}.weight"] = rng.normal(size=shape)
        tensors = {name: array.astype(np.float32) for name, array in tensors.items()}
        adapter = folder / "adapter"
        adapter.mkdir()
        safetensors.numpy.save_file(tensors, adapter / TENSORS)
        settings = {
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "../base",
            "revision": None, "r": 2, "lora_alpha": 6, "lora_dropout": 0.1, "use_rslora": False,
            "use_dora": False, "bias": "none", "target_modules": ["q_proj", "down_proj"],
            "modules_to_save": ["norm"], "rank_pattern": {}, "layers_to_transform": None,
            "alpha_pattern": {"down_proj": 3}, "trainable_token_indices": [1, 5],
            "init_lora_weights": True, "layers_pattern": None, "exclude_modules": None,
        }  # fmt: skip
        (adapter / SETTINGS).write_text(json.dumps(settings))
        return adapter

    def mutate(self, rng: np.random.Generator) -> str:
        """Of the one file or the other."""
        self.restore()
        raw = json.loads(self.honest[SETTINGS])
        self.kind = pick(rng, ["field", "field", "field", "more", "text", "bytes", "whole", "place",
                               "tensors", "tensors", "tensors", "tensors"])  # fmt: skip
        told = None
        if self.kind == "field":
            told = json.dumps(mutate_json(raw, rng, WORDS))
        elif self.kind == "more":
            key = pick(
                rng, ["layer_replication", "use_qalora", "x", "lora_bias", "target_parameters"]
            )
            told = json.dumps({**raw, key: pick(rng, [*ODD, [[0, 1]]])})
        elif self.kind == "text":
            told = dump(raw, rng)
        elif self.kind == "bytes":
            told = mutate_bytes(self.honest[SETTINGS], rng)
        elif self.kind == "whole":
            told = whole(self.honest[SETTINGS], rng)
        elif self.kind == "place":
            what = pick(rng, ["fifo", "folder", "missing", "loop", "device", "dangling"])
            put(self.folder / pick(rng, [SETTINGS, TENSORS]), what, self.outside)
        else:
            kind, content = file_mutant(self.honest[TENSORS], rng)
            self.kind = f"tensors: {kind}"
            self.write(TENSORS, content)
        if told is not None:
            self.write(
                SETTINGS, told if isinstance(told, bytes) else told.encode("utf-8", "replace")
            )
        return self.kind

    def load(self, deep: int) -> dict[str, np.ndarray]:
        """The merged model."""
        made = jaxtc.load_model(self.folder, dtype="float32", mesh=MESHES[deep])
        return {name: np.asarray(leaf[...]) for name, leaf in variables(made)}

    def check(self, loaded: dict[str, np.ndarray]) -> None:
        """Compare with the merge by hand, of what the libraries read of both files."""
        raw = json.loads((self.folder / SETTINGS).read_text(encoding="utf-8"))
        known = safetensors.numpy.load_file(self.folder / TENSORS)
        known = {name.removeprefix("base_model.model."): x for name, x in known.items()}
        for hf, name in self.names.items():
            expected, module = self.plain[name.ours].astype(np.float64), hf.removesuffix(".weight")
            if hf in known:
                expected = known.pop(hf).astype(np.float64)
            if f"{module}.lora_A.weight" in known:
                a, b = (known.pop(f"{module}.lora_{x}.weight").astype(np.float64) for x in "AB")
                alpha = 8 if raw.get("lora_alpha") is None else raw["lora_alpha"]
                for pattern, value in (raw.get("alpha_pattern") or {}).items():
                    if re.fullmatch(rf"(.*\.)?({pattern})", module):
                        alpha = value
                        break
                rank = len(a)
                scale = alpha / math.sqrt(rank) if raw.get("use_rslora") else alpha / rank
                expected = expected + (b @ a * scale).reshape(name.shape)
            rows = known.pop(f"{module}.token_adapter.trainable_tokens_delta", None)
            if rows is not None:
                ids = raw["trainable_token_indices"]
                expected[ids if isinstance(ids, list) else next(iter(ids.values()))] = rows
            ours = loaded[name.ours]
            assert ours.shape == expected.shape and np.allclose(ours, expected, 1e-5, 1e-6), hf
        assert not known, f"{[*known]} was left out"


CASES = {"adapter": AdapterFolder}

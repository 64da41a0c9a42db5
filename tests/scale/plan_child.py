"""Holds a model, transcoders, a cache and captures on 8 simulated devices, and says what each took.

Run by ``test_plan.py`` in a process of its own; prints one JSON object.
"""

import dataclasses
import json
import sys
from pathlib import Path

import jax
import numpy as np
from flax import nnx

import jaxtc
from jaxtc.captures.reducers import At, Mean, Norm, TopK
from jaxtc.captures.request import understand
from jaxtc.model.prompts import prepare
from jaxtc.model.released import RELEASED
from jaxtc.programs.leaves import parameters, placed
from jaxtc.sharding.mesh import make_mesh
from jaxtc.sharding.placement import Placement
from jaxtc.sharding.rules import shardings

CONFIG = jaxtc.Gemma2Config(
    vocab_size=512, hidden_size=64, intermediate_size=512, num_hidden_layers=3,
    num_attention_heads=8, num_key_value_heads=2, head_dim=16, query_pre_attn_scalar=16,
    sliding_window=8, max_position_embeddings=512,
)  # fmt: skip
WIDE = dataclasses.replace(RELEASED["27b"], num_hidden_layers=2, layer_types=None)
MESH_27B = "data=1,model=8"
LAYERS, FEATURES, BATCH, LENGTH, NEW = (0, 2), 1024, 4, 44, 9
WHOLE = ["resid_post", "q", "k", "layers.1.mlp_act", "layers.0.attn_pattern", "final_scale"]
REDUCED = [At("resid_post", -1), At("q", [0, 2]), Mean("mlp_act"), Norm("q"), TopK("logits", 5)]
STEPWISE = ["v", "layers.2.mlp_out", Norm("mlp_act")]


def held(tree) -> list[int]:
    """Bytes on each device."""
    bytes_ = dict.fromkeys(range(8), 0)
    for x in jax.tree.leaves(tree):
        for part in x.addressable_shards:
            bytes_[part.device.id] += part.data.nbytes
    return list(bytes_.values())


def workspace(model, capture, logits, edits=()) -> int:
    """What XLA says that the program of a run holds besides, on each device."""
    module = sys.modules["jaxtc.programs.run"]
    asked = understand(capture, CONFIG.num_hidden_layers)
    leaves = parameters(model)
    prompts = prepare(np.full((BATCH, 256), 5), CONFIG)
    place = placed(model, leaves, None)
    call = module.Call.of(CONFIG, prompts, asked, edits, logits, place)
    program = module._run.lower(*call.on_mesh(leaves)).compile()
    return program.memory_analysis().temp_size_in_bytes


def cache_of(model, tokens, **options):
    """What a generation keeps, and its cache."""
    module, caches = sys.modules["jaxtc.programs.generate"], []
    prefill = module._PREFILL

    def spy(*args, **kwargs):
        out = prefill(*args, **kwargs)
        caches.append(held(out[1]))
        return out

    module._PREFILL = spy
    try:
        found = jaxtc.generate(model, tokens, NEW, stop=[], **options)
    finally:
        module._PREFILL = prefill
    return held(dict(found.activations)), caches[0]


def measure(folder: Path, mesh: str) -> dict:
    """Everything by the names of a plan's parts."""
    model = jaxtc.load_model(folder / "model", mesh=mesh, dtype="float32")
    transcoders = jaxtc.load_transcoders(folder / "transcoders", mesh=mesh)
    tokens = np.arange(BATCH * LENGTH).reshape(BATCH, LENGTH) % 500 + 4
    found = jaxtc.run(model, tokens, capture=WHOLE)
    kept = {
        "weights": held(model),
        "transcoders": held(transcoders),
        "activations": held(dict(found.activations)),
        "logits": held(found.logits),
    }
    del found
    kept["reduced"] = held(dict(jaxtc.run(model, tokens, capture=REDUCED, logits=None).activations))
    kept["generated"], kept["kv cache"] = cache_of(model, tokens, capture=STEPWISE)
    kept["alone"] = held(jaxtc.run(model, tokens[:3], capture="mlp_out", logits="last").logits)
    return kept


def workspaces(folder: Path, mesh: str) -> dict:
    """Of three programs."""
    model = jaxtc.load_model(folder / "model", mesh=mesh, dtype="float32")
    splice = jaxtc.Splice(jaxtc.load_transcoder(folder / "transcoders", LAYERS[0], mesh=mesh))
    return {
        "scores": workspace(model, (), "last"),
        "captures": workspace(model, ["resid_post"], None),
        "features": workspace(model, (), "last", [splice]),
    }


def of_real_width(mesh: str) -> dict:
    """Two layers of 27B, compiled from shapes: XLA's own account of each device, in bytes."""
    module = sys.modules["jaxtc.programs.run"]
    mesh, model = make_mesh(mesh), jaxtc.Gemma2.abstract(WIDE)
    places = zip(jax.tree.leaves(model), shardings(model, mesh), strict=True)
    leaves = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at) for x, at in places]
    prompts = prepare(np.full((4, 1024), 5), WIDE)
    asked = understand("resid_post", WIDE.num_hidden_layers)
    call = module.Call.of(WIDE, prompts, asked, (), "last", Placement.of(mesh))
    found = module._run.lower(*call.on_mesh(leaves)).compile().memory_analysis()
    return {
        "arguments": found.argument_size_in_bytes,
        "results": found.output_size_in_bytes,
        "workspace": found.temp_size_in_bytes,
    }


def main(folder: Path, meshes: list[str]) -> None:
    """Write the files, then read them onto each mesh."""
    jaxtc.save_model(jaxtc.Gemma2(CONFIG, rngs=nnx.Rngs(0)), folder / "model")
    for layer in LAYERS:
        made = jaxtc.Transcoder(CONFIG.hidden_size, FEATURES, layer=layer, rngs=nnx.Rngs(layer))
        place = folder / "transcoders" / f"layer_{layer}" / "width_1k" / "average_l0_9"
        jaxtc.save_transcoder(made, place)
    found = {mesh: measure(folder, mesh) for mesh in meshes}
    found["workspace"] = workspaces(folder, meshes[0])
    found["27b"] = of_real_width(MESH_27B)
    print(json.dumps(found))


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)
    main(Path(sys.argv[1]), sys.argv[2:])

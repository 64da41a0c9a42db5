"""One of several processes that share a mesh; test_processes.py starts them and reads reports.

``process.py prepare FOLDER`` writes checkpoints and what one device computes;
``process.py INDEX COUNT PORT FOLDER MESH OTHER_MESH`` is one of COUNT processes.
"""

import json
import sys
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

import jaxtc
from jaxtc.sharding.mesh import make_mesh, mesh_of
from jaxtc.sharding.rules import variables
from jaxtc.weights.checkpoints import tree as checkpoint_tree
from tests.scale import lab

# About 168 MB in float32.
BIG = jaxtc.Gemma2Config(
    vocab_size=32768, hidden_size=512, intermediate_size=8192, num_hidden_layers=2,
    num_attention_heads=8, num_key_value_heads=4, head_dim=64,
)  # fmt: skip
RUNS = ("run_with_everything", "generation", "dictionary")
X = np.random.default_rng(2).normal(size=(4, 6, 24)).astype(np.float32)


def results(name: str, model, transcoder) -> dict:
    if name == "dictionary":
        return lab.dictionary(transcoder, X)
    return getattr(lab, name)(model, transcoder)


def prepare(folder: Path) -> None:
    """Files that all processes read, and the results of a single device."""
    jaxtc.save_model(lab.model(), folder / "model")
    jaxtc.save_transcoder(lab.transcoder(), folder / "layer_1")
    big = jax.tree.map(
        lambda leaf: np.full(leaf.shape, 0.5, np.float32), jaxtc.Gemma2.abstract(BIG)
    )
    jaxtc.save_model(big, folder / "big", max_shard_size=60_000_000)
    for name in RUNS:
        found = lab.numbers(results(name, lab.model(), lab.transcoder()))
        flat = {
            f"{key}|{index}": np.asarray(leaf)
            for key, tree in found.items()
            for index, leaf in enumerate(jax.tree.leaves(tree))
        }
        np.savez(folder / f"{name}.npz", **flat)


def expected(folder: Path, name: str) -> dict[str, list[np.ndarray]]:
    found: dict[str, list[np.ndarray]] = {}
    with np.load(folder / f"{name}.npz") as stored:
        for key in stored:
            found.setdefault(key.rpartition("|")[0], []).append(stored[key])
    return found


def proc(file: str, field: str) -> int:
    lines = Path(f"/proc/self/{file}").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(field + ":")))


def share_of_a_big_model(folder: Path) -> dict[str, int]:
    """Bytes that this process holds of it, reads for it, and needs at the most to load it."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    read, before = proc("io", "rchar"), proc("status", "VmRSS") * 1024
    model = jaxtc.load_model(folder / "big", mesh=f"model={jax.device_count()}")
    read, peak = proc("io", "rchar") - read, proc("status", "VmHWM") * 1024 - before
    leaves = jax.tree.leaves(model)
    held = sum(shard.data.nbytes for x in leaves for shard in x.addressable_shards)
    pieces = {
        (i, str(s.index)): s.data.nbytes for i, x in enumerate(leaves) for s in x.addressable_shards
    }
    whole = sum(x.nbytes for x in leaves)
    return {"held": held, "share": sum(pieces.values()), "read": read, "peak": peak, "whole": whole}


def same_bits(model, wanted) -> None:
    """This process's shards are those parts of the arrays."""
    for (name, a), (_, b) in zip(variables(model), variables(wanted), strict=True):
        whole = np.asarray(b[...])
        for shard in a[...].addressable_shards:
            assert np.array_equal(np.asarray(shard.data), whole[shard.index]), name


def agreement(folder: Path, index: int, mesh: Mesh) -> str:
    """A process that cannot load makes all of them raise."""
    try:
        jaxtc.load_model(folder / ("nowhere" if index == 1 else "model"), mesh=mesh)
    except jaxtc.JaxtcError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def refused(model, folder: Path) -> str:
    """A file that one process writes cannot hold a model of several."""
    try:
        jaxtc.save_model(model, folder / "one_file")
    except jaxtc.JaxtcError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def work(index: int, count: int, folder: Path, mesh: str, other: str) -> dict:
    assert jax.process_count() == count
    told = {"devices": jax.device_count(), "agreement": agreement(folder, index, make_mesh(mesh))}
    told["big"] = share_of_a_big_model(folder)
    model = jaxtc.load_model(folder / "model", mesh=mesh)
    transcoder = jaxtc.load_transcoder(folder / "layer_1", mesh=mesh)
    same_bits(model, lab.model())
    same_bits(transcoder, lab.transcoder())
    told["refused"] = refused(model, folder)
    for name in RUNS:
        print(index, name, flush=True)
        wanted = expected(folder, name)
        told[name] = lab.check_same(results(name, model, transcoder), wanted)
    checkpoint_tree.CHUNK_BYTES = 1000  # so that what is as small as here is in chunks too
    saved = folder / f"saved_by_{count}"
    jaxtc.save_checkpoint(model, saved)
    jaxtc.save_checkpoint({1: transcoder}, saved.with_suffix(".transcoders"))
    for shape in (mesh, other):
        again = jaxtc.load_model(saved, mesh=shape, verify=shape == other)
        assert mesh_of(again) == make_mesh(shape)
        same_bits(again, lab.model())
        same_bits(
            jaxtc.load_transcoder(saved.with_suffix(".transcoders"), 1, mesh=shape),
            lab.transcoder(),
        )
    found = lab.numbers(jaxtc.run(again, lab.ROWS, lengths=lab.LENGTHS).logits)
    told["restored"] = float(np.abs(found).max())
    return told


def main(index: str, count: str, port: str, folder: str, mesh: str, other: str) -> None:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        f"localhost:{port}", int(count), int(index), initialization_timeout=120
    )
    told = work(int(index), int(count), Path(folder), mesh, other)
    Path(folder, f"report_{count}_{index}.json").write_text(json.dumps(told))
    jax.distributed.shutdown()


if __name__ == "__main__":
    if sys.argv[1] == "prepare":
        prepare(Path(sys.argv[2]))
    else:
        main(*sys.argv[1:])

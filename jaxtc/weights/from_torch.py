"""A Gemma-2 that is in memory as a model of transformers, taken over."""

import dataclasses
import functools
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from jaxtc.errors import InputError, WeightsError, some
from jaxtc.helpers import explicit_transfers
from jaxtc.interchange import from_foreign, plain
from jaxtc.model.config import Gemma2Config
from jaxtc.model.gemma2 import Gemma2
from jaxtc.sharding.mesh import MeshLike, make_mesh
from jaxtc.sharding.processes import agreed
from jaxtc.sharding.rules import RULES, Rules, shardings
from jaxtc.weights.files import arrays, shards
from jaxtc.weights.files.generation import with_stops
from jaxtc.weights.names import BUFFERS, EMBEDDING, HEAD, Name, parameter_names, published

# What is in the name of a parameter that an adapter of PEFT put there.
_ADAPTER = ("lora_", "base_layer.", "modules_to_save.", "token_adapter.", "prompt_encoder.")


@explicit_transfers
def from_torch(
    model: Any,
    *,
    dtype: jnp.dtype | str | None = None,
    mesh: MeshLike | None = None,
    rules: Rules = RULES,
    share: bool = False,
) -> Gemma2:
    """A Gemma-2 of ``transformers`` that is in memory, as ours, with the weights that it has now.

    The weights are copied, a parameter at a time, so that nothing that torch does to its model
    later (training, ``.half()``, a merge) changes this one. Training, dropout, hooks and the
    attention that the model runs with do not come along. A model that torch changes afterwards is
    taken again.

    With ``share`` they are not copied where that can be: of the same dtype, on the device that
    JAX uses (a CPU, or a GPU of both), without a mesh, and laid out as JAX wants it (on the CPU
    aligned to 64 bytes). A shared weight must not be written to any more, in place or by an
    optimiser: JAX takes its arrays for constants, so what it computed, computes or compiles then is
    neither the old model nor the new one, without a word. torch's model may be deleted; memory that
    is shared lives on.

    Args:
        model: a ``Gemma2ForCausalLM`` or ``Gemma2Model`` (whose output matrix is its embedding, if
            its config ties it), on any device. ``lm_head`` is used where it is a matrix of its own.
        dtype: of the weights; by default the narrowest that holds those of the model as they are.
        mesh: such as ``"data=2,model=4"``, see :func:`jaxtc.make_mesh`; the default device if None.
            In many processes, each has the model in its torch and keeps its shards.
        rules: which axes of the parameters are divided, see :data:`jaxtc.sharding.RULES`.
        share: use torch's memory where possible, under the terms above.

    Raises:
        InputError: not a model of transformers; one that PEFT wraps (merge it first:
            ``model = model.merge_and_unload()``); weights that are not in memory.
        ConfigError: another architecture.
        WeightsError: quantised weights; parameters missing, extra, misshapen, or not finite.
        ShardingError: no such mesh, or an axis that does not divide over it.
    """
    mesh = None if mesh is None else make_mesh(mesh)
    places = mesh and functools.partial(shardings, mesh=mesh, rules=rules)
    with agreed(mesh, "take the model over"):
        config, tensors = _checked(model)
        if dtype is None:
            dtype = functools.reduce(jnp.promote_types, (_dtype(x) for x in tensors.values()))
        dtype = arrays.check_dtype(dtype)
        names = {name.ours: name for name in parameter_names(config)}

        def read(ours: str, dtype: np.dtype, sharding: NamedSharding | None):
            return _read(tensors[names[ours].hf], names[ours], dtype, sharding, share)

        where = Path(type(model).__name__)
        return shards.fill(Gemma2.abstract(config, dtype), read, where, places)


def _checked(model: Any) -> tuple[Gemma2Config, dict[str, Any]]:
    """The config, and the tensors by their published names."""
    torch = sys.modules.get("torch")
    kind = type(model).__name__
    if torch is None or not isinstance(model, torch.nn.Module):
        raise InputError(
            f"from_torch takes a model of transformers that is in memory (Gemma2ForCausalLM), not "
            f"{'a ' * isinstance(model, str | Path)}{kind}. A folder or a hub id is loaded with "
            "load_model; a transcoder with load_transcoder."
        )
    found = model.state_dict(keep_vars=True)  # one tensor that has two names is under both
    wrapped = [name for name in found if any(sign in name for sign in _ADAPTER)]
    if wrapped:
        raise InputError(
            f"This {kind} has an adapter of PEFT in it ({some(wrapped, 2)}). "
            "Merge it first: model = model.merge_and_unload(), then from_torch(model); or load "
            "the adapter's folder with load_model, which merges it."
        )
    settings = getattr(getattr(model, "config", None), "to_dict", dict)()
    if not settings:
        raise InputError(
            f"{kind} has no config, so it is not a model of transformers. from_torch takes a "
            "Gemma2ForCausalLM or a Gemma2Model."
        )
    config = Gemma2Config.from_dict(settings, f"The config of this {kind}")
    stops = {
        "eos_token_id": getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    }
    where = f"The generation_config of this {kind}"
    config = with_stops(config, json.dumps(stops).encode(), where)
    known: dict[str, Any] = {}
    for name, tensor in found.items():
        if not BUFFERS.fullmatch(published(name)):
            known[published(name)] = tensor
    if HEAD in known and EMBEDDING in known and config.tie_word_embeddings:
        head, embedding = known[HEAD], known[EMBEDDING]
        comparable = head.device == embedding.device and head.dtype == embedding.dtype
        if head is embedding or (comparable and torch.equal(head, embedding)):
            del known[HEAD]
        else:
            config = dataclasses.replace(config, tie_word_embeddings=False)
    _account(kind, known, config)
    return config, known


def _dtype(tensor: Any) -> np.dtype:
    """The dtype of a tensor as NumPy has it."""
    return np.dtype(str(tensor.dtype).removeprefix("torch."))


def _account(kind: str, known: Mapping[str, Any], config: Gemma2Config) -> None:
    """Raise for tensors that are not the parameters of this config."""
    expected = {name.hf: name for name in parameter_names(config)}
    floats = ("bfloat16", "float16", "float32", "float64")
    packed = [
        name for name, x in known.items() if str(x.dtype) not in {f"torch.{f}" for f in floats}
    ]
    if packed:
        x = known[packed[0]]
        raise WeightsError(
            f"{packed[0]} of this {kind} is {x.dtype}{list(x.shape)}: its weights are quantised, "
            "and jaxtc takes only those that are not. Load the model without quantization_config, "
            "or call model.dequantize() first."
        )
    away = [name for name, x in known.items() if x.device.type == "meta"]
    if away:
        raise InputError(
            f"{some(away, 3)} of this {kind} are on the device 'meta': they are not in memory "
            "(offloaded, or not loaded). Load the model whole, without device_map, or give its "
            "folder to load_model, which needs one layer's memory."
        )
    problems = [f"{hf} is missing" for hf in expected if hf not in known]
    if HEAD in expected and HEAD not in known:
        problems.append(
            "its config says tie_word_embeddings = false, and a backbone has no output matrix: "
            "give the model with its head"
        )
    for name, tensor in known.items():
        shape = tuple(tensor.shape)
        if name not in expected:
            problems.append(f"{name} is not a tensor of a Gemma-2")
        elif shape != expected[name].hf_shape:
            problems.append(f"{name} has shape {shape}, not {expected[name].hf_shape}")
    if problems:
        raise WeightsError(
            f"This {kind} is not the Gemma-2 of its config: {some(problems, 20)}. Of a model with "
            "another head, give the Gemma-2 in it: from_torch(model.model)."
        )


def _read(
    tensor: Any, name: Name, dtype: np.dtype, sharding: NamedSharding | None, share: bool
) -> tuple[np.ndarray | jax.Array, str]:
    """A parameter, and what is wrong with its values or an empty string."""
    if share and sharding is None and _dtype(tensor) == dtype:
        taken = from_foreign(tensor.detach().reshape(name.shape))
        finite = bool(jax.device_get(jnp.isfinite(taken).all()))
        return taken, "" if finite else f"{name.hf} {arrays.NOT_FINITE}"
    made, problem = arrays.converted(plain(tensor).reshape(name.shape), dtype)
    if problem:
        return made, f"{name.hf} {problem}"
    return (made if sharding is None else shards.spread(made, sharding)), ""

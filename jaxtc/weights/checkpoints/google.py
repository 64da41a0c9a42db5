"""Google's own checkpoints of Gemma-2: orbax trees of its Flax model, as Kaggle has them.

The tree of ``gemma.gm.nn`` (github.com/google-deepmind/gemma), nested or with flat keys such as
``transformer/layer_0/attn/q_einsum``. Axis letters: V vocabulary, D hidden, N query heads, K
key/value heads, H head dim, F MLP width.
"""

import contextlib
import dataclasses
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import unflatten_dict
from jax.sharding import NamedSharding

from jaxtc.errors import ConfigError, WeightsError, some
from jaxtc.helpers import is_whole
from jaxtc.model.config import Gemma2Config
from jaxtc.model.released import RELEASED
from jaxtc.weights.checkpoints import tree
from jaxtc.weights.checkpoints.read import check_plain
from jaxtc.weights.files import arrays, local, shards
from jaxtc.weights.files.safetensors import FLOATS
from jaxtc.weights.names import parameter_names

# What orbax writes into the folder of a tree, and where below a checkpoint its tree may be.
METADATA = "_METADATA"
_WITHIN = ("", "default", "state", "params")

# Our name below a layer, the name in Google's tree there, its axes, and how ours come from them.
_LAYER = (
    ("attn_in_norm.weight", "pre_attention_norm/scale", "D", "D->D"),
    ("attn.q", "attn/q_einsum/w", "N D H", "NDH->NHD"),
    ("attn.k", "attn/kv_einsum/w", "2 K D H", "KDH->KHD"),
    ("attn.v", "attn/kv_einsum/w", "2 K D H", "KDH->KHD"),
    ("attn.o", "attn/attn_vec_einsum/w", "N H D", "NHD->DNH"),
    ("attn_out_norm.weight", "post_attention_norm/scale", "D", "D->D"),
    ("mlp_in_norm.weight", "pre_ffw_norm/scale", "D", "D->D"),
    ("mlp.gate", "mlp/gating_einsum", "2 D F", "DF->FD"),
    ("mlp.up", "mlp/gating_einsum", "2 D F", "DF->FD"),
    ("mlp.down", "mlp/linear", "F D", "FD->DF"),
    ("mlp_out_norm.weight", "post_ffw_norm/scale", "D", "D->D"),
)
_OUTER = {
    "embed.weight": ("embedder/input_embedding", "V D", "VD->VD"),
    "final_norm.weight": ("final_norm/scale", "D", "D->D"),
}
# Which of those that are stored together.
_SECOND = {"attn.k": 0, "attn.v": 1, "mlp.gate": 0, "mlp.up": 1}
# Where every head has keys of its own, the three are stored together.
_TOGETHER = {"attn.q": 0, "attn.k": 1, "attn.v": 2}
# The MLP's first matrices of some releases.
_TRANSPOSED = ("2 F D", "FD->FD")


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where a parameter is: the array in the tree, its axes, an index of it, and an einsum that
    only orders axes."""

    array: str
    axes: str
    order: str
    index: int | None = None


def find(folder: Path) -> Path | None:
    """The folder of the orbax tree in ``folder``, or in the only folder in it that has one (as in
    Kaggle's downloads, beside the tokenizer); None if there is none."""
    if here := _tree(folder):
        return here
    with contextlib.suppress(OSError):
        below = [path for path in sorted(folder.iterdir())[:100] if path.is_dir()]
        found = [tree for path in below if (tree := _tree(path))]
        return found[0] if len(found) == 1 else None
    return None


def _tree(folder: Path) -> Path | None:
    places = (folder / within for within in _WITHIN)
    return next((place for place in places if local.has(place, METADATA)), None)


class GoogleTree:
    """A Gemma-2 in Google's tree; its config is the released one of its sizes, or is given.

    Raises:
        ConfigError: no release has these sizes, and no config is given, or one of other sizes.
        WeightsError: not a Gemma-2's tree; one that orbax cannot read; arrays missing or misshapen.
    """

    def __init__(
        self,
        folder: Path,
        config: Gemma2Config | None = None,
    ):
        self.folder = folder
        check_plain(folder)
        stored = self._stored()
        self._paths = {name: path for name, (path, _) in stored.items()}
        self._said = {name: one for name, (_, one) in stored.items()}
        self._shapes = {name: tuple(one.shape) for name, one in self._said.items()}
        self._refuse_others()
        sizes, layers = self._sizes(), self._layers()
        self.config = config or self._released(sizes, layers)
        self._compare(sizes, layers)
        self.places = self._account()
        self._readers = Counter(place.array for place in self.places.values())
        self._last: dict[str, np.ndarray] = {}
        self.dtypes = {ours: np.dtype(self._said[x.array].dtype) for ours, x in self.places.items()}

    def _stored(self) -> dict[str, tuple[tuple[str, ...], Any]]:
        """(path of keys, what orbax says of it) of each array by its name, ``transformer/`` and
        what is around it left out."""
        with _orbax(self.folder) as reader:
            tree = reader.metadata(self.folder).item_metadata.tree
            found = jax.tree.leaves_with_path(tree, is_leaf=lambda x: hasattr(x, "shape"))
            named = {}
            for path, one in found:
                keys = tuple(str(getattr(key, "key", key)) for key in path)
                name = re.sub(r"^(?:params/)?(?:transformer/)?", "", "/".join(keys))
                name = re.sub(r"(mlp/(?:linear|gating_einsum))/w$", r"\1", name)
                if name in named:
                    raise ValueError(f"{name} is stored twice")
                named[name] = keys, one
        for name, (_, one) in named.items():
            shape = getattr(one, "shape", None)
            whole = isinstance(shape, tuple) and all(is_whole(size, 1) for size in shape)
            if not whole or getattr(one, "dtype", None) not in FLOATS.values():
                raise WeightsError(
                    f"{self.folder} holds {name[:200]!r}, which is no array of floating-point "
                    "numbers, so it is not a Gemma-2 in Google's tree; or its metadata is damaged: "
                    "fetch it again."
                )
        return named

    def _refuse_others(self) -> None:
        """Name other trees by what only they have."""
        names = self._shapes
        signs = {
            "_query_norm": "Gemma 3", "siglip": "a Gemma 3 with a vision encoder",
            "vision_encoder": "a Gemma 3 with a vision encoder", "_lora": "a LoRA",
        }  # fmt: skip
        kind = next((what for sign, what in signs.items() if any(sign in x for x in names)), None)
        if "embedder/input_embedding" in names and "layer_0/post_ffw_norm/scale" not in names:
            kind = kind or "Gemma 1, or another model without norms after its blocks"
        if kind or "embedder/input_embedding" not in names:
            raise WeightsError(
                f"{self.folder} is an orbax tree of {kind or 'something else'}, not of Google's "
                f"Gemma-2: it holds {some(sorted(name[:100] for name in names), 6)}. jaxtc reads "
                "Google's Gemma-2, and what `jaxtc convert` or save_checkpoint wrote."
            )

    def _layers(self) -> int:
        numbers = {int(x[1]) for name in self._shapes if (x := re.match(r"layer_(\d{1,5})/", name))}
        if numbers != set(range(len(numbers))):
            raise WeightsError(
                f"{self.folder} has {len(numbers)} layers up to layer_{max(numbers, default=0)}: "
                "some are missing. The copy was cut short; fetch it again."
            )
        return len(numbers)

    def _sizes(self) -> dict[str, int]:
        """The size of each axis letter, from the embedding and the first layer."""
        first = "layer_0/attn/q_einsum/w", "layer_0/attn/kv_einsum/w", "layer_0/mlp/linear"
        axes = dict(zip(first, ("N D H", "2 K D H", "F D"), strict=True))
        if "layer_0/attn/qkv_einsum/w" in self._shapes:
            axes |= {"layer_0/attn/qkv_einsum/w": "3 N D H"}
            del axes[first[0]], axes[first[1]]
        sizes: dict[str, int] = {}
        for name, letters in {"embedder/input_embedding": "V D", **axes}.items():
            shape = self._shapes.get(name, ())
            if len(shape) != len(letters.split()):
                raise self._unsound(f"{name} has shape {shape}, not ({letters})")
            sizes |= dict(zip(letters.split(), shape, strict=True))
        return sizes | {"K": sizes.get("K", sizes["N"])}

    def _released(self, sizes: Mapping[str, int], layers: int) -> Gemma2Config:
        """The config of the release with these sizes; Google's embedding has rows to spare."""
        for one in RELEASED.values():
            same = {key: size for key, size in one.sizes.items() if key != "V"}
            if layers == one.num_hidden_layers and same.items() <= sizes.items():
                return dataclasses.replace(one, vocab_size=sizes["V"])
        shown = ", ".join(f"{key} {sizes[key]}" for key in "VDNKHF")
        raise ConfigError(
            f"{self.folder} is a Gemma-2 in Google's tree of {layers} layers and sizes that no "
            f"release has ({shown}), and it has no config.json, which says what shapes do not "
            "(query_pre_attn_scalar, sliding_window, softcapping, ...). Give config=, a "
            "Gemma2Config or a config.json, or put a config.json into the folder."
        )

    def _compare(self, sizes: Mapping[str, int], layers: int) -> None:
        said = self.config.sizes | {"layers": self.config.num_hidden_layers}
        found = {**sizes, "layers": layers}
        odd = [f"{key} is {found[key]}, not {said[key]}" for key in said if found[key] != said[key]]
        if odd or not self.config.tie_word_embeddings:
            tied = "" if self.config.tie_word_embeddings else "its output matrix is the embedding"
            raise ConfigError(
                f"The config is not that of the Gemma-2 in {self.folder}: "
                f"{some([*odd, *filter(None, [tied])], 20)}. Give the config of this checkpoint."
            )

    def _account(self) -> dict[str, _Place]:
        """Where each parameter is; every array is used."""
        sizes = {letter: str(size) for letter, size in self.config.sizes.items()}
        rows = {ours: _Place(*place) for ours, place in _OUTER.items()}
        for layer in range(self.config.num_hidden_layers):
            below = f"layer_{layer}/"
            for ours, array, axes, order in _LAYER:
                place = _Place(below + array, axes, order, _SECOND.get(ours))
                joined = f"{below}attn/qkv_einsum/w"
                if ours in _TOGETHER and joined in self._shapes:
                    place = _Place(joined, "3 N D H", "NDH->NHD", _TOGETHER[ours])
                elif array == "mlp/gating_einsum" and self._is_transposed(place.array):
                    place = dataclasses.replace(place, axes=_TRANSPOSED[0], order=_TRANSPOSED[1])
                rows[f"layers.{layer}.{ours}"] = place
        problems = []
        for place in {place.array: place for place in rows.values()}.values():
            shape = self._shapes.get(place.array)
            expected = tuple(int(sizes.get(axis, axis)) for axis in place.axes.split())
            if shape is None:
                problems.append(f"{place.array} is missing")
            elif shape != expected:
                problems.append(
                    f"{place.array} has shape {shape}, not {expected} "
                    f"({place.axes.replace(' ', ', ')})"
                )
        used = {place.array for place in rows.values()}
        problems += [
            f"{name[:200]} is not a parameter" for name in self._shapes if name not in used
        ]
        if problems:
            raise self._unsound(some(problems, 20))
        return {name.ours: rows[name.ours] for name in parameter_names(self.config)}

    def _is_transposed(self, array: str) -> bool:
        D, F = self.config.hidden_size, self.config.intermediate_size
        if D == F:
            raise WeightsError(
                f"{self.folder}: in {array}, (2, D, F) and (2, F, D) look the same where D and F "
                f"are both {D}, and Google's checkpoints have either. Convert it to safetensors "
                "with a program that knows."
            )
        return self._shapes.get(array) == (2, F, D)

    def _unsound(self, problem: str) -> WeightsError:
        return WeightsError(
            f"{self.folder} is not a whole Gemma-2 in Google's tree: {problem}. The copy was cut "
            "short, or it is another model; fetch it again."
        )

    def _fetch(self, array: str) -> np.ndarray:
        """One array as it is stored; the last one is kept, as keys and values are in one."""
        if array in self._last:
            return self._last[array]
        self._last.clear()
        path = self._paths[array]
        with _orbax(self.folder) as reader:
            import orbax.checkpoint as ocp

            wanted = unflatten_dict({path: 0})
            kinds = unflatten_dict({path: ocp.RestoreArgs(restore_type=np.ndarray)})
            asked = ocp.args.PyTreeRestore(wanted, restore_args=kinds, partial_restore=True)
            [found] = jax.tree.leaves(reader.restore(self.folder, args=asked))
            said = self._shapes[array], self._said[array].dtype
            if (found.shape, found.dtype) != said:
                raise ValueError(f"{array} has shape {found.shape} and dtype {found.dtype}")
        if self._readers[array] > 1:
            self._last[array] = found
        return found

    def read(
        self, ours: str, dtype: np.dtype, sharding: NamedSharding | None = None
    ) -> tuple[np.ndarray | jax.Array, str]:
        """A parameter by our name; every process reads all of the array that it is in.

        Returns (the array, what is wrong with its values or an empty string).
        """
        place = self.places[ours]
        stored = self._fetch(place.array)
        stored = stored if place.index is None else stored[place.index]
        before, after = place.order.split("->")
        turned = stored.transpose([before.index(letter) for letter in after])
        made, problem = arrays.converted(turned, dtype)
        if problem:
            return made, f"{place.array} {problem}"
        return (made if sharding is None else shards.spread(made, sharding)), ""


@contextlib.contextmanager
def _orbax(folder: Path) -> Iterator[Any]:
    """Orbax's reader of trees, which takes those of older releases too, and whatever a damaged
    folder leads to as our error."""
    import orbax.checkpoint as ocp  # slow to import

    with tree.quiet(f"The orbax tree in {folder}", "fetch it again"):
        # By each process without waiting for the others.
        process = jax.process_index()
        alone = ocp.options.MultiprocessingOptions(
            primary_host=process, active_processes={process},
            barrier_sync_key_prefix=f"jaxtc_{process}",
        )  # fmt: skip
        handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)
        with ocp.Checkpointer(handler, multiprocessing_options=alone) as reader:
            yield reader

"""The tensors of an adapter, each accounted for: what it changes of which parameter."""

import contextlib
import dataclasses
import fnmatch
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from jax.sharding import NamedSharding

from jaxtc.errors import WeightsError, some
from jaxtc.model.config import Gemma2Config
from jaxtc.weights.adapters.merge import Change, LowRank, Rows
from jaxtc.weights.adapters.settings import SETTINGS, LoraSettings
from jaxtc.weights.files import arrays, local, shards
from jaxtc.weights.files.safetensors import SafetensorsFile
from jaxtc.weights.names import EMBEDDING, HEAD, Name, parameter_names, published

TENSORS = "adapter_model.safetensors"
_PICKLES = ("adapter_model.bin", "adapter_model.pt")

# PEFT's name of a tensor: the module as it is called in the model that was wrapped, and what it is.
_TENSOR = re.compile(
    r"base_model\.model\.(?P<module>.+?)\."
    r"(?P<part>lora_[AB]\.weight|lora_embedding_[AB]|lora_magnitude_vector(?:\.weight)?|"
    r"token_adapter\.trainable_tokens_delta|(?:base_layer\.)?(?:weight|bias)|lora_[AB]\.bias)"
)


@dataclasses.dataclass(frozen=True)
class Part:
    """A module's tensors in the file, by what they are."""

    module: str
    tensors: Mapping[str, str]


class Adapter:
    """An open adapter of a base model of this config.

    Attributes:
        config: of the merged model: an embedding that is stored whole may have other rows, and one
            that is changed apart from the output matrix is no longer tied to it.
        changes: of each parameter that is changed, by our name, in order.
        replaced: the tensor in the place of a whole parameter.

    Raises:
        WeightsError: tensors that are not those of its settings and this base, all of them named.
    """

    def __init__(
        self,
        file: SafetensorsFile,
        settings: LoraSettings,
        base: Gemma2Config,
        ignore: Sequence[str] = (),
    ):
        self.file, self.settings, self._ignore = file, settings, ignore
        self.problems: list[str] = []
        modules = self._modules()
        self.replaced = self._whole(modules)
        self.config = self._merged(base)
        names = {name.hf: name for name in parameter_names(self.config)}
        self._check_whole(names)
        self._untied = not self.config.tie_word_embeddings
        self._tied_base = base.tie_word_embeddings
        self.changes: dict[str, list[Change]] = defaultdict(list)
        for hf, part in sorted(modules.items()):
            self._changed(hf, part, names)
        self._check_targets(names, modules)
        self.replaced = {names[hf].ours: one for hf, one in self.replaced.items() if hf in names}
        if self.problems:
            raise WeightsError(
                f"The tensors in {file.path} are not those that {SETTINGS} and the base model "
                f"call for: {some(self.problems, 20)}. Give the base model that it was trained on "
                "with base=, or fetch the adapter again."
            )

    @property
    def doubled(self) -> bool:
        """Whether low-rank changes of the embedding, or of the output matrix, are of a matrix that
        is both: there PEFT's merge is another model than the adapter that was trained."""
        ours = next(iter(self.changes.get("embed.weight", ())), None)
        return isinstance(ours, LowRank) and not self._untied

    def _modules(self) -> dict[str, Part]:
        """The modules that have tensors, by the published name of what those change."""
        found: dict[str, Part] = {}
        for tensor, entry in self.file.entries.items():
            match = _TENSOR.fullmatch(tensor)
            names = {tensor, published(f"{match['module']}.weight") if match else tensor}
            if any(fnmatch.fnmatchcase(name, one) for name in names for one in self._ignore):
                continue
            if match is None:
                self.problems.append(f"{tensor} is no tensor of a LoRA")
                continue
            if entry.fault:
                self.problems.append(f"{tensor} {entry.fault}")
            module, kind = match["module"], match["part"].removeprefix("base_layer.")
            kind = kind.removesuffix(".weight")
            if kind.endswith("bias"):
                self.problems.append(f"{tensor} is a bias, and Gemma-2's layers have none")
                continue
            part = found.setdefault(published(f"{module}.weight"), Part(module, {}))
            if part.module != module or kind in part.tensors:
                self.problems.append(f"{tensor} and another tensor are of the same parameter")
            part.tensors[kind] = tensor
        return found

    def _whole(self, modules: Mapping[str, Part]) -> dict[str, str]:
        return {hf: one.tensors["weight"] for hf, one in modules.items() if "weight" in one.tensors}

    def _merged(self, base: Gemma2Config) -> Gemma2Config:
        """The config of the merged model."""
        changed = {}
        if base.tie_word_embeddings and self._parts_ways():
            changed["tie_word_embeddings"] = False
        elif base.tie_word_embeddings and HEAD in self.replaced:
            head = self.replaced.pop(HEAD)
            self.replaced.setdefault(EMBEDDING, head)  # one matrix, under either name or both
        if EMBEDDING in self.replaced:  # of other rows where there are new tokens
            shape = self.file.entries[self.replaced[EMBEDDING]].shape
            changed["vocab_size"] = max(shape[0], 1) if len(shape) == 2 else base.vocab_size
        merged = dataclasses.replace(base, **changed)
        grown = merged.vocab_size != base.vocab_size
        if grown and not merged.tie_word_embeddings and HEAD not in self.replaced:
            self.problems.append(
                f"{self.replaced[EMBEDDING]} has {merged.vocab_size} rows, and the output matrix "
                f"of the base model {base.vocab_size}"
            )
        return merged

    def _parts_ways(self) -> bool:
        """Whether the embedding and the output matrix, tied in the base, differ in the result:
        one of them alone was trained whole (modules_to_save), or both, apart."""
        there = [hf for hf in (EMBEDDING, HEAD) if hf in self.replaced]
        if len(there) == 2:
            one, other = (self.file.entries[self.replaced[hf]] for hf in there)
            if one.shape != other.shape or one.fault or other.fault:
                return True
            return not shards.equal(*(self.file.raw(self.replaced[hf]) for hf in there))
        return any(self.settings.saves(hf.removesuffix(".weight")) for hf in there)

    def _check_whole(self, names: Mapping[str, Name]) -> None:
        for hf, tensor in self.replaced.items():
            if hf not in names:
                self.problems.append(f"{tensor} is not a tensor of this model")
            elif (shape := self.file.entries[tensor].shape) != names[hf].hf_shape:
                self.problems.append(f"{tensor} has shape {shape}, not {names[hf].hf_shape}")

    def _changed(self, hf: str, part: Part, names: Mapping[str, Name]) -> None:
        """Add the changes that a module's tensors are."""
        tied_head = hf == HEAD and not self._untied
        name = names.get(EMBEDDING if tied_head else hf)
        kinds = {kind: tensor for kind, tensor in part.tensors.items() if kind != "weight"}
        if not kinds:
            return
        if name is None or len(name.hf_shape) != 2:
            self.problems.append(f"{part.module} is no matrix of this model")
            return
        out, inner = name.hf_shape
        if tokens := kinds.pop("token_adapter.trainable_tokens_delta", None):
            self._tokens(tokens, part.module, name)
        if not kinds:
            return
        rank, of_embedding = self.settings.rank_of(part.module), "lora_embedding_A" in kinds
        left, right, magnitude = "lora_B", "lora_A", out
        shapes = {"lora_A": (rank, inner), "lora_B": (out, rank)}
        if of_embedding:
            left, right, magnitude = "lora_embedding_A", "lora_embedding_B", inner
            shapes = {"lora_embedding_A": (rank, out), "lora_embedding_B": (inner, rank)}
        if self.settings.dora:
            shapes["lora_magnitude_vector"] = (magnitude,)
        if wrong := self._unlike(part.module, kinds, shapes):
            self.problems.append(wrong)
            return
        size = range(1, len(name.shape) + 1)
        self.changes[name.ours].append(
            LowRank(
                self._reader(kinds[left], of_embedding), self._reader(kinds[right], of_embedding),
                self.settings.scale(part.module),
                next(axes for axes in size if math.prod(name.shape[:axes]) == out),
                self._reader(kinds["lora_magnitude_vector"]) if self.settings.dora else None,
                of_embedding,
            )
        )  # fmt: skip

    def _unlike(self, module: str, kinds: Mapping[str, str], shapes: Mapping[str, tuple]) -> str:
        """What keeps tensors from being those of these shapes, or an empty string."""
        if missing := shapes.keys() - kinds.keys():
            return f"{module} lacks {some(sorted(missing))}"
        if extra := kinds.keys() - shapes.keys():
            dora = " (use_dora is false)" * ("lora_magnitude_vector" in extra)
            return f"{module} has {some(sorted(extra))} too{dora}"
        for kind, shape in shapes.items():
            if (found := self.file.entries[kinds[kind]].shape) != shape:
                return f"{kinds[kind]} has shape {found}, not {shape}"
        return ""

    def _tokens(self, tensor: str, module: str, name: Name) -> None:
        """Rows of the embedding that were trained."""
        asked = self.settings.tokens
        ids = next((asked[one] for one in asked if f".{module}".endswith(f".{one}")), ())
        if name.hf != EMBEDDING or self.file.entries[tensor].shape != (len(ids), name.hf_shape[1]):
            self.problems.append(f"{tensor} is not the {len(ids)} trainable tokens of an embedding")
        elif bad := [one for one in ids if one >= name.hf_shape[0]] or len(set(ids)) != len(ids):
            self.problems.append(f"trainable_token_indices has ids that are none, or twice: {bad}")
        else:
            self.changes[name.ours].append(Rows(ids, self._reader(tensor)))

    def _reader(self, tensor: str, transposed: bool = False):
        def read(dtype: np.dtype) -> np.ndarray:
            array, problem = self.file.read(tensor, dtype, transposed=transposed)
            if problem:
                raise WeightsError(
                    f"{self.file.path} cannot be used: {tensor} {problem}. Whatever was computed "
                    "with these values would be wrong; fetch the adapter again."
                )
            return array

        return read

    def _check_targets(self, names: Mapping[str, Name], modules: Mapping[str, Part]) -> None:
        """The modules that have a LoRA are those that the settings take."""
        lora = {hf: one for hf, one in modules.items() if any("lora" in k for k in one.tensors)}
        for part in lora.values():
            if not self.settings.targeted(part.module):
                self.problems.append(f"{part.module} has a LoRA but is no target of {SETTINGS}")
        # Below what the wrapped model called its layers; that the file of an adapter without any
        # tensor of them does not say.
        around = {
            one.module.removesuffix(hf.removesuffix(".weight").removeprefix("model."))
            for hf, one in lora.items()
            if hf.startswith("model.")
        }
        for prefix in sorted(around or {"model."}):
            for hf, name in names.items():
                module = hf.removesuffix(".weight").removeprefix("model.")
                module = module if hf == HEAD else prefix + module
                matrix = len(name.hf_shape) == 2 and hf not in self.replaced
                if matrix and hf not in lora and self.settings.targeted(module):
                    self.problems.append(f"{module} is a target of {SETTINGS} but has no tensors")

    def read(self, base, name: Name, dtype: np.dtype, sharding: NamedSharding | None):
        """A parameter merged: ``base`` (name, dtype, sharding) gives it without the adapter.

        On a mesh each process merges its own shards; of DoRA it reads one parameter whole, at a
        time.

        Returns (the array, what is wrong with its values or an empty string).
        """
        changes = self.changes.get(name.ours, [])
        if whole := any(change.whole for change in changes):
            sharding, spread = None, sharding
        if tensor := self.replaced.get(name.ours):
            array, problem = self.file.read(tensor, dtype, sharding, shape=name.shape)
            problem = problem and f"{tensor} of the adapter {problem}"
        else:
            # The output matrix of a base that ties it is its embedding.
            ours = "embed.weight" if name.ours == "head.weight" and self._tied_base else name.ours
            array, problem = base(ours, dtype, sharding)
        if problem or not changes:
            return array, problem

        def merged(part: np.ndarray, box: shards.Box) -> np.ndarray:
            made = part if part.flags.writeable else None
            if made is None:
                made = arrays.empty(part.shape, part.dtype)
                np.copyto(made, part)
            with np.errstate(all="ignore"):  # what is not finite is told below
                for change in changes:
                    change.apply(made, box, name.shape)
            return made

        if sharding is None:
            array = merged(array, tuple((0, size) for size in name.shape))
            fine = arrays.all_finite(array)
            if whole and spread is not None:
                array = shards.spread(array, spread)
        else:
            array, fine = _each_shard(array, sharding, merged)
        large = f"holds NaN, or values too large for {dtype.name}, once the adapter is merged"
        return array, "" if fine else f"{name.ours} {large}"


def _each_shard(array: jax.Array, sharding: NamedSharding, merged) -> tuple[jax.Array, bool]:
    """An array of which every part that this process holds was changed on the host."""
    parts = {shard.device: shard.data for shard in array.addressable_shards}
    placed, fine, shape = [], True, array.shape
    del array
    for box, devices in shards.boxes_of(shape, sharding).items():
        part = merged(np.array(parts[devices[0]]), box)
        fine &= arrays.all_finite(part)
        placed += jax.block_until_ready([jax.device_put(part, device) for device in devices])
        for device in devices:
            del parts[device]
    return jax.make_array_from_single_device_arrays(shape, sharding, placed), fine


@contextlib.contextmanager
def open_adapter(
    folder: Path, settings: LoraSettings, base: Gemma2Config, ignore: Sequence[str] = ()
) -> Iterator[Adapter]:
    """The adapter in a folder, for a base model of this config, but for tensors to ``ignore``.

    Raises:
        WeightsError: no safetensors; as :class:`Adapter`.
    """
    if not local.has(folder, TENSORS):
        pickles = [name for name in _PICKLES if local.has(folder, name)]
        raise WeightsError(
            f"{folder} has {SETTINGS} but no {TENSORS}"
            + (
                f"; {pickles[0]} is a pickle, which can run code and is not read. PEFT writes "
                "safetensors: PeftModel.from_pretrained(base_model, folder).save_pretrained(out)."
                if pickles
                else ". The copy was cut short; fetch the adapter again."
            )
        )
    with SafetensorsFile(folder / TENSORS) as file:
        yield Adapter(file, settings, base, ignore)


def files_of(folder: Path) -> Sequence[Path]:
    """The files of an adapter that are read."""
    return [path for name in (SETTINGS, TENSORS) if (path := folder / name).is_file()]

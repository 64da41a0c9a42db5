"""Converting transcoders, a parameter at a time: that is the most that is in memory."""

import dataclasses
import functools
import itertools
import operator
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxtc.errors import SourceError, WeightsError
from jaxtc.helpers import JAXTC_VERSION
from jaxtc.sharding.rules import variables
from jaxtc.tap.sites import BY_NAME
from jaxtc.transcoders.transcoder import Transcoder
from jaxtc.weights.checkpoints.job import FILE_BYTES, Job
from jaxtc.weights.checkpoints.read import Converted, open_transcoders
from jaxtc.weights.checkpoints.sidecar import TRANSCODERS
from jaxtc.weights.conversion.orbax import write_orbax
from jaxtc.weights.conversion.source import fetch_converted, sound, state_of
from jaxtc.weights.files import arrays
from jaxtc.weights.files.formats import BY_FORMAT, SITES, Format
from jaxtc.weights.files.layout import check_layer
from jaxtc.weights.files.transcoder import open_transcoder, write_transcoder
from jaxtc.weights.load_model import Progress
from jaxtc.weights.load_transcoder import look_up
from jaxtc.weights.save_transcoder import check_savable
from jaxtc.weights.sources.resolve import CONVERTED, Source
from jaxtc.weights.sources.verify import verify_files

FORMATS = {"npz": "gemma-scope", "circuit-tracer": "circuit-tracer"}

_TIER = re.compile(r"(?:^|/)(layer_\d+/width_[^/]+/average_l0_[^/]+)$")
# What circuit-tracer puts around an MLP itself; for other sites it goes by TransformerLens's names.
_HOOKS = {"mlp_in": "mlp.hook_in", "mlp_proj": "mlp.hook_out"}


@dataclasses.dataclass(frozen=True)
class _One:
    """One transcoder of a source: what it will be, and how to have its parameters by name."""

    declared: Transcoder
    fetch: Callable[[str], np.ndarray]


@dataclasses.dataclass(frozen=True)
class _Source:
    """The transcoders to convert, by layer, and where they come from."""

    ones: Mapping[int, _One]
    name: str
    revision: str | None
    state: str


def convert_transcoders(
    source: Source,
    out: str | Path,
    to: str,
    *,
    layers: str | Iterable[int] = "all",
    dtype: np.dtype | None = None,
    verify: bool = False,
    without_sites: bool = False,
    model_name: str | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Path:
    """See :func:`jaxtc.convert`; ``to`` is "orbax", "npz" or "circuit-tracer"."""
    if not isinstance(layers, str):
        layers = list(layers)
        if not layers:
            raise SourceError("layers is empty, so there is nothing to convert.")
    elif layers != "all":
        raise SourceError(f"layers is {layers!r}, expected 'all' or whole numbers.")
    found = _open(source, layers, dtype, verify, options)
    what = {
        "source": found.name,
        "to": to,
        "dtype": dtype.name if dtype else None,
        "layers": sorted(found.ones),
        "revision": found.revision,
        "state of its files": found.state,
        "jaxtc": JAXTC_VERSION,
        "options": {**options, "without_sites": without_sites, "model_name": model_name},
    }
    if to == "orbax":
        return _to_orbax(found, out, what, progress)
    made = BY_FORMAT[FORMATS[to]]
    files = {layer: _file(made, one.declared) for layer, one in found.ones.items()}
    base = Path(out)
    for layer, one in found.ones.items():
        check_savable(one.declared, made, base / files[layer], without_sites)
    last, content = _last(to, found, model_name)
    wide = np.dtype(np.float32) if made.suffix == ".npz" else None
    sizes = [_size(one.declared, wide) + FILE_BYTES for one in found.ones.values()]
    with Job(out, what, sum(sizes)) as job:
        if job.finished:
            return job.out
        for number, (layer, one) in enumerate(sorted(found.ones.items()), 1):
            write = functools.partial(write_transcoder, made, declared=one.declared)
            job.place(files[layer], functools.partial(write, fetch=one.fetch))
            if progress:
                progress(number, len(found.ones))
        if last:
            job.write(last, [content])
        return job.finish()


def _to_orbax(
    found: _Source, out: str | Path, what: dict[str, Any], progress: Progress | None
) -> Path:
    arrays, fetches = {}, {}
    for layer, one in sorted(found.ones.items()):
        for name, param in variables(one.declared):
            arrays[f"layers.{layer}.{name}"] = param.shape, np.dtype(param.dtype)
            fetches[f"layers.{layer}.{name}"] = functools.partial(one.fetch, name)
    facts = {"kind": TRANSCODERS, "source": found.name, "revision": found.revision}
    facts["transcoders"] = {layer: one.declared.facts() for layer, one in found.ones.items()}
    numbers = itertools.count(1)

    def written(_) -> None:
        number = next(numbers)
        if progress:
            progress(number, len(found.ones))

    sizes = [_size(one.declared, None) for one in found.ones.values()]
    with Job(out, what, sum(sizes) + FILE_BYTES * len(arrays)) as job:
        return write_orbax(job, arrays, lambda name: fetches[name](), {}, facts, written)


def _open(
    source: Source,
    layers: str | Iterable[int],
    dtype: np.dtype | None,
    verify: bool,
    options: Mapping[str, Any],
) -> _Source:
    """The transcoders that are meant, each looked at but not read."""
    if source.format == CONVERTED:
        return _of_converted(open_transcoders(source.path), layers, dtype, verify)
    tier = [options.get(key) for key in ("width", "l0")]
    sites = {key: options[key] for key in SITES if key in options}
    wanted = source.layers() if isinstance(layers, str) else layers
    files, ones = {}, {}
    for layer in wanted:
        found = source.one(layer, *tier)
        stored, declared = look_up(found, dtype, **sites)
        layer = operator.index(layer)  # JSON knows no integers of NumPy
        files[layer] = found.file
        if stored == np.float64 and dtype is None:
            raise WeightsError(
                f"{files[layer]} holds float64, which loses nothing that matters as float32: say "
                "so with dtype='float32'."
            )
        ones[layer] = _One(declared, functools.partial(_fetch, files[layer], declared))
    if verify:
        verify_files(files.values())
    parts = next(iter(files.values())).parts
    commit = parts[parts.index("snapshots") + 1] if "snapshots" in parts else None
    return _Source(ones, source.name, commit, state_of(list(files.values())))


def _of_converted(
    checkpoint: Converted, layers: str | Iterable[int], dtype: np.dtype | None, verify: bool
) -> _Source:
    if verify:
        checkpoint.verify()
    sidecar = checkpoint.sidecar
    wanted = sorted(sidecar.transcoders) if isinstance(layers, str) else layers
    ones = {}
    for layer in wanted:
        check_layer(layer, sidecar.transcoders, str(checkpoint.folder))
        declared = checkpoint.declared(layer, dtype)
        ones[layer] = _One(declared, functools.partial(_fetch_converted, checkpoint, declared))
    return _Source(ones, sidecar.source, sidecar.revision, sidecar.content)


def _fetch(file: Path, declared: Transcoder, name: str) -> np.ndarray:
    with open_transcoder(file) as opened:
        values, problem = opened.read(name, np.dtype(declared.W_enc.dtype))
    return sound(values, file, name, problem.removeprefix(f"{name} "))


def _fetch_converted(checkpoint: Converted, declared: Transcoder, name: str) -> np.ndarray:
    dtype = np.dtype(declared.W_enc.dtype)
    return fetch_converted(checkpoint, f"layers.{declared.layer}.{name}", dtype)


def _file(made: Format, declared: Transcoder) -> str:
    """Where a transcoder's file goes below the folder: as it was in Gemma Scope, if it was."""
    if made.suffix == ".safetensors":
        return f"layer_{declared.layer}.safetensors"
    tier = _TIER.search(declared.source)
    features = declared.features
    width = f"{features // 1024}k" if features % 1024 == 0 else str(features)
    place = f"layer_{declared.layer}/width_{width}/average_l0_unknown"
    return f"{tier[1] if tier else place}/params.npz"


def _size(declared: Transcoder, dtype: np.dtype | None) -> int:
    return sum(x.size * (dtype or np.dtype(x.dtype)).itemsize for x in jax.tree.leaves(declared))


def _last(to: str, found: _Source, model_name: str | None) -> tuple[str, bytes]:
    """The file that is written last: circuit-tracer's config."""
    declared = [one.declared for one in found.ones.values()]
    if to != "circuit-tracer":
        return "", b""
    sites = {(one.input_site, one.output_site) for one in declared}
    if len(sites) > 1:
        raise SourceError(
            f"These transcoders read and write different sites ({sorted(sites)}), and a set of "
            "circuit-tracer has one input and one output. Convert them apart, with layers=."
        )
    pair = sites.pop()
    hooks = [_HOOKS.get(site, BY_NAME[site].tl) for site in pair]
    if not all(hooks):
        raise SourceError(
            f"circuit-tracer has no hook for {pair[not hooks[1]]}, which these transcoders "
            f"{'write' if hooks[0] else 'read'}; it knows {', '.join(_known())}."
        )
    scope = re.search(r"gemma-scope-(2b|9b|27b)-", found.name)
    if model_name is None and scope:
        model_name = f"google/gemma-2-{scope[1]}"
    told = {"model_name": model_name, "model_kind": "transcoder_set"}
    told |= {"feature_input_hook": hooks[0], "feature_output_hook": hooks[1]}
    lines = (f'{key}: "{value}"\n' for key, value in told.items() if value is not None)
    return "config.yaml", "".join(lines).encode()


def _known() -> list[str]:
    """The sites of a layer that circuit-tracer has a hook for."""
    layered = (site for site in BY_NAME.values() if site.per_layer and site.token_axes)
    return [site.name for site in layered if site.tl or site.name in _HOOKS]


def check_model_name(name: str | None) -> str | None:
    """A model's name as it goes into circuit-tracer's config. Raises SourceError for no name."""
    if name is not None and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise SourceError(f"model_name is {name!r}, expected one such as google/gemma-2-2b.")
    return name


def check_dtype(dtype: Any, to: str) -> np.dtype | None:
    """The dtype to convert to, None to keep what is stored. Raises WeightsError for none."""
    found = None if dtype is None else arrays.check_dtype(dtype)
    if to == "npz" and found not in (None, np.float32):
        raise WeightsError(f"A params.npz is float32, so it cannot be written as {found.name}.")
    return found

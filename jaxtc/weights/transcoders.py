"""Transcoders from a source: Gemma Scope's on the hub, files and folders like them, the embedded.

Their layout is ``layer_{l}/width_{w}/average_l0_{n}/params.npz``.
"""

import os
import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

import jax
import jax.numpy as jnp

from jaxtc.errors import SourceError, did_you_mean, some
from jaxtc.transcoder import Transcoder
from jaxtc.weights import arrays, hub
from jaxtc.weights.load import EMBEDDED, embedded_data, no_revision
from jaxtc.weights.npz import KEYS, read_params, write_params

PARAMS = "params.npz"

GEMMA_SCOPE_2B = "google/gemma-scope-2b-pt-transcoders"

# The average L0 of the transcoder that is usually meant for each layer of Gemma-2 2B, the same
# choice as circuit-tracer, SAELens and Neuronpedia make among those of GEMMA_SCOPE_2B.
DEFAULT_L0 = (
    76, 65, 49, 54, 88, 87, 95, 70, 52, 72, 88, 5, 6, 8, 8, 8, 10, 12, 13, 12, 11, 13, 15, 25, 37,
    41,
)  # fmt: skip
DEFAULT_WIDTH = "width_16k"

_LAYER = re.compile(r"layer_(\d+)")
_LAYOUT = re.compile(r"(?:.*/)?layer_\d+/width_[^/]+/average_l0_[^/]+/params\.npz")


def load_transcoder(
    source: str | Path = EMBEDDED,
    layer: int | None = None,
    *,
    path: str | None = None,
    dtype: jnp.dtype | str = jnp.float32,
    input_site: str = "mlp_in_normed",
    revision: str | None = None,
) -> Transcoder:
    """One transcoder.

    Args:
        source: a hub id, with a path or without
            (``google/gemma-scope-2b-pt-transcoders/layer_20/width_16k/average_l0_11``); a
            ``params.npz``; a folder in the layout of Gemma Scope; or ``"embedded"``.
        layer: which layer's; the default tier is taken (of Gemma Scope's, the usual L0).
        path: below ``source``, such as ``layer_20/width_16k/average_l0_11``.
        dtype: of its parameters.
        input_site: the site it reads.
        revision: of a hub id: a branch, tag or commit.

    Raises:
        SourceError: nothing there, no access to it, or more than one candidate; they are listed.
        WeightsError: a damaged file; arrays missing, extra, misshapen, or not finite.
    """
    dtype = arrays.check_dtype(dtype)
    if layer is not None and (not isinstance(layer, int) or isinstance(layer, bool) or layer < 0):
        raise SourceError(f"layer is {layer!r}, expected a whole number from 0.")
    file, name = _find(source, layer, path, revision)
    found = _LAYER.findall(name)
    if found and layer is not None and int(found[-1]) != layer:
        raise SourceError(f"layer={layer} was asked for, but {name} is of layer {found[-1]}.")
    return _read(file, dtype, int(found[-1]) if found else layer, input_site, name)


def load_transcoders(
    source: str | Path = EMBEDDED,
    layers: str | Iterable[int] = "all",
    *,
    dtype: jnp.dtype | str = jnp.float32,
    input_site: str = "mlp_in_normed",
    revision: str | None = None,
) -> dict[int, Transcoder]:
    """A transcoder for each of several layers, by layer, as :func:`load_transcoder` picks them.

    Args:
        source: as there, without a path.
        layers: which, or ``"all"`` that the source has.
        dtype: of their parameters.
        input_site: the site they read.
        revision: of a hub id: a branch, tag or commit.

    Raises:
        SourceError, WeightsError: as :func:`load_transcoder`.
    """
    if isinstance(layers, str):
        if layers != "all":
            raise SourceError(f"layers is {layers!r}, expected 'all' or whole numbers.")
        layers = available_layers(source, revision)
    options = {"dtype": dtype, "input_site": input_site, "revision": revision}
    return {layer: load_transcoder(source, layer, **options) for layer in layers}


def available_layers(source: str | Path = EMBEDDED, revision: str | None = None) -> list[int]:
    """The layers that a folder, a hub repository or the embedded data has transcoders for.

    Raises:
        SourceError: as :func:`load_transcoder`.
    """
    if source == GEMMA_SCOPE_2B:
        return list(range(len(DEFAULT_L0)))
    if source == EMBEDDED:
        paths = _list(embedded_data("transcoders", revision))
    elif (folder := Path(source).expanduser()).is_dir():
        no_revision(source, revision)
        paths = _list(folder)
    else:
        paths = [p for p in hub.list_files(*_split(source)[:1], revision) if _LAYOUT.fullmatch(p)]
    layers = sorted({_layer_of(file) for file in paths})
    if not layers:
        raise SourceError(f"{source} holds no layer_N/width_W/average_l0_L/{PARAMS}.")
    return layers


def save_transcoder(transcoder: Transcoder, path: str | Path) -> Path:
    """Write a transcoder as Gemma Scope's ``params.npz``; whole or not at all.

    Args:
        transcoder: to be saved; its parameters are written as float32.
        path: the file, or the folder to write ``params.npz`` in; folders are made.

    Returns:
        The file.

    Raises:
        SourceError: it cannot be written there.
    """
    path = Path(path).expanduser()
    file = path if path.suffix == ".npz" else path / PARAMS
    values = {key: jnp.asarray(getattr(transcoder, key)[...], jnp.float32) for key in KEYS}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_params(file, {key: jax.device_get(value) for key, value in values.items()})
    except OSError as error:
        raise SourceError(f"{file} cannot be written: {error.strerror}.") from error
    return file


def _read(file: Path, dtype, layer: int | None, input_site: str, name: str) -> Transcoder:
    params = read_params(file, dtype)
    (d_in, features), (_, d_out) = params["W_enc"].shape, params["W_dec"].shape
    abstract = Transcoder.abstract(
        d_in, features, d_out, layer=layer, input_site=input_site, source=name, dtype=dtype
    )
    shapes, structure = jax.tree_util.tree_flatten_with_path(abstract)
    leaves = [arrays.to_jax(params[_key(path)]) for path, _ in shapes]
    return jax.tree.unflatten(structure, leaves)


def _key(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")


def _find(
    source: str | Path, layer: int | None, path: str | None, revision: str | None
) -> tuple[Path, str]:
    """The local file of a transcoder, and the name it goes by."""
    if source == EMBEDDED:
        return _in_folder(embedded_data("transcoders", revision), EMBEDDED, layer, path)
    local = Path(source).expanduser()
    if local.exists():
        no_revision(source, revision)
        if local.is_dir():
            return _in_folder(local, str(source), layer, path)
        if path is not None:
            raise SourceError(f"{source} is a file, so there is no {path!r} in it.")
        return local, str(source)
    repo, inside = _split(source)
    parts = [part for part in (inside, path) if part]
    wanted = _file("/".join(parts)) if parts else ""
    if not _LAYOUT.fullmatch(wanted):
        if repo == GEMMA_SCOPE_2B and layer is not None and not parts:
            _check_layer(layer, range(len(DEFAULT_L0)), repo)
            wanted = _default_path(layer)
        else:
            paths = [p for p in hub.list_files(repo, revision) if _LAYOUT.fullmatch(p)]
            wanted = _choose(paths, "/".join(parts), layer, repo)
    file = hub.download_if_there(repo, wanted, revision)
    if file is None:
        paths = [p for p in hub.list_files(repo, revision) if _LAYOUT.fullmatch(p)]
        wanted = _choose(paths, str(PurePosixPath(wanted).parent), layer, repo)
        file = hub.download(repo, wanted, revision)
    return file, f"{repo}/{PurePosixPath(wanted).parent}"


def _split(source: str | Path) -> tuple[str, str]:
    parts = hub.split_id(source) if isinstance(source, str) else None
    if parts is None:
        raise SourceError(
            f"There is no file or folder {source}, and it is not a hub id such as {GEMMA_SCOPE_2B}."
        )
    return parts


def _in_folder(folder: Path, source: str, layer: int | None, path: str | None) -> tuple[Path, str]:
    if path and (os.path.isabs(path) or ".." in PurePosixPath(path).parts):
        raise SourceError(f"path={path!r} leaves {source}; give a path below it.")
    direct = folder / _file(path) if path else folder / PARAMS
    chosen = direct.relative_to(folder).as_posix()
    if not direct.is_file():
        chosen = _choose(_list(folder), (path or "").strip("/"), layer, source)
    inside = str(PurePosixPath(chosen).parent)
    return folder / chosen, source if inside == "." else f"{source.rstrip('/')}/{inside}"


def _file(path: str) -> str:
    path = path.strip("/")
    return path if path.endswith(".npz") else f"{path}/{PARAMS}"


def _list(folder: Path) -> list[str]:
    """All transcoders below a folder that is, or lies somewhere in, the layout."""
    files = folder.glob("**/" + PARAMS)
    paths = [file.relative_to(folder).as_posix() for file in files]
    return sorted(path for path in paths if _LAYOUT.fullmatch((folder / path).as_posix()))


def _choose(paths: list[str], below: str, layer: int | None, source: str) -> str:
    """The one of ``paths`` that is meant."""
    if not paths:
        raise SourceError(
            f"{source} holds no transcoders: expected layer_N/width_W/average_l0_L/{PARAMS}."
        )
    if layer is not None:
        _check_layer(layer, {_layer_of(p, layer) for p in paths}, source)
    inside = [p for p in paths if f"{p}/".startswith(f"{below}/" if below else "")]
    if below and not inside:
        tiers = [str(PurePosixPath(p).parent) for p in paths]
        near = did_you_mean(below, tiers)
        raise SourceError(f"{source} has no {below!r}.{near or f' It has {some(sorted(tiers))}.'}")
    if layer is not None:
        inside = [p for p in inside if _layer_of(p, layer) == layer]
        if _default_path(layer) in inside:
            return _default_path(layer)
    if len(inside) == 1:
        return inside[0]
    layers = sorted({_layer_of(p, -1) for p in inside})
    if layer is None and len(layers) > 1:
        raise SourceError(
            f"{source} has transcoders for several layers ({some([str(n) for n in layers], 50)}); "
            "say which layer."
        )
    tiers = sorted(str(PurePosixPath(p).parent) for p in inside)
    raise SourceError(
        f"{source} has {len(tiers)} transcoders for that layer; choose one by its path: "
        f"{some(tiers, 20)}."
    )


def _check_layer(layer: int, layers: Iterable[int], source: str) -> None:
    if layer not in (layers := sorted(layers)):
        raise SourceError(
            f"{source} has no transcoder for layer {layer}; it has layers "
            f"{some([str(n) for n in layers], 50)}."
        )


def _default_path(layer: int) -> str:
    l0 = DEFAULT_L0[layer] if layer < len(DEFAULT_L0) else "none"
    return f"layer_{layer}/{DEFAULT_WIDTH}/average_l0_{l0}/{PARAMS}"


def _layer_of(path: str, unknown: int = -1) -> int:
    found = _LAYER.findall(path)
    return int(found[-1]) if found else unknown

"""Transcoders from a source: Gemma Scope's on the hub, files and folders like it, the embedded."""

import os
import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

import jax
import jax.numpy as jnp
import numpy as np

from jaxtc.errors import SiteError, SourceError, did_you_mean
from jaxtc.sites import BY_NAME
from jaxtc.transcoder import Transcoder
from jaxtc.weights import arrays, hub
from jaxtc.weights.layout import (
    DEFAULT_L0,
    GEMMA_SCOPE_2B,
    PARAMS,
    SHAPE,
    Tier,
    check_layer,
    choose,
    default_path,
    is_tier,
    layer_of,
    tiers_in,
    tiers_of,
)
from jaxtc.weights.load import EMBEDDED, embedded_data, no_revision, parameter_path
from jaxtc.weights.npz import KEYS, read_params, write_params

# Sparse autoencoders of the same release and the same file format: they read and write one site.
_SAE = re.compile(r"gemma-scope.*-(res|mlp|att)(-.*)?")


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
        SiteError: no such ``input_site``.
        WeightsError: a damaged file; arrays missing, extra, misshapen, or not finite.
    """
    dtype = arrays.check_dtype(dtype)
    if input_site not in BY_NAME:
        raise SiteError(
            f"There is no site called {input_site!r}.{did_you_mean(input_site, BY_NAME)}"
        )
    if layer is not None and layer < 0:
        raise SourceError(f"layer is {layer}, expected a whole number from 0.")
    file, name = _find(source, layer, path, revision)
    named = layer_of(file.absolute().as_posix())
    if None not in (named, layer) and named != layer:
        raise SourceError(f"layer={layer} was asked for, but {name} is of layer {named}.")
    return _read(file, dtype, layer if named is None else named, input_site, name)


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
        tiers = tiers_in(embedded_data("transcoders", revision))
    elif (folder := Path(source).expanduser()).is_dir():
        no_revision(source, revision)
        tiers = tiers_in(folder)
    else:
        repo, inside = _split(source)
        tiers = [t for t in _listed(repo, revision) if t.is_below(inside)]
    layers = sorted({tier.layer for tier in tiers})
    if not layers:
        raise SourceError(f"{source} holds no transcoders; expected {SHAPE} in it.")
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


def _read(file: Path, dtype: np.dtype, layer: int | None, input_site: str, name: str) -> Transcoder:
    params = read_params(file, dtype)
    (d_in, features), (_, d_out) = params["W_enc"].shape, params["W_dec"].shape
    abstract = Transcoder.abstract(
        d_in, features, d_out, layer=layer, input_site=input_site, source=name, dtype=dtype
    )
    shapes, structure = jax.tree_util.tree_flatten_with_path(abstract)
    leaves = [arrays.to_jax(params[parameter_path(path)]) for path, _ in shapes]
    return jax.tree.unflatten(structure, leaves)


def _find(
    source: str | Path, layer: int | None, path: str | None, revision: str | None
) -> tuple[Path, str]:
    """The local file of a transcoder, and the name it goes by."""
    if path is not None and (os.path.isabs(path) or ".." in PurePosixPath(path).parts):
        raise SourceError(f"path={path!r} leaves {source}; give a path below it.")
    if source == EMBEDDED:
        return _in_folder(embedded_data("transcoders", revision), EMBEDDED, layer, path or "")
    local = Path(source).expanduser()
    if local.is_dir():
        no_revision(source, revision)
        return _in_folder(local, str(source), layer, path or "")
    if local.exists():
        no_revision(source, revision)
        if path is not None:
            raise SourceError(f"{source} is a file, so there is no {path!r} in it.")
        return local, str(source)
    repo, inside = _split(source)
    return _on_hub(repo, "/".join(filter(None, (inside, path))), layer, revision)


def _in_folder(folder: Path, source: str, layer: int | None, path: str) -> tuple[Path, str]:
    chosen = _file(path) if path else PARAMS
    if not (folder / chosen).is_file():
        chosen = choose(tiers_in(folder), _folder(path), layer, source).path
    inside = _folder(chosen)
    return folder / chosen, f"{source.rstrip('/')}/{inside}" if inside else source


def _on_hub(repo: str, path: str, layer: int | None, revision: str | None) -> tuple[Path, str]:
    wanted = _file(path) if path else ""
    if not path and repo == GEMMA_SCOPE_2B and layer is not None:
        check_layer(layer, range(len(DEFAULT_L0)), repo)
        wanted = default_path(layer)
    file = hub.download_if_there(repo, wanted, revision) if is_tier(wanted) else None
    if file is None:
        wanted = choose(_listed(repo, revision), _folder(path), layer, repo).path
        file = hub.download(repo, wanted, revision)
    return file, f"{repo}/{_folder(wanted)}"


def _listed(repo: str, revision: str | None) -> list[Tier]:
    return tiers_of(hub.list_files(repo, revision))


def _split(source: str | Path) -> tuple[str, str]:
    """The repository and the path in it that a hub source names."""
    parts = hub.split_id(source) if isinstance(source, str) else None
    if parts is None:
        raise SourceError(
            f"There is no file or folder {source}, and it is not a hub id such as {GEMMA_SCOPE_2B}."
        )
    if _SAE.fullmatch(parts[0].split("/")[1]):
        raise SourceError(
            f"{parts[0]} holds sparse autoencoders, which rebuild one site, not transcoders, which "
            f"imitate an MLP; run as transcoders they would give wrong numbers. See "
            f"{GEMMA_SCOPE_2B}."
        )
    return parts


def _file(path: str) -> str:
    path = path.strip("/")
    return path if path.endswith(".npz") else f"{path}/{PARAMS}"


def _folder(path: str) -> str:
    """``path`` without its file and without slashes around it; empty for the top."""
    path = path.strip("/")
    folder = str(PurePosixPath(path).parent) if path.endswith(".npz") else path
    return "" if folder == "." else folder

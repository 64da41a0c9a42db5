"""Transcoders from a source: Gemma Scope's on the hub, files and folders like it, the embedded."""

import operator
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
from jaxtc.weights import arrays, hub, local
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
# A local copy has the name of its repository, the hub's cache owner and name.
_SAE = re.compile(r"(models--.+--)?gemma-scope-(?!.*transcoder).*-(res|mlp|att)(-.*)?")


# What a transcoder loaded from a file is taken for: Gemma Scope's.
_SITES = {"input_site": "mlp_in_normed", "output_site": "mlp_out"}


def load_transcoder(
    source: str | Path = EMBEDDED,
    layer: int | None = None,
    *,
    path: str | None = None,
    dtype: jnp.dtype | str = jnp.float32,
    input_site: str = "mlp_in_normed",
    output_site: str = "mlp_out",
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
        input_site: the site it reads; files do not say.
        output_site: the site it imitates; files do not say.
        revision: of a hub id: a branch, tag or commit.

    Raises:
        SourceError: nothing there, no access to it, more than one candidate (they are listed), or
            an autoencoder of Gemma Scope, told by its folder's name.
        SiteError: no such site.
        WeightsError: a damaged file; arrays missing, extra, misshapen, or not finite.
    """
    dtype = arrays.check_dtype(dtype)
    for site in (input_site, output_site):
        if site not in BY_NAME:
            raise SiteError(f"There is no site called {site!r}.{did_you_mean(site, BY_NAME)}")
    layer = _number(layer)
    file, name = _find(source, layer, path, revision)
    for part in file.absolute().parts:
        _refuse_autoencoders(part)
    named = layer_of(file.absolute().as_posix())
    if None not in (named, layer) and named != layer:
        raise SourceError(f"layer={layer} was asked for, but {name} is of layer {named}.")
    sites = {"input_site": input_site, "output_site": output_site}
    return _read(file, dtype, name, layer=layer if named is None else named, **sites)


def transcoder_file(source: str | Path, layer: int | None = None) -> Path:
    """The local ``params.npz`` that :func:`load_transcoder` would read. Raises SourceError so."""
    return _find(source, _number(layer), None, None)[0]


def load_transcoders(
    source: str | Path = EMBEDDED,
    layers: str | Iterable[int] = "all",
    *,
    dtype: jnp.dtype | str = jnp.float32,
    input_site: str = "mlp_in_normed",
    output_site: str = "mlp_out",
    revision: str | None = None,
) -> dict[int, Transcoder]:
    """A transcoder for each of several layers, by layer, as :func:`load_transcoder` picks them.

    Args:
        source: as there, without a path.
        layers: which, or ``"all"`` that the source has.
        dtype: of their parameters.
        input_site: the site they read.
        output_site: the site they imitate.
        revision: of a hub id: a branch, tag or commit.

    Raises:
        SourceError, WeightsError: as :func:`load_transcoder`.
    """
    if isinstance(layers, str):
        if layers != "all":
            raise SourceError(f"layers is {layers!r}, expected 'all' or whole numbers.")
        layers = available_layers(source, revision)
    if not isinstance(layers, Iterable):
        raise SourceError(f"layers is {layers!r}, expected 'all' or several, such as [{layers}].")
    sites = {"input_site": input_site, "output_site": output_site}
    options = {"dtype": dtype, "revision": revision, **sites}
    return {layer: load_transcoder(source, layer, **options) for layer in layers}


def available_layers(source: str | Path = EMBEDDED, revision: str | None = None) -> list[int]:
    """The layers that a folder, a file, a hub repository or the embedded data has transcoders for.

    Raises:
        SourceError: as :func:`load_transcoder`, or a file that no ``layer_N`` folder is around.
    """
    found = local.find(source)
    if source == GEMMA_SCOPE_2B:
        return list(range(len(DEFAULT_L0)))
    if source == EMBEDDED:
        tiers = tiers_in(embedded_data("transcoders", revision))
    elif found is not None:
        no_revision(source, revision)
        if not found.is_dir():
            return [_layer_of_file(found)]
        tiers = tiers_in(found)
    else:
        repo, inside = _split(source)
        tiers = [t for t in _listed(repo, revision) if t.is_below(inside)]
    layers = sorted({tier.layer for tier in tiers})
    if not layers:
        raise SourceError(f"{source} holds no transcoders; expected {SHAPE} in it.")
    return layers


def save_transcoder(
    transcoder: Transcoder, path: str | Path, *, without_sites: bool = False
) -> Path:
    """Write a transcoder as Gemma Scope's ``params.npz``; whole or not at all.

    The file has no place for the sites (nor for the layer, which the folder ``layer_N`` around it
    names), so a transcoder of other sites than Gemma Scope's is refused unless you say that you
    will remember them.

    Args:
        transcoder: to be saved; its parameters are written as float32.
        path: the file, or the folder to write ``params.npz`` in; folders are made.
        without_sites: write it though its sites are lost; they must then be given to
            :func:`load_transcoder` each time, as ``input_site`` and ``output_site``.

    Returns:
        The file.

    Raises:
        SourceError: it cannot be written there.
        SiteError: it reads or imitates other sites than mlp_in_normed and mlp_out, and
            ``without_sites`` is false.
    """
    own = {"input_site": transcoder.input_site, "output_site": transcoder.output_site}
    if own != _SITES and not without_sites:
        given = ", ".join(f"{key}={value!r}" for key, value in own.items())
        raise SiteError(
            f"params.npz has no place for this transcoder's sites ({given}); loaded again it would "
            f"be taken for {_SITES['input_site']} to {_SITES['output_site']}. Save it with "
            f"without_sites=True, and give {given} to load_transcoder."
        )
    path = local.expand(path)
    file = path if path.suffix == ".npz" else path / PARAMS
    values = {key: jnp.asarray(getattr(transcoder, key)[...], jnp.float32) for key in KEYS}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_params(file, {key: jax.device_get(value) for key, value in values.items()})
    except OSError as error:
        raise SourceError(f"{file} cannot be written: {error.strerror}.") from error
    return file


def _read(
    file: Path, dtype: np.dtype, name: str, *, layer: int | None, input_site: str, output_site: str
) -> Transcoder:
    params = read_params(file, dtype)
    (d_in, features), (_, d_out) = params["W_enc"].shape, params["W_dec"].shape
    told = {"layer": layer, "input_site": input_site, "output_site": output_site, "source": name}
    abstract = Transcoder.abstract(d_in, features, d_out, dtype=dtype, **told)
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
    found = local.find(source)
    if found is not None:
        no_revision(source, revision)
        if found.is_dir():
            return _in_folder(found, str(source), layer, path or "")
        if path is not None:
            raise SourceError(f"{source} is a file, so there is no {path!r} in it.")
        return found, str(source)
    repo, inside = _split(source)
    return _on_hub(repo, "/".join(filter(None, (inside, path))), layer, revision)


def _in_folder(folder: Path, source: str, layer: int | None, path: str) -> tuple[Path, str]:
    chosen = _file(path) if path else PARAMS
    if not local.has(folder, chosen):
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
    # Every hub id may look like a relative path; none of a repository's ends like a file of ours.
    if parts is None or parts[0].endswith(".npz"):
        raise SourceError(
            f"There is no file or folder {source}, and it is not a hub id such as {GEMMA_SCOPE_2B}."
        )
    _refuse_autoencoders(parts[0].split("/")[1])
    return parts


def _refuse_autoencoders(name: str) -> None:
    """Refuse a repository or folder with the name of one of Gemma Scope's autoencoders."""
    if _SAE.fullmatch(name):
        raise SourceError(
            f"{name} holds sparse autoencoders, which rebuild one site, not transcoders, which "
            f"imitate an MLP; run as transcoders they would give wrong numbers. See "
            f"{GEMMA_SCOPE_2B}. (A folder is told by its name: rename one that has another's.)"
        )


def _number(layer: int | None) -> int | None:
    """``layer`` as an index from 0, when it is one."""
    try:
        number = None if layer is None else operator.index(layer)
    except TypeError:
        number = -1
    if number is not None and number < 0:
        place = f" A place below the source is given as path={layer!r}."
        raise SourceError(
            f"layer is {layer!r}, expected a whole number from 0."
            + (place if isinstance(layer, str) else "")
        )
    return number


def _layer_of_file(file: Path) -> int:
    named = layer_of(file.absolute().as_posix())
    if named is None:
        raise SourceError(
            f"{file} is one transcoder, and no folder around it (layer_N) says of which layer; say "
            "which layer, as a number."
        )
    return named


def _file(path: str) -> str:
    path = path.strip("/")
    return path if path.endswith(".npz") else f"{path}/{PARAMS}"


def _folder(path: str) -> str:
    """``path`` without its file and without slashes around it; empty for the top."""
    path = path.strip("/")
    folder = str(PurePosixPath(path).parent) if path.endswith(".npz") else path
    return "" if folder == "." else folder

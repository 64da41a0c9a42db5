"""Transcoders from a source: Gemma Scope's on the hub, files and folders like it, the embedded."""

import functools
from collections.abc import Callable, Iterable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from jaxtc.errors import SiteError, SourceError, did_you_mean
from jaxtc.sharding.mesh import MeshLike, make_mesh
from jaxtc.sharding.processes import agreed
from jaxtc.sharding.rules import RULES, Rules, shardings, variables
from jaxtc.tap.sites import BY_NAME
from jaxtc.transcoders.transcoder import Transcoder
from jaxtc.weights.checkpoints.read import load_converted_transcoder, open_transcoders
from jaxtc.weights.files import arrays, local
from jaxtc.weights.files.layout import DEFAULT_L0, GEMMA_SCOPE_2B, SHAPE, sae_site, tiers_in
from jaxtc.weights.files.transcoder import (
    SITES,
    TranscoderFile,
    open_transcoder,
    read_all,
    told_sites,
)
from jaxtc.weights.load_model import EMBEDDED, embedded_data, no_revision
from jaxtc.weights.sources.transcoder import (
    converted_folder,
    find_file,
    find_layer,
    layer_of_file,
    listed,
    split,
    wish_of,
)


def load_transcoder(
    source: str | Path = EMBEDDED,
    layer: int | None = None,
    *,
    path: str | None = None,
    width: str | None = None,
    l0: int | str | None = None,
    dtype: jnp.dtype | str = jnp.float32,
    input_site: str | None = None,
    output_site: str | None = None,
    revision: str | None = None,
    mesh: MeshLike | None = None,
    rules: Rules = RULES,
) -> Transcoder:
    """One transcoder, or one sparse autoencoder, on one device or spread over a mesh of them.

    What it reads and writes is told by, in this order: the two arguments; the file (those that
    jaxtc writes as safetensors); the name of its repository or folder (Gemma Scope's
    autoencoders: ``gemma-scope-2b-pt-res`` ``resid_post``, ``-mlp`` ``mlp_out``, ``-att``
    ``attn_heads``); the format, see :mod:`jaxtc.weights.files.transcoder`.

    Args:
        source: a hub id, with a path or without
            (``google/gemma-scope-2b-pt-transcoders/layer_20/width_16k/average_l0_11``); a
            ``params.npz`` or a ``.safetensors`` file; a folder in the layout of Gemma Scope
            (``layer_N/width_W/average_l0_L/params.npz``) or of circuit-tracer
            (``layer_N.safetensors``), or one that ``jaxtc convert`` made; or ``"embedded"``.
        layer: which layer's; the default tier is taken (of Gemma Scope's, the usual L0).
        path: below ``source``, such as ``layer_20/width_16k/average_l0_11``.
        width: which of several widths, such as ``"65k"``.
        l0: which of several average L0s, such as 11.
        dtype: of its parameters.
        input_site: the site it reads.
        output_site: the site it imitates.
        revision: of a hub id: a branch, tag or commit.
        mesh: the model's, see :func:`jaxtc.load_model`: features are divided over its axis
            ``model``, so W_enc by columns and W_dec by rows. All processes call this.
        rules: which axes are divided, see :data:`jaxtc.sharding.RULES`.

    Raises:
        SourceError: nothing there, no access to it, or more than one candidate (they are listed).
        ShardingError: no such mesh, or features that do not divide over it.
        SiteError: no such site, or one that is no layer's; a file of which nothing tells the sites.
        WeightsError: a damaged file; arrays missing, extra, misshapen, or not finite.
    """
    dtype = arrays.check_dtype(dtype)
    mesh = None if mesh is None else make_mesh(mesh)
    given = {"input_site": input_site, "output_site": output_site}
    for site in filter(None, given.values()):
        _check_site(site)
    wish = wish_of(layer, width, l0)
    with agreed(mesh, "load the transcoder"):
        places = mesh and functools.partial(shardings, mesh=mesh, rules=rules)
        folder = converted_folder(source, revision)
        if folder is not None:
            if path or not wish.usual:
                raise SourceError(
                    f"{source} is a converted checkpoint with one transcoder a layer: give layer "
                    "only, not path, width or l0."
                )
            checkpoint = open_transcoders(folder)
            return load_converted_transcoder(checkpoint, wish.layer, dtype, places, given)
        file, name, number = find_layer(source, wish, path, revision)
        return _read(file, dtype, name, number, given, places)


def look_up(
    source: str | Path,
    layer: int | None = None,
    *,
    width: str | None = None,
    l0: int | str | None = None,
    dtype: jnp.dtype | None = None,
    input_site: str | None = None,
    output_site: str | None = None,
    revision: str | None = None,
) -> tuple[Path, np.dtype, Transcoder]:
    """What :func:`load_transcoder` would load, of which only the file's headers are read.

    Returns:
        (the local file, the widest dtype in it, the transcoder without its values, in that dtype
        or the one that was asked for).

    Raises:
        SourceError, SiteError, WeightsError: as there.
    """
    given = {"input_site": input_site, "output_site": output_site}
    file, name, number = find_layer(source, wish_of(layer, width, l0), None, revision)
    with open_transcoder(file) as opened:
        stored = opened.dtype
        declared = _declared(opened, stored if dtype is None else dtype, name, number, given)
        return file, stored, declared


def transcoder_file(source: str | Path, layer: int | None = None) -> Path:
    """The local file that :func:`load_transcoder` would read. Raises SourceError so."""
    return find_file(source, wish_of(layer, None, None), None, None)[0]


def load_transcoders(
    source: str | Path = EMBEDDED,
    layers: str | Iterable[int] = "all",
    *,
    width: str | None = None,
    l0: int | str | None = None,
    dtype: jnp.dtype | str = jnp.float32,
    input_site: str | None = None,
    output_site: str | None = None,
    revision: str | None = None,
    mesh: MeshLike | None = None,
    rules: Rules = RULES,
) -> dict[int, Transcoder]:
    """A transcoder for each of several layers, by layer, as :func:`load_transcoder` picks them.

    Args:
        source: as there, without a path.
        layers: which, or ``"all"`` that the source has.
        width: of each, as there.
        l0: of each, as there.
        dtype: of their parameters.
        input_site: the site they read.
        output_site: the site they imitate.
        revision: of a hub id: a branch, tag or commit.
        mesh: as there.
        rules: as there.

    Raises:
        SourceError, SiteError, ShardingError, WeightsError: as :func:`load_transcoder`.
    """
    if isinstance(layers, str):
        if layers != "all":
            raise SourceError(f"layers is {layers!r}, expected 'all' or whole numbers.")
        layers = available_layers(source, revision)
    if not isinstance(layers, Iterable):
        raise SourceError(f"layers is {layers!r}, expected 'all' or several, such as [{layers}].")
    options = {"width": width, "l0": l0, "dtype": dtype, "revision": revision}
    options |= {"input_site": input_site, "output_site": output_site}
    options |= {"mesh": None if mesh is None else make_mesh(mesh), "rules": rules}
    return {layer: load_transcoder(source, layer, **options) for layer in layers}


def available_layers(source: str | Path = EMBEDDED, revision: str | None = None) -> list[int]:
    """The layers that a folder, a file, a hub repository or the embedded data has transcoders for.

    Raises:
        SourceError: as :func:`load_transcoder`, or a file that no ``layer_N`` folder is around.
    """
    found = local.find(source)
    if source == GEMMA_SCOPE_2B:
        return list(range(len(DEFAULT_L0)))
    converted = converted_folder(source, revision)
    if converted is not None:
        return sorted(open_transcoders(converted).sidecar.transcoders)
    if source == EMBEDDED:
        tiers = tiers_in(embedded_data("transcoders", revision))
    elif found is not None:
        no_revision(source, revision)
        if not found.is_dir():
            return [layer_of_file(found)]
        tiers = tiers_in(found)
    else:
        repo, inside = split(source)
        tiers = [t for t in listed(repo, revision) if t.is_below(inside)]
    layers = sorted({tier.layer for tier in tiers})
    if not layers:
        raise SourceError(f"{source} holds no transcoders; expected {SHAPE} in it.")
    return layers


def _check_site(name: str) -> None:
    """Refuse what no transcoder can read or write."""
    site = BY_NAME.get(name)
    if site is None:
        raise SiteError(f"There is no site called {name!r}.{did_you_mean(name, BY_NAME)}")
    if not site.per_layer or not site.token_axes:
        raise SiteError(
            f"{name!r} [{site.axes}] is no vector that each token has at each layer, which is what "
            "transcoders and autoencoders read and write; mlp_in_normed, mlp_out and resid_post "
            "are."
        )


def _read(
    file: Path,
    dtype: np.dtype,
    name: str,
    layer: int | None,
    given: dict[str, str | None],
    places: Callable[[Transcoder], list[NamedSharding]] | None,
) -> Transcoder:
    """The transcoder in a file; ``places`` says where its parameters go."""
    with open_transcoder(file) as opened:
        abstract = _declared(opened, dtype, name, layer, given)
        names = [key for key, _ in variables(abstract)]
        where = None if places is None else dict(zip(names, places(abstract), strict=True))
        params = read_all(opened, dtype, where)
    leaves = [params.pop(key) for key in names]
    if places is None:
        leaves = [arrays.to_jax(leaf) for leaf in leaves]
    return jax.tree.unflatten(jax.tree.structure(abstract), leaves)


def _declared(
    opened: TranscoderFile,
    dtype: np.dtype,
    name: str,
    layer: int | None,
    given: dict[str, str | None],
) -> Transcoder:
    """The transcoder in an open file, without its values."""
    file = opened.path
    if sae_site(file.absolute().parts) and "embedding" in file.absolute().parts:
        raise SourceError(
            f"{name} is an autoencoder of the token embedding, which the model has once; jaxtc "
            "reads those of layers (layer_N)."
        )
    sites = told_sites(file.absolute().parts, opened.format.sites) | opened.sites
    sites |= {key: site for key, site in given.items() if site}
    missing = [key for key in SITES if key not in sites]
    if missing:
        raise SiteError(
            f"Nothing tells which sites {name} reads and writes: files of the format "
            f"{opened.format.name!r} do not. Give {' and '.join(missing)}; transcoders of "
            "Gemma Scope have input_site='mlp_in_normed' (before the norm's gain) and "
            "output_site='mlp_out', many others input_site='mlp_in'."
        )
    for site in sites.values():
        _check_site(site)
    shapes = opened.shapes
    return Transcoder.abstract(
        *shapes["W_enc"], shapes["W_dec"][1], dtype=dtype, layer=layer, source=name,
        activation=opened.activation, skip="W_skip" in shapes, **sites,
    )  # fmt: skip

"""Transcoders from a source: Gemma Scope's on the hub, files and folders like it, the embedded."""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxtc.errors import SiteError, SourceError
from jaxtc.sharding.mesh import MeshLike, make_mesh
from jaxtc.sharding.processes import agreed
from jaxtc.sharding.rules import RULES, Rules, shardings
from jaxtc.tap.sites import BY_NAME, parse
from jaxtc.transcoders.cross_layer import CrossLayerTranscoder, LayerFeatures
from jaxtc.transcoders.transcoder import Transcoder
from jaxtc.weights.checkpoints.read import Converted
from jaxtc.weights.files.arrays import check_dtype
from jaxtc.weights.files.formats import SITES, sites_of
from jaxtc.weights.files.layout import sae_site
from jaxtc.weights.files.shards import fill
from jaxtc.weights.files.transcoder import TranscoderFile, open_transcoder
from jaxtc.weights.load_cross_layer import load_cross_layer
from jaxtc.weights.sources.cross_layer import CrossLayerSource, cross_layer
from jaxtc.weights.sources.resolve import CONVERTED, EMBEDDED, TRANSCODERS, Source, resolve


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
) -> Transcoder | LayerFeatures:
    """One transcoder, or one sparse autoencoder, on one device or spread over a mesh of them.

    Of a cross-layer transcoder, the features of one layer: they can be read and edited, but no
    layer is reconstructed of them alone; :func:`load_transcoders` loads the whole.

    What it reads and writes is said by, in this order: the two arguments; the file (those that
    jaxtc writes as safetensors); the name of its repository or folder (Gemma Scope's
    autoencoders: ``gemma-scope-2b-pt-res`` ``resid_post``, ``-mlp`` ``mlp_out``, ``-att``
    ``attn_heads``); the format, see :mod:`jaxtc.weights.files.formats`.

    Args:
        source: a hub id, with a path or without
            (``google/gemma-scope-2b-pt-transcoders/layer_20/width_16k/average_l0_11``); a
            ``params.npz`` or a ``.safetensors`` file; a folder in the layout of Gemma Scope
            (``layer_N/width_W/average_l0_L/params.npz``) or of circuit-tracer
            (``layer_N.safetensors``; of a cross-layer one ``W_enc_N.safetensors`` and
            ``W_dec_N.safetensors``), or one that ``jaxtc convert`` made; or ``"embedded"``.
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
        SiteError: no such site, or not a layer's; a file of which nothing says the sites.
        WeightsError: a damaged file; arrays missing, extra, misshapen, or not finite.
    """
    with _loader(dtype, mesh, rules, input_site=input_site, output_site=output_site) as load:
        found = resolve(source, TRANSCODERS, revision=revision, path=path)
        if whole := cross_layer(found):
            whole.check_tier(width, l0)
            return load(whole, whole.check_layer(layer))
        return load(found.one(layer, width, l0))


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
) -> dict[int, Transcoder] | CrossLayerTranscoder:
    """A transcoder for each of several layers, by layer, as :func:`load_transcoder` picks them.

    Of a cross-layer transcoder, the whole of it: one :class:`jaxtc.CrossLayerTranscoder`.

    Args:
        layers: which, or ``"all"`` that the source has; the other arguments are as there.

    Raises:
        SourceError, SiteError, ShardingError, WeightsError: as :func:`load_transcoder`.
    """
    with _loader(dtype, mesh, rules, input_site=input_site, output_site=output_site) as load:
        found = resolve(source, TRANSCODERS, revision=revision)
        if whole := cross_layer(found):
            whole.check_tier(width, l0)
            whole.check_all(layers)
            return load(whole)
        return {n: load(found.one(n, width, l0)) for n in found.layers(layers)}


@contextlib.contextmanager
def _loader(
    dtype: jnp.dtype | str, mesh: MeshLike | None, rules: Rules, **sites: str | None
) -> Iterator[Callable[..., Any]]:
    """What loads one transcoder, or a cross-layer one (all of it, or one layer's features).

    The arguments are checked by then; processes fail together.
    """
    mesh = None if mesh is None else make_mesh(mesh)
    places = mesh and functools.partial(shardings, mesh=mesh, rules=rules)
    for site in filter(None, sites.values()):
        _check_site(site)
    dtype = check_dtype(dtype)

    def load(found: Source | CrossLayerSource, layer: int | None = None) -> Any:
        if isinstance(found, CrossLayerSource):
            return load_cross_layer(found, layer, dtype, sites, places)
        if found.format == CONVERTED:
            checkpoint = Converted(found.path, TRANSCODERS)
            return checkpoint.load(checkpoint.transcoder(found.layer, dtype, sites), places)
        with open_transcoder(found.file) as opened:
            return fill(declared(opened, dtype, found, sites), opened.read, found.file, places)

    with agreed(mesh, "load transcoders"):
        yield load


def _check_site(name: str) -> None:
    """Refuse what no transcoder can read or write."""
    base, layer = parse(name)
    site = BY_NAME[base]
    if layer is not None or not site.per_layer or not site.token_axes:
        raise SiteError(
            f"{name!r} [{site.axes}] is not a vector for each token and layer, named without the "
            "layer, which is what transcoders and autoencoders read and write, such as "
            "mlp_in_normed, mlp_out and resid_post."
        )


def declared(
    opened: TranscoderFile, dtype: np.dtype, found: Source, given: Mapping[str, str | None]
) -> Transcoder:
    """The transcoder in an open file, without its values.

    ``given`` sites and errors are as in :func:`load_transcoder`.
    """
    name, folders = found.name, opened.path.absolute().parts
    site = sae_site(folders)
    if site and "embedding" in folders:
        raise SourceError(
            f"{name} is an autoencoder of the token embedding, which the model has once; jaxtc "
            "reads those of layers (layer_N)."
        )
    sites = sites_of(site, opened.format) | opened.sites
    sites |= {key: site for key, site in given.items() if site}
    missing = [key for key in SITES if key not in sites]
    if missing:
        raise SiteError(
            f"Nothing says which sites {name} reads and writes: files of the format "
            f"{opened.format.name!r} do not. Give {' and '.join(missing)}; transcoders of "
            "Gemma Scope have input_site='mlp_in_normed' (before the norm's gain) and "
            "output_site='mlp_out', many others input_site='mlp_in'."
        )
    for site in sites.values():
        _check_site(site)
    shapes = opened.shapes
    return Transcoder.abstract(
        *shapes["W_enc"], shapes["W_dec"][1], dtype=dtype, layer=found.layer, source=name,
        activation=opened.activation, skip="W_skip" in shapes, **sites,
    )  # fmt: skip

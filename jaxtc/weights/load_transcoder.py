"""Transcoders from a source: Gemma Scope's on the hub, files and folders like it, the embedded."""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxtc.errors import SiteError, SourceError
from jaxtc.helpers import explicit_transfers
from jaxtc.sharding.mesh import MeshLike, make_mesh
from jaxtc.sharding.processes import agreed
from jaxtc.sharding.rules import RULES, Rules, shardings
from jaxtc.tap.sites import BY_NAME, LOGITS, parse
from jaxtc.transcoders.cross_layer import CrossLayerTranscoder, LayerFeatures
from jaxtc.transcoders.transcoder import Transcoder
from jaxtc.weights.checkpoints.read import Converted
from jaxtc.weights.files.arrays import check_dtype
from jaxtc.weights.files.formats import SITES
from jaxtc.weights.files.shards import fill
from jaxtc.weights.files.transcoder import TranscoderFile, open_transcoder
from jaxtc.weights.load_cross_layer import load_cross_layer
from jaxtc.weights.sources.cross_layer import CrossLayerSource, cross_layer
from jaxtc.weights.sources.resolve import CONVERTED, EMBEDDED, TRANSCODERS, Source, resolve


@explicit_transfers
def load_transcoder(
    source: str | Path = EMBEDDED,
    layer: int | None = None,
    *,
    path: str | None = None,
    width: str | None = None,
    l0: int | str | None = None,
    format: str | None = None,
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

    What it reads and writes is said by, in this order: the two arguments; the file itself (those
    that jaxtc writes); the file beside it (SAELens' and sparsify's ``cfg.json``, circuit-tracer's
    ``config.yaml``, Gemma Scope 2's ``config.json``); the name of its repository or folder (Gemma
    Scope's: ``gemma-scope-2b-pt-transcoders``, autoencoders ``-res`` ``resid_post``, ``-mlp``
    ``mlp_out``, ``-att`` ``attn_heads``, and ``embedding`` of ``-res`` ``embed``). Where none of
    them does it is asked for: it is never guessed, nor is an activation or an orientation.

    Those files are obeyed: activation and k, whether ``b_dec`` is taken off the input, skip
    connections, sizes, layer. Constants that a library multiplies with while it runs (SAELens'
    input scale and decoder norms) are multiplied into the weights; what no weights can stand for
    is refused by name. Gemma Scope's autoencoders of the embedding, trained on the table's rows,
    are scaled for the site ``embed``, which holds those rows times √D: W_enc / √D, W_dec and b_dec
    times √D (SAELens leaves its b_dec as it is).

    Args:
        source: a hub id, with a path or without
            (``google/gemma-scope-2b-pt-transcoders/layer_20/width_16k/average_l0_11``); a
            ``params.npz`` or a ``.safetensors`` file; a folder in the layout of Gemma Scope
            (``layer_N/width_W/average_l0_L/params.npz``), of circuit-tracer
            (``layer_N.safetensors``, or a ``config.yaml`` that lists them; of a cross-layer one
            ``W_enc_N.safetensors`` and ``W_dec_N.safetensors``), of SAELens
            (``sae_weights.safetensors``) or sparsify (``layers.N.mlp/sae.safetensors``), or one
            that ``jaxtc convert`` made; or ``"embedded"``.
        layer: which layer's; the default tier is taken (of Gemma Scope's, the usual L0).
        path: below ``source``, such as ``layer_20/width_16k/average_l0_11``.
        width: which of several widths, such as ``"65k"``.
        l0: which of several average L0s, such as 11; or ``"canonical"``: of Gemma Scope's
            transcoders the usual one, of its autoencoders the one closest to 100.
        format: whose arrays they are, where nothing else says it: ``"circuit-tracer"`` for bare
            ``W_enc``, ``W_dec``, ``b_enc``, ``b_dec``, which several libraries write. The others
            (``"gemma-scope"``, ``"gemma-scope-2"``, ``"saelens"``, ``"sparsify"``) are told by
            their keys or the config beside them; one that is given must be the same.
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
    sites = {"input_site": input_site, "output_site": output_site}
    with _loader(dtype, mesh, rules, format, sites) as load:
        found = resolve(source, TRANSCODERS, revision=revision, path=path)
        if whole := cross_layer(found):
            whole.check_tier(width, l0, format)
            return load(whole, whole.check_layer(layer))
        return load(found.one(layer, width, l0))


def load_transcoders(
    source: str | Path = EMBEDDED,
    layers: str | Iterable[int] = "all",
    *,
    width: str | None = None,
    l0: int | str | Mapping[int, int | str] | Sequence[int | str] | None = None,
    format: str | None = None,
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
        l0: as there, or one for each layer: a mapping, or several in the order of the layers.

    Raises:
        SourceError, SiteError, ShardingError, WeightsError: as :func:`load_transcoder`.
    """
    sites = {"input_site": input_site, "output_site": output_site}
    with _loader(dtype, mesh, rules, format, sites) as load:
        found = resolve(source, TRANSCODERS, revision=revision)
        if whole := cross_layer(found):
            whole.check_tier(width, l0, format)
            whole.check_all(layers)
            return load(whole)
        return {n: load(one) for n, one in found.each(layers, width, l0)}


@contextlib.contextmanager
def _loader(
    dtype: jnp.dtype | str,
    mesh: MeshLike | None,
    rules: Rules,
    format: str | None,
    sites: Mapping[str, str | None],
) -> Iterator[Callable[..., Any]]:
    """What loads one transcoder, or a cross-layer one (all of it, or one layer's features).

    The arguments are checked by then; processes fail together.
    """
    mesh = None if mesh is None else make_mesh(mesh)
    places = mesh and functools.partial(shardings, mesh=mesh, rules=rules)
    for site in filter(None, sites.values()):
        _check_site(site)
    dtype = check_dtype(dtype)

    @explicit_transfers
    def load(found: Source | CrossLayerSource, layer: int | None = None) -> Any:
        if isinstance(found, CrossLayerSource):
            return load_cross_layer(found, layer, dtype, sites, places)
        if found.format == CONVERTED:
            checkpoint = Converted(found.path, TRANSCODERS)
            return checkpoint.load(checkpoint.transcoder(found.layer, dtype, sites), places)
        with open_transcoder(found.file, format, found.told) as opened:
            made = declared(opened, dtype, found, sites)
            return fill(made, opened.reader(made.input_site), found.file, places)

    with agreed(mesh, "load transcoders"):
        yield load


def _check_site(name: str) -> None:
    """Refuse what no transcoder can read or write."""
    base, layer = parse(name)
    site = BY_NAME[base]
    if layer is not None or not site.token_axes or site.name in LOGITS:
        raise SiteError(
            f"{name!r} [{site.axes}] is not a vector for each token, named without the layer, "
            "which is what transcoders and autoencoders read and write, such as mlp_in_normed, "
            "mlp_out and resid_post."
        )


def declared(
    opened: TranscoderFile, dtype: np.dtype, found: Source, given: Mapping[str, str | None]
) -> Transcoder:
    """The transcoder in an open file, without its values.

    ``given`` sites and errors are as in :func:`load_transcoder`.
    """
    name, said = found.name, opened.said
    given = {key: site for key, site in given.items() if site}
    sites = opened.sites | given
    missing = [key for key in SITES if key not in sites]
    for key in missing:
        if said and key in said.no_sites:
            raise said.no_sites[key]
    if missing:
        raise SiteError(
            f"Nothing says which sites {name} reads and writes: files of the format "
            f"{opened.format.name!r} do not, and those of transcoders and of autoencoders look "
            f"alike. Give {' and '.join(missing)}: transcoders of Gemma Scope have "
            "input_site='mlp_in_normed' (before the norm's gain) and output_site='mlp_out', many "
            "others input_site='mlp_in'; its autoencoders read what they write, -res 'resid_post', "
            "-mlp 'mlp_out', -att 'attn_heads'. (`jaxtc explain` and `jaxtc generate` have "
            "--sites.)"
        )
    for site in sites.values():
        _check_site(site)
    sites = {key: parse(site)[0] for key, site in sites.items()}
    each = {BY_NAME[site].per_layer for site in sites.values()}
    if len(each) > 1:
        raise SiteError(
            f"{name} would read {sites['input_site']!r} and write {sites['output_site']!r}: one of "
            "them is a layer's and the model has the other once."
        )
    layer = found.layer
    if said and said.layer is not None:
        if layer not in (None, said.layer):
            raise SourceError(
                f"{name} is of layer {said.layer} by {said.settings.where}, and was asked for, or "
                f"is called, layer {layer}."
            )
        layer = said.layer
    own = opened.own.get("layer")
    if layer is None:
        layer = own
    elif own not in (None, layer):
        raise SourceError(
            f"{name} says that it is of layer {own}, and was asked for, or is called, layer "
            f"{layer}. Leave layer out, or move the file to where its name says layer {own}."
        )
    shapes = opened.shapes
    return Transcoder.abstract(
        *shapes["W_enc"], shapes["W_dec"][1], dtype=dtype, layer=layer if all(each) else None,
        source=name, activation=opened.activation, skip="W_skip" in shapes,
        subtract_b_dec=bool(said and said.subtract_b_dec), **sites,
    )  # fmt: skip

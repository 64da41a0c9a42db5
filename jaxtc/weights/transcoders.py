"""Transcoders from a source: Gemma Scope's on the hub, files and folders like it, the embedded."""

import functools
import operator
import os
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from jaxtc.errors import SiteError, SourceError, did_you_mean
from jaxtc.processes import agreed
from jaxtc.sharding import RULES, MeshLike, Rules, make_mesh, shardings, variables
from jaxtc.sites import BY_NAME
from jaxtc.transcoder import Transcoder
from jaxtc.weights import arrays, hub, local
from jaxtc.weights.converted import is_converted, load_converted_transcoder, open_transcoders
from jaxtc.weights.formats import (
    BY_FORMAT,
    SITES,
    Format,
    TranscoderFile,
    by_name,
    open_transcoder,
    read_all,
    write,
)
from jaxtc.weights.layout import (
    DEFAULT_L0,
    DEFAULT_WIDTH,
    GEMMA_SCOPE_2B,
    PARAMS,
    SHAPE,
    Tier,
    Wish,
    check_layer,
    choose,
    default_path,
    is_file,
    is_tier,
    layer_of,
    place_of,
    sae_site,
    tiers_in,
    tiers_of,
)
from jaxtc.weights.load import EMBEDDED, embedded_data, no_revision


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
    ``attn_heads``); the format, see :mod:`jaxtc.weights.formats`.

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
    wish = _wish(layer, width, l0)
    with agreed(mesh, "load the transcoder"):
        places = mesh and functools.partial(shardings, mesh=mesh, rules=rules)
        folder = _converted(source, revision)
        if folder is not None:
            if path or not wish.usual:
                raise SourceError(
                    f"{source} is a converted checkpoint with one transcoder a layer: give layer "
                    "only, not path, width or l0."
                )
            checkpoint = open_transcoders(folder)
            return load_converted_transcoder(checkpoint, wish.layer, dtype, places, given)
        file, name, number = _find_layer(source, wish, path, revision)
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
    file, name, number = _find_layer(source, _wish(layer, width, l0), None, revision)
    with open_transcoder(file) as opened:
        stored = opened.dtype
        declared = _declared(opened, stored if dtype is None else dtype, name, number, given)
        return file, stored, declared


def transcoder_file(source: str | Path, layer: int | None = None) -> Path:
    """The local file that :func:`load_transcoder` would read. Raises SourceError so."""
    return _find(source, _wish(layer, None, None), None, None)[0]


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
    converted = _converted(source, revision)
    if converted is not None:
        return sorted(open_transcoders(converted).manifest.transcoders)
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
    transcoder: Transcoder,
    path: str | Path,
    *,
    format: str | None = None,
    without_sites: bool = False,
) -> Path:
    """Write a transcoder in one of the formats of :data:`jaxtc.weights.formats.FORMATS`.

    The file is written whole or not at all. Those in safetensors say which sites the transcoder
    reads and writes. ``params.npz`` has no place for that (nor for the layer, which the folder
    ``layer_N`` around it names): a transcoder that would be taken for one of other sites is refused
    there unless you say that you will remember them.

    Args:
        transcoder: to be saved. In ``params.npz`` its parameters are float32, and a ReLU has
            thresholds of 0; in safetensors they keep their dtype. circuit-tracer's
            ``z·(z > threshold)`` lets negative values pass a negative threshold: it is written as
            0 there, which computes the same.
        path: the file, or the folder to write ``params.npz`` (or circuit-tracer's
            ``layer_N.safetensors``) in; folders are made.
        format: ``"gemma-scope"``, ``"circuit-tracer"`` or ``"gemma-scope-2"``; by default the one
            that the file's name ends like, or the first.
        without_sites: write ``params.npz`` though the sites are lost; they must then be given to
            :func:`load_transcoder` each time, as ``input_site`` and ``output_site``.

    Returns:
        The file.

    Raises:
        SourceError: it cannot be written there, or not in this format.
        SiteError: ``params.npz`` of other sites than would be read from it, and ``without_sites``
            is false.
    """
    path = local.expand(path)
    made = by_name(format, path)
    file = path if path.suffix == made.suffix else path / _file_name(made.name, transcoder)
    check_savable(transcoder, made, file, without_sites)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write(made, file, transcoder, jax.device_get)
    except OSError as error:
        raise SourceError(f"{file} cannot be written: {error.strerror}.") from error
    return file


def check_savable(
    transcoder: Transcoder, made: Format, file: Path, without_sites: bool = False
) -> None:
    """Refuse to write a transcoder to a file that could not give it back.

    Raises:
        SourceError, SiteError: as :func:`save_transcoder`.
    """
    if transcoder.W_skip is not None and "W_skip" not in made.keys:
        others = [other.name for other in BY_FORMAT.values() if "W_skip" in other.keys]
        raise SourceError(
            f"The format {made.name!r} has no skip connection, and this transcoder has one. Give "
            f"format={others[0]!r} (a .safetensors file)."
        )
    own = {"input_site": transcoder.input_site, "output_site": transcoder.output_site}
    told = _told(file.absolute().parts, made.sites)
    if made.suffix == ".npz" and own != told and not without_sites:
        given = ", ".join(f"{key}={value!r}" for key, value in own.items())
        raise SiteError(
            f"params.npz has no place for this transcoder's sites ({given}); loaded again it would "
            f"be taken for {told['input_site']} to {told['output_site']}. Save it as safetensors "
            f"(format='circuit-tracer'); or with without_sites=True, and give {given} to "
            "load_transcoder."
        )


def _file_name(format: str, transcoder: Transcoder) -> str:
    """The file in a folder that a transcoder is written to."""
    if format != "circuit-tracer":
        return "params" + BY_FORMAT[format].suffix
    if transcoder.layer is None:
        raise SourceError(
            "This transcoder does not know its layer, which names its file in a folder of this "
            "format; give the file: path='layer_20.safetensors'."
        )
    return f"layer_{transcoder.layer}.safetensors"


def _told(parts: Iterable[str], usual: tuple[str, str] | None) -> dict[str, str]:
    """The sites that folders' names tell, or a format's usual ones; empty when neither does."""
    site = sae_site(parts)
    pair = (site, site) if site else usual
    return dict(zip(SITES, pair, strict=True)) if pair else {}


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
    sites = _told(file.absolute().parts, opened.format.sites) | opened.sites
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
        relu="threshold" not in shapes, skip="W_skip" in shapes, **sites,
    )  # fmt: skip


def _converted(source: str | Path, revision: str | None) -> Path | None:
    """The folder of a source that is a converted checkpoint, None for any other."""
    found = None if source == EMBEDDED else local.find(source)
    if found is None or not found.is_dir() or not is_converted(found):
        return None
    no_revision(source, revision)
    return found


def _find_layer(
    source: str | Path, wish: Wish, path: str | None, revision: str | None
) -> tuple[Path, str, int | None]:
    """As :func:`_find`, and the layer, if anything tells."""
    file, name = _find(source, wish, path, revision)
    named = layer_of(file.absolute().as_posix())
    if None not in (named, wish.layer) and named != wish.layer:
        raise SourceError(f"layer={wish.layer} was asked for, but {name} is of layer {named}.")
    return file, name, wish.layer if named is None else named


def _find(
    source: str | Path, wish: Wish, path: str | None, revision: str | None
) -> tuple[Path, str]:
    """The local file of a transcoder, and the name it goes by."""
    if path is not None and (os.path.isabs(path) or ".." in PurePosixPath(path).parts):
        raise SourceError(f"path={path!r} leaves {source}; give a path below it.")
    if source == EMBEDDED:
        return _in_folder(embedded_data("transcoders", revision), EMBEDDED, wish, path or "")
    found = local.find(source)
    if found is not None:
        no_revision(source, revision)
        if found.is_dir():
            return _in_folder(found, str(source), wish, path or "")
        if path is not None:
            raise SourceError(f"{source} is a file, so there is no {path!r} in it.")
        return found, str(source)
    repo, inside = _split(source)
    return _on_hub(repo, "/".join(filter(None, (inside, path))), wish, revision)


def _in_folder(folder: Path, source: str, wish: Wish, path: str) -> tuple[Path, str]:
    if is_converted(folder):
        raise SourceError(
            f"{folder} is a converted checkpoint, which has no file for each transcoder. Convert "
            "it with `jaxtc convert --to npz` first."
        )
    candidates = [name for name in _files(path) if local.has(folder, name)]
    chosen = candidates[0] if candidates else None
    if chosen is None:
        usual = sae_site(folder.absolute().parts) is None
        chosen = choose(tiers_in(folder), _folder(path), wish, source, usual=usual).path
    inside = place_of(chosen)
    return folder / chosen, f"{source.rstrip('/')}/{inside}" if inside else source


def _on_hub(repo: str, path: str, wish: Wish, revision: str | None) -> tuple[Path, str]:
    wanted = _files(path)[0] if path else ""
    usual = wish.l0 is None and wish.width in (None, DEFAULT_WIDTH)
    if not path and repo == GEMMA_SCOPE_2B and wish.layer is not None and usual:
        check_layer(wish.layer, range(len(DEFAULT_L0)), repo)
        wanted = default_path(wish.layer)
    file = hub.download_if_there(repo, wanted, revision) if is_tier(wanted) else None
    if file is None:
        usual = sae_site(repo.split("/")) is None
        wanted = choose(_listed(repo, revision), _folder(path), wish, repo, usual=usual).path
        file = hub.download(repo, wanted, revision)
    return file, f"{repo}/{place_of(wanted)}"


def _listed(repo: str, revision: str | None) -> list[Tier]:
    return tiers_of(hub.list_files(repo, revision))


def _split(source: str | Path) -> tuple[str, str]:
    """The repository and the path in it that a hub source names."""
    parts = hub.split_id(source) if isinstance(source, str) else None
    # Every hub id may look like a relative path; none of a repository's ends like a file of ours.
    if parts is None or is_file(parts[0]):
        raise SourceError(
            f"There is no file or folder {source}, and it is not a hub id such as {GEMMA_SCOPE_2B}."
        )
    return parts


def _wish(layer: int | None, width: str | None, l0: int | str | None) -> Wish:
    """What was asked for, the layer as an index from 0."""
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
    width = None if width is None else str(width).removeprefix("width_")
    return Wish(number, width, None if l0 is None else str(l0).removeprefix("average_l0_"))


def _layer_of_file(file: Path) -> int:
    named = layer_of(file.absolute().as_posix())
    if named is None:
        raise SourceError(
            f"{file} is one transcoder, and no folder around it (layer_N) says of which layer; say "
            "which layer, as a number."
        )
    return named


def _files(path: str) -> list[str]:
    """The files that a path below a source may mean."""
    path = path.strip("/")
    if is_file(path):
        return [path]
    return [f"{path}/{name}".lstrip("/") for name in (PARAMS, "params.safetensors")]


def _folder(path: str) -> str:
    """What to look below for a path that is no file: without a file's name and slashes around."""
    return place_of(path.strip("/"))

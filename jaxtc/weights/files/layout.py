"""Where transcoders lie in a release: the layouts of folders, their defaults, what names say."""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath

from jaxtc.errors import SourceError, did_you_mean, some
from jaxtc.helpers import is_whole, plain_number

PARAMS = "params.npz"

GEMMA_SCOPE_2B = "google/gemma-scope-2b-pt-transcoders"

DEFAULT_WIDTH = "16k"

_LAYER = re.compile(r"(?:^|/)layer_(\d+)(?=/|$|\.safetensors$|_width_[^/]+_l0_[^/]+(?:/|$))")

_LAYOUTS = tuple(
    re.compile(f"(?:.*/)?{layout}")
    for layout in (
        # Gemma Scope; "canonical" is its selection of one for each layer and width.
        r"layer_(?P<layer>\d+)/width_(?P<width>[^/]+)/(?:average_l0_)?"
        r"(?P<l0>(?<=average_l0_)[^/]+|canonical)/params\.npz",
        # circuit-tracer
        r"layer_(?P<layer>\d+)(?P<width>)(?P<l0>)\.safetensors",
        # Gemma Scope 2
        r"layer_(?P<layer>\d+)_width_(?P<width>[^/_]+)_l0_(?P<l0>[^/]+)/params\.safetensors",
    )
)
_PARAMS = (PARAMS, "params.safetensors")

# Sparse autoencoders of the same release and in the same format, recognised by the name of their
# repository; a local copy may have that name, and the hub's cache has owner and name.
_SAE = re.compile(r"(models--.+--)?gemma-scope-(?!.*transcoder).*-(?P<kind>res|mlp|att)(-.*)?")
SAE_SITES = {"res": "resid_post", "mlp": "mlp_out", "att": "attn_heads"}


@dataclasses.dataclass(frozen=True)
class Tier:
    """One transcoder of several: its layer, width and average L0, and its file below the source."""

    path: str = dataclasses.field(compare=False)
    layer: int
    width: str
    l0: str

    @property
    def is_default(self) -> bool:
        """Whether it is the default of its layer."""
        return self in DEFAULTS


# The default of each layer of GEMMA_SCOPE_2B: among the average L0s that there are, the choice of
# circuit-tracer, SAELens and Neuronpedia.
DEFAULTS = [
    Tier(f"layer_{layer}/width_16k/average_l0_{l0}/{PARAMS}", layer, DEFAULT_WIDTH, str(l0))
    for layer, l0 in enumerate(
        (76, 65, 49, 54, 88, 87, 95, 70, 52, 72, 88, 5, 6,
         8, 8, 8, 10, 12, 13, 12, 11, 13, 15, 25, 37, 41)
    )
]  # fmt: skip


def is_file(path: str) -> bool:
    """Whether a path ends like that of a transcoder's file."""
    return path.endswith((".npz", ".safetensors"))


def files_of(path: str) -> list[str]:
    """The files that a path below a source may mean."""
    return [path] if is_file(path) else [f"{path}/{name}".lstrip("/") for name in _PARAMS]


def place_of(path: str) -> str:
    """``path`` without its file, unless the file's own name is what names it (``layer_3``)."""
    folder, _, file = path.rpartition("/")
    return folder if file in _PARAMS else path


def sae_site(parts: Iterable[str]) -> str | None:
    """The site of a Gemma Scope autoencoder, by the last folder with such a name."""
    found = [match["kind"] for match in map(_SAE.fullmatch, parts) if match]
    return SAE_SITES[found[-1]] if found else None


def layer_of(path: str) -> int | None:
    """The layer that the last ``layer_N`` folder of a path names, None when it names none."""
    found = _LAYER.findall(path)
    return int(found[-1]) if found else None


def tiers_of(paths: Iterable[str], root: str = "") -> list[Tier]:
    """Those of ``paths`` that follow a layout, possibly only together with their ``root``."""
    found = [
        Tier(path, int(match["layer"]), match["width"], match["l0"])
        for path in paths
        for layout in _LAYOUTS
        if (match := layout.fullmatch(f"{root}/{path}"))
    ]
    return sorted(found, key=lambda tier: (tier.layer, len(tier.path), tier.path))


def tiers_in(folder: Path) -> list[Tier]:
    """The transcoders below a folder that is a layout's root, or lies somewhere in it."""
    paths = (file.relative_to(folder).as_posix() for file in folder.rglob("*"))
    return tiers_of(paths, folder.absolute().as_posix())


def asked(layer: int | None, width: str | None, l0: int | str | None) -> dict[str, int | str]:
    """What of a :class:`Tier` is asked for. Raises SourceError for a layer that is no index."""
    layer, l0 = plain_number(layer), plain_number(l0)
    if layer is not None and not is_whole(layer):
        hint = isinstance(layer, str) * f" A place below the source is given as path={layer!r}."
        raise SourceError(f"layer is {layer!r}, expected a whole number from 0.{hint}")
    found = {
        "layer": None if layer is None else int(layer),
        "width": None if width is None else str(width).removeprefix("width_"),
        "l0": None if l0 is None else str(l0).removeprefix("average_l0_"),
    }
    return {name: value for name, value in found.items() if value is not None}


def below(tiers: list[Tier], folder: str, source: str) -> list[Tier]:
    """Those in a folder of ``source``, "" for all of them. Raises SourceError if there are none."""
    if not tiers:
        raise SourceError(
            f"{source} holds no transcoders; expected layer_N/width_W/average_l0_L/{PARAMS} in it."
        )
    inside = [tier for tier in tiers if PurePosixPath(tier.path).is_relative_to(folder)]
    if not inside:
        named = layer_of(folder)
        if named is not None:
            check_layer(named, {tier.layer for tier in tiers}, source)
        folders = [place_of(tier.path) for tier in tiers if named in (None, tier.layer)]
        near = did_you_mean(folder, folders)
        raise SourceError(f"{source} has no {folder!r}.{near} It has {some(folders, 20)}.")
    return inside


def choose(tiers: list[Tier], query: Mapping[str, int | str], source: str, usual: bool) -> Tier:
    """The one that matches what :func:`asked` says.

    ``usual`` says whether each layer has a default, as it has in releases of transcoders. Raises
    SourceError, with a list of what there is, for no match or several.
    """
    if "layer" in query:
        check_layer(query["layer"], {tier.layer for tier in tiers}, source)
        tiers = [tier for tier in tiers if tier.layer == query["layer"]]
    layers = sorted({tier.layer for tier in tiers})
    if len(layers) > 1:
        raise SourceError(
            f"{source} has transcoders for layers {some([*map(str, layers)], 50)}; say which layer "
            f"(layer={layers[0]})."
        )
    for name, wanted in query.items():
        there = sorted({getattr(tier, name) for tier in tiers})
        if wanted not in there:
            raise SourceError(
                f"{source} has no transcoder with {name}={wanted!r} for layer {layers[0]}; there "
                f"is {some([repr(one) for one in there if one] or ['only one'], 20)}."
            )
        tiers = [tier for tier in tiers if getattr(tier, name) == wanted]
    chosen = [tier for tier in tiers if usual and "l0" not in query and tier.is_default] or tiers
    if len(chosen) > 1:
        raise SourceError(
            f"{source} has {len(chosen)} transcoders for layer {layers[0]}; choose one by its "
            f"path, or by width and l0: {some([place_of(tier.path) for tier in chosen], 20)}."
        )
    return chosen[0]


def check_layer(layer: int, layers: Iterable[int], source: str) -> None:
    """Raise SourceError for a layer that is not among these."""
    layers = sorted(layers)
    if layer not in layers:
        known = some([*map(str, layers)], 50)
        raise SourceError(f"{source} has no transcoder for layer {layer}; it has layers {known}.")

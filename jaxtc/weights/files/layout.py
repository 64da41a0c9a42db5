"""Where transcoders lie in a release: the layouts of folders, their defaults, what names say."""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from jaxtc.errors import SourceError, did_you_mean, some
from jaxtc.helpers import is_whole, plain_number

PARAMS = "params.npz"

# How releases name their own choice of one for each layer and width.
CANONICAL = "canonical"

GEMMA_SCOPE_2B = "google/gemma-scope-2b-pt-transcoders"

DEFAULT_WIDTH = "16k"

_LAYER = re.compile(
    r"(?:^|/)(?:layer_(\d+)(?=/|$|\.safetensors$|_width_[^/]+_l0_[^/]+(?:/|$))"
    r"|(?:blocks|(?:model\.)?layers)\.(\d+)(?:\.[\w.]+)?(?=/|$))"
)

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
        # SAELens: a folder is called like the hook, or layer_N.
        r"(?:blocks\.(?P<layer>\d+)\.[\w.]+|layer_(?P<layer_>\d+))(?P<width>)(?P<l0>)"
        r"(?:/[^/]+)*/sae_weights\.safetensors",
        # sparsify: a folder is called like the module.
        r"(?:model\.)?layers\.(?P<layer>\d+)(?:\.[\w.]+)?(?P<width>)(?P<l0>)(?:/[^/]+)?"
        r"/sae\.safetensors",
    )
)
# What a transcoder's file is called when its folder's name is what tells it apart.
_PARAMS = (PARAMS, "params.safetensors", "sae_weights.safetensors", "sae.safetensors")

# Sparse autoencoders of the same release and in the same format, recognised by the name of their
# repository; a local copy may have that name, and the hub's cache has owner and name.
_SAE = re.compile(r"(models--.+--)?gemma-scope-(?!.*transcoder).*-(?P<kind>res|mlp|att)(-.*)?")
SAE_SITES = {"res": "resid_post", "mlp": "mlp_out", "att": "attn_heads"}
_TRANSCODERS = re.compile(r"(models--.+--)?gemma-scope-(?!2-).*transcoder.*")
# Folders of Gemma Scope 2, and those of the first that hold autoencoders of the embedding.
_EMBEDDING = "embedding"
_SECOND = re.compile(r"(?P<kind>resid_post|attn_out|mlp_out|transcoder)(_all)?")
_SECOND_SITES = {
    "resid_post": ("resid_post", "resid_post"), "attn_out": ("attn_heads", "attn_heads"),
    "mlp_out": ("mlp_out", "mlp_out"), "transcoder": ("mlp_in", "mlp_out"),
}  # fmt: skip
# What Gemma Scope's transcoders read and write.
TRANSCODER_SITES = ("mlp_in_normed", "mlp_out")


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


def config_of(path: str) -> str:
    """What the file beside this one is called that says what it is, "" when none does."""
    name = path.rpartition("/")[2]
    known = {"sae_weights.safetensors": "cfg.json", "sae.safetensors": "cfg.json",
             "params.safetensors": "config.json"}  # fmt: skip
    return known.get(name, "config.yaml" if name.endswith(".safetensors") else "")


def may_lie_anywhere(path: str) -> bool:
    """Whether a path below a repository may be a transcoder's though it follows no layout."""
    folder, _, name = path.rpartition("/")
    return name in ("sae_weights.safetensors", "sae.safetensors") or (
        name == PARAMS and folder.startswith(f"{_EMBEDDING}/")
    )


def sae_site(parts: Sequence[str]) -> str | None:
    """The site of a Gemma Scope autoencoder, by the last folder with such a name."""
    found = [
        (at, match["kind"]) for at, part in enumerate(parts) if (match := _SAE.fullmatch(part))
    ]
    if not found:
        return None
    at, kind = found[-1]
    return "embed" if kind == "res" and _EMBEDDING in parts[at:] else SAE_SITES[kind]


def told_sites(parts: Sequence[str], format: str) -> tuple[str, str] | None:
    """(input, output) that the names of the folders around a file of Gemma Scope's format say."""
    if format == "gemma-scope":
        site = sae_site(parts)
        if site:
            return site, site
        return TRANSCODER_SITES if any(map(_TRANSCODERS.fullmatch, parts)) else None
    if format == "gemma-scope-2":
        found = [match["kind"] for match in map(_SECOND.fullmatch, parts) if match]
        return _SECOND_SITES[found[-1]] if found else None
    return None


def layer_of(path: str) -> int | None:
    """The layer that the last ``layer_N``, ``blocks.N`` or ``layers.N`` of a path names, if any."""
    found = _LAYER.findall(path)
    return int("".join(found[-1])) if found else None


def tiers_of(paths: Iterable[str], root: str = "") -> list[Tier]:
    """Those of ``paths`` that follow a layout, possibly only together with their ``root``."""
    found = [
        Tier(path, _layer(match), match["width"], match["l0"])
        for path in paths
        for layout in _LAYOUTS
        if (match := layout.fullmatch(f"{root}/{path}"))
    ]
    return sorted(found, key=lambda tier: (tier.layer, len(tier.path), tier.path))


def _layer(match: re.Match) -> int:
    return int(match["layer"] or match["layer_"])


def tiers_in(folder: Path) -> list[Tier]:
    """The transcoders below a folder that is a layout's root, or lies somewhere in it."""
    paths = (file.relative_to(folder).as_posix() for file in folder.rglob("*"))
    return tiers_of(paths, folder.absolute().as_posix())


def for_each(l0: Any, layers: Sequence[int]) -> dict[int, int | str | None]:
    """``l0`` by layer: one for all of them, a mapping, or several in the order of the layers.

    Raises SourceError unless there is exactly one for each layer.
    """
    if l0 is None or isinstance(l0, str | int | np.integer):
        return dict.fromkeys(layers, l0)
    if isinstance(l0, Mapping):
        missing = [layer for layer in layers if layer not in l0]
        extra = [layer for layer in l0 if layer not in set(layers)]
        if missing or extra:
            what, names = ("lacks", missing) if missing else ("also has", extra)
            raise SourceError(
                f"l0 {what} {some([repr(one) for one in names], 20)}; give one for each of the "
                f"layers {some([*map(str, layers)], 50)}."
            )
        return {layer: l0[layer] for layer in layers}
    given = list(l0) if isinstance(l0, Iterable) else None
    if given is None or len(given) != len(layers):
        raise SourceError(
            f"l0 is {given if given is None else f'{len(given)} values'}, expected one, one for "
            f"each of the {len(layers)} layers in order, or a mapping of layers to them."
        )
    return dict(zip(layers, given, strict=True))


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
            f"{source} holds no transcoders; expected layer_N/width_W/average_l0_L/{PARAMS} in it, "
            "layer_N.safetensors, blocks.N.hook/sae_weights.safetensors or "
            "layers.N.mlp/sae.safetensors."
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
    if query.get("l0") == CANONICAL:
        tiers, query = _canonical(tiers, query, usual), {**query, "l0": None}
    for name, wanted in query.items():
        if wanted is None:
            continue
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


def _canonical(tiers: list[Tier], query: Mapping[str, int | str], usual: bool) -> list[Tier]:
    """Those of one layer that a release names so: a folder of that name, the usual ones of
    transcoders; of autoencoders the one of each width whose average L0 is closest to 100.
    """
    width = query.get("width")
    named = [t for t in tiers if t.l0 == CANONICAL and width in (None, t.width)]
    if named or usual:
        return named or [tier for tier in tiers if tier.is_default] or tiers
    wide = [tier for tier in tiers if tier.width == (width or DEFAULT_WIDTH)]
    numbered = [tier for tier in wide if tier.l0.isdecimal()]
    # Of two as close the sparser: so are all but one of the 426 that SAELens lists.
    return sorted(numbered, key=lambda tier: (abs(int(tier.l0) - 100), int(tier.l0)))[:1] or tiers


def check_layer(layer: int, layers: Iterable[int], source: str) -> None:
    """Raise SourceError for a layer that is not among these."""
    layers = sorted(layers)
    if layer not in layers:
        known = some([*map(str, layers)], 50)
        raise SourceError(f"{source} has no transcoder for layer {layer}; it has layers {known}.")

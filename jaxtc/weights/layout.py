"""Gemma Scope's layout, ``layer_{l}/width_{w}/average_l0_{n}/params.npz``, and its defaults."""

import dataclasses
import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from jaxtc.errors import SourceError, did_you_mean, some

PARAMS = "params.npz"
SHAPE = f"layer_N/width_W/average_l0_L/{PARAMS}"

GEMMA_SCOPE_2B = "google/gemma-scope-2b-pt-transcoders"

# The average L0 of the transcoder that is usually meant for each layer of Gemma-2 2B: the choice
# that circuit-tracer, SAELens and Neuronpedia make among those of GEMMA_SCOPE_2B.
DEFAULT_L0 = (
    76, 65, 49, 54, 88, 87, 95, 70, 52, 72, 88, 5, 6, 8, 8, 8, 10, 12, 13, 12, 11, 13, 15, 25, 37,
    41,
)  # fmt: skip
DEFAULT_WIDTH = "16k"

_LAYER = re.compile(r"(?:^|/)layer_(\d+)(?=/|$)")
_LAYOUT = re.compile(r"(?:.*/)?layer_(\d+)/width_([^/]+)/average_l0_([^/]+)/params\.npz")


@dataclasses.dataclass(frozen=True)
class Tier:
    """One transcoder of several: its file below the source, its layer, width and average L0."""

    path: str
    layer: int
    width: str
    l0: str

    @property
    def folder(self) -> str:
        """The folder of its file, below the source."""
        return str(PurePosixPath(self.path).parent)

    def is_below(self, folder: str) -> bool:
        """Whether it lies in this folder of the source; the empty one is the source itself."""
        return not folder or self.path.startswith(f"{folder}/")

    @property
    def is_default(self) -> bool:
        """Whether it is the one that is meant when only the layer is named."""
        known = self.layer < len(DEFAULT_L0) and self.width == DEFAULT_WIDTH
        return known and self.l0 == str(DEFAULT_L0[self.layer])


def default_path(layer: int) -> str:
    """The file of GEMMA_SCOPE_2B that is meant by a layer."""
    return f"layer_{layer}/width_{DEFAULT_WIDTH}/average_l0_{DEFAULT_L0[layer]}/{PARAMS}"


def is_tier(path: str) -> bool:
    """Whether a path follows the layout from a layer to the file."""
    return _LAYOUT.fullmatch(path) is not None


def layer_of(path: str) -> int | None:
    """The layer that the last ``layer_N`` folder of a path names, None when it names none."""
    found = _LAYER.findall(path)
    return int(found[-1]) if found else None


def tiers_of(paths: Iterable[str], root: str = "") -> list[Tier]:
    """Those of ``paths`` that follow the layout, possibly only together with their ``root``."""
    found = []
    for path in paths:
        match = _LAYOUT.fullmatch(f"{root}/{path}")
        if match:
            found.append(Tier(path, int(match[1]), match[2], match[3]))
    return sorted(found, key=lambda tier: (tier.layer, len(tier.path), tier.path))


def tiers_in(folder: Path) -> list[Tier]:
    """The transcoders below a folder that is the layout's root, or lies somewhere in it."""
    files = folder.glob("**/" + PARAMS)
    paths = (file.relative_to(folder).as_posix() for file in files)
    return tiers_of(paths, folder.absolute().as_posix())


def choose(tiers: list[Tier], below: str, layer: int | None, source: str) -> Tier:
    """The one that is meant.

    Args:
        tiers: to choose from.
        below: a folder of the layout to stay in, or empty.
        layer: or None for any.
        source: for messages.

    Raises:
        SourceError: none is, or several could be; they are listed.
    """
    if not tiers:
        raise SourceError(f"{source} holds no transcoders; expected {SHAPE} in it.")
    inside = [tier for tier in tiers if tier.is_below(below)]
    if not inside:
        folders = [tier.folder for tier in tiers]
        named = layer_of(below)
        if named is not None:
            check_layer(named, {tier.layer for tier in tiers}, source)
            folders = [tier.folder for tier in tiers if tier.layer == named]
        near = did_you_mean(below, folders)
        raise SourceError(f"{source} has no {below!r}.{near} It has {some(folders, 20)}.")
    if layer is not None:
        check_layer(layer, {tier.layer for tier in inside}, source)
        inside = [tier for tier in inside if tier.layer == layer]
    layers = sorted({tier.layer for tier in inside})
    if len(layers) > 1:
        raise SourceError(
            f"{source} has transcoders for layers {some([*map(str, layers)], 50)}; say which layer "
            f"(layer={layers[0]})."
        )
    chosen = [tier for tier in inside if tier.is_default] or inside
    if len(chosen) > 1:
        raise SourceError(
            f"{source} has {len(chosen)} transcoders for layer {layers[0]}; choose one by its "
            f"path: {some([tier.folder for tier in chosen], 20)}."
        )
    return chosen[0]


def check_layer(layer: int, layers: Iterable[int], source: str) -> None:
    """Refuse a layer that is not among those there.

    Raises:
        SourceError: it is not.
    """
    layers = sorted(layers)
    if layer not in layers:
        raise SourceError(
            f"{source} has no transcoder for layer {layer}; it has layers "
            f"{some([*map(str, layers)], 50)}."
        )

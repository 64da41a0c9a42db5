"""Where the files of a cross-layer transcoder lie, if that is what a source is."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path

from jaxtc.errors import SourceError, some
from jaxtc.helpers import is_whole
from jaxtc.weights.files import layout, local
from jaxtc.weights.files.circuit_tracer import CROSS_LAYER, SetConfig
from jaxtc.weights.files.cross_layer import DECODER, ENCODER, layers_of
from jaxtc.weights.sources import hub
from jaxtc.weights.sources.resolve import FOLDER, HUB, Source, join


@dataclasses.dataclass(frozen=True)
class CrossLayerSource:
    """The folder of a cross-layer transcoder, here or in a repository on the hub.

    Attributes:
        source: what was given.
        layers: how many it has.
    """

    source: Source
    layers: int

    @property
    def name(self) -> str:
        """The name that it goes by."""
        root = self.source.repo or self.source.name.rstrip("/")
        return join(root, self.source.inside)

    def files(self, layer: int) -> dict[str, Path]:
        """The two files of a layer; fetched when they are on the hub."""
        return {part: self._fetch(part.format(layer=layer)) for part in (ENCODER, DECODER)}

    def config(self) -> SetConfig | None:
        """What its config.yaml says, None without one.

        Raises WeightsError, SiteError for one that is unsound or of another kind.
        """
        found = self.source.set_config
        if found is not None and found.kind != CROSS_LAYER:
            raise found.settings.wrong(
                f"it says model_kind {found.kind!r}, but the files beside it ({ENCODER}, "
                f"{DECODER}) are those of a {CROSS_LAYER!r}"
            )
        return found

    def check_layer(self, layer: int | None) -> int:
        """A layer that it has. Raises SourceError for others, and for none."""
        if layer is None:
            raise SourceError(
                f"{self.name} is a cross-layer transcoder, one dictionary for all "
                f"{self.layers} layers: jaxtc.load_transcoders({self.name!r}) gives the whole, "
                "layer=... of load_transcoder the features of one layer."
            )
        if not is_whole(layer):
            raise SourceError(f"layer is {layer!r}, expected a whole number from 0.")
        layout.check_layer(layer, range(self.layers), self.name)
        return int(layer)

    def check_tier(self, width: object, l0: object, format: str | None) -> None:
        """Raise SourceError where one of several is asked for, or another format."""
        if format not in (None, "circuit-tracer"):
            raise SourceError(f"{self.name} is of the format 'circuit-tracer', not {format!r}.")
        if width is not None or l0 is not None:
            raise SourceError(f"{self.name} is one cross-layer transcoder: leave width and l0 out.")

    def check_all(self, layers: object) -> None:
        """Raise SourceError unless ``layers`` are all, as no part works alone."""
        several = isinstance(layers, Iterable) and not isinstance(layers, str)
        if layers == "all" or (several and [*layers] == [*range(self.layers)]):
            return
        raise SourceError(
            f"{self.name} is a cross-layer transcoder, of which only the whole can take the place "
            f"of MLPs; layers is {layers!r}, expected 'all'. load_transcoder({self.name!r}, "
            "layer=...) gives the features of one layer."
        )

    def _fetch(self, name: str) -> Path:
        source = self.source
        if source.path is not None:
            return source.path / source.inside / name
        return hub.download(source.repo, join(source.inside, name), source.revision)


def cross_layer(source: Source) -> CrossLayerSource | None:
    """The cross-layer transcoder that a source is, None for anything else.

    Raises SourceError when files of it are missing, or it cannot be looked up.
    """
    found = layers_of(_names(source))
    if not found:
        return None
    count = max(found) + 1
    missing = [
        part.format(layer=layer)
        for layer in range(min(count, 4096))
        for part in (ENCODER, DECODER)
        if part not in found.get(layer, ())
    ]
    if missing:
        raise SourceError(
            f"{source.repo or source.name} has files of a cross-layer transcoder of {count} "
            f"layers, but not {some(missing, 10)}. Fetch those too."
        )
    return CrossLayerSource(source, count)


def refuse_cross_layer(source: Source) -> None:
    """Raise SourceError for a cross-layer transcoder, where single ones are needed."""
    if found := cross_layer(source):
        raise SourceError(
            f"{found.name} is a cross-layer transcoder, one dictionary for all layers, and this "
            "takes transcoders of single layers. jaxtc.load_transcoders reads its folder as it is, "
            "onto any mesh; jaxtc.save_transcoder writes it."
        )


def _names(source: Source) -> list[str]:
    """The files of the folder or repository itself, or of the place in it that is named."""
    if layout.is_file(source.inside):
        return []
    if source.format == FOLDER:
        folder = source.path / source.inside
        if local.find(folder) is None or not folder.is_dir():
            return []
        try:
            return [path.name for path in folder.iterdir()]
        except OSError as error:
            raise SourceError(f"{folder} cannot be read: {error.strerror}.") from error
    # What is known to be something else is not listed: that asks the hub.
    known = source.repo == layout.GEMMA_SCOPE_2B or layout.layer_of(source.inside) is not None
    if source.format != HUB or known:
        return []
    below = source.inside + "/" if source.inside else ""
    return [path.removeprefix(below) for path in source.names if path.startswith(below)]

"""What a source is and where it lies: the one place that looks, for every loader and command.

A source is a hub id (``google/gemma-2-2b``), perhaps with a path in the repository; a local folder
or file, also of an adapter or of Google's Flax tree; a checkpoint that ``jaxtc convert`` made,
there or in a bucket (``gs://…``); or ``"embedded"``.
"""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path, PurePosixPath

from jaxtc.errors import SourceError, did_you_mean, first_line, some
from jaxtc.model.released import RELEASED
from jaxtc.weights.adapters.settings import SETTINGS
from jaxtc.weights.checkpoints import google
from jaxtc.weights.checkpoints.read import Converted
from jaxtc.weights.checkpoints.sidecar import SIDECAR, read_sidecar
from jaxtc.weights.files import circuit_tracer, foreign, layout, local
from jaxtc.weights.files.beside import describe, of_set
from jaxtc.weights.files.circuit_tracer import SetConfig, read_config
from jaxtc.weights.files.description import Description
from jaxtc.weights.files.model import INDEX, SINGLE
from jaxtc.weights.sources import hub

EMBEDDED = "embedded"
#: Folder of the shipped model and transcoders.
EMBEDDED_DATA = Path(str(resources.files("jaxtc"))) / "embedded" / "data"

# What is wanted of a source. A model's tokenizer and its config may be fetched without its weights.
MODEL, TOKENIZER, CONFIG, TRANSCODERS = "model", "tokenizer", "config", "transcoders"

# How it is kept: in a repository of the hub; in a folder of Hugging Face's layout, or of a
# release's of transcoders; as one file; as a converted checkpoint; as an adapter, whose base is
# elsewhere; as Google's own tree.
HUB, FOLDER, FILE, CONVERTED = "hub", "folder", "file", "converted"
ADAPTER, GOOGLE = "adapter", "google"

# Where orbax reads and writes by paths of etils.
_BUCKETS = ("gs://", "s3://", "az://")


@dataclasses.dataclass(frozen=True)
class Source:
    """What a source is and where it lies; nothing of it is read.

    Attributes:
        name: as it was given; of one transcoder, the name that it goes by.
        kind: what is wanted of it: MODEL, TOKENIZER, CONFIG or TRANSCODERS.
        format: how it is kept: HUB, FOLDER, FILE, CONVERTED, ADAPTER or GOOGLE.
        path: the folder or file on this machine; None while it is on the hub only.
        inside: which transcoder below the folder or repository, "" when that is not said.
        repo, revision: the repository on the hub; its branch, tag or commit.
        layer: of one transcoder, where it is known.
        told: of one transcoder, what a file elsewhere says of it.
    """

    name: str
    kind: str
    format: str
    path: Path | None = None
    inside: str = ""
    repo: str | None = None
    revision: str | None = None
    layer: int | None = None
    told: Description | None = None

    def fetch(self) -> Path:
        """The folder or file on this machine, downloaded first when it is on the hub.

        Raises SourceError, ConfigError, WeightsError as :mod:`jaxtc.weights.sources.hub`.
        """
        if self.path:
            return self.path
        if self.kind == CONFIG:
            return hub.download_config(self.repo, self.revision)
        download = hub.download_tokenizer if self.kind == TOKENIZER else hub.download_model
        return download(self.repo, self.revision)

    def fetched(self) -> "Source":
        """The same on this machine, with the format that it has there. Raises as :meth:`fetch`."""
        if self.path:
            return self
        folder = self.fetch()
        return dataclasses.replace(self, path=folder, format=_format(folder))

    @property
    def tree(self) -> Path:
        """The folder of Google's tree."""
        return google.find(self.path)

    @property
    def file(self) -> Path:
        """The file of one transcoder. Raises SourceError for a converted checkpoint."""
        if self.format == CONVERTED:
            raise SourceError(
                f"{self.path} is a converted checkpoint, which has no file for each transcoder. "
                "Convert it with `jaxtc convert --to npz` first."
            )
        return self.path

    @functools.cached_property
    def names(self) -> list[str]:
        """The paths of all files of a repository, asked for once."""
        return hub.list_files(self.repo, self.revision)

    @functools.cached_property
    def _listed(self) -> list[layout.Tier]:
        """All transcoders of a folder or a repository, listed once."""
        if self.format == HUB:
            return layout.tiers_of(self.names)
        return layout.tiers_in(self.path)

    @functools.cached_property
    def set_config(self) -> SetConfig | None:
        """circuit-tracer's ``config.yaml`` in the folder or repository (below ``inside``), if any.

        Raises SourceError, WeightsError as :func:`read_config` and the hub.
        """
        if self.format == FOLDER:
            return read_config(self.path / self.inside)
        place = join(self.inside, circuit_tracer.CONFIG)
        if self.format != HUB or self.repo == layout.GEMMA_SCOPE_2B or place not in self.names:
            return None
        return read_config(hub.download(self.repo, place, self.revision).parent)

    def _tiers(self, **query: int | str) -> list[layout.Tier]:
        """Those that may be meant; the defaults of Gemma Scope are known without the hub.

        Raises SourceError if there are none.
        """
        usual = query.get("width", layout.DEFAULT_WIDTH) == layout.DEFAULT_WIDTH
        usual &= query.get("l0", layout.CANONICAL) == layout.CANONICAL and not self.inside
        if usual and self.repo == layout.GEMMA_SCOPE_2B:
            return layout.DEFAULTS
        if not self._listed and self.path:
            foreign.refuse_below(self.path)
        what = "" if self._listed or self.path is None else _folder_kind(self.path)
        if what and what != foreign.TRANSCODERS:
            raise SourceError(f"{self.name} holds no transcoders: {what}.")
        return layout.below(self._listed, layout.place_of(self.inside), self.repo or self.name)

    def layers(self, asked: str | Iterable[int] = "all") -> list[int]:
        """The layers that are ``asked`` for, or all that there are transcoders for.

        Raises SourceError if there are none, or for a file that no ``layer_N`` folder is around.
        """
        if isinstance(asked, Iterable) and not isinstance(asked, str):
            return list(asked)
        if asked != "all":
            raise SourceError(f"layers is {asked!r}, expected 'all' or several, such as [20].")
        if self.format == CONVERTED:
            return sorted(Converted(self.path, TRANSCODERS).sidecar.transcoders)
        single = self.path if self.format == FILE else (self._direct() or [None])[0]
        if not single and self._lists():
            return list(range(len(self.set_config.transcoders)))
        if single:
            said = describe(single)
            named = layout.layer_of(single.absolute().as_posix()) if said is None else said.layer
            if named is None:
                raise SourceError(
                    f"{single} is one transcoder, and no folder around it (layer_N) says of "
                    "which layer; say which layer, as a number (for `jaxtc parity`, "
                    "--transcoder-layer)."
                )
            return [named]
        return sorted({tier.layer for tier in self._tiers()})

    def one(
        self, layer: int | None = None, width: str | None = None, l0: int | str | None = None
    ) -> "Source":
        """The one transcoder that matches; its file is fetched when it is on the hub.

        Raises SourceError: there is none, no access to it, or several candidates (all listed).
        """
        query = layout.asked(layer, width, l0)
        layer = query.get("layer")
        if self.format == CONVERTED:
            if self.inside or width is not None or l0 is not None:
                raise SourceError(
                    f"{self.name} is a converted checkpoint with one transcoder a layer: give "
                    "layer only, not path, width or l0."
                )
            return dataclasses.replace(self, layer=layer)
        told, direct = None, None if self.format == FILE else self._direct()
        if self.format != FILE and not direct and self._lists():
            file, name, named = self._listed_one(query)
            told = of_set(self.set_config, file)
        else:
            file, name = direct or ((self.path, self.name) if self.path else (None, ""))
            if self.format != FILE and not direct:
                file, name = self._find(query)
            named = layout.layer_of(file.absolute().as_posix())
        if None not in (named, layer) and named != layer:
            raise SourceError(f"layer={layer} was asked for, but {name} is of layer {named}.")
        layer = layer if named is None else named
        one = dataclasses.replace(self, name=name, format=FILE, path=file, layer=layer)
        return dataclasses.replace(one, told=told)

    def each(
        self,
        asked: str | Iterable[int],
        width: str | None,
        l0: int | str | Mapping[int, int | str] | Sequence[int | str] | None,
    ) -> Iterator[tuple[int, "Source"]]:
        """:meth:`one` of each of these layers; ``l0`` may be of each layer its own.

        Raises SourceError as :meth:`one`, and for l0s that are not one for each layer.
        """
        layers = self.layers(asked)
        each = layout.for_each(l0, layers)
        for layer in layers:
            yield layer, self.one(layer, width, each[layer])

    def _lists(self) -> bool:
        """Whether a ``config.yaml`` lists the transcoders, wherever they lie."""
        config = self.set_config
        return config is not None and config.transcoders is not None

    def _direct(self) -> tuple[Path, str] | None:
        """File and name of the transcoder that the source, with ``inside``, is the folder of."""
        for place in layout.files_of(self.inside):
            if self.path:
                file = self.path / place if local.has(self.path, place) else None
            elif self.inside:
                # No repository has a transcoder that follows no layout, but for SAELens' and
                # sparsify's, and the autoencoders of the embedding.
                there = layout.tiers_of([place]) or layout.may_lie_anywhere(place)
                file = there and hub.download_if_there(self.repo, place, self.revision)
            else:
                there = self.repo != layout.GEMMA_SCOPE_2B and place in self.names
                file = hub.download(self.repo, place, self.revision) if there else None
            if file:
                return self._beside(file, place)
        return None

    def _listed_one(self, query: Mapping[str, int | str]) -> tuple[Path, str, int]:
        """File, name and layer of a transcoder that the ``config.yaml`` lists."""
        listed, layer = self.set_config.transcoders, query.get("layer")
        if query.keys() - {"layer"}:
            raise SourceError(
                f"{self.set_config.settings.where} lists one transcoder a layer: give layer only, "
                "not width or l0."
            )
        if layer is None and len(listed) > 1:
            raise SourceError(
                f"{self.name} has transcoders for layers 0 to {len(listed) - 1}; say which layer "
                "(layer=0)."
            )
        layer = layer or 0
        layout.check_layer(layer, range(len(listed)), self.name)
        entry = listed[layer]
        named = layout.layer_of(entry.path)
        if named not in (None, layer):
            raise SourceError(
                f"{self.set_config.settings.where} lists {entry.path} in the place of layer "
                f"{layer}, and by its name it is of layer {named}."
            )
        repo, inside = entry.repo or self.repo, entry.path
        if entry.repo is None:
            inside = join(self.inside, inside)
            if self.path:
                return self.path / inside, join(self.name.rstrip("/"), inside), layer
        revision = entry.revision if entry.repo else self.revision
        file = hub.download(repo, inside, revision)
        return file, f"{repo}/{layout.place_of(inside)}", layer

    def _find(self, query: Mapping[str, int | str]) -> tuple[Path, str]:
        """The local file of the one transcoder that matches, and the name it goes by."""
        folders = (self.repo or self.path.absolute().as_posix()).split("/")
        usual = layout.sae_site(folders) is None
        place = layout.choose(self._tiers(**query), query, self.repo or self.name, usual).path
        file = self.path / place if self.path else hub.download(self.repo, place, self.revision)
        return self._beside(file, place)

    def _beside(self, file: Path, place: str) -> tuple[Path, str]:
        """A file and its name, with what describes it in the hub's cache beside it, if anything."""
        config = layout.config_of(place) if self.repo else ""
        if config:
            # All files are of one commit, whatever is pushed meanwhile. Weights that are in the
            # cache are used without the hub; what no config says is then asked for.
            commit = file.parents[place.count("/")].name
            with contextlib.suppress(SourceError):
                hub.download_if_there(self.repo, join(place.rpartition("/")[0], config), commit)
        return file, join((self.repo or self.name).rstrip("/"), layout.place_of(place))


def join(*parts: str) -> str:
    """A path in a repository of those parts that are not empty."""
    return "/".join(filter(None, parts))


def resolve(
    source: str | Path,
    kind: str | None = None,
    *,
    revision: str | None = None,
    path: str | None = None,
    default: str = MODEL,
) -> Source:
    """The :class:`Source` of this name. Nothing is read, and no weights are fetched.

    Args:
        source: a hub id, with a path in the repository or without; a local folder or file; or
            ``"embedded"``.
        kind: as there. By default what it holds: a model if there is a ``config.json``, or
            transcoders.
        revision: of a hub id: a branch, tag or commit.
        path: of a transcoder below the source.
        default: the kind of a source that holds both.

    Raises:
        SourceError: nothing there, no access to it, or not of this kind.
    """
    if path is not None:
        if not isinstance(path, str | os.PathLike):
            raise SourceError(f"path is {path!r}, expected a path below {source}, as a string.")
        path = "" if str(path) in ("", ".") else PurePosixPath(path).as_posix()
    if path is not None and (os.path.isabs(path) or ".." in PurePosixPath(path).parts):
        raise SourceError(f"path={path!r} leaves {source}; give a path below it.")
    if source == EMBEDDED:
        found = _embedded(kind or default)
    elif in_bucket(str(source)):
        found = _in_bucket(str(source), kind)
    elif there := local.find(source):
        found = _local(str(source), there, kind)
    else:
        return _on_hub(source, kind, revision, path or "", default)
    if revision is not None:
        raise SourceError(
            f"revision={revision!r} applies to hub ids only, and {found.name!r} is not one."
        )
    if path is not None and found.format == FILE:
        raise SourceError(f"{source} is a file, so there is no {path!r} in it.")
    return dataclasses.replace(found, inside=(path or "").strip("/"))


def _embedded(kind: str) -> Source:
    part = TRANSCODERS if kind == TRANSCODERS else MODEL
    folder = EMBEDDED_DATA / part
    if not folder.is_dir():
        raise SourceError(
            f"This copy of jaxtc has no embedded {part} ({folder} does not exist). Make them with "
            "`jaxtc embedded train`, or install a released jaxtc, which has them."
        )
    return Source(EMBEDDED, kind, FOLDER, folder)


def _in_bucket(name: str, kind: str | None) -> Source:
    """A converted checkpoint where orbax reads it."""
    from etils import epath

    folder = epath.Path(name)
    try:
        there = (folder / SIDECAR).exists()
    except Exception as error:  # of whichever library reads these paths
        raise SourceError(f"{name} cannot be looked up: {first_line(error)}.") from error
    if not there or kind == TOKENIZER:
        raise SourceError(
            f"{name} is not a checkpoint that `jaxtc convert` or save_checkpoint made, or a "
            "tokenizer is wanted of it: nothing else is read from a bucket. Copy the folder to "
            "this machine and give that."
        )
    return Source(name, kind or read_sidecar(folder).kind, CONVERTED, folder)


def _local(name: str, path: Path, kind: str | None) -> Source:
    if not path.is_dir():
        what = foreign.file_kind(path)
        model = kind is None and local.has(path.parent, "config.json")
        if kind in (None, TRANSCODERS) and not model and (layout.is_file(path.name) or not what):
            return Source(name, TRANSCODERS, FILE, path)
        raise SourceError(f"{name} is {what or 'a file; give the folder that holds config.json'}.")
    if local.has(path, SIDECAR):
        return Source(name, kind or read_sidecar(path).kind, CONVERTED, path)
    format = FOLDER if kind == TRANSCODERS else _format(path)
    if format != FOLDER:
        return Source(name, kind or MODEL, format, path)
    # Gemma Scope 2 has a config.json beside each of its transcoders.
    has_config = local.has(path, "config.json") and not local.has(path, "params.safetensors")
    below = [] if has_config or kind == TRANSCODERS else _models_below(path)
    unknown = kind is None and below and not layout.tiers_in(path)
    if not has_config and (kind in (MODEL, CONFIG) or unknown):
        what = f": {found}" if (found := _folder_kind(path)) else ""
        if below:
            what += f". There is one in {some(below)}: give that folder"
        raise SourceError(
            f"{path} has no config.json, so it is not a model's folder in Hugging Face's format "
            f"(config.json beside model.safetensors){what}."
        )
    return Source(name, kind or (MODEL if has_config else TRANSCODERS), FOLDER, path)


def _models_below(path: Path) -> list[str]:
    """The folders of models and adapters right below a folder, or in a repository's cache."""
    names = ("config.json", SETTINGS, SIDECAR)
    below = [
        one
        for name in names
        for place in ("*", "snapshots/*")
        for one in path.glob(f"{place}/{name}")
    ]
    return sorted({one.parent.as_posix() for one in below})


def _format(path: Path) -> str:
    """How a model in a folder is kept. Raises SourceError for one that is kept in two ways."""
    whole = [name for name in (SINGLE, INDEX) if local.has(path, name)]
    if local.has(path, SETTINGS):
        if whole:
            raise SourceError(
                f"{path} holds a whole model ({whole[0]}) and an adapter ({SETTINGS}), and nothing "
                "says whether the one is merged into the other. Move the files of one of them to "
                "a folder of their own."
            )
        return ADAPTER
    return GOOGLE if not whole and google.find(path) else FOLDER


def in_bucket(name: str) -> bool:
    """Whether this is the name of a folder in a bucket."""
    return name.startswith(_BUCKETS)


def _folder_kind(path: Path) -> str:
    """What a folder holds, by the names in it and right below."""
    return foreign.folder_kind([x.relative_to(path).as_posix() for x in path.glob("*")])


def _on_hub(
    source: str | Path, kind: str | None, revision: str | None, path: str, default: str
) -> Source:
    name = str(source)
    repo, inside = (hub.split_id(source) if isinstance(source, str) else None) or ("", "")
    kind = kind or (default if not repo else TRANSCODERS if inside else None)
    # Every hub id may look like a relative path; none of a repository's ends like a file of ours.
    if not repo or (kind == TRANSCODERS and layout.is_file(repo)):
        ours = kind == TRANSCODERS
        near = did_you_mean(name.lower(), [*RELEASED, *hub.RELEASED_IDS])
        sizes = f", nor one of {', '.join(RELEASED)}.{near}"
        raise SourceError(
            f"There is no {'file or folder' if ours else 'folder'} {name}, and it is not a hub id "
            f"such as {layout.GEMMA_SCOPE_2B if ours else 'google/gemma-2-2b'}"
            f"{sizes if kind == CONFIG else '.' if ours else f'.{near}'}"
        )
    if kind is None:
        names = ("config.json", SETTINGS)
        there = any(hub.download_if_there(repo, name, revision) for name in names)
        kind = MODEL if there else TRANSCODERS
    if inside and kind != TRANSCODERS:
        raise SourceError(
            f"{name!r} is neither a local folder nor a hub id: a model's id has two parts, such "
            f"as {repo!r}."
        )
    inside = join(inside, path.strip("/"))
    return Source(name, kind, HUB, inside=inside, repo=repo, revision=revision)

"""Which file of a source is the transcoder that is meant: on this machine, on the hub, embedded."""

import operator
import os
from pathlib import Path, PurePosixPath

from jaxtc.errors import SourceError
from jaxtc.weights.checkpoints.read import is_converted
from jaxtc.weights.files import local
from jaxtc.weights.files.layout import (
    DEFAULT_L0,
    DEFAULT_WIDTH,
    GEMMA_SCOPE_2B,
    PARAMS,
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
from jaxtc.weights.load_model import EMBEDDED, embedded_data, no_revision
from jaxtc.weights.sources import hub


def converted_folder(source: str | Path, revision: str | None) -> Path | None:
    """The folder of a source that is a converted checkpoint, None for any other."""
    found = None if source == EMBEDDED else local.find(source)
    if found is None or not found.is_dir() or not is_converted(found):
        return None
    no_revision(source, revision)
    return found


def find_layer(
    source: str | Path, wish: Wish, path: str | None, revision: str | None
) -> tuple[Path, str, int | None]:
    """As :func:`find_file`, and the layer, if anything tells."""
    file, name = find_file(source, wish, path, revision)
    named = layer_of(file.absolute().as_posix())
    if None not in (named, wish.layer) and named != wish.layer:
        raise SourceError(f"layer={wish.layer} was asked for, but {name} is of layer {named}.")
    return file, name, wish.layer if named is None else named


def find_file(
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
    repo, inside = split(source)
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
        wanted = choose(listed(repo, revision), _folder(path), wish, repo, usual=usual).path
        file = hub.download(repo, wanted, revision)
    return file, f"{repo}/{place_of(wanted)}"


def listed(repo: str, revision: str | None) -> list[Tier]:
    """The transcoders of a repository on the hub."""
    return tiers_of(hub.list_files(repo, revision))


def split(source: str | Path) -> tuple[str, str]:
    """The repository and the path in it that a hub source names."""
    parts = hub.split_id(source) if isinstance(source, str) else None
    # Every hub id may look like a relative path; none of a repository's ends like a file of ours.
    if parts is None or is_file(parts[0]):
        raise SourceError(
            f"There is no file or folder {source}, and it is not a hub id such as {GEMMA_SCOPE_2B}."
        )
    return parts


def wish_of(layer: int | None, width: str | None, l0: int | str | None) -> Wish:
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


def layer_of_file(file: Path) -> int:
    """The layer that the folders around a file tell. Raises SourceError when none does."""
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

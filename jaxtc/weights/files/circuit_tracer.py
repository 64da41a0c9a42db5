"""circuit-tracer's ``config.yaml``: what the transcoders of a folder read, write and compute."""

import dataclasses
import json
import os
import re
from pathlib import Path, PurePosixPath
from urllib.parse import parse_qs, urlsplit

from jaxtc.errors import WeightsError
from jaxtc.weights.files import local
from jaxtc.weights.files.settings import Settings, read_yaml

CONFIG = "config.yaml"
TRANSCODER_SET, CROSS_LAYER = "transcoder_set", "cross_layer_transcoder"
_ACTIVATIONS = ("topk", "relu", "jump_relu", "jumprelu")
# What else such files say, which changes no number.
_HARMLESS = (
    "model_name", "scan", "scan_name", "repo_id", "revision", "subfolder", "dtype", "d_model",
    "d_transcoder", "n_layers", "n_features", "features", "description", "name", "license", "tags",
    "dataset", "datasets", "author", "url",
)  # fmt: skip
_URI = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)/(?P<path>[^?#]+)")


@dataclasses.dataclass(frozen=True)
class Listed:
    """One entry of ``transcoders``: a file below the folder, or one of a repository on the hub."""

    path: str
    repo: str | None = None
    revision: str | None = None


@dataclasses.dataclass(frozen=True)
class SetConfig:
    """What a ``config.yaml`` says.

    Attributes:
        kind: ``"transcoder_set"`` (one a layer) or ``"cross_layer_transcoder"``.
        settings: the file, for messages.
        activation: ``"topk"``, ``"relu"``, ``"jumprelu"``, or None: by the arrays in the files.
        k: of TopK.
        transcoders: of layers 0, 1, …, where it lists them; None when they lie in its folder.
    """

    settings: Settings
    kind: str
    activation: str | None
    k: int | None
    transcoders: tuple[Listed, ...] | None

    def site(self, name: str) -> str | None:
        """``"input_site"`` or ``"output_site"``, None when it does not say.

        Raises SiteError for a hook that is not one of our sites.
        """
        key = {"input_site": "feature_input_hook", "output_site": "feature_output_hook"}[name]
        found = self.settings.place(key)
        if found and found[1] is not None:
            raise self.settings.wrong(f"its {key} names a layer, which is one of every layer")
        return found and found[0]


def read_config(folder: Path) -> SetConfig | None:
    """The ``config.yaml`` of a folder; None when there is none.

    Raises WeightsError for a file that is not sound, of another kind, or that says what jaxtc does
    not know.
    """
    if not local.has(folder, CONFIG):
        return None
    settings = read_yaml(folder / CONFIG)
    kind = settings.one_of("model_kind", (TRANSCODER_SET, CROSS_LAYER))
    if kind is None:
        raise settings.wrong(
            f"it does not say model_kind, so it is not circuit-tracer's; expected "
            f"{TRANSCODER_SET!r} or {CROSS_LAYER!r}"
        )
    for key in ("feature_input_hook", "feature_output_hook"):
        settings.get(key, "text")
    activation = settings.one_of("activation", _ACTIVATIONS)
    k = settings.get("k", "count")
    if k is not None and activation is None:
        activation = "topk"
    if (activation == "topk") != (k is not None):
        raise settings.wrong(f"activation {activation!r} and k {k!r} do not belong together")
    listed = settings.get("transcoders", "texts")
    settings.finish(_HARMLESS)
    found = None if listed is None else tuple(_listed(settings, entry) for entry in listed)
    return SetConfig(settings, kind, activation and activation.replace("_", ""), k, found)


def write_config(kind: str, input_hook: str, output_hook: str, **others: object) -> bytes:
    """A ``config.yaml`` as circuit-tracer reads it; of ``others`` those that are not None.

    Texts are quoted as YAML has it; callers check that no hook or name needs escapes.
    """
    fields = {"model_name": others.pop("model_name", None), "model_kind": kind}
    fields |= {"feature_input_hook": input_hook, "feature_output_hook": output_hook, **others}
    said = {key: value for key, value in fields.items() if value is not None}
    return "".join(f"{key}: {json.dumps(value)}\n" for key, value in said.items()).encode()


def _listed(settings: Settings, entry: str) -> Listed:
    if entry.startswith("hf://"):
        match = _URI.fullmatch(entry.removeprefix("hf://").partition("?")[0])
        revision = parse_qs(_query(entry)).get("revision", [None])[0]
        if match and _stays(match["path"]):
            return Listed(match["path"], match["repo"], revision)
    elif _stays(entry):
        return Listed(entry)
    raise WeightsError(
        f"{settings.where}: its transcoders list {entry[:100]!r}, which is neither a path below "
        "the folder of this file nor hf://owner/name/path. Put the files beside it and list those."
    )


def _query(uri: str) -> str:
    try:
        return urlsplit(uri).query
    except ValueError:  # brackets that are no address
        return ""


def _stays(path: str) -> bool:
    """Whether a path leads below where it starts, for sure."""
    parts = PurePosixPath(path).parts
    odd = os.path.isabs(path) or ".." in parts or "\\" in path or ":" in path
    return bool(parts) and not odd and path.isprintable()

"""Files from the Hugging Face hub: only those that are needed, and errors that say what to do;
whether files are still those that the hub has."""

import contextlib
import hashlib
import logging
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from huggingface_hub import (
    _CACHED_NO_EXIST,
    errors,
    hf_hub_download,
    list_repo_files,
    try_to_load_from_cache,
)

from jaxtc.errors import SourceError, WeightsError, did_you_mean, first_line, some
from jaxtc.model.config import Gemma2Config
from jaxtc.model.released import RELEASED
from jaxtc.weights.adapters.adapter import TENSORS
from jaxtc.weights.adapters.settings import SETTINGS
from jaxtc.weights.files.foreign import folder_kind
from jaxtc.weights.files.generation import GENERATION, read_config
from jaxtc.weights.files.model import INDEX, SINGLE, read_index

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
    "added_tokens.json", "chat_template.jinja",
)  # fmt: skip

# Hub ids of the released models.
RELEASED_IDS = [f"google/gemma-2-{size}{it}" for size in RELEASED for it in ("", "-it")]

_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?P<rest>(/[^/]+)*/?)")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_HASH = re.compile(r"[0-9a-f]{64}|[0-9a-f]{40}")  # SHA-256 of a large file, git's of a small one
_UNREACHABLE = (errors.HTTPError, errors.EntryNotFoundError, errors.OfflineModeIsEnabled)


def split_id(source: str) -> tuple[str, str] | None:
    """``owner/name/some/path`` as (``owner/name``, ``some/path``); None when it is no hub id."""
    match = None if ".." in source else _ID.fullmatch(source)
    return match and (match["repo"], match["rest"].strip("/"))


def download(repo: str, file: str, revision: str | None = None) -> Path:
    """The local copy of one file, fetched when the cache lacks it.

    Raises SourceError: no access, no such repository, revision or file, or no network.
    """
    with _explained(repo, file, revision):
        return Path(hf_hub_download(repo, file, revision=revision))


def download_if_there(repo: str, file: str, revision: str | None = None) -> Path | None:
    """As :func:`download`, None when the repository has no such file."""
    # What the cache knows of a commit stays true, also when the hub cannot be reached.
    known = revision and _COMMIT.fullmatch(revision)
    if known and try_to_load_from_cache(repo, file, revision=revision) is _CACHED_NO_EXIST:
        return None
    with _explained(repo, file, revision), contextlib.suppress(errors.RemoteEntryNotFoundError):
        return Path(hf_hub_download(repo, file, revision=revision))
    return None


def list_files(repo: str, revision: str | None = None) -> list[str]:
    """The paths of all files of a repository. Raises SourceError as :func:`download`."""
    with _explained(repo, "", revision):
        return list_repo_files(repo, revision=revision)


def download_model(repo: str, revision: str | None = None) -> Path:
    """The local folder with a model's config and weights, or an adapter's; nothing else is fetched.

    Raises SourceError as :func:`download`; before the weights are fetched, ConfigError when it is
    not a Gemma-2 and WeightsError for an unsound index of shards.
    """
    folder = download_config(repo, revision)
    commit = folder.name  # all files are of one, whatever is pushed meanwhile
    if not (folder / "config.json").exists():
        download(repo, TENSORS, commit)
        return folder
    index = download_if_there(repo, INDEX, commit)
    # Some repositories of an adapter have its base's config.json too.
    adapter = index is None and download_if_there(repo, SINGLE, commit) is None
    if adapter and download_if_there(repo, SETTINGS, commit):
        download(repo, TENSORS, commit)
        return folder
    # Only the shards that the index names: some repositories hold the weights a second time.
    names = [SINGLE] if index is None else sorted(set(read_index(index)[0].values()))
    for name in names:
        _download_or_explain(repo, name, commit)
    return folder


def download_config(repo: str, revision: str | None = None) -> Path:
    """The local folder with a model's config and its stop tokens, or with an adapter's settings.

    Raises SourceError as :func:`download`, ConfigError when it is not a Gemma-2.
    """
    try:
        config = download_if_there(repo, "config.json", revision)
    except SourceError:
        # Without the hub, a cache does not tell that an adapter has no config.json.
        known = try_to_load_from_cache(repo, SETTINGS, revision=revision)
        if not isinstance(known, str):
            raise
        return Path(known).parent
    adapter = None if config else download_if_there(repo, SETTINGS, revision)
    if adapter:
        return adapter.parent
    folder = _download_or_explain(repo, "config.json", revision).parent
    Gemma2Config.from_file(folder / "config.json")
    try:
        download_if_there(repo, GENERATION, folder.name)
    except SourceError as error:
        if not isinstance(error.__cause__, errors.LocalEntryNotFoundError):
            raise
        # A cache that was filled by hand does not tell that a repository has no such file.
        logging.getLogger("jaxtc").warning(
            "%s of %s is not in the local cache, and the hub cannot be reached: texts end at the "
            "eos_token_id of config.json only.", GENERATION, repo,
        )  # fmt: skip
    read_config(folder)
    return folder


def _download_or_explain(repo: str, file: str, revision: str | None) -> Path:
    """As :func:`download`; of a repository without the file, the error says what it is."""
    try:
        return download(repo, file, revision)
    except SourceError as error:
        if not isinstance(error.__cause__, errors.RemoteEntryNotFoundError):
            raise
        what = folder_kind(list_files(repo, revision))
        if not what:
            raise
        raise SourceError(f"{error} In that repository: {what}.") from error


def download_tokenizer(repo: str, revision: str | None = None) -> Path:
    """The local folder with a tokenizer's files. Raises SourceError as :func:`download`."""
    config = download(repo, "tokenizer_config.json", revision)
    for name in (*TOKENIZER_FILES, "config.json"):
        download_if_there(repo, name, config.parent.name)
    return config.parent


@contextlib.contextmanager
def _explained(repo: str, file: str, revision: str | None) -> Iterator[None]:
    try:
        yield
    # errors.HTTPError covers what the HTTP client itself raises; OSError a full disk.
    except (*_UNREACHABLE, errors.HFValidationError, OSError) as error:
        raise SourceError(_explain(error, repo, file, revision)) from error


def _explain(error: Exception, repo: str, file: str, revision: str | None) -> str:
    what = (f"{repo}/{file}" if file else repo) + (f" at revision {revision!r}" if revision else "")
    status = _status(error)
    odd = re.match(r"google/gemma-2-(?!(2|9|27)b(-|$))", repo.lower())
    near = did_you_mean(repo, RELEASED_IDS) if odd else ""
    if isinstance(error, errors.HFValidationError):
        return f"{repo!r} is not a hub id: {first_line(error)}."
    if isinstance(error, errors.RepositoryNotFoundError) and not isinstance(
        error, errors.GatedRepoError
    ):
        return (
            f"The Hugging Face hub has no repository {repo!r} that you may see."
            f"{near} Check the "
            "spelling (owner/name); if it is private or gated, log in with `hf auth login` or set "
            "HF_TOKEN. A local folder must exist to be taken as one."
        )
    if isinstance(error, errors.GatedRepoError) or status in (401, 403):
        return (
            f"{repo} is gated: its files are given only to people who accepted its licence. Accept "
            f"it at https://huggingface.co/{repo}, then log in with `hf auth login` (or set "
            "HF_TOKEN to a token of that account, with read access to gated repositories) and try "
            "again."
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return (
            f"{repo} on the Hugging Face hub has no revision {revision!r}; give a branch, a tag "
            "or a commit hash of it."
        )
    if isinstance(error, errors.RemoteEntryNotFoundError):
        place = f"https://huggingface.co/{repo}/tree/{revision or 'main'}"
        return f"The Hugging Face hub has no file {what}; see {place}."
    if status is not None:
        return f"The Hugging Face hub answered {what} with status {status}. Try again later."
    if isinstance(error, _UNREACHABLE):
        return (
            f"{what} is not in the local cache, and the Hugging Face hub cannot be reached.{near} "
            "Check the network (and that HF_HUB_OFFLINE is not set), give a local folder instead, "
            "or use the source 'embedded', which needs no network."
        )
    return f"{what} could not be fetched: {first_line(error)}. Is there room on the disk?"


def _status(error: BaseException | None) -> int | None:
    """The HTTP status behind an error; the hub wraps some answers into "not in the cache"."""
    while error is not None:
        if isinstance(error, errors.HfHubHTTPError) and error.response is not None:
            return error.response.status_code
        error = error.__cause__
    return None


def verify_files(files: Iterable[Path]) -> None:
    """Hash files as the hub does and compare.

    Raises WeightsError when a file is not what the hub has, or nothing here says what that is.
    """
    expected = {file: _hub_hash(file) for file in files}
    unknown = [file for file, digest in expected.items() if digest is None]
    if unknown:
        raise WeightsError(
            f"{unknown[0].parent} cannot be verified: nothing says what the hub's hashes of "
            f"{some([file.name for file in unknown])} are. They are known of a hub id's files in "
            "the hub's own cache, and of a folder that `hf download --local-dir` made; for other "
            "folders leave verify out."
        )
    wrong = [file for file, digest in expected.items() if _hash(file, len(digest)) != digest]
    if wrong:
        raise WeightsError(
            f"{some([file.name for file in wrong])} in {wrong[0].parent} "
            f"{'is' if len(wrong) == 1 else 'are'} not what the Hugging Face hub has "
            f"({wrong[0].name} should hash to {expected[wrong[0]][:12]}…): damaged or changed "
            f"since. Remove {wrong[0].resolve()} and fetch it again."
        )


def _hub_hash(file: Path) -> str | None:
    """The hash by which the hub knows a file, None when it is not known here.

    The hub's client keeps it: in its cache a file is a link to ``blobs/HASH``, beside a folder that
    was downloaded (``hf download --local-dir``) it is in ``.cache/huggingface``.
    """
    blob, file = file.resolve(), file.absolute()
    kept = [blob.name] if blob.parent.name == "blobs" else []
    for folder in file.parents:
        name = f"{file.relative_to(folder).as_posix()}.metadata"
        with contextlib.suppress(OSError, UnicodeDecodeError):
            lines = (folder / ".cache/huggingface/download" / name).read_text(encoding="utf-8")
            kept += lines.splitlines()[1:2]
    return next(filter(_HASH.fullmatch, kept), None)


def _hash(file: Path, digits: int) -> str:
    try:
        # git's hash of a blob begins with its size; not for security, but it is the hub's name.
        blob = f"blob {file.stat().st_size}\0".encode()
        made = hashlib.sha256() if digits == 64 else hashlib.sha1(blob, usedforsecurity=False)
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, lambda: made).hexdigest()
    except OSError as error:
        raise WeightsError(f"{file} cannot be read: {error.strerror}.") from error

"""From what a person types as MODEL to files on disk; fetches from the Hugging Face hub what is not there yet.

Knows the hub's cache layout and which files of a repository a model needs.  Does not open them.

    path = resolve("Qwen/Qwen3-0.6B")          # or "demo", a directory, a .gguf file, "owner/name@revision"

huggingface_hub throws a broken-off download away (its temporary file is unique to each call), so large files
are fetched here into the cache's blob folder under a name that the next call finds again, continued with a
Range request, checked against their SHA-256 where the hub states it, and only then linked by huggingface_hub.
"""

from __future__ import annotations

import difflib
import fnmatch
import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finial.errors import FileError

Progress = Callable[[str, int, int], None]  # (file name, bytes on disk, bytes in total)

SMALL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
)
INDEX_FILE = "model.safetensors.index.json"
SHARDS = "model-*-of-*.safetensors"

_HUB_NAME = re.compile(
    r"(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*)(@(?P<revision>[\w.-]+(/[\w.-]+)*?))?(/(?P<file>[^@]+\.gguf))?"
)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_RESUMABLE_BYTES = 1 << 20  # below this a fresh download costs less than the bookkeeping
_ANSWER_SECONDS = 30.0
_SPARE_BYTES = 64 << 20  # left free on the disk beyond the model itself


@dataclass(frozen=True)
class HubName:
    """A hub name taken apart: `owner/name[@revision][/file.gguf]`."""

    repo: str
    revision: str | None
    file: str | None

    @staticmethod
    def parse(name: str) -> HubName:
        """Raises FileError when `name` is not of that form."""
        match = _HUB_NAME.fullmatch(name)
        if match is None or ".." in name or "--" in match["repo"]:
            raise FileError(
                f"{name!r} is not a hub name, expected owner/name or owner/name@revision",
                fix="copy the name from the model's page, for example Qwen/Qwen3-0.6B",
            )
        return HubName(match["repo"], match["revision"], match["file"])


@dataclass(frozen=True)
class _Remote:
    """One file that the hub holds."""

    name: str
    size: int


def resolve(
    model: str,
    *,
    download: bool = True,
    progress: bool | Progress = True,
    offline: bool | None = None,
    endpoint: str | None = None,
    cache_dir: str | Path | None = None,
) -> Path:
    """The directory or .gguf file that `model` means; what is on disk is never asked for again.

    Args:
        model: "demo", a directory, a .gguf file, or `owner/name[@revision][/file.gguf]` on the hub.
        download: fetch a hub model that is not in the cache; otherwise say how to.
    Raises:
        FileError: nothing of that name; names near matches, or the command that fetches it.
    """
    if model == "demo":
        return _demo()
    path = Path(model).expanduser()
    if path.exists():
        return _local(path)
    match = _HUB_NAME.fullmatch(model)
    if match is None or model.startswith((".", "~", "/")):
        raise _no_such_path(model, path)
    name = HubName.parse(model)
    cached = find_cached(name.repo, name.revision, name.file, cache_dir=cache_dir)
    if cached is not None:
        return cached
    if path.parent.is_dir() and _near(path):
        raise _no_such_path(model, path)
    if not download or _is_offline(offline):
        why = "" if not download else " and offline mode is on"
        raise FileError(f"{model} is not on disk{why}", fix=f"run `finial pull {model}` while online")
    return pull(model, progress=progress, offline=offline, endpoint=endpoint, cache_dir=cache_dir)


def pull(
    name: str,
    revision: str | None = None,
    file: str | None = None,
    *,
    progress: bool | Progress = True,
    offline: bool | None = None,
    endpoint: str | None = None,
    cache_dir: str | Path | None = None,
) -> Path:
    """Fetch a model into the Hugging Face cache: only the files needed, continuing where a former call broke off.

    The path returned lies in `snapshots/COMMIT`, so that it also records which commit was fetched.

    Args:
        name: `owner/name[@revision][/file.gguf]`.
        revision: branch, tag or commit; overrides the one in `name`.
        file: name or glob of one file, for repositories that hold many GGUF files, or a .pth.
        progress: True shows huggingface_hub's bars on a terminal; a callable receives (file, bytes, total).
        offline: make no request (default: HF_HUB_OFFLINE).
        endpoint: hub address (default: HF_ENDPOINT).
        cache_dir: cache root (default: huggingface_hub's, see HF_HOME and HF_HUB_CACHE).
    Returns:
        The snapshot directory, or the file in it when one file was asked for or the repository is GGUF.
    Raises:
        FileError: no network, unknown repository, revision or file, no access, disk too small, damaged download.
    """
    parsed = HubName.parse(name)
    repo, revision, file = parsed.repo, revision or parsed.revision, file or parsed.file
    pinned = revision is not None and _COMMIT.fullmatch(revision) is not None
    if pinned or _is_offline(offline):  # a commit never changes, so a complete one needs no request
        cached = find_cached(repo, revision, file, cache_dir=cache_dir)
        if cached is not None:
            return cached
    if _is_offline(offline):
        raise FileError(f"{name} is not on disk and offline mode is on", fix=f"run `finial pull {name}` while online")

    from huggingface_hub import HfApi

    endpoint = endpoint or os.environ.get("HF_ENDPOINT") or None
    with _translated(repo, revision):
        try:
            api = HfApi(endpoint=endpoint)  # without a time limit it would wait forever on a silent network
            info = api.model_info(repo, revision=revision, files_metadata=True, timeout=_ANSWER_SECONDS)
            commit = str(info.sha)
            listing = [_Remote(s.rfilename, int(s.size or 0)) for s in info.siblings or ()]
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            if type(error).__name__ == "HFValidationError":
                raise FileError(f"{repo!r} is not a hub name: {error}", fix="expected owner/name") from error
            raise FileError(
                f"{endpoint or 'the hub'} answered something that is not a hub's description of {repo}",
                fix="check HF_ENDPOINT, and proxies between here and the hub",
            ) from error
    if not _COMMIT.fullmatch(commit):
        raise FileError(f"the hub gave {commit!r} as the commit of {repo}", fix="check HF_ENDPOINT")
    wanted = choose_files(repo, listing, file)
    cache = _Cache(repo, cache_dir)
    with _translated(repo, revision):
        _fetch(cache, commit, wanted, endpoint, progress)
    cache.write_ref(revision or "main", commit)
    found = find_cached(repo, commit, file, cache_dir=cache_dir)
    if found is None:
        raise FileError(
            f"{repo} at {commit} holds no complete model: " + ", ".join(f.name for f in wanted),
            fix="choose another repository or revision",
        )
    return found


def find_cached(
    repo: str, revision: str | None = None, file: str | None = None, *, cache_dir: str | Path | None = None
) -> Path | None:
    """The complete model (or `file`, a name or glob) in the cache; None when it is not there.  Makes no request."""
    snapshot = _Cache(repo, cache_dir).snapshot(revision or "main")
    if snapshot is None:
        return None
    if file is not None:
        matches = sorted(p for p in snapshot.rglob("*") if fnmatch.fnmatch(p.relative_to(snapshot).as_posix(), file))
        return matches[0] if len(matches) == 1 else None
    if (snapshot / "config.json").exists() and _has_weights(snapshot):
        return snapshot
    ggufs = sorted(snapshot.rglob("*.gguf"))
    return ggufs[0] if len(ggufs) == 1 else None


def choose_files(repo: str, listing: Sequence[_Remote], file: str | None) -> list[_Remote]:
    """Of a repository's files those that a model needs, or the one that matches `file`.

    Raises:
        FileError: no weights that finial reads, or several GGUF files and none chosen; lists them.
    """
    if file is not None:
        matches = [f for f in listing if f.name == file] or [f for f in listing if fnmatch.fnmatch(f.name, file)]
        if len(matches) == 1:
            return matches
        what = f"{repo} has no file {file!r}" if not matches else f"{len(matches)} files of {repo} match {file!r}"
        near = [f for f in listing if f.name.endswith(Path(file).suffix or ".gguf")]
        raise FileError(f"{what}; it has:{_sizes(matches or near or list(listing))}", fix="name one of these files")
    top = {f.name: f for f in listing if "/" not in f.name}
    weights: list[_Remote] = []
    if "model.safetensors" in top:
        weights = [top["model.safetensors"]]
    elif INDEX_FILE in top:
        weights = [top[INDEX_FILE], *(f for n, f in sorted(top.items()) if fnmatch.fnmatch(n, SHARDS))]
    else:
        weights = [f for n, f in sorted(top.items()) if n.endswith(".safetensors") and "consolidated" not in n]
    if weights and "config.json" in top:
        return [top[n] for n in SMALL_FILES if n in top] + weights
    ggufs = [f for f in listing if f.name.endswith(".gguf")]
    if len(ggufs) == 1:
        return ggufs
    if ggufs:
        raise FileError(
            f"{repo} has {len(ggufs)} GGUF files:{_sizes(ggufs)}",
            fix=f"choose one: `finial pull {repo}/{ggufs[0].name}`",
        )
    pickles = [f for f in listing if f.name.endswith((".bin", ".pth", ".pt"))]
    if pickles:
        raise FileError(
            f"{repo} has neither safetensors nor GGUF, only{_sizes(pickles)}",
            fix=f"`finial pull {repo} --file {pickles[0].name}`, then `finial convert` what it fetched",
        )
    raise FileError(f"{repo} holds no model that finial reads (safetensors with config.json, or GGUF)")


# ---------------------------------------------------------------------------------------------- the cache


class _Cache:
    """One repository's folder in the Hugging Face cache: blobs by ETag, snapshots by commit, refs by name."""

    def __init__(self, repo: str, cache_dir: str | Path | None) -> None:
        from huggingface_hub import constants

        self.repo = repo
        self.root = Path(cache_dir or constants.HF_HUB_CACHE).expanduser()
        self.folder = self.root / f"models--{repo.replace('/', '--')}"

    def snapshot(self, revision: str) -> Path | None:
        commit = revision
        if not _COMMIT.fullmatch(revision):
            ref = self.folder / "refs" / revision
            if not ref.is_file():
                return None
            commit = ref.read_text().strip()
        folder = self.folder / "snapshots" / commit
        return folder if folder.is_dir() else None

    def write_ref(self, revision: str, commit: str) -> None:
        if _COMMIT.fullmatch(revision):
            return
        ref = self.folder / "refs" / revision
        ref.parent.mkdir(parents=True, exist_ok=True)
        partial = ref.with_name(f"{ref.name}.{os.getpid()}")
        partial.write_text(commit)
        partial.replace(ref)

    def blob(self, etag: str) -> Path:
        if not re.fullmatch(r"[\w.-]+", etag):
            raise FileError(
                f"the hub gave the unusable ETag {etag!r} for a file of {self.repo}", fix="check HF_ENDPOINT"
            )
        return self.folder / "blobs" / etag


def _fetch(
    cache: _Cache, commit: str, wanted: Sequence[_Remote], endpoint: str | None, progress: bool | Progress
) -> None:
    """Bring `wanted` into the cache; the links in the snapshot are made last, so that it appears complete."""
    from huggingface_hub import hf_hub_download, hf_hub_url
    from huggingface_hub.file_download import get_hf_file_metadata

    large = [f for f in wanted if f.size >= _RESUMABLE_BYTES]
    there = cache.snapshot(commit)
    missing = [f for f in large if there is None or not (there / f.name).exists()]
    on_disk = _partial_bytes(cache)
    need = sum(f.size for f in missing) - on_disk
    cache.folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(cache.folder).free
    if missing and need + _SPARE_BYTES > free:
        raise FileError(
            f"{cache.repo} needs {need / 1e9:.2f} GB more, {cache.root} has {free / 1e9:.2f} GB free",
            fix="free some space, or set HF_HOME to a larger disk",
        )
    for remote in missing:
        url = hf_hub_url(cache.repo, remote.name, revision=commit, endpoint=endpoint)
        metadata = get_hf_file_metadata(url, endpoint=endpoint)
        if metadata.etag is None or metadata.size is None:
            raise FileError(
                f"the hub gave no ETag or size for {remote.name} of {cache.repo}", fix="check HF_ENDPOINT and proxies"
            )
        if not cache.blob(metadata.etag).exists():
            _fetch_blob(cache, remote.name, url, metadata.etag, metadata.size, progress)
    for remote in sorted(wanted, key=lambda f: f.size):
        hf_hub_download(
            cache.repo,
            remote.name,
            revision=commit,
            cache_dir=cache.root,
            endpoint=endpoint,
            tqdm_class=_bar(remote.name, _silent),
        )
        if callable(progress):
            progress(remote.name, remote.size, remote.size)


def _fetch_blob(cache: _Cache, name: str, url: str, etag: str, size: int, progress: bool | Progress) -> None:
    """One large file by plain HTTP, continued where a former call stopped, checked, moved into place."""
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import WeakFileLock, build_hf_headers  # type: ignore[attr-defined]

    blob = cache.blob(etag)
    partial = blob.with_name(f"{etag}.finial-partial")
    lock = cache.root / ".locks" / cache.folder.name / f"{etag}.lock"  # huggingface_hub's own for this blob
    for path in (partial, lock):
        path.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock):
        if blob.exists():  # another process was quicker
            return
        if partial.exists() and partial.stat().st_size > size:
            partial.unlink()
        with partial.open("ab") as file:
            http_get(
                url,
                file,
                resume_size=file.tell(),
                headers=build_hf_headers(),
                expected_size=size,
                displayed_filename=name,
                tqdm_class=None if progress is True else _bar(name, progress or _silent),
            )
        # For files kept in LFS the ETag is the SHA-256 of the content; for others it is git's own hash of it.
        if re.fullmatch(r"[0-9a-f]{64}", etag) and _sha256(partial) != etag:
            partial.unlink()
            raise FileError(f"{name} of {cache.repo} arrived damaged (its SHA-256 is not {etag})", fix="pull it again")
        partial.replace(blob)


def _silent(name: str, done: int, total: int) -> None:
    """A progress report to nobody."""


def _bar(name: str, report: Progress) -> Any:
    """A stand-in for tqdm that tells `report` instead of drawing."""

    class Bar:
        def __init__(self, *_: object, total: float | None = None, initial: float = 0, **__: object) -> None:
            self.done, self.total = int(initial), int(total or 0)
            report(name, self.done, self.total)

        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *_: object) -> None:
            return None

        def update(self, n: float | None = 1) -> None:
            self.done += int(n or 0)
            report(name, self.done, self.total)

    return Bar


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _partial_bytes(cache: _Cache) -> int:
    return sum(p.stat().st_size for p in (cache.folder / "blobs").glob("*.finial-partial"))


def _has_weights(folder: Path) -> bool:
    if (folder / "model.safetensors").exists():
        return True
    index = folder / INDEX_FILE
    if index.exists():
        # The names alone are enough here; the checkpoint reader parses and checks the index.
        names = set(re.findall(r'"([^"/\\]+\.safetensors)"', index.read_text(encoding="utf-8", errors="replace")))
        return bool(names) and all((folder / n).exists() for n in names)
    return any(folder.glob("*.safetensors"))


# ------------------------------------------------------------------------------------------- local paths


def _demo() -> Path:
    # Not importlib.resources: an editable install has the package in two places.
    folder = Path(__file__).parents[1] / "demo"
    if not (folder / "config.json").exists():
        raise FileError(f"{folder}: the embedded demo model is missing", fix="install finial again")
    return folder


def _local(path: Path) -> Path:
    if path.is_dir() or path.suffix == ".gguf":
        return path
    if path.suffix == ".safetensors" and (path.parent / "config.json").exists():
        return path.parent
    if path.suffix in (".pth", ".pt", ".bin"):
        raise FileError(f"{path} is a pickled PyTorch file", fix=f"`finial convert {path} OUT` makes a model of it")
    raise FileError(f"{path} is not a model", fix="give a directory with config.json, a .gguf file, or a hub name")


def _near(path: Path) -> list[str]:
    try:
        names = [p.name for p in path.parent.iterdir() if p.is_dir() or p.suffix in (".gguf", ".pth", ".safetensors")]
    except OSError:
        return []
    lower = {n.lower(): n for n in names}
    return [lower[n] for n in difflib.get_close_matches(path.name.lower(), lower, n=3, cutoff=0.6)]


def _no_such_path(model: str, path: Path) -> FileError:
    if not path.parent.is_dir():
        return FileError(f"{model}: no such file, and no such folder {path.parent}", fix="check the path")
    near = _near(path)
    if near:
        return FileError(f"{model}: no such file or directory", fix="did you mean " + " or ".join(near) + "?")
    return FileError(
        f"{model}: no such file or directory",
        fix="give a directory with config.json, a .gguf file, `demo`, or a hub name such as Qwen/Qwen3-0.6B",
    )


# ------------------------------------------------------------------------------------------------- errors


def _is_offline(offline: bool | None) -> bool:
    if offline is not None:
        return offline
    from huggingface_hub import constants

    return constants.is_offline_mode() or os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def _sizes(files: Sequence[_Remote], shown: int = 24) -> str:
    lines = "".join(f"\n    {f.name} ({f.size / 1e6:,.1f} MB)" for f in files[:shown])
    return lines + (f"\n    and {len(files) - shown} more" if len(files) > shown else "")


@contextmanager
def _translated(repo: str, revision: str | None) -> Iterator[None]:
    """Say in one sentence what huggingface_hub's and its HTTP library's exceptions mean here."""
    from huggingface_hub import errors

    # The HTTP library below huggingface_hub differs between its versions; all its errors share this base.
    transport: type[BaseException] = errors.HfHubHTTPError.__mro__[1]
    again = f"run `finial pull {repo}` again; it continues where it stopped"
    try:
        yield
    except errors.GatedRepoError as error:
        raise FileError(
            f"{repo} is gated: its owner wants to know who fetches it",
            fix="accept its terms on the model's page, then `hf auth login`",
        ) from error
    except errors.RevisionNotFoundError as error:
        raise FileError(f"{repo} has no revision {revision!r}", fix="name a branch, tag or full commit hash") from error
    except errors.RepositoryNotFoundError as error:
        raise FileError(
            f"{repo}: the hub has no such model, or it is private",
            fix="check the name on the model's page; for a private one `hf auth login` first",
        ) from error
    except errors.OfflineModeIsEnabled as error:
        raise FileError(f"{repo} is not on disk and offline mode is on", fix="unset HF_HUB_OFFLINE") from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):  # the hub also answers 401 for names that do not exist
            raise FileError(
                f"{repo}: the hub refused access ({status}), or has no such model",
                fix="check the name on the model's page; for a private one `hf auth login` first",
            ) from error
        raise FileError(f"{repo}: the hub answered {status}", fix=again) from error
    except errors.FileMetadataError as error:
        raise FileError(f"{repo}: {error}", fix="check HF_ENDPOINT and proxies") from error
    except errors.LocalEntryNotFoundError as error:
        raise FileError(f"{repo}: the hub cannot be reached", fix=f"check the network, then {again}") from error
    except OSError as error:
        if isinstance(error, transport):
            raise FileError(f"{repo}: the connection to the hub failed ({error})", fix=again) from error
        raise FileError(f"{repo}: {error}", fix=again) from error
    except transport as error:
        kind = type(error).__name__
        raise FileError(
            f"{repo}: the hub cannot be reached ({kind}: {error})", fix=f"check the network, then {again}"
        ) from error

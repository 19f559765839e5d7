"""Bytes from the Hugging Face hub into its cache, continued where a former call broke off.

Knows the cache's folders, one file's download and what the hub's exceptions mean.  Does not know which files a
model needs.

huggingface_hub throws a broken-off download away (its temporary file is unique to each call), so large files
are fetched here into the cache's blob folder under a name that the next call finds again, continued with a
Range request, checked against their SHA-256 where the hub states it, and only then linked by huggingface_hub.

    fetch(Cache("Qwen/Qwen3-0.6B"), commit, [Remote("model.safetensors", 1_503_300_328)], None, True)
"""

from __future__ import annotations

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

COMMIT = re.compile(r"[0-9a-f]{40}")
_RESUMABLE_BYTES = 1 << 20  # below this a fresh download costs less than the bookkeeping
_SPARE_BYTES = 64 << 20  # left free on the disk beyond the model itself


@dataclass(frozen=True)
class Remote:
    """One file that the hub holds."""

    name: str
    size: int


class Cache:
    """One repository's folder in the Hugging Face cache: blobs by ETag, snapshots by commit, refs by name."""

    def __init__(self, repo: str, cache_dir: str | Path | None) -> None:
        from huggingface_hub import constants

        self.repo = repo
        self.root = Path(cache_dir or constants.HF_HUB_CACHE).expanduser()
        self.folder = self.root / f"models--{repo.replace('/', '--')}"

    def snapshot(self, revision: str) -> Path | None:
        """The folder of that branch, tag or commit; None when it was never fetched."""
        commit = revision
        if not COMMIT.fullmatch(revision):
            ref = self.folder / "refs" / revision
            if not ref.is_file():
                return None
            commit = ref.read_text().strip()
        folder = self.folder / "snapshots" / commit
        return folder if folder.is_dir() else None

    def write_ref(self, revision: str, commit: str) -> None:
        """Remember that a branch or tag is at that commit."""
        if COMMIT.fullmatch(revision):
            return
        ref = self.folder / "refs" / revision
        ref.parent.mkdir(parents=True, exist_ok=True)
        partial = ref.with_name(f"{ref.name}.{os.getpid()}")
        partial.write_text(commit)
        partial.replace(ref)

    def blob(self, etag: str) -> Path:
        """Where the content with that ETag lies; FileError for one that is no file name."""
        if not re.fullmatch(r"[\w.-]+", etag):
            raise FileError(
                f"the hub gave the unusable ETag {etag!r} for a file of {self.repo}", fix="check HF_ENDPOINT"
            )
        return self.folder / "blobs" / etag


def fetch(cache: Cache, commit: str, wanted: Sequence[Remote], endpoint: str | None, progress: bool | Progress) -> None:
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


def _fetch_blob(cache: Cache, name: str, url: str, etag: str, size: int, progress: bool | Progress) -> None:
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


def _partial_bytes(cache: Cache) -> int:
    return sum(p.stat().st_size for p in (cache.folder / "blobs").glob("*.finial-partial"))


@contextmanager
def translated(repo: str, revision: str | None) -> Iterator[None]:
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

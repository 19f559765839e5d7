"""From what a person types as MODEL to files on disk; fetches from the Hugging Face hub what is not there yet.

Knows which files of a repository a model needs.  Does not open them, nor fetch a byte itself (hub_download does).

    path = resolve("Qwen/Qwen3-0.6B")          # or "demo", a directory, a .gguf file, "owner/name@revision"
"""

from __future__ import annotations

import difflib
import fnmatch
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from finial.errors import FileError
from finial.files.hub_download import COMMIT, Cache, Progress, Remote, fetch, translated

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)
SMALL_FILES = ("config.json", "generation_config.json", *TOKENIZER_FILES, "chat_template.json")
INDEX_FILE = "model.safetensors.index.json"
SHARDS = "model-*-of-*.safetensors"

_HUB_NAME = re.compile(
    r"(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*)(@(?P<revision>[\w.-]+(/[\w.-]+)*?))?(/(?P<file>[^@]+\.gguf))?"
)
_ANSWER_SECONDS = 30.0


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
    pinned = revision is not None and COMMIT.fullmatch(revision) is not None
    if pinned or _is_offline(offline):  # a commit never changes, so a complete one needs no request
        cached = find_cached(repo, revision, file, cache_dir=cache_dir)
        if cached is not None:
            return cached
    if _is_offline(offline):
        raise FileError(f"{name} is not on disk and offline mode is on", fix=f"run `finial pull {name}` while online")

    from huggingface_hub import HfApi

    endpoint = endpoint or os.environ.get("HF_ENDPOINT") or None
    with translated(repo, revision):
        try:
            api = HfApi(endpoint=endpoint)  # without a time limit it would wait forever on a silent network
            info = api.model_info(repo, revision=revision, files_metadata=True, timeout=_ANSWER_SECONDS)
            commit = str(info.sha)
            listing = [Remote(s.rfilename, int(s.size or 0)) for s in info.siblings or ()]
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            if type(error).__name__ == "HFValidationError":
                raise FileError(f"{repo!r} is not a hub name: {error}", fix="expected owner/name") from error
            raise FileError(
                f"{endpoint or 'the hub'} answered something that is not a hub's description of {repo}",
                fix="check HF_ENDPOINT, and proxies between here and the hub",
            ) from error
    if not COMMIT.fullmatch(commit):
        raise FileError(f"the hub gave {commit!r} as the commit of {repo}", fix="check HF_ENDPOINT")
    wanted = choose_files(repo, listing, file)
    cache = Cache(repo, cache_dir)
    with translated(repo, revision):
        fetch(cache, commit, wanted, endpoint, progress)
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
    snapshot = Cache(repo, cache_dir).snapshot(revision or "main")
    if snapshot is None:
        return None
    if file is not None:
        matches = sorted(p for p in snapshot.rglob("*") if fnmatch.fnmatch(p.relative_to(snapshot).as_posix(), file))
        return matches[0] if len(matches) == 1 else None
    if (snapshot / "config.json").exists() and _has_weights(snapshot):
        return snapshot
    ggufs = sorted(snapshot.rglob("*.gguf"))
    return ggufs[0] if len(ggufs) == 1 else None


def choose_files(repo: str, listing: Sequence[Remote], file: str | None) -> list[Remote]:
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
    weights: list[Remote] = []
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


def _sizes(files: Sequence[Remote], shown: int = 24) -> str:
    lines = "".join(f"\n    {f.name} ({f.size / 1e6:,.1f} MB)" for f in files[:shown])
    return lines + (f"\n    and {len(files) - shown} more" if len(files) > shown else "")

"""The hub, against a server of our own that speaks the hub's HTTP API on loopback and can break off mid-file."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from finial.errors import FileError
from finial.files import hub

COMMIT = "a" * 40
OLD_COMMIT = "b" * 40
WEIGHTS = hashlib.shake_128(b"weights").digest(3 << 20)


@dataclass
class Hub:
    """What the server serves, and what it saw."""

    files: dict[str, bytes]
    revisions: dict[str, str] = field(default_factory=lambda: {"main": COMMIT, "v1": OLD_COMMIT})
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)  # (method, path, Range)
    bytes_served: dict[str, int] = field(default_factory=dict)
    break_at: int | None = None  # close the connection of a large file after so many bytes, then answer 503
    ignore_range: bool = False
    corrupt: bool = False
    api_status: tuple[int, dict[str, str]] | None = None
    api_body: bytes | None = None
    url: str = ""

    def gets(self, suffix: str) -> list[str | None]:
        return [r for method, path, r in self.requests if method == "GET" and path.endswith(suffix)]


def _handler(hub_state: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            return None

        def reply(self, status: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for key, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub_state.requests.append((self.command, path, self.headers.get("Range")))
            if path.startswith("/api/models/"):
                self.api(path.removeprefix("/api/models/"))
            else:
                _, _, rest = path.partition("/resolve/")
                revision, _, name = rest.partition("/")
                self.file(revision, name)

        def api(self, rest: str) -> None:
            if hub_state.api_status is not None:
                status, headers = hub_state.api_status
                return self.reply(status, b"{}", headers)
            if hub_state.api_body is not None:
                return self.reply(200, hub_state.api_body, {"Content-Type": "application/json"})
            repo, _, revision = rest.partition("/revision/")
            if repo != "owner/model":
                return self.reply(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            revision = revision or "main"
            commit = revision if len(revision) == 40 else hub_state.revisions.get(revision)
            if commit is None:
                return self.reply(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            siblings = [{"rfilename": n, "size": len(b), "blobId": "0" * 40} for n, b in hub_state.files.items()]
            body = {"id": repo, "modelId": repo, "sha": commit, "siblings": siblings, "tags": [], "private": False}
            return self.reply(200, json.dumps(body).encode(), {"Content-Type": "application/json"})

        def file(self, revision: str, name: str) -> None:
            body = hub_state.files.get(name)
            if body is None:
                return self.reply(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
            headers = {
                "ETag": f'"{hashlib.sha256(body).hexdigest()}"',
                "X-Repo-Commit": hub_state.revisions.get(revision, revision),
                "Accept-Ranges": "bytes",
            }
            start, status = 0, 200
            wanted = self.headers.get("Range")
            if wanted and not hub_state.ignore_range:
                start, status = int(wanted.removeprefix("bytes=").rstrip("-")), 206
                headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
            if hub_state.corrupt and len(body) > 1 << 20:
                body = body[:-1] + bytes([body[-1] ^ 1])
            part = body[start:]
            large = self.command == "GET" and len(body) > 1 << 20
            if large and hub_state.break_at is not None:
                if hub_state.bytes_served.get(name):
                    return self.reply(503, b"", {})
                hub_state.bytes_served[name] = hub_state.break_at
                self.send_response(status)
                for key, value in {"Content-Length": str(len(part)), **headers}.items():
                    self.send_header(key, value)
                self.end_headers()
                self.wfile.write(part[: hub_state.break_at])
                self.close_connection = True
                return None
            if self.command == "GET":
                hub_state.bytes_served[name] = hub_state.bytes_served.get(name, 0) + len(part)
            return self.reply(status, part, headers)

    return Handler


@pytest.fixture
def server() -> Iterator[Hub]:
    state = Hub(
        {
            "config.json": b'{"model_type": "qwen3"}',
            "tokenizer.json": b"{}",
            "README.md": b"read me",
            "model.safetensors": WEIGHTS,
            "pytorch_model.bin": b"duplicate",
            "onnx/model.onnx": b"duplicate",
            "original/consolidated.00.pth": b"duplicate",
        }
    )
    http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(state))
    state.url = f"http://127.0.0.1:{http.server_port}"
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield state
    http.shutdown()
    http.server_close()


def _pull(server: Hub, cache: Path, name: str = "owner/model", **options: object) -> Path:
    return hub.pull(name, endpoint=server.url, cache_dir=cache, progress=False, **options)  # type: ignore[arg-type]


def test_fetches_only_what_a_model_needs(server: Hub, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    path = hub.pull("owner/model", endpoint=server.url, cache_dir=tmp_path, progress=lambda *a: seen.append(a))
    assert path.name == COMMIT  # the commit fetched is recorded in the path
    assert sorted(p.name for p in path.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert (path / "model.safetensors").read_bytes() == WEIGHTS
    assert server.bytes_served["model.safetensors"] == len(WEIGHTS)
    of_weights = [(done, total) for name, done, total in seen if name == "model.safetensors"]
    assert of_weights[-1] == (len(WEIGHTS), len(WEIGHTS)) and of_weights == sorted(of_weights)


def test_second_pull_transfers_no_file_and_offline_makes_no_request(
    server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = _pull(server, tmp_path)
    server.requests.clear()
    assert _pull(server, tmp_path) == first
    assert not [r for r in server.requests if r[0] == "GET" and "/resolve/" in r[1]]
    server.requests.clear()
    assert _pull(server, tmp_path, offline=True) == first
    assert hub.resolve("owner/model", endpoint=server.url, cache_dir=tmp_path) == first
    assert hub.resolve(f"owner/model@{COMMIT}", endpoint=server.url, cache_dir=tmp_path) == first
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert _pull(server, tmp_path) == first
    with pytest.raises(FileError, match="offline mode is on"):
        _pull(server, tmp_path, revision="v1")
    assert server.requests == []


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """huggingface_hub writes in chunks of 10 MiB and loses the last, unfinished one; here the files are smaller."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 100_000)


@pytest.mark.usefixtures("small_chunks")
def test_a_broken_off_pull_is_continued_by_the_next(server: Hub, tmp_path: Path) -> None:
    server.break_at = 1_200_000
    with pytest.raises(FileError, match="continues where it stopped"):
        _pull(server, tmp_path)
    assert hub.find_cached("owner/model", cache_dir=tmp_path) is None  # half a model is no model
    server.break_at = None
    server.requests.clear()
    path = _pull(server, tmp_path)
    assert server.gets("model.safetensors") == ["bytes=1200000-"]
    assert server.bytes_served["model.safetensors"] == len(WEIGHTS)  # over both calls: no byte twice
    assert (path / "model.safetensors").read_bytes() == WEIGHTS


@pytest.mark.usefixtures("small_chunks")
def test_a_server_without_ranges_and_a_stale_partial_still_give_the_right_file(server: Hub, tmp_path: Path) -> None:
    server.break_at = 1_200_000
    with pytest.raises(FileError):
        _pull(server, tmp_path)
    server.break_at, server.ignore_range = None, True
    assert (_pull(server, tmp_path) / "model.safetensors").read_bytes() == WEIGHTS


def test_a_damaged_download_is_refused_and_not_kept(server: Hub, tmp_path: Path) -> None:
    honest = server.files["model.safetensors"]
    server.corrupt = True
    with pytest.raises(FileError, match=r"model\.safetensors .*damaged"):
        _pull(server, tmp_path)
    server.corrupt = False
    assert (_pull(server, tmp_path) / "model.safetensors").read_bytes() == honest


def test_a_pinned_revision_is_what_is_asked_for(server: Hub, tmp_path: Path) -> None:
    assert _pull(server, tmp_path, revision="v1").name == OLD_COMMIT
    assert server.requests[0][1] == "/api/models/owner/model/revision/v1"
    assert all(f"/resolve/{OLD_COMMIT}/" in path for _, path, _ in server.requests[1:])
    assert hub.resolve("owner/model@v1", offline=True, cache_dir=tmp_path).name == OLD_COMMIT
    assert hub.find_cached("owner/model", cache_dir=tmp_path) is None  # main was never fetched
    with pytest.raises(FileError, match="no revision 'v9'"):
        _pull(server, tmp_path, "owner/model@v9")


@pytest.mark.parametrize(
    ("status", "headers", "message"),
    [
        (404, {"X-Error-Code": "RepoNotFound"}, "no such model"),
        (401, {}, "refused access .401., or has no such model"),
        (403, {"X-Error-Code": "GatedRepo"}, "gated"),
        (403, {}, "refused access"),
        (500, {}, "answered 500"),
    ],
)
def test_refusals_are_told_apart(
    server: Hub, tmp_path: Path, status: int, headers: dict[str, str], message: str
) -> None:
    server.api_status = (status, headers)
    with pytest.raises(FileError, match=message) as caught:
        _pull(server, tmp_path)
    assert caught.value.fix


@pytest.mark.parametrize("body", [b"<html>sign in to the wifi</html>", b"[]", b'{"sha": "../../etc"}', b"{}"])
def test_something_that_is_not_a_hub(server: Hub, tmp_path: Path, body: bytes) -> None:
    server.api_body = body
    with pytest.raises(FileError, match="HF_ENDPOINT"):
        _pull(server, tmp_path)


def test_no_network(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="cannot be reached"):
        hub.pull("owner/model", endpoint="http://127.0.0.1:9", cache_dir=tmp_path, progress=False)


def test_a_disk_too_small_is_noticed_before_anything_is_fetched(
    server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: real._replace(free=1 << 20))
    with pytest.raises(FileError, match=r"needs 0\.00 GB more"):
        _pull(server, tmp_path)
    assert not server.gets("model.safetensors")


def test_gguf_repositories_ask_which_file(server: Hub, tmp_path: Path) -> None:
    server.files = {"model-q8_0.gguf": WEIGHTS, "model-q4_0.gguf": WEIGHTS[:2000], "README.md": b""}
    with pytest.raises(FileError, match="2 GGUF files") as caught:
        _pull(server, tmp_path)
    assert "model-q4_0.gguf" in str(caught.value) and "model-q8_0.gguf" in str(caught.value)
    path = _pull(server, tmp_path, file="*q4_0*")
    assert path.name == "model-q4_0.gguf" and path.read_bytes() == WEIGHTS[:2000]
    assert _pull(server, tmp_path, "owner/model/model-q8_0.gguf").read_bytes() == WEIGHTS
    assert hub.resolve("owner/model/model-q4_0.gguf", offline=True, cache_dir=tmp_path) == path
    with pytest.raises(FileError, match="no file"):
        _pull(server, tmp_path, file="model-q2_k.gguf")


def test_sharded_pickled_and_empty_repositories(server: Hub, tmp_path: Path) -> None:
    shards = {f"model-0000{i}-of-00002.safetensors": bytes([i]) * 10 for i in (1, 2)}
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    server.files = {
        "config.json": b"{}",
        hub.INDEX_FILE: json.dumps(index).encode(),
        "consolidated.safetensors": b"duplicate",
        **shards,
    }
    path = _pull(server, tmp_path / "1")
    assert sorted(p.name for p in path.iterdir()) == sorted(["config.json", hub.INDEX_FILE, *shards])
    (path / "model-00002-of-00002.safetensors").unlink()
    assert hub.find_cached("owner/model", cache_dir=tmp_path / "1") is None  # a shard is missing
    server.files = {"config.json": b"{}", "pytorch_model.bin": b"x"}
    with pytest.raises(FileError, match="finial convert"):
        _pull(server, tmp_path / "2")
    server.files = {"README.md": b""}
    with pytest.raises(FileError, match="holds no model"):
        _pull(server, tmp_path / "3")


def test_the_environment_names_the_endpoint(server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    assert hub.pull("owner/model", cache_dir=tmp_path, progress=False).name == COMMIT


def test_resolve_fetches_when_allowed_and_says_how_when_not(server: Hub, tmp_path: Path) -> None:
    where = {"endpoint": server.url, "cache_dir": tmp_path}
    with pytest.raises(FileError, match="finial pull owner/model"):
        hub.resolve("owner/model", download=False, **where)  # type: ignore[arg-type]
    with pytest.raises(FileError, match="offline mode is on"):
        hub.resolve("owner/model", offline=True, **where)  # type: ignore[arg-type]
    assert server.requests == []
    assert hub.resolve("owner/model", progress=False, **where).name == COMMIT  # type: ignore[arg-type]


def test_local_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "Qwen3-0.6B"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").touch()
    (tmp_path / "model-q8_0.gguf").touch()
    (tmp_path / "weights.pth").touch()
    (tmp_path / "notes.txt").touch()
    assert hub.resolve(str(folder)) == folder
    assert hub.resolve(str(folder / "model.safetensors")) == folder
    assert hub.resolve(str(tmp_path / "model-q8_0.gguf")).suffix == ".gguf"
    with pytest.raises(FileError, match=r"did you mean Qwen3-0\.6B"):
        hub.resolve(str(tmp_path / "qwen3-0.6"))
    with pytest.raises(FileError, match=r"did you mean model-q8_0\.gguf"):
        hub.resolve(str(tmp_path / "model-q4_0.gguf"))
    with pytest.raises(FileError, match="finial convert"):
        hub.resolve(str(tmp_path / "weights.pth"))
    with pytest.raises(FileError, match="not a model"):
        hub.resolve(str(tmp_path / "notes.txt"))
    with pytest.raises(FileError, match="no such folder"):
        hub.resolve(str(tmp_path / "nowhere" / "model"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileError, match=r"did you mean Qwen3-0\.6B"):
        hub.resolve("Qwen3-0.6")


@pytest.mark.parametrize(
    "name", ["model", "a/b/c", "owner/../model", "owner/mo--del", "owner/model@", "@x", "", "a b/c"]
)
def test_names_that_are_none(name: str, tmp_path: Path) -> None:
    with pytest.raises(FileError):
        hub.pull(name, endpoint="http://127.0.0.1:9", cache_dir=tmp_path, offline=True)

"""A server as a process: started on a free port, waited for, watched and ended.

Knows its command line and /proc; nothing of what it is asked.

    with finial(["demo", "--max-batch", "8"]) as server: server.port, server.memory_bytes()
"""

from __future__ import annotations

import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

READY_S = 180.0


@dataclass
class Server:
    """One that answers."""

    name: str
    port: int
    process: subprocess.Popen[bytes]
    log: Path

    def memory_bytes(self) -> int:
        """Resident now."""
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
        raise RuntimeError(f"{self.name} has ended: {self.log.read_text()[-2000:]}")


@contextmanager
def finial(arguments: Sequence[str]) -> Iterator[Server]:
    """`finial serve`."""
    port = free_port()
    command = [sys.executable, "-m", "finial.cli", "serve", *arguments, "--port", str(port), "--no-log"]
    with started("finial", command, port, "/ready") as server:
        yield server


@contextmanager
def started(name: str, command: Sequence[str], port: int, ready: str) -> Iterator[Server]:
    """A process whose port answers 200 at `ready`; RuntimeError with its last words when it does not."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with log.open("wb") as out:
            process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
        try:
            deadline = time.monotonic() + READY_S
            while not _answers(port, ready):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"{name} does not answer: {log.read_text(errors='replace')[-2000:]}")
                time.sleep(0.1)
            yield Server(name, port, process, log)
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _answers(port: int, path: str) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=2) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def free_port() -> int:
    """One that nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])

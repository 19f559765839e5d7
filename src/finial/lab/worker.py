"""An engine in its own process, spoken to in JSON lines, and stopped while others are measured.

Knows the protocol (docs/lab-protocol.md); nothing of workloads.

    worker = Worker([python, "run_finial.py"], {}); worker.ask("load", model=…, timeout_s=120)
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

QUIT_S = 10.0


class WorkerError(Exception):
    """The engine said no, died or took too long; the message is the reason for its row."""


class Worker:
    """One process.  It runs only inside `ask`: between two questions it is stopped, and so are its spinning threads.

    Args:
        command: interpreter and adapter.
        environment: added to this process's own.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115
        try:
            self._process = subprocess.Popen(
                list(command),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                env={**os.environ, **environment},
                text=True,
                encoding="utf-8",
            )
        except OSError as error:
            raise WorkerError(f"{command[0]} does not start: {error}") from error
        self._replies: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def ask(self, op: str, timeout_s: float, **fields: Any) -> dict[str, Any]:
        """One request and its reply.

        Raises:
            WorkerError: the reply says no, there is none in time, or the process is gone; it is ended in the last two.
        """
        assert self._process.stdin is not None
        self._signal("SIGCONT")
        try:
            self._process.stdin.write(json.dumps({"op": op, **fields}) + "\n")
            self._process.stdin.flush()
            line = self._replies.get(timeout=timeout_s)
        except queue.Empty:
            self.kill()
            raise WorkerError(f"no answer to {op} within {timeout_s:.0f} s") from None
        except OSError:
            line = ""
        if not line:
            self.kill()
            raise WorkerError(f"died in {op} with status {self._process.returncode}: {self.last_words()}")
        self._signal("SIGSTOP")
        reply: dict[str, Any] = json.loads(line)
        if not reply.pop("ok"):
            raise WorkerError(str(reply["error"]))
        return reply

    def processor_seconds(self) -> float | None:
        """Processor time of all its threads so far; None where nobody says."""
        try:
            fields = Path(f"/proc/{self._process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        except (OSError, IndexError):
            return None
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")  # proc_pid_stat(5): utime, stime

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self._process.poll() is None

    def last_words(self) -> str:
        """The last line it wrote to stderr."""
        self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, self._log.tell() - 4096))
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it said nothing"

    def close(self) -> None:
        """Let it end by itself, or end it."""
        if self.alive:
            assert self._process.stdin is not None
            self._signal("SIGCONT")
            try:
                self._process.stdin.write('{"op": "quit"}\n')
                self._process.stdin.close()
                self._process.wait(QUIT_S)
            except (OSError, subprocess.TimeoutExpired):
                pass  # it is killed below
        self.kill()

    def kill(self) -> None:
        """End it now."""
        if self.alive:
            self._process.kill()
        self._process.wait()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._replies.put(line)
        self._replies.put("")

    def _signal(self, name: str) -> None:
        number = getattr(signal, name, None)  # Windows has neither
        if number is not None and self.alive:
            self._process.send_signal(number)

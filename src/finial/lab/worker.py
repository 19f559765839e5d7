"""An engine in its own process group, spoken to in JSON lines, watched, and stopped while others are measured.

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
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

QUIT_S = 10.0
WATCH_S = 0.1  # between two looks at its memory and its log: some ten microseconds each
LINE_BYTES = 16 << 20  # of one reply
LOG_BYTES = 16 << 20  # of everything it writes to stderr


class WorkerError(Exception):
    """The engine said no, died or went beyond a limit; the message is the reason for its row."""


class Worker:
    """One process and what it starts.  It runs only inside `ask`: between two questions its group is stopped.

    Args:
        command: interpreter and adapter.
        environment: added to this process's own.
        memory_bytes: physical memory of the whole group at most; None: no limit.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], memory_bytes: int | None = None) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115
        self._memory_bytes = memory_bytes
        self._broken = ""  # the limit it went beyond
        self._asked = threading.Event()
        try:
            self._process = subprocess.Popen(
                list(command),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                env={**os.environ, **environment},
                # A group of its own, in this session: Linux shares processor time out by session (sched(7), autogroup).
                process_group=0 if os.name == "posix" else None,
            )
        except OSError as error:
            self._log.close()
            raise WorkerError(f"{command[0]} does not start: {error}") from error
        self._replies: queue.Queue[bytes] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        threading.Thread(target=self._watch, daemon=True).start()

    def ask(self, op: str, timeout_s: float, **fields: Any) -> dict[str, Any]:
        """One request and its reply.

        Raises:
            WorkerError: the reply says no or is none, there is none in time, or the process is gone or was ended for
                going beyond a limit.
        """
        assert self._process.stdin is not None
        self._signal("SIGCONT")
        self._asked.set()
        try:
            self._process.stdin.write(json.dumps({"op": op, **fields}).encode() + b"\n")
            self._process.stdin.flush()
            line = self._replies.get(timeout=timeout_s)
        except queue.Empty:
            self.kill()
            raise WorkerError(f"no answer to {op} within {timeout_s:.0f} s") from None
        except (OSError, ValueError):
            line = b""
        finally:
            self._asked.clear()
        if not line:
            self.kill()
            how = self._broken or f"died in {op} with status {self._process.returncode}: {self.last_words()}"
            raise WorkerError(how)
        self._signal("SIGSTOP")
        try:
            reply = json.loads(line)
            good = reply.pop("ok")
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
            self.kill()
            raise WorkerError(f"its answer to {op} is none: {line[:80].decode(errors='replace')!r}") from None
        if not good:
            raise WorkerError(str(reply.get("error", "it said no, and not why"))[:2000])
        return dict(reply)

    def processor_seconds(self) -> float | None:
        """Processor time of all its threads so far; None where nobody says."""
        try:
            fields = Path(f"/proc/{self._process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        except (OSError, IndexError):
            return None
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")  # proc_pid_stat(5): utime, stime

    @property
    def pid(self) -> int:
        """Of the process that leads its group."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self._process.poll() is None

    def last_words(self) -> str:
        """The last line it wrote to stderr."""
        self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, self._log.tell() - 4096))
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        return lines[-1][:500] if lines else "it said nothing"

    def close(self) -> None:
        """Let it end by itself, or end it."""
        if self.alive:
            assert self._process.stdin is not None
            self._signal("SIGCONT")
            try:
                self._process.stdin.write(b'{"op": "quit"}\n')
                self._process.stdin.close()
                self._process.wait(QUIT_S)
            except (OSError, ValueError, subprocess.TimeoutExpired):
                pass  # it is killed below
        self.kill()

    def kill(self) -> None:
        """End it and all that it started, now."""
        self._signal("SIGKILL", whole=True)
        if self.alive:
            self._process.kill()
        self._process.wait()

    # --- watching ----------------------------------------------------------------------------------------------

    def _read(self) -> None:
        assert self._process.stdout is not None
        while True:
            line = self._process.stdout.readline(LINE_BYTES + 1)
            if len(line) > LINE_BYTES:
                self._end(f"wrote more than {LINE_BYTES >> 20} MiB in one answer")
                line = b""
            self._replies.put(line)
            if not line:
                return

    def _watch(self) -> None:
        while self.alive:
            if not self._asked.wait(1.0):  # stopped: nothing grows
                continue
            log = os.fstat(self._log.fileno()).st_size
            if log > LOG_BYTES:
                self._end(f"wrote more than {LOG_BYTES >> 20} MiB beside its answers")
            held = self._memory_bytes is not None and group_bytes(self._process.pid)
            if held and self._memory_bytes is not None and held > self._memory_bytes:
                limit = self._memory_bytes / 1e9
                self._end(f"held {held / 1e9:.2f} GB of memory, more than its limit of {limit:.2f} GB")
            time.sleep(WATCH_S)

    def _end(self, reason: str) -> None:
        self._broken = self._broken or reason
        self._signal("SIGKILL", whole=True)

    def _signal(self, name: str, whole: bool = False) -> None:
        number = getattr(signal, name, None)  # Windows has none of these
        if number is None or not (whole or self.alive):
            return
        try:
            os.killpg(self._process.pid, number)
        except (OSError, AttributeError):
            return  # they are gone


def group_bytes(pid: int) -> int:
    """Physical memory of a process and its children's children, counted as each sees it; 0 where nobody says."""
    total, left = 0, [pid]
    while left:
        process = Path(f"/proc/{left.pop()}")
        try:
            total += int((process / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
            for task in (process / "task").iterdir():
                left += [int(child) for child in (task / "children").read_text().split()]
        except (OSError, IndexError, ValueError):
            continue
    return total

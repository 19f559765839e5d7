"""finial's commands as tests run them: in this process, in a process with pipes, in a pseudo-terminal."""

from __future__ import annotations

import errno
import os
import re
import select
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import finial

SOURCES = str(Path(finial.__file__).parents[1])
GREEDY = ["--temperature", "0", "--threads", "1"]


def environment(**changes: str) -> dict[str, str]:
    base = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "FORCE_COLOR", "COLUMNS")}
    return base | {"PYTHONPATH": SOURCES, "OMP_NUM_THREADS": "1", "TERM": "xterm-256color"} | changes


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "finial.cli", *arguments]


def finial_(*arguments: str, stdin: str | None = None, **changes: str) -> subprocess.CompletedProcess[str]:
    """A real process with pipes; without `stdin` there is none to read."""
    given = {"input": stdin} if stdin is not None else {"stdin": subprocess.DEVNULL}
    return subprocess.run(
        command(*arguments), capture_output=True, text=True, timeout=250, env=environment(**changes), **given
    )


Call = Callable[..., tuple[int, str, str]]


class Terminal:
    """A command in a pseudo-terminal."""

    def __init__(self, *arguments: str, columns: int = 80, **changes: str) -> None:
        import fcntl
        import pty
        import struct
        import termios

        leader, follower = pty.openpty()
        fcntl.ioctl(leader, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
        self.process = subprocess.Popen(
            command(*arguments),
            stdin=follower,
            stdout=follower,
            stderr=follower,
            env=environment(**changes),
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # so that ^C typed here becomes SIGINT
        )
        os.close(follower)
        self._leader = leader
        self.shown = ""

    def until(self, *words: str, limit_s: float = 40.0) -> str:
        """Read until all words were shown since the last call; returns what was."""
        start, deadline = len(self.shown), time.monotonic() + limit_s
        while not all(word in self.shown[start:] for word in words):
            assert time.monotonic() < deadline, f"{words} not in {self.shown[start:]!r}"
            assert self._read(0.2), f"ended without {words}: {self.shown[start:]!r}"
        return self.shown[start:]

    def asked(self) -> None:
        """Wait for the prompt, and until the process sleeps: readline listens for signals a moment after it."""
        self.until("> ")
        self._wait(lambda: self._stat()[0] == "S")

    def taken(self, line: str) -> None:
        """Wait until a line that was typed is shown, and has been computed with for a fifth of a second."""
        self.until(line)
        end = self._stat()[1] + 20
        self._wait(lambda: self._stat()[1] >= end)

    def _wait(self, reached: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 40
        if self._stat()[0] == "":
            time.sleep(0.5)
            return
        while not reached():
            assert time.monotonic() < deadline, f"it stays {self._stat()}"
            time.sleep(0.01)

    def _stat(self) -> tuple[str, int]:
        """The process's state, empty on a system without /proc, and the hundredths of a second it has computed."""
        file = Path(f"/proc/{self.process.pid}/stat")
        if not file.exists():
            return "", 0
        state, *numbers = file.read_text().rsplit(")", 1)[1].split()
        return state, int(numbers[10])

    def _read(self, wait_s: float) -> bool:
        if not select.select([self._leader], [], [], wait_s)[0]:
            return True
        try:
            data = os.read(self._leader, 1 << 16)
        except OSError as error:
            if error.errno != errno.EIO:  # what Linux says when the other side is closed
                raise
            data = b""
        self.shown += data.decode(errors="replace")
        return bool(data)

    def type(self, text: str) -> None:
        os.write(self._leader, text.encode())

    def end(self) -> tuple[int, str]:
        """(exit code, everything that was shown)."""
        deadline = time.monotonic() + 40
        while self._read(0.2):
            assert time.monotonic() < deadline, f"does not end: {self.shown!r}"
        code = self.process.wait(timeout=60)
        os.close(self._leader)
        return code, self.shown


def lines_of(shown: str) -> list[str]:
    """What a person sees, without colours and cursor movements."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown).replace("\r\n", "\n").split("\n")

"""The files of a job: requests read line by line, answers appended in their order and never twice.

Whatever ended a run, the next one cuts off a torn last line, sees how far the file goes and continues behind it.  Knows
lines and their names; nothing of what is asked.

    with JobFiles(Path("in.jsonl"), Path("out.jsonl")) as files:
        for line in files.pending(): files.append([answer(line)])
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NamedTuple, Self

import msgspec

from finial.errors import FileError

MAX_LINE = 8 << 20  # bytes; a request of the server's largest size, written with escapes
SYNC_S = 0.5  # a power cut may take what so many seconds brought; a killed process loses nothing


class Line(NamedTuple):
    """One request as it stands in the file; `number` counts the lines that are not blank, from 0."""

    number: int
    text: bytes


class _Id(msgspec.Struct):
    custom_id: Any = None


class JobFiles:
    """The two files of a job; what the answers' file holds already is checked when it is opened.

    Attributes:
        done: answers in the file.

    Raises:
        FileError: a file cannot be read or written, another process writes the answers, or what stands there
            already are no answers to these requests.
    """

    def __init__(self, source: Path, target: Path) -> None:
        self._source = source
        self.target = target
        self.done = 0
        self._synced = time.monotonic()
        if not source.is_file():
            raise FileError(f"{source}: no such file", fix="name a file with one request on each line")
        if target.exists() and target.samefile(source):
            raise FileError(f"{target}: is the file of requests itself", fix="name another file for the answers")
        try:
            self._file = target.open("a+b", buffering=0)
        except OSError as error:
            raise FileError(f"{target}: cannot be written to ({error.strerror})", fix="choose another place") from None
        try:
            _lock(self._file, target)
            self._resume()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        os.fsync(self._file.fileno())
        self._file.close()

    def count(self) -> int:
        """Requests in all, answered ones included."""
        return sum(1 for _ in lines(self._source))

    def pending(self) -> Iterator[Line]:
        """The requests that have no answer yet."""
        return (line for line in lines(self._source) if line.number >= self.done)

    def append(self, answers: list[bytes]) -> None:
        """Add the next answers, in the order of the requests, each without its line end."""
        data = memoryview(b"".join([answer + b"\n" for answer in answers]))
        while data:
            data = data[self._file.write(data) :]
        self.done += len(answers)
        if time.monotonic() - self._synced > SYNC_S:
            os.fsync(self._file.fileno())
            self._synced = time.monotonic()

    def _resume(self) -> None:
        """Cut off a torn last line; FileError unless each line answers the request with its number."""
        whole = 0
        self._file.seek(0)
        requests = lines(self._source)
        with open(self._file.fileno(), "rb", closefd=False) as written:
            for text in written:
                if not text.endswith(b"\n"):
                    break
                request = next(requests, None)
                try:
                    answered = msgspec.json.decode(text, type=_Id)
                except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
                    answered = None
                if request is None or answered is None or answered.custom_id != custom_id(request.text):
                    at = self.done + 1
                    raise FileError(
                        f"{self.target}: line {at} does not answer request {at} of {self._source}",
                        fix="name a new file for the answers, or delete this one to begin again",
                    )
                self.done += 1
                whole += len(text)
        self._file.truncate(whole)


def first_model(source: Path) -> str | None:
    """The model that the first request names, if it names one; nothing is raised for a damaged line."""
    if source.is_file():
        for line in lines(source):
            try:
                model = msgspec.json.decode(line.text)["body"]["model"]
            except (msgspec.DecodeError, UnicodeDecodeError, KeyError, TypeError, RecursionError):
                return None
            return model if isinstance(model, str) and model else None
    return None


def lines(path: Path) -> Iterator[Line]:
    """Lines that are not blank, without their ends; one that is too long is cut behind its limit."""
    number = 0
    with path.open("rb") as file:
        while text := file.readline(MAX_LINE + 2):
            whole = text
            while not whole.endswith(b"\n") and (whole := file.readline(1 << 20)):
                pass
            text = text.rstrip(b"\r\n")
            if text.strip():
                yield Line(number, text)
                number += 1


def custom_id(text: bytes) -> str | None:
    """The line's own name, as far as it has one that can be read."""
    try:
        found = msgspec.json.decode(text, type=_Id).custom_id
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    return found if isinstance(found, str) else None


def _lock(file: IO[bytes], path: Path) -> None:
    """Nobody else may write the answers; the lock goes with the process."""
    try:
        import fcntl
    except ImportError:  # Windows: two jobs on one file are the person's to avoid
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise FileError(f"{path}: another process writes it", fix="wait for it, or name another file") from None

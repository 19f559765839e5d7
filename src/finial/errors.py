"""The errors a user can cause, each carrying what is wrong and what to do about it.

Knows nothing of models or devices.  `assert` is for what only we can get wrong; everything that a
person, a file or a machine can cause is a `FinialError`:

    raise FileError("model.gguf: tensor count 2**60 exceeds the file's 1,024 bytes", fix="fetch it again")
"""

from __future__ import annotations


class FinialError(Exception):
    """A problem with its cause named.

    Args:
        what: one sentence naming the value and what was expected.
        fix: what the person can do about it, as an imperative; may be empty when `what` says it all.
    """

    def __init__(self, what: str, fix: str = "") -> None:
        super().__init__(what, fix)
        self.what = what
        self.fix = fix

    def __str__(self) -> str:
        return f"{self.what}\n  fix: {self.fix}" if self.fix else self.what


class FileError(FinialError):
    """A file or directory is missing, damaged, or of another kind than it claims."""


class ModelError(FinialError):
    """A model that finial cannot run as written: unknown architecture, unknown field, wrong shape."""


class BackendError(FinialError):
    """A backend is unavailable here, or cannot run a node of the graph."""


class RequestError(FinialError):
    """A request whose arguments cannot be honoured (sampling, length, template)."""

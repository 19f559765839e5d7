"""The backends that this machine can run: all of the table, those for a GPU only where there is one."""

from __future__ import annotations

from finial.backends import BACKENDS as TABLE
from finial.backends import get_backend
from finial.errors import BackendError


def _usable(name: str) -> bool:
    if name in ("cpu", "reference"):
        return True  # that one of these is missing must be seen
    try:
        get_backend(name)
    except BackendError:
        return False
    return True


BACKENDS = [name for name in TABLE if _usable(name)]

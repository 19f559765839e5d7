"""Waiting for what is certain to come.

until(lambda: path.exists())
"""

from __future__ import annotations

import time
from collections.abc import Callable

HUNG_S = 60.0  # nothing that is waited for takes nearly so long, on a busy machine either


def until(true: Callable[[], bool], said: Callable[[], str] = lambda: "") -> None:
    """Wait until something is so; an AssertionError when it hangs.

    Args:
        said: what to say then.
    """
    end = time.monotonic() + HUNG_S
    while not true():
        assert time.monotonic() < end, said()
        time.sleep(0.01)

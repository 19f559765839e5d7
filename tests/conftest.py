"""What holds for the whole suite."""

from __future__ import annotations

import io
import os
import signal
import sys

import pytest
from hypothesis import settings

from commands import Call
from finial.cli import invoke

# A shell starts what it puts into the background with interrupts ignored, and so would be every command under test.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Commands under test write to a pipe, which has no width; pytest-xdist says 80 columns for all.
for name in ("COLUMNS", "LINES"):
    os.environ.pop(name, None)

# An example that takes long says something of the machine, not of us.  Further settings stay, such as those in CI.
settings.register_profile("finial", deadline=None)
settings.load_profile("finial")


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Call:
    """One command line in this process: (exit code, standard output, standard error)."""

    def run(*arguments: str, stdin: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        code = invoke(arguments)
        return code, *capsys.readouterr()

    return run

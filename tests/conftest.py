"""What holds for the whole suite."""

from __future__ import annotations

import signal

from hypothesis import settings

# A shell starts what it puts into the background with interrupts ignored, and so would be every command under test.
signal.signal(signal.SIGINT, signal.default_int_handler)

# An example that takes long says something of the machine, not of us.  Further settings stay, such as those in CI.
settings.register_profile("finial", deadline=None)
settings.load_profile("finial")

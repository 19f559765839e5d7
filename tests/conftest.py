"""What holds for the whole suite."""

from __future__ import annotations

import signal

# A shell starts what it puts into the background with interrupts ignored, and so would be every command under test.
signal.signal(signal.SIGINT, signal.default_int_handler)

"""`python -m finial.cli`, the same as `finial`."""

from __future__ import annotations

from finial.cli import main

main()

"""finial: small language models as fast as the machine physically allows, and the proof of it.

The version stands here alone; pyproject.toml reads it from this file.
"""

from __future__ import annotations

__version__ = "0.1.0"

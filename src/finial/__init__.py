"""finial: small language models as fast as the machine physically allows, and the proof of it.

The version stands here alone; pyproject.toml reads it from this file.  What is upstairs is imported when it is asked
for, so that `import finial` costs nothing.

    from finial import LLM
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from finial.engine.sampling import SamplingParams
    from finial.errors import FinialError
    from finial.llm import LLM

__version__ = "0.1.0"
__all__ = ["LLM", "SamplingParams", "FinialError", "__version__"]

_ROOMS = {"LLM": "finial.llm", "SamplingParams": "finial.engine.sampling", "FinialError": "finial.errors"}


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module 'finial' has no attribute {name!r}")
    return getattr(importlib.import_module(_ROOMS[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)

"""Prints what the package's extras ask for, a requirement a line: to be installed without building the package again.

Knows pyproject.toml alone.
Use: `python tools/extras.py test dev > requirements.txt`
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"


def requirements(names: list[str]) -> list[str]:
    """Of these extras and of those that they name in turn ("finial[serve]")."""
    project = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]
    found: dict[str, None] = {}
    waiting = list(names)
    seen: set[str] = set()
    while waiting:
        name = waiting.pop(0)
        if name in seen:
            continue
        seen.add(name)
        if name not in project["optional-dependencies"]:
            sys.exit(f"no extra {name!r}: there are {', '.join(project['optional-dependencies'])}")
        for requirement in project["optional-dependencies"][name]:
            own = re.fullmatch(rf"{project['name']}\[([^\]]+)\]", requirement)
            if own is None:
                found[requirement] = None
            else:
                waiting += [part.strip() for part in own[1].split(",")]
    return list(found)


if __name__ == "__main__":
    print("\n".join(requirements(sys.argv[1:])))

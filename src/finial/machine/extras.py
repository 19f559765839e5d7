"""Optional parts: which of a distribution's extras are installed, and the command for those that are not.

Reads the installed package's own metadata, so that there is no second list to keep.

    for extra in probe_extras(): extra.name, extra.missing, extra.command
"""

from __future__ import annotations

import importlib.metadata
import platform
import re
import sys
from dataclasses import dataclass


@dataclass(frozen=True)
class Extra:
    """One extra: the distributions that it asks for, and those of them that are not installed."""

    name: str
    packages: tuple[str, ...]
    missing: tuple[str, ...]
    command: str

    @property
    def installed(self) -> bool:
        """Whether nothing is missing."""
        return not self.missing


def probe_extras(distribution: str = "finial") -> tuple[Extra, ...] | None:
    """The extras in order of name; None when `distribution` runs from its sources without being installed."""
    try:
        metadata = importlib.metadata.metadata(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
    names = metadata.get_all("Provides-Extra") or []
    requirements = importlib.metadata.requires(distribution) or []
    extras = []
    for name in sorted(names):
        packages = tuple(sorted(_packages(distribution, name, requirements, frozenset())))
        missing = tuple(package for package in packages if not _has(package))
        extras.append(Extra(name, packages, missing, f'pip install "{distribution}[{name}]"'))
    return tuple(extras)


# Dependency specifiers: name, [extras], version (or @ address), ; markers.
_REQUIREMENT = re.compile(r"\s*([A-Za-z0-9][\w.-]*)\s*(?:\[([^\]]*)\])?[^;]*(?:;(.*))?")
_MARKER = re.compile(r"(\w+)\s*(==|!=)\s*['\"]([^'\"]*)['\"]")


def _packages(distribution: str, extra: str, requirements: list[str], seen: frozenset[str]) -> set[str]:
    """Distributions of one extra; those that name the distribution's own extras are followed."""
    packages: set[str] = set()
    for requirement in requirements:
        match = _REQUIREMENT.fullmatch(requirement)
        if match is None or not _applies(match[3] or "", extra):
            continue
        if _normal(match[1]) == _normal(distribution):
            for inner in filter(None, (part.strip() for part in (match[2] or "").split(","))):
                if inner not in seen:
                    packages |= _packages(distribution, inner, requirements, seen | {extra})
        else:
            packages.add(match[1])
    return packages


def _applies(marker: str, extra: str) -> bool:
    """Whether a marker asks for this extra on this platform.

    Conditions joined by `and`, with == and != on names of strings, are understood; others count as met, so that at
    worst a package is shown as missing that this platform does not need.
    """
    here = {
        "extra": extra,
        "sys_platform": sys.platform,
        "platform_system": platform.system(),
        "platform_machine": platform.machine(),
    }
    conditions = _MARKER.findall(marker)
    if not any(name == "extra" for name, _, _ in conditions):
        return False
    return all((here[name] == value) == (sign == "==") for name, sign, value in conditions if name in here)


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _has(package: str) -> bool:
    try:
        importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True

"""The versions that tests are run with, against what the package asks for."""

from __future__ import annotations

import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def requirements(extra: str) -> list[Requirement]:
    """Those of an extra, and of the extras that it names."""
    found = []
    for requirement in map(Requirement, PROJECT["optional-dependencies"][extra]):
        if requirement.name == PROJECT["name"]:
            found += [below for name in requirement.extras for below in requirements(name)]
        else:
            found.append(requirement)
    return found


def test_every_package_has_one_version_that_is_allowed() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {canonicalize_name(pin.name): pin.specifier for pin in map(Requirement, filter(is_pin, lines))}
    for requirement in (*map(Requirement, PROJECT["dependencies"]), *requirements("dev")):
        (exact,) = pinned[canonicalize_name(requirement.name)]
        assert exact.operator == "=="
        assert requirement.specifier.contains(exact.version), requirement


def is_pin(line: str) -> bool:
    return not line.startswith("#")

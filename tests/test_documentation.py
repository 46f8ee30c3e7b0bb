"""What the documentation shows is what the code does."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

import flap_export
from flap_export.families import FAMILIES
from flap_export.recipe import Recipe, recipe_from

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def shown_recipe() -> dict[str, Any]:
    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8"), re.DOTALL)
    (values,) = map(yaml.safe_load, blocks)
    assert isinstance(values, dict)
    return values


def keys_of(model: BaseModel) -> dict[str, Any]:
    """Names of all fields, those of sections below them."""
    return {
        field.alias or name: keys_of(value) if isinstance(value := getattr(model, name), BaseModel) else None
        for name, field in type(model).model_fields.items()
    }


def test_the_shown_recipe_has_every_key_and_every_default() -> None:
    values = shown_recipe()
    least = {"model": values["model"], "calibrate": {"source": "text.txt"}, "prune": {"ratio": 0.2}, "search": {}}
    shown, defaults = recipe_from(values), recipe_from(least)
    assert shown == defaults
    known = keys_of(defaults)
    assert {name: set(section) if isinstance(section, dict) else None for name, section in values.items()} == {
        name: set(section) if section is not None else None for name, section in known.items()
    }
    assert set(known) == {field.alias or name for name, field in Recipe.model_fields.items()}


def test_the_page_about_python_has_every_public_name() -> None:
    text = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    named = set(re.findall(r"\w+", " ".join(re.findall(r"`([^`]+)`", text))))
    assert set(flap_export.__all__) - {"__version__"} <= named
    assert set(re.findall(r"flap_export\.(\w+)", text)) <= set(flap_export.__all__)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]*)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert target.startswith("http") or (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_files_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for path in re.findall(r"`((?:flap_export|benchmarks|pipelines|tests|docs)/[\w./-]+)`", text):
        assert (ROOT / path).exists(), path


def test_the_number_of_families_is_as_said() -> None:
    rows = [row for row in FAMILIES.values() if not row.mixture]
    assert f"{len(FAMILIES)} model families" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"{len(rows)} plain families" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")

"""The stage itself: read the records, make the page, write it whole; of a run, or of a search."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from flap_export.manifest import Manifest, note
from flap_export.reporting.page import Page, page_from
from flap_export.reporting.records import altered_records, read_run
from flap_export.reporting.searches import SearchPage, search_page
from flap_export.searching.record import SEARCH_NAME, SearchReport
from flap_export.storage import MANIFEST_NAME, write_text

_logger = logging.getLogger(__name__)

REPORT_NAME: Final = "report.html"


def report(run_directory: str | Path, *, recipe: Mapping[str, Any] | None = None) -> Path:
    """Write `report.html` into the directory of a run or a search: self-contained, opens from disk.

    A run's directory holds `plan.json`, `onnx/dense` and `onnx/pruned`; `parity.json`, `quality.json`, `latency.json`
    and `manifest.json` may be missing, and the page then says so.

    Args:
        run_directory: the output directory of a run.
        recipe: what the run was asked to do, its gates among it; None takes it from the manifest, where there is one.

    Returns:
        The path of the page.

    Raises:
        InputError: no plan or no artifact, a record that cannot be read, or parts of different runs.
        OutputError: the page cannot be written.
    """
    directory = Path(run_directory)
    path = directory / REPORT_NAME
    if (directory / SEARCH_NAME).is_file():
        found = SearchReport.load(directory / SEARCH_NAME)
        manifest = Manifest.load(directory / MANIFEST_NAME) if (directory / MANIFEST_NAME).is_file() else None
        page: Page | SearchPage = search_page(found, altered_records(directory, (SEARCH_NAME,), manifest))
        text = _rendered("search.html", page)
    else:
        page = page_from(read_run(directory, recipe))
        text = _rendered("report.html", page)
    if page.altered is not None:
        _logger.warning("%s", page.altered)
    write_text(path, text)
    note(path)
    return path


def _rendered(template: str, page: Page | SearchPage) -> str:
    """The page as HTML; every text is escaped, names and reasons come from outside."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["pct"] = "{:.3f}%".format
    return environment.get_template(template).render(page=page)

"""Stage `search`: pruning rates per layer, searched by a language model or by chance (Self-Pruner, 2502.14413)."""

from __future__ import annotations

from flap_export.searching.record import SEARCH_NAME, SearchOptions, SearchReport
from flap_export.searching.stage import search

__all__ = ["SEARCH_NAME", "SearchOptions", "SearchReport", "search"]

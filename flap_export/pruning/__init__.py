"""Stage `prune`: choose what goes, restore, rewrite and save, from a method's evidence or from scratch."""

from __future__ import annotations

from flap_export.pruning.stage import prune

__all__ = ["prune"]

"""Stage `export`: a checkpoint becomes an ONNX graph of standard operators with its KV cache in place."""

from __future__ import annotations

from flap_export.exporting.stage import cache_length, export

__all__ = ["cache_length", "export"]

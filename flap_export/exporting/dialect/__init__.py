"""The ONNX dialect: while it is spoken, a transformers model calls standard operators instead of torch code.

Attention, cache updates, a family's own norms and rotary embeddings each become one node; a mixture's experts become
one FFN. No `com.microsoft` operator and no custom one: the graph runs wherever opset 24 does.
"""

from __future__ import annotations

from flap_export.exporting.dialect.attention import ScatterCache
from flap_export.exporting.dialect.rotary import rotary_tables
from flap_export.exporting.dialect.speaking import speaking_onnx

__all__ = ["ScatterCache", "rotary_tables", "speaking_onnx"]

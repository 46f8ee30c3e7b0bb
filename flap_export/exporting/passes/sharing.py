"""Let equal constants be one value, so that what layers compute alike from them is seen to be the same.

Precondition: constants are folded, into initializers of their own.
Postcondition: no two small constants of one type hold the same. Weights stay as they are.
"""

from __future__ import annotations

import onnx_ir as ir

from flap_export.exporting.passes.values import is_weight

_MAX_ELEMENTS = 256
"""As many as a layer has heads, whose slopes are constants where it has ALiBi."""


class ShareConstantsPass(ir.passes.InPlacePass):
    """f(x, 4.0), f(x, 4.0) read one 4.0."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Replace in place."""
        graph, first = model.graph, dict[object, ir.Value]()
        modified = False
        for name, value in list(graph.initializers.items()):
            tensor = value.const_value
            if tensor is None or is_weight(value) or tensor.size > _MAX_ELEMENTS:
                continue
            key = (tensor.dtype, tuple(tensor.shape.numpy()), tensor.tobytes())
            kept = first.setdefault(key, value)
            if kept is not value:
                ir.convenience.replace_all_uses_with(value, kept)
                graph.initializers.pop(name)
                modified = True
        return ir.passes.PassResult(model, modified=modified)

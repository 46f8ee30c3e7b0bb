"""Fold what is computed from constants alone.

Postcondition: no node has constant inputs only, except those that read a weight.
"""

from __future__ import annotations

import onnx_ir as ir


class FoldConstantsPass(ir.passes.InPlacePass):
    """ONNX Script's constant folding, kept away from weights: they are fake while the graph is optimized."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Fold in place."""
        import onnxscript.optimizer

        weights = set(model.graph.initializers)

        def should_fold(node: ir.Node) -> bool | None:
            return False if any(value is not None and value.name in weights for value in node.inputs) else None

        result = onnxscript.optimizer.fold_constants(model, should_fold=should_fold, onnx_shape_inference=False)
        return ir.passes.PassResult(model, modified=result.modified)

"""Graph passes over lazy initializers: small, in order, none of which reads a large weight.

A pass states what it needs and what holds after it. `optimize` runs them all.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import PassError, Sequential, common

from flap_export.errors import FlapExportError
from flap_export.exporting.passes.constants import FoldConstantsPass
from flap_export.exporting.passes.heads import LayOutHeadsPass
from flap_export.exporting.passes.logits import KeepAllLogitsPass
from flap_export.exporting.passes.loops import MakeLoopsPass
from flap_export.exporting.passes.projections import FuseProjectionsPass
from flap_export.exporting.passes.reshapes import StaticReshapesPass
from flap_export.exporting.passes.rotaries import JoinPartialRotariesPass
from flap_export.exporting.passes.scales import FoldQueryScalesPass
from flap_export.exporting.passes.sharing import ShareConstantsPass
from flap_export.exporting.passes.slices import RemoveFullSlicesPass
from flap_export.exporting.passes.splits import SplitSlicesPass
from flap_export.exporting.passes.transposes import TransposeWeightsPass

__all__ = ["keep_all_logits", "optimize"]


def optimize(ir_model: ir.Model) -> ir.Model:
    """Simplify a traced graph: about a quarter of its nodes remain.

    Raises:
        ModelError: a tensor that is read on the way holds NaN or infinity.
    """
    passes = Sequential(
        FoldConstantsPass(),
        ShareConstantsPass(),
        common.IdentityEliminationPass(),
        common.CommonSubexpressionEliminationPass(),
        RemoveFullSlicesPass(),
        SplitSlicesPass(),
        JoinPartialRotariesPass(),
        FoldQueryScalesPass(),
        StaticReshapesPass(),
        common.RemoveUnusedNodesPass(),
        TransposeWeightsPass(),
        FuseProjectionsPass(),
        LayOutHeadsPass(),
        common.RemoveUnusedNodesPass(),
        MakeLoopsPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.DeduplicateInitializersPass(size_limit=64),
        common.ClearMetadataAndDocStringPass(),
        common.TopologicalSortPass(),
    )
    try:
        return passes(ir_model).model
    except PassError as error:
        # Small tensors are read to be compared; one that is damaged says so itself.
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, FlapExportError):
            cause = cause.__cause__
        raise cause or error from error


def keep_all_logits(ir_model: ir.Model) -> ir.Model:
    """Turn an optimized graph of the last token's logits into one of all logits."""
    return Sequential(KeepAllLogitsPass(), common.RemoveUnusedNodesPass())(ir_model).model

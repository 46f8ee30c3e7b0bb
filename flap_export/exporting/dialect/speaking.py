"""Make a model speak the dialect, for one trace."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Final

from torch import Tensor, nn

from flap_export.exporting.dialect.activations import ACTIVATIONS
from flap_export.exporting.dialect.attention import attention
from flap_export.exporting.dialect.experts import StackedExperts
from flap_export.exporting.dialect.norms import normalized
from flap_export.exporting.dialect.rotary import turning_by
from flap_export.exporting.dialect.routers import looks_at_no_group, routed
from flap_export.models.attention import attend_by
from flap_export.models.modeling_pruned import Experts
from flap_export.models.opening import Checkpoint

NAME: Final = "flap_export_onnx"


@contextmanager
def speaking_onnx(model: nn.Module, checkpoint: Checkpoint, tables: Mapping[str, Tensor]) -> Iterator[None]:
    """Make `model`, built for this trace only, speak the dialect; global functions are put back at the end.

    Args:
        model: a causal LM with fake weights.
        checkpoint: what it was built from.
        tables: `rotary_tables` and `slope_tables`, as the trace sees them.
    """
    family = checkpoint.family
    attend_by(attention, NAME, model, family)
    for path, module in list(model.named_modules()):
        if family.norm.covers(module):
            module.forward = partial(normalized, module, family.norm)
        if activation := ACTIVATIONS.get(type(module).__name__):
            module.forward = partial(activation, module)
        if looks_at_no_group(module):
            module.forward = partial(routed, module)
        if isinstance(module, Experts):
            model.set_submodule(path, StackedExperts(module))
    with turning_by(tables, model, interleaved=family.rotary.interleaved):
        yield

"""Routers that choose among groups of experts first, where there is nothing to choose: every group is allowed."""

from __future__ import annotations

from typing import Any, Final

from torch import Tensor
from torch.nn.functional import linear

GROUPING: Final = (
    "DeepseekV3TopkRouter",
    "Dots1TopkRouter",
    "ExaoneMoeTopkRouter",
    "Glm4MoeLiteTopkRouter",
    "Glm4MoeTopkRouter",
    "SolarOpenTopkRouter",
)
"""Names of their classes."""


def looks_at_no_group(module: Any) -> bool:
    """Whether `module` is such a router, and tokens may be sent to experts of any group, as in published models."""
    return type(module).__name__ in GROUPING and bool(module.topk_group == module.num_group)


def routed(module: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Transformers' own without its choice of groups, which is a third of it: logits, weights and experts chosen.

    Args:
        module: the router.
        hidden_states: [..., H]
    """
    logits = linear(hidden_states.view(-1, module.hidden_dim).float(), module.weight.float())
    scores = logits.sigmoid()
    _, chosen = (scores + module.e_score_correction_bias).topk(module.top_k, dim=-1, sorted=False)
    weights = scores.gather(1, chosen)
    if module.norm_topk_prob:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
    return logits, weights * module.routed_scaling_factor, chosen

"""The model families: what a row says (`family`), the rows (`table`), and what a configuration makes of one."""

from flap_export.families.configuration import check_config, heads_are_fixed, shape_from_config
from flap_export.families.family import (
    EVERY_EXPERT,
    JOINT_SPACES,
    PARTS,
    Family,
    Norm,
    Part,
    Projection,
    Space,
    Stack,
    expert_at,
    experts_of,
    space_widths,
)
from flap_export.families.table import FAMILIES, family_of

__all__ = [
    "EVERY_EXPERT",
    "FAMILIES",
    "JOINT_SPACES",
    "PARTS",
    "Family",
    "Norm",
    "Part",
    "Projection",
    "Space",
    "Stack",
    "check_config",
    "expert_at",
    "experts_of",
    "family_of",
    "heads_are_fixed",
    "shape_from_config",
    "space_widths",
]

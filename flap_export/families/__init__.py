"""The model families: what a row says (`family`), the rows (`table`), and what a configuration makes of one."""

from flap_export.families.configuration import check_config, heads_are_fixed, shape_from_config
from flap_export.families.family import (
    EVERY_EXPERT,
    PARTS,
    Family,
    Norm,
    Part,
    Projection,
    Space,
    expert_at,
    experts_of,
    space_widths,
)
from flap_export.families.table import FAMILIES, family_of

__all__ = [
    "EVERY_EXPERT",
    "FAMILIES",
    "PARTS",
    "Family",
    "Norm",
    "Part",
    "Projection",
    "Space",
    "check_config",
    "expert_at",
    "experts_of",
    "family_of",
    "heads_are_fixed",
    "shape_from_config",
    "space_widths",
]

"""The rule that says how far a candidate may be from the reference, stated before anything is measured.

The reference is PyTorch in a higher precision than the artifact's. The yardstick is PyTorch in the artifact's own
precision, over the same inputs: its distance from the reference is what that precision costs this model. With
c = `SAFETY_FACTOR`, a candidate passes when

1. its largest error is at most c times the yardstick's,
2. its KL divergence from the reference is at most c times the yardstick's, and
3. wherever its most likely token is not the reference's, the reference prefers its own by no more than bound 1.

Both bounds have a floor, so that a yardstick that happens to be perfect cannot fail a good candidate: an error of
`FLOOR_ULPS` units in the last place at the scale of the logits, f, and the divergence such errors can cause, f² / 2
(Hoeffding's lemma: errors within [-f, f] change log-probabilities by a variable of range 2 f).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from flap_export.precision import PRECISIONS, DtypeName
from flap_export.validation import errormetrics
from flap_export.validation.errormetrics import Array

SAFETY_FACTOR: Final = 8.0
FLOOR_ULPS: Final = 4.0


@dataclass(frozen=True)
class Tolerance:
    """Bounds on a candidate's largest error (in logits) and on its KL divergence (in nats)."""

    max_abs: float
    kl: float


def tolerance_from(reference: Array, yardstick: Array, dtype: DtypeName) -> Tolerance:
    """Bounds for a candidate of precision `dtype`, from PyTorch's own error in that precision.

    Args:
        reference: logits [N, V] in the higher precision.
        yardstick: logits [N, V] in `dtype`.
        dtype: the artifact's precision.
    """
    floor = FLOOR_ULPS * PRECISIONS[dtype].epsilon * errormetrics.scale(reference)
    return Tolerance(
        max_abs=max(SAFETY_FACTOR * errormetrics.max_abs(reference, yardstick), floor),
        kl=max(SAFETY_FACTOR * errormetrics.kl(reference, yardstick), floor**2 / 2),
    )

"""Choosing tokens where the logits are: the rule of `flap_export.generation.pick_token`, in torch, for a batch.

Notation: B sequences, V vocabulary size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from flap_export.errors import ArtifactError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; what an option means is said at `flap_export.generation.generate`."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0


def sampled(logits: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> torch.Tensor:
    """Token ids int64 [B] for logits [B, V], on their device.

    Greedy choices are those of the host; random ones follow the same distribution with other draws.

    Raises:
        ArtifactError: a logit is NaN or infinite.
    """
    import torch

    if not bool(torch.isfinite(logits).all()):
        raise ArtifactError("the model gave logits that are NaN or infinite; check it with `flap-export validate`")
    if sampling.temperature == 0.0:
        return logits.argmax(-1)
    ordered, order = torch.sort(logits.double(), dim=-1, descending=True, stable=True)
    kept = slice(None, sampling.top_k or None)
    # The largest is subtracted first: a very low temperature would make it infinite.
    probabilities = torch.softmax((ordered - ordered[:, :1])[:, kept] / sampling.temperature, -1)
    # A token is kept while what precedes it is short of top_p; nothing precedes the first.
    chances = probabilities * (probabilities.cumsum(-1) - probabilities < sampling.top_p)
    drawn = torch.multinomial(chances, 1, generator=generator)
    return order[:, kept].gather(-1, drawn).squeeze(-1)

"""Searches on tiny models: problems, candidates by their cut points, and the checkpoints that these stand for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tiny import plan_of, save_tokens, tiny_checkpoint, tokens_of
from torch import Tensor

from flap_export.allocation.ladders import layer_plan
from flap_export.calibration.stage import calibrate
from flap_export.evidence.methods import PruneOptions, resolved
from flap_export.evidence.record import Evidence
from flap_export.models.opening import open_checkpoint
from flap_export.pruning.choosing import ladders_of
from flap_export.rewriting.checkpoint import write_checkpoint
from flap_export.rewriting.compensation import CompensationName
from flap_export.rewriting.cutting import rewrite
from flap_export.searching.fitness import FitnessName
from flap_export.searching.fitting import fit_rankings
from flap_export.searching.problem import Problem
from flap_export.searching.space import Candidate, Space


def tiny_problem(
    family: str,
    folder: Path,
    *,
    compensation: CompensationName = "least-squares",
    fitness: FitnessName = "kl",
    sequences: int = 6,
    length: int = 9,
    chunk_sequences: int = 2,
    dtype: torch.dtype = torch.float32,
    head_units: Any = "groups",
    **overrides: Any,
) -> Problem:
    """Every layer may lose any share; the model is in `folder / "dense"`."""
    path = tiny_checkpoint(family, folder / "dense", **overrides)
    dense, tokens = open_checkpoint(path), tokens_of(9, length, seed=7)
    statistics = calibrate(path, save_tokens(folder / "calibration.npy", tokens))
    options = resolved(PruneOptions(ratio=0.5, head_units=head_units, compensation=compensation))
    ladders = ladders_of(dense, Evidence.of(statistics), options)
    if compensation == "least-squares":
        fit_rankings(dense, ladders, tokens, folder / "fits")
    return Problem(
        str(path),
        Space.of(ladders, 0.5, granularity="modules", step=0.02, greatest=1.0),
        tokens_of(sequences, length),
        fitness,
        compensation,
        folder / "fits" if compensation == "least-squares" else None,
        statistics if compensation == "bias" else None,
        dtype,
        "cpu",
        chunk_sequences,
    )


def candidate_of(space: Space, shares: Sequence[tuple[float, float]]) -> Candidate:
    """The candidate whose layers lose about these shares of attention and of the FFN; all where the share is 1."""
    levels, attention = [], []
    for costs, (heads, channels) in zip(space.layers, shares, strict=True):
        steps = round(heads * (len(costs.attention) - 1))
        weights = float(costs.attention[steps] + channels * costs.ffn[-1])
        levels.append(math.ceil(weights / space.step - 1e-9))
        attention.append(steps)
    return Candidate(tuple(levels), tuple(attention))


def checkpoint_of(problem: Problem, candidate: Candidate, directory: Path) -> Path:
    """Rewrite the dense model as the candidate says, and save it."""
    dense, directory = open_checkpoint(problem.model), directory / "pruned"
    layers = [
        layer_plan(index, dense.shape, costs.ladders, *taken)
        for index, (costs, taken) in enumerate(zip(problem.space.layers, problem.space.steps(candidate), strict=True))
    ]
    plan = plan_of(dense, layers)
    directory.mkdir(parents=True)
    shape = plan.pruned_shape(dense.shape, compensated=problem.compensation != "none")
    write_checkpoint(directory, dense, plan, shape, rewrite(dense, plan, problem.restore))
    return directory


@torch.no_grad()
def losses_of_model(model: Any, dense: Any, problem: Problem) -> Tensor:
    """Loss of every sequence, in nats, by its definition and in double precision; [sequences]."""
    tokens = problem.tokens
    found = torch.log_softmax(model(input_ids=tokens, use_cache=False).logits.double(), dim=-1)
    if problem.fitness == "perplexity":
        return -found[:, :-1].gather(-1, tokens[:, 1:, None]).sum(dim=(1, 2))
    expected = torch.log_softmax(dense(input_ids=tokens, use_cache=False).logits.double(), dim=-1)
    return (expected.exp() * (expected - found)).sum(dim=(1, 2))

"""Pruned checkpoints in a family's own classes: the same counts in every layer, so that every serving stack loads them.

A plan can take this layout when all layers kept as many heads, and those of a kind (plain, or a mixture of experts) as
many channels, the number of heads divides the hidden size where the family's class checks that, and it has a place for
every bias that compensation adds. Where a configuration's flag gives all projections around a space a bias, those that
need none get zeros.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final, Literal

import torch
from torch import Tensor

from flap_export.calibration.statistics import CUT_SPACES, CutSpace
from flap_export.errors import ModelError, PlanError
from flap_export.families import Family, Stack, expert_at, heads_are_fixed
from flap_export.models.loading import check_weights, meta_model, parameter_names
from flap_export.models.opening import Checkpoint, config_from, open_checkpoint
from flap_export.plan import PruningPlan
from flap_export.rewriting.checkpoint import MAX_SHARD_BYTES, as_stored, read_config, write_beside_weights, write_shards
from flap_export.shapes import DecoderShape, LayerShape

Layout = Literal["uneven", "stock"]
LAYOUTS: Final[tuple[Layout, ...]] = ("uneven", "stock")
EXPERT_ALIGNMENT: Final = 8
"""Rows of experts' weights must be multiples of 16 bytes in transformers' grouped products, in half precision too."""


def allowed_heads(dense: Checkpoint) -> tuple[int, ...]:
    """Numbers of query heads that the family's own class takes."""
    heads = dense.shape.layers[0].query_heads
    if heads_are_fixed(dense.config, dense.family):
        return (heads,)
    takes_any = not dense.family.heads.divide_hidden
    fewer = (count for count in range(1, heads) if takes_any or dense.shape.hidden_size % count == 0)
    return (*fewer, heads)


def check_stock(dense: Checkpoint, *, compensated: bool, align_channels: int) -> None:
    """Whether the family's own class can take any plan of such options, before anything is computed for one.

    Raises:
        PlanError: its FFN has one width, it has no place for the FFN's bias, or experts of any width would not run in
            it.
    """
    family = dense.family
    if family.ffn.width_field is None:
        raise PlanError(
            f"--layout stock: {family.model_type}'s class makes every FFN {family.ffn.multiple} times as wide as the "
            "hidden states, whatever a configuration states; use --layout uneven"
        )
    without_place = [space for space in CUT_SPACES if not family.can_hold_bias(space)]
    # A plan may leave attention whole; one that leaves every FFN whole is not to be expected.
    if compensated and "ffn" in without_place:
        raise _no_place_for_bias(family, without_place[0])
    if family.mixture and align_channels % EXPERT_ALIGNMENT:
        raise PlanError(
            f"--layout stock: transformers multiplies the experts of {family.model_type} in groups, which fails for "
            f"widths that are no multiple of {EXPERT_ALIGNMENT}; set --align-channels {EXPERT_ALIGNMENT}, or --layout "
            "uneven"
        )


def _no_place_for_bias(family: Family, space: CutSpace) -> PlanError:
    return PlanError(
        f"--layout stock: {family.model_type}'s class has no place for a bias of {family.restoring(space).path}; "
        "use --compensation none, or --layout uneven"
    )


def stock_config(dense: Checkpoint, shape: DecoderShape) -> dict[str, Any]:
    """The dense configuration with the pruned counts, and the flags for the biases that were added.

    Raises:
        PlanError: layers differ, lost everything, or the family's class has no place for a bias.
    """
    family, layer = dense.family, shape.layers[0]
    kinds = _kinds(dense.shape, shape)
    if any(not kept.query_heads or not kept.ffn_channels or kept.shared_channels == 0 for _, kept in kinds):
        raise PlanError("--layout stock needs heads and FFN channels in every layer; ask for a lower ratio")
    if layer.query_heads not in allowed_heads(dense):
        raise PlanError(
            f"--layout stock: {family.model_type}'s class takes {', '.join(map(str, allowed_heads(dense)))} query "
            f"heads at a hidden size of {shape.hidden_size}, the plan keeps {layer.query_heads}; keep one of these"
        )
    config = {**read_config(dense), **_head_counts(dense, layer)}
    for full, kept in kinds:
        config |= _ffn_counts(family, kept)
        biases: dict[CutSpace, bool] = {
            "query": kept.attention_bias and not full.attention_bias,
            "ffn": kept.ffn_bias and not full.ffn_bias,
            "shared": kept.shared_bias and not full.shared_bias,
        }
        for space in (space for space, added in biases.items() if added):
            flag = family.bias_flags.get(space)
            if flag is None:
                raise _no_place_for_bias(family, space)
            config[flag] = True
    _taken(config, dense)
    return config


def _kinds(dense: DecoderShape, pruned: DecoderShape) -> list[tuple[LayerShape, LayerShape]]:
    """Every kind of layer, plain or a mixture, before and after.

    Raises:
        PlanError: layers of a kind differ, or attention does among all.
    """
    kinds = dict(zip(dense.layers, pruned.layers, strict=True))
    attentions = {(layer.query_heads, layer.kv_heads, layer.attention_bias) for layer in pruned.layers}
    if len(attentions) > 1 or any(kinds[full] != kept for full, kept in zip(dense.layers, pruned.layers, strict=True)):
        raise PlanError(
            "--layout stock needs the same counts in every layer; use --structure ul-um or ul-mm, or --layout uneven"
        )
    return list(kinds.items())


def _ffn_counts(family: Family, layer: LayerShape) -> dict[str, int]:
    """The fields that state a layer's FFN; where several shared experts have none, the routed ones' state theirs."""
    if not layer.experts:
        assert family.ffn.width_field is not None, "check_stock comes first"
        return {family.ffn.width_field: layer.ffn_channels}
    assert family.mixture is not None
    shared = family.mixture.shared
    own = {shared.width_field: layer.shared_width} if shared is not None and shared.width_field is not None else {}
    return {family.mixture.width_field: layer.ffn_channels, **own}


def _head_counts(dense: Checkpoint, layer: LayerShape) -> dict[str, int]:
    if heads_are_fixed(dense.config, dense.family):
        return {}
    heads = {"num_attention_heads": layer.query_heads, "num_key_value_heads": layer.kv_heads}
    # What transformers makes head_dim of, with latents, is the part of a head that turns.
    return {**heads, "v_head_dim" if dense.shape.latent else "head_dim": dense.shape.head_dim}


def write_stock_checkpoint(
    directory: Path,
    dense: Checkpoint,
    plan: PruningPlan,
    shape: DecoderShape,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a checkpoint of the family's own class into an empty directory; see `write_checkpoint`.

    Raises:
        PlanError: the plan does not fit that class.
    """
    config = stock_config(dense, shape)
    target = dataclasses.replace(dense, config=_taken(config, dense), shape=shape)
    whole = _in_stacks(target, _with_zero_biases(target, tensors))
    stored = ((dense.family.stored_name(name), tensor) for name, tensor in as_stored(dense.family, whole))
    write_shards(directory, stored, max_shard_bytes)
    write_beside_weights(directory, dense, plan, config)
    _check_written(directory, dense.family)


def _taken(config: dict[str, Any], dense: Checkpoint) -> Any:
    """The configuration as transformers takes it.

    Raises:
        PlanError: it does not.
    """
    try:
        return config_from(config, dense.family, dense.directory)
    except ModelError as error:
        raise _refused(dense.family, dense.directory, error) from error


def _check_written(directory: Path, family: Family) -> None:
    """Whether the family's own class takes what was written, before it stands where it was asked for.

    Raises:
        PlanError: it does not.
    """
    try:
        written = open_checkpoint(directory)
        check_weights(meta_model(written, written.dtype), written)
    except ModelError as error:
        raise _refused(family, directory, error) from error


def _refused(family: Family, directory: Path, error: ModelError) -> PlanError:
    """What transformers said, without the directory, which goes away."""
    reason = " ".join(str(error).replace(f"{directory}/", "").replace(str(directory), "the checkpoint").split())
    return PlanError(
        f"--layout stock: transformers' {family.class_name} cannot hold what the plan keeps of this model ({reason}); "
        "use --layout uneven"
    )


def _in_stacks(target: Checkpoint, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The tensors, with those that checkpoints of the family hold in stacks put there; a stack is given when full."""
    family, begun = target.family, dict[str, tuple[Tensor, int]]()
    prefix = f"{family.modules.layers}."
    for name, tensor in tensors:
        place = family.stack_of(name)
        if place is None:
            yield name, tensor
            continue
        (stack, part), layer = place, name.removeprefix(prefix).partition(".")[0]
        stored, experts = f"{prefix}{layer}.{stack.name}", target.shape.layers[int(layer)].experts
        if stored not in begun:
            begun[stored] = _empty_stack(stack, tensor, experts), experts * len(stack.parts)
        whole, missing = begun.pop(stored)
        outputs = whole.mT if stack.transposed else whole
        number = expert_at(name.removeprefix(f"{prefix}{layer}"))
        assert number is not None
        outputs[number, stack.outputs_of(part, outputs.shape[1])] = tensor
        if missing > 1:
            begun[stored] = whole, missing - 1
        else:
            yield stored, whole
    assert not begun, "an expert is missing"


def _empty_stack(stack: Stack, of_one: Tensor, experts: int) -> Tensor:
    """Room for a tensor of every expert, [out, ...] each, and of every part."""
    outputs, *inputs = of_one.shape
    width = len(stack.parts) * outputs
    return of_one.new_empty(experts, *inputs, width) if stack.transposed else of_one.new_empty(experts, width, *inputs)


def _with_zero_biases(target: Checkpoint, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The tensors, and zeros for the biases that only the flags ask for."""
    written: set[str] = set()
    dtype = torch.float32
    for name, tensor in tensors:
        written.add(name)
        dtype = tensor.dtype
        yield name, tensor
    model = meta_model(target, torch.float32)
    for name in parameter_names(model, target):
        if name not in written:
            assert name.endswith(".bias"), name
            yield name, torch.zeros(model.get_parameter(name).shape, dtype=dtype)

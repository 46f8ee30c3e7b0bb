"""Stage `rewrite`: cut every weight to what the plan keeps, and add the compensation. Reads one tensor at a time.

A projection's axes belong to spaces (`flap_export.families`); a plan says which channels of each space stay. Kept
weights are copied bit for bit; compensation is added to a bias that is there, never put in its place.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from flap_export.calibration.statistics import CutSpace, Site, cut_spaces, part_of
from flap_export.errors import ModelError
from flap_export.families import JOINT_SPACES, PARTS, Part, Projection, Space, expert_at, experts_of, space_widths
from flap_export.models.opening import Checkpoint
from flap_export.plan import LayerPlan, PruningPlan
from flap_export.rewriting.compensation import complement
from flap_export.shapes import DecoderShape

Restore = Callable[[Site, Tensor, Tensor], tuple[Tensor, Tensor | None]]
"""What becomes of a restoring projection: from its site, weight [H, C] and kept channels int64 [K] to its weight [H, K]
and what is added to its bias, [H] or None."""
Kept = Mapping[Space, Tensor | None]
"""Per space the kept channels, int64 [K], or [E, K] in the `ffn` of a mixture of experts; of a joint space all, in the
order they take, or none. None where all stay as they are, or there is no such space."""


def rewrite(
    checkpoint: Checkpoint,
    plan: PruningPlan,
    restore: Restore,
) -> Iterator[tuple[str, Tensor]]:
    """Yield the pruned model's tensors by name, in the checkpoint's dtypes.

    Args:
        checkpoint: the dense model; its weights are read from disk one at a time.
        plan: what every layer keeps.
        restore: what the projections that lose inputs become, see `flap_export.rewriting.compensation`.

    Raises:
        PlanError: the plan does not fit the model.
        ModelError: a tensor is missing or holds NaN.
    """
    plan.check(checkpoint.shape)
    prefix = f"{checkpoint.family.modules.layers}."
    for name in checkpoint.weights:
        if not name.startswith(prefix):
            yield name, checkpoint.weights.finite(name)
    for index, layer_plan in enumerate(plan.layers):
        kept = kept_channels(layer_plan, checkpoint.shape)
        yield from rewrite_layer(checkpoint, index, kept, restore)


def kept_channels(plan: LayerPlan, shape: DecoderShape) -> Kept:
    """The channels of every space that one layer keeps; a head is D consecutive channels."""
    dense = shape.layers[plan.layer]

    def of_heads(heads: tuple[int, ...], available: int, size: int = shape.head_dim) -> Tensor | None:
        if len(heads) == available:
            return None
        starts = torch.tensor(heads, dtype=torch.int64) * size
        return (starts.unsqueeze(1) + torch.arange(size)).flatten()

    def of_ffn(channels: Sequence[int] | Sequence[Sequence[int]], width: int, available: int) -> Tensor | None:
        return None if width == available else torch.tensor(channels, dtype=torch.int64)

    query, kv = of_heads(plan.query_heads, dense.query_heads), of_heads(plan.kv_heads, dense.kv_heads)
    shared, latent = plan.shared_channels or (), shape.latent
    score, key_value = (latent.score, latent.key_value(shape.head_dim)) if latent else (0, 0)
    return {
        "hidden": None,
        "query": query,
        "kv": kv,
        "ffn": of_ffn(plan.experts or plan.ffn_channels, plan.ffn_width, dense.ffn_channels),
        "shared": of_ffn(shared, len(shared), dense.shared_width),
        "joint_query": _kept_first(query, dense.query_heads * shape.head_dim),
        "joint_key": _kept_first(kv, dense.kv_heads * shape.head_dim),
        "query_latent": None,
        "kv_latent": None,
        "score": of_heads(plan.query_heads, dense.query_heads, score),
        "key_value": of_heads(plan.query_heads, dense.query_heads, key_value),
    }


def _kept_first(kept: Tensor | None, channels: int) -> Tensor | None:
    """All channels of a joint space, those that attention takes before the others; none where it takes none."""
    if kept is None or not len(kept):
        return kept
    return torch.cat([kept, complement(kept, channels)])


def of_expert(channels: Tensor | None, expert: int | None) -> Tensor | None:
    """One expert's part of what stays of a space, int64 [K]; all of it where there are no experts."""
    return channels if channels is None or expert is None else channels[expert]


def rewrite_layer(
    checkpoint: Checkpoint, index: int, kept: Kept, restore: Restore, parts: Collection[Part] = PARTS
) -> Iterator[tuple[str, Tensor]]:
    """Yield one layer's tensors by name; see `rewrite`.

    Args:
        checkpoint: the dense model.
        index: of the layer.
        kept: the channels of every space that stay.
        restore: what the projections that lose inputs become.
        parts: attention (`query`), the FFN, or both; norms around them, routers and gates come with attention.
    """
    prefix = f"{checkpoint.family.modules.layers}.{index}."
    weights, layer = checkpoint.weights, checkpoint.shape.layers[index]
    widths = space_widths(checkpoint.shape, layer)
    for name in [name for name in weights if name.startswith(prefix)]:
        below = name.removeprefix(prefix)
        path, _, kind = below.rpartition(".")
        projection = checkpoint.family.projection(path)
        if projection is None:
            block = _block_of(below, checkpoint, index)
            if part_of(block or "query") in parts and not (block and _is_emptied(kept[block])):
                rows = _kept_rows(below, checkpoint, kept)
                yield name, weights.finite(name) if rows is None else weights.finite(name)[rows]
            continue
        check_kind(projection, kind)
        if projection.restores or projection.part not in parts:
            continue
        own = {**kept, "ffn": of_expert(kept["ffn"], expert_at(path))}
        tensor = cut(weights.finite(name), projection, kind, own, widths, layer.kv_heads)
        if tensor.numel():
            yield name, tensor
    for site in (site for site in sites_of(checkpoint, index) if part_of(site.space) in parts):
        path = f"{prefix}{path_of(checkpoint, site)}"
        yield from _restoring(checkpoint, path, site, of_expert(kept[site.space], site.expert), restore)


def sites_of(checkpoint: Checkpoint, index: int) -> Iterator[Site]:
    """Every restoring projection of one layer."""
    layer = checkpoint.shape.layers[index]
    for space in cut_spaces(layer):
        yield from (Site(index, space, expert) for expert in experts_of(space, layer))


def path_of(checkpoint: Checkpoint, site: Site) -> str:
    """The path of a restoring projection below its layer."""
    return checkpoint.family.restoring(site.space, checkpoint.shape.layers[site.layer]).at(site.expert)


def _restoring(
    checkpoint: Checkpoint, path: str, site: Site, channels: Tensor | None, restore: Restore
) -> Iterator[tuple[str, Tensor]]:
    """A projection back to the residual stream; its bias is the dense one plus what is added."""
    weights = checkpoint.weights
    weight = weights.finite(f"{path}.weight")
    bias = weights.finite(f"{path}.bias") if f"{path}.bias" in weights else None
    if channels is not None:
        dtype = weight.dtype
        restored, added = restore(site, weight, channels)
        weight = restored.to(dtype)
        if added is not None:
            bias = (added if bias is None else bias.to(torch.float64) + added).to(dtype)
    if weight.numel():
        yield f"{path}.weight", weight.contiguous()
    if bias is not None:
        yield f"{path}.bias", bias


def check_kind(projection: Projection, kind: str) -> None:
    """Whether a projection's tensor is a weight or a bias.

    Raises:
        ModelError: it is neither (a quantised checkpoint).
    """
    if kind not in ("weight", "bias"):
        raise ModelError(
            f"projection '{projection.path}' has a tensor '{kind}' beside weight and bias; quantised checkpoints "
            "cannot be pruned, start from the full-precision one"
        )


def _block_of(name: str, checkpoint: Checkpoint, index: int) -> CutSpace | None:
    """The block that a tensor of no projection is inside of and leaves with: query and key norms, an activation's."""
    layer = checkpoint.shape.layers[index]
    for space in cut_spaces(layer):
        module = checkpoint.family.restoring(space, layer).path.rpartition(".")[0]
        if module and name.startswith(f"{module}."):
            return space
    return None


def _is_emptied(channels: Tensor | None) -> bool:
    return channels is not None and channels.numel() == 0


def _kept_rows(name: str, checkpoint: Checkpoint, kept: Kept) -> Tensor | None:
    """What stays of a parameter of heads, [heads, ...] or [heads D], int64; None where all of it stays."""
    space = checkpoint.family.heads.parameters.get(name)
    channels = kept[space] if space is not None else None
    size = checkpoint.shape.head_dim
    return channels if channels is None or space in JOINT_SPACES else channels[::size] // size


def cut(
    tensor: Tensor, projection: Projection, kind: str, kept: Kept, widths: Mapping[Space, int], groups: int = 1
) -> Tensor:
    """Keep the plan's channels of one weight [out, in] or bias [out].

    Args:
        tensor: the dense weight or bias.
        projection: the spaces of its axes; several output spaces are stacked along the outputs.
        kind: "weight" or "bias".
        kept: channels that stay, per space.
        widths: dense size of every space.
        groups: KV groups K of the layer, for outputs that stand in blocks.
    """
    sizes = [widths[space] for space in projection.outputs]
    rows = _stacked([kept[space] for space in projection.outputs], sizes)
    if rows is not None:
        # Outputs of one space are in no blocks, and those of a joint space change their order.
        tensor = tensor[rows if len(sizes) == 1 else _in_blocks(rows, projection, sizes, groups)]
    columns = kept[projection.inputs]
    if kind == "weight" and columns is not None:
        tensor = tensor[:, columns]
    return tensor.contiguous()


def _stacked(kept: list[Tensor | None], widths: list[int]) -> Tensor | None:
    """Indices into fused outputs that stand one space after another; None where all stay."""
    if all(channels is None for channels in kept):
        return None
    starts = [sum(widths[:position]) for position in range(len(widths))]
    return torch.cat(
        [
            (torch.arange(width) if channels is None else channels) + start
            for channels, width, start in zip(kept, widths, starts, strict=True)
        ]
    )


def _in_blocks(rows: Tensor, projection: Projection, sizes: Sequence[int], groups: int) -> Tensor:
    """Where rows that stay are, in the order in which they stand from then on.

    Args:
        rows: int64 [R], indices into outputs that stand space after space, ascending.
        projection: says in which blocks the outputs stand.
        sizes: of the spaces.
        groups: KV groups K of the dense layer.
    """
    position = torch.argsort(grouped_order(sizes, projection.dense_blocks(groups)))
    order = grouped_order(sizes, projection.pruned_blocks(groups))
    return position[order[torch.isin(order, rows)]]


def grouped_order(widths: Sequence[int], groups: int) -> Tensor:
    """Of outputs that stand block after block, where each would be if they stood space after space.

    Args:
        widths: of the spaces, in their order within a block.
        groups: blocks, such as one for each KV group, with as much of every space in each.

    Returns:
        int64 [sum of widths], a permutation.
    """
    stacked = torch.split(torch.arange(sum(widths)), list(widths))
    return torch.cat([part.view(groups, -1) for part in stacked], dim=1).flatten()

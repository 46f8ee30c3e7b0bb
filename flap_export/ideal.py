"""What the arithmetic allows: bytes moved and operations done by one call of a decoder, and the speedup they bound.

Notation, beside H, D, Q, K, F, g, E, k of `flap_export.shapes`:

    B   sequences of a batch             n   new tokens of each sequence in one call
    V   vocabulary size                  c   tokens already in the cache of each sequence
    b   bytes per weight, and per cached value

A prefill is one call with n prompt tokens and c = 0; a decode step is one call with n = 1. Token ids in, embedding
rows read and logits written are left out: together they are below a thousandth of the weights.

Of a mixture, a call on a CPU reads the experts that its tokens were sent to and computes each token's own (`chosen`).
How many different ones B n tokens are sent to depends on the router; expected are

    E (1 - (1 - k / E)^(B n))

where it treats all alike, k for one token and nearly E for many. A router that prefers some reads fewer. On a GPU the
experts of a layer are one wide FFN, which every call reads and computes whole (`all`; see
`flap_export.building.experts`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from flap_export.artifact import LogitsKind
from flap_export.shapes import DecoderShape, LayerShape

Phase = Literal["prefill", "decode"]
Experts = Literal["chosen", "all"]
"""Which experts of a mixture a call reads and computes."""


@dataclass(frozen=True)
class Roofline:
    """What a machine was measured to sustain on one precision."""

    bandwidth_bytes_per_s: float
    flops_per_s: float


def experts_on(backend: str, device: str) -> Experts:
    """Which experts an artifact's runner reads and computes; engines run on a GPU whatever device is named."""
    return "chosen" if backend == "onnxruntime" and device == "cpu" else "all"


def read_parameters(shape: DecoderShape, tokens: int | None = None) -> float:
    """Parameters one call reads, once for the whole batch.

    Attention and FFN weights, output biases, two norms of H per layer (none before an emptied block; one where blocks
    are parallel and not both of them empty), norms over all heads or of latents, the last norm and the head, V H. Of a
    mixture the router, E H, the shared expert, and the routed experts that `tokens` new tokens, B n of them, are
    expected to be sent to; all of them with None. The embedding is not among them: a call reads n rows of it. A tied
    head is the embedding's own matrix and is read whole, once.
    """
    layers = sum(_layer_parameters(shape, layer, tokens) for layer in shape.layers)
    return layers + shape.head_parameters + shape.hidden_size


def _layer_parameters(shape: DecoderShape, layer: LayerShape, tokens: int | None) -> float:
    share = _experts_read(shape, layer, tokens) / layer.ffns
    # Biases of emptied experts are one matrix, of which the router's weights make a product.
    biases = (
        layer.ffns * layer.ffn_bias * (share if layer.ffn_channels else 1) + layer.attention_bias + layer.shared_bias
    )
    vectors = (_norms(shape, layer) + _router_rows(layer) + _has_gate(shape, layer) + biases) * shape.hidden_size
    head_norms = (layer.joint_query_heads + layer.joint_key_heads) * shape.head_dim
    if shape.latent is not None and layer.query_heads:
        head_norms += shape.latent.queries + shape.latent.keys_and_values
    channels = share * layer.ffns * layer.ffn_channels + layer.shared_width
    return shape.attention_parameters(layer) + channels * shape.ffn_channel_parameters + vectors + head_norms


def _experts_read(shape: DecoderShape, layer: LayerShape, tokens: int | None) -> float:
    """How many FFNs of a layer `tokens` tokens need, expected; all of them where k is not known."""
    if tokens is None or not layer.experts or not shape.experts_per_token:
        return layer.ffns
    return layer.experts * (1 - (1 - shape.experts_per_token / layer.experts) ** tokens)


def stored_parameters(shape: DecoderShape) -> int:
    """Parameters on disk and in memory: all that can be read, and the embedding where it is a matrix of its own."""
    return round(read_parameters(shape)) + (0 if shape.tied_embeddings else shape.head_parameters)


def _norms(shape: DecoderShape, layer: LayerShape) -> int:
    """Norms in front of what is left of a layer's blocks."""
    is_fed = layer.ffn_channels or layer.shared_width or _router_rows(layer) or _has_gate(shape, layer)
    norms = bool(layer.query_heads) + bool(is_fed)
    return min(norms, 1) if shape.parallel_blocks else norms


def _has_gate(shape: DecoderShape, layer: LayerShape) -> bool:
    """Whether a shared expert's gate is read."""
    return shape.shared_gates and bool(layer.shared_width or layer.shared_bias)


def _router_rows(layer: LayerShape) -> int:
    """Experts of a mixture that has something to choose."""
    return layer.experts if layer.ffn_channels or layer.ffn_bias else 0


def weight_bytes(shape: DecoderShape, bytes_per_weight: float, tokens: int | None = None) -> float:
    """Bytes of parameters one call reads: b times `read_parameters`."""
    return bytes_per_weight * read_parameters(shape, tokens)


def cache_bytes(shape: DecoderShape, *, batch_size: int, context_length: int, bytes_per_value: float) -> float:
    """Bytes of the KV cache that one call reads: b B c times the sum over layers of 2 K D, or of latents' channels."""
    return bytes_per_value * batch_size * context_length * shape.cached_channels


def call_bytes(
    shape: DecoderShape,
    *,
    batch_size: int,
    new_tokens: int,
    context_length: int,
    bytes_per_weight: float,
    experts: Experts = "chosen",
) -> float:
    """Bytes one call moves: weights once, and the cache of every sequence; both have b bytes per value."""
    cache = cache_bytes(shape, batch_size=batch_size, context_length=context_length, bytes_per_value=bytes_per_weight)
    tokens = batch_size * new_tokens if experts == "chosen" else None
    return weight_bytes(shape, bytes_per_weight, tokens) + cache


def call_flops(
    shape: DecoderShape,
    *,
    batch_size: int,
    new_tokens: int,
    context_length: int = 0,
    logits: LogitsKind = "last",
    experts: Experts = "chosen",
) -> int:
    """Floating-point operations of one call; a multiplication and its addition are two.

        projections   2 n            times the decoder's attention and FFN weights; of E experts, k
        attention     4 p            times the sum over layers of Q D, for Q K^T and its product with V, where
                                     p = n c + n (n + 1) / 2 pairs of a query and a key it may see; where a latent
                                     is cached, D is its width
        head          2 m V H        m = 1 with logits `last`, n with `all`

    all of it B times. Norms, rotary embeddings, softmax, activations and routers are left out.
    """
    pairs = new_tokens * context_length + new_tokens * (new_tokens + 1) // 2
    query_channels = sum(layer.query_heads * shape.attended_channels for layer in shape.layers)
    head_tokens = 1 if logits == "last" else new_tokens
    weights = sum(_computed_weights(shape, layer, experts) for layer in shape.layers)
    per_sequence = 2 * new_tokens * weights + 4 * pairs * query_channels + 2 * head_tokens * shape.head_parameters
    return batch_size * per_sequence


def _computed_weights(shape: DecoderShape, layer: LayerShape, experts: Experts) -> int:
    """Attention and FFN weights of a layer that one token meets."""
    is_routed = experts == "chosen" and layer.experts and shape.experts_per_token
    ffns = shape.experts_per_token if is_routed else layer.ffns
    channels = ffns * layer.ffn_channels + layer.shared_width
    return shape.attention_parameters(layer) + channels * shape.ffn_channel_parameters


def call_seconds(
    shape: DecoderShape,
    phase: Phase,
    *,
    batch_size: int,
    length: int,
    bytes_per_weight: float,
    roofline: Roofline,
    logits: LogitsKind = "last",
    experts: Experts = "chosen",
) -> float:
    """The least time one call can take: the longer of moving its bytes and doing its operations.

    Args:
        shape: the decoder.
        phase: `prefill` or `decode`.
        batch_size: B.
        length: n of a prefill; c of a decode step.
        bytes_per_weight: b.
        roofline: the machine.
        logits: of which new tokens.
        experts: of a mixture.
    """
    new_tokens, context_length = (length, 0) if phase == "prefill" else (1, length)
    moved = call_bytes(
        shape,
        batch_size=batch_size,
        new_tokens=new_tokens,
        context_length=context_length,
        bytes_per_weight=bytes_per_weight,
        experts=experts,
    )
    operations = call_flops(
        shape,
        batch_size=batch_size,
        new_tokens=new_tokens,
        context_length=context_length,
        logits=logits,
        experts=experts,
    )
    return max(moved / roofline.bandwidth_bytes_per_s, operations / roofline.flops_per_s)


def ideal_speedup(
    dense: DecoderShape,
    pruned: DecoderShape,
    phase: Phase,
    *,
    batch_size: int,
    length: int,
    bytes_per_weight: float,
    logits: LogitsKind = "last",
    roofline: Roofline | None = None,
    experts: Experts = "chosen",
) -> float:
    """How many times faster `pruned` may run than `dense`.

    Without a roofline a decode step is taken as bound by bandwidth and gives the ratio of `call_bytes`; a prefill is
    taken as bound by operations and gives the ratio of `call_flops`. With one it is the ratio of `call_seconds`: a
    decode step of a large batch, or a prefill of few tokens, may lie on the other side.

    Args:
        dense: shape before pruning.
        pruned: shape after it.
        phase: `prefill` or `decode`.
        batch_size: B.
        length: n of a prefill; c of a decode step.
        bytes_per_weight: b.
        logits: of which new tokens.
        roofline: what the machine sustains, where it was measured.
        experts: of a mixture.
    """
    machine = roofline or _bound_by(phase)
    dense_seconds, pruned_seconds = (
        call_seconds(
            shape,
            phase,
            batch_size=batch_size,
            length=length,
            bytes_per_weight=bytes_per_weight,
            roofline=machine,
            logits=logits,
            experts=experts,
        )
        for shape in (dense, pruned)
    )
    return dense_seconds / pruned_seconds


def _bound_by(phase: Phase) -> Roofline:
    """A machine that is never short of the other resource."""
    unlimited = float("inf")
    return Roofline(1.0, unlimited) if phase == "decode" else Roofline(unlimited, 1.0)

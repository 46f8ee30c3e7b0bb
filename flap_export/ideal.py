"""What the arithmetic allows: bytes moved and operations done by one call of a decoder, and the speedup they bound.

Notation, beside H, D, Q, K, F, g of `flap_export.shapes`:

    B   sequences of a batch             n   new tokens of each sequence in one call
    V   vocabulary size                  c   tokens already in the cache of each sequence
    b   bytes per weight, and per cached value

A prefill is one call with n prompt tokens and c = 0; a decode step is one call with n = 1. Token ids in, embedding
rows read and logits written are left out: together they are below a thousandth of the weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from flap_export.artifact import LogitsKind
from flap_export.shapes import DecoderShape, LayerShape

Phase = Literal["prefill", "decode"]


@dataclass(frozen=True)
class Roofline:
    """What a machine was measured to sustain on one precision."""

    bandwidth_bytes_per_s: float
    flops_per_s: float


def read_parameters(shape: DecoderShape) -> int:
    """Parameters every call reads, once for the whole batch.

    Attention and FFN weights, output biases, two norms of H per layer (none before an emptied block; one where blocks
    are parallel and not both of them empty), norms over all heads, the last norm and the head, V H. Of a mixture the
    router, E H, and all experts: the exported graph computes every one of them and weighs those that were not chosen
    with zero, because standard operators can read no expert by its number without copying it for every token. The
    embedding is not among them: a call reads n rows of it. A tied head is the embedding's own matrix and is read whole,
    once.
    """
    vectors = sum(_vectors(shape, layer) for layer in shape.layers) + 1
    normed_heads = sum(layer.joint_query_heads + layer.joint_key_heads for layer in shape.layers)
    norms = vectors * shape.hidden_size + normed_heads * shape.head_dim
    return shape.decoder_parameters + shape.head_parameters + norms


def stored_parameters(shape: DecoderShape) -> int:
    """Parameters on disk and in memory: `read_parameters`, and the embedding where it is a matrix of its own."""
    return read_parameters(shape) + (0 if shape.tied_embeddings else shape.head_parameters)


def _vectors(shape: DecoderShape, layer: LayerShape) -> int:
    """Vectors of H that one layer reads: norms, output biases, the router's rows and a shared expert's gate."""
    router = layer.experts if layer.ffn_channels or layer.ffn_bias else 0
    gate = shape.shared_gates and bool(layer.shared_width or layer.shared_bias)
    norms = bool(layer.query_heads) + bool(layer.ffn_channels or layer.shared_width or router or gate)
    if shape.parallel_blocks:
        norms = min(norms, 1)
    return norms + layer.attention_bias + layer.ffns * layer.ffn_bias + layer.shared_bias + router + gate


def weight_bytes(shape: DecoderShape, bytes_per_weight: float) -> float:
    """Bytes of parameters one call reads: b times `read_parameters`."""
    return bytes_per_weight * read_parameters(shape)


def cache_bytes(shape: DecoderShape, *, batch_size: int, context_length: int, bytes_per_value: float) -> float:
    """Bytes of the KV cache that one call reads: b B c times the sum over layers of 2 K D."""
    rows = sum(2 * layer.kv_heads * shape.head_dim for layer in shape.layers)
    return bytes_per_value * batch_size * context_length * rows


def call_bytes(shape: DecoderShape, *, batch_size: int, context_length: int, bytes_per_weight: float) -> float:
    """Bytes one call moves: all weights once, and the cache of every sequence; both have b bytes per value."""
    cache = cache_bytes(shape, batch_size=batch_size, context_length=context_length, bytes_per_value=bytes_per_weight)
    return weight_bytes(shape, bytes_per_weight) + cache


def call_flops(
    shape: DecoderShape, *, batch_size: int, new_tokens: int, context_length: int = 0, logits: LogitsKind = "last"
) -> int:
    """Floating-point operations of one call; a multiplication and its addition are two.

        projections   2 n            times the decoder's attention and FFN weights
        attention     4 p            times the sum over layers of Q D, for Q K^T and its product with V, where
                                     p = n c + n (n + 1) / 2 pairs of a query and a key it may see
        head          2 m V H        m = 1 with logits `last`, n with `all`

    all of it B times. Norms, rotary embeddings, softmax, activations and routers are left out; all experts of a mixture
    are counted, see `read_parameters`.
    """
    pairs = new_tokens * context_length + new_tokens * (new_tokens + 1) // 2
    query_channels = sum(layer.query_heads * shape.head_dim for layer in shape.layers)
    head_tokens = 1 if logits == "last" else new_tokens
    per_sequence = (
        2 * new_tokens * shape.decoder_parameters + 4 * pairs * query_channels + 2 * head_tokens * shape.head_parameters
    )
    return batch_size * per_sequence


def call_seconds(
    shape: DecoderShape,
    phase: Phase,
    *,
    batch_size: int,
    length: int,
    bytes_per_weight: float,
    roofline: Roofline,
    logits: LogitsKind = "last",
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
    """
    new_tokens, context_length = (length, 0) if phase == "prefill" else (1, length)
    moved = call_bytes(shape, batch_size=batch_size, context_length=context_length, bytes_per_weight=bytes_per_weight)
    operations = call_flops(
        shape, batch_size=batch_size, new_tokens=new_tokens, context_length=context_length, logits=logits
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
        )
        for shape in (dense, pruned)
    )
    return dense_seconds / pruned_seconds


def _bound_by(phase: Phase) -> Roofline:
    """A machine that is never short of the other resource."""
    unlimited = float("inf")
    return Roofline(1.0, unlimited) if phase == "decode" else Roofline(unlimited, 1.0)

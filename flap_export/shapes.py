"""What a decoder is made of, in numbers: the pure record every budget, rewrite and roofline reads.

Notation used throughout the package:

    H   hidden size                      Q   query heads of one layer
    D   head_dim                         K   KV heads of one layer
    F   FFN channels of one layer        g   query heads per KV head, Q / K
    E   experts of one layer; F is then the width of each of them
    k   experts that every token is sent to
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from flap_export.storage import Value

# Far above every model there is: a record that says more is damaged, and would only run out of memory later.
_Heads = Annotated[int, Field(ge=0, le=2**16)]
_Channels = Annotated[int, Field(ge=0, le=2**24)]
_Size = Annotated[int, Field(ge=1, le=2**24)]


class LayerShape(Value):
    """Units of one decoder layer, and whether its two output projections carry a bias."""

    query_heads: _Heads
    kv_heads: _Heads
    ffn_channels: _Channels
    attention_bias: bool = False
    ffn_bias: bool = False
    experts: _Heads = 0
    """Experts of a mixture, each of them `ffn_channels` wide and with an output bias of its own; 0 is a plain FFN."""

    @property
    def ffns(self) -> int:
        """How many FFNs stand side by side: E, or 1."""
        return max(self.experts, 1)

    @property
    def ffn_scores(self) -> tuple[int, ...]:
        """Shape of what is known of each FFN channel: (F,), or (E, F)."""
        return (self.experts, self.ffn_channels) if self.experts else (self.ffn_channels,)


class DecoderShape(Value):
    """Sizes of a decoder whose layers may differ from each other."""

    hidden_size: _Size
    head_dim: Annotated[int, Field(ge=1, le=2**16)]
    vocabulary_size: _Size
    ffn_matrices: Annotated[int, Field(ge=1)]
    """Matrices of one FFN: 3 when gated (gate, up, down), 2 when not."""
    tied_embeddings: bool
    parallel_blocks: bool = False
    """Whether attention and FFN of a layer read the same hidden states, behind one norm."""
    experts_per_token: _Heads = 0
    """k of a mixture; 0 without experts, and where a record does not say."""
    layers: tuple[LayerShape, ...]

    @property
    def query_head_parameters(self) -> int:
        """Weights of one query head: a row block of q_proj and a column block of o_proj, 2 H D."""
        return 2 * self.hidden_size * self.head_dim

    @property
    def kv_head_parameters(self) -> int:
        """Weights of one KV head: row blocks of k_proj and v_proj, 2 H D."""
        return 2 * self.hidden_size * self.head_dim

    @property
    def ffn_channel_parameters(self) -> int:
        """Weights of one FFN channel, 3 H when gated."""
        return self.ffn_matrices * self.hidden_size

    def ffn_unit_parameters(self, layer: LayerShape) -> int:
        """Weights of what an FFN loses at a time: one channel, or one of every expert (3 E H)."""
        return layer.ffns * self.ffn_channel_parameters

    def attention_parameters(self, layer: LayerShape) -> int:
        """Attention weights of `layer`, (2 Q + 2 K) H D."""
        return layer.query_heads * self.query_head_parameters + layer.kv_heads * self.kv_head_parameters

    def ffn_parameters(self, layer: LayerShape) -> int:
        """FFN weights of `layer`, 3 H F when gated, E times that in a mixture; the router is never cut nor counted."""
        return layer.ffn_channels * self.ffn_unit_parameters(layer)

    @property
    def decoder_parameters(self) -> int:
        """All attention and FFN weights: what a pruning ratio is a share of."""
        return sum(self.attention_parameters(layer) + self.ffn_parameters(layer) for layer in self.layers)

    @property
    def head_parameters(self) -> int:
        """Weights of the language-model head."""
        return self.vocabulary_size * self.hidden_size

"""What a decoder is made of, in numbers: the pure record every budget, rewrite and roofline reads.

Notation used throughout the package:

    H   hidden size                      Q   query heads of one layer
    D   head_dim                         K   KV heads of one layer
    F   FFN channels of one layer        g   query heads per KV head, Q / K
    E   experts of one layer; F is then the width of each of them
    k   experts that every token is sent to
    S   channels of the expert that every token passes beside those, where a layer has one

In some families one norm runs over all query heads together, and one over all key heads. What such a norm makes of one
head depends on the others, so their projections go on computing every head of the dense layer, and attention takes the
first Q and K; an attention without heads needs none of it.

In multi-head latent attention (MLA; DeepSeek-V2, section 2.1) the keys and values of all heads are made of one latent
of a token, and only that is cached. Every query head has a key and a value of its own, so K = Q, and D is the size of a
value. What makes latents reads and writes nothing that is cut; it too goes with an attention's last head only.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

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
    joint_query_heads: _Heads = 0
    """Query heads that are projected and normed together, of which attention takes the first Q; 0 where each head that
    is projected stands for itself."""
    joint_key_heads: _Heads = 0
    """Key heads likewise, of which it takes the first K."""
    experts: _Heads = 0
    """Experts of a mixture, each of them `ffn_channels` wide and with an output bias of its own; 0 is a plain FFN."""
    shared_channels: _Channels | None = None
    """Channels of a mixture's shared expert, which every token passes; None where there is no such expert."""
    shared_bias: bool = False
    """Whether the shared expert's output projection carries a bias."""
    head_numbers: tuple[_Heads, ...] = ()
    """Which heads of the dense layer these are, in families that tell heads apart by more than their weights: with
    ALiBi, every head has a slope of its own."""

    @property
    def head_blocks(self) -> int:
        """Matrices [H, D] of attention: those of query heads in q_proj and o_proj, of KV heads in k_proj and v_proj."""
        projected = (self.joint_query_heads or self.query_heads) + (self.joint_key_heads or self.kv_heads)
        return projected + self.query_heads + self.kv_heads

    def with_heads(self, query_heads: int, kv_heads: int) -> LayerShape:
        """The layer with fewer heads; with none, nothing is left of what its heads were normed with."""
        nothing = {} if query_heads else {"joint_query_heads": 0, "joint_key_heads": 0}
        return self.model_copy(update={"query_heads": query_heads, "kv_heads": kv_heads, **nothing})

    @property
    def ffns(self) -> int:
        """How many FFNs stand side by side: E, or 1."""
        return max(self.experts, 1)

    @property
    def ffn_scores(self) -> tuple[int, ...]:
        """Shape of what is known of each FFN channel: (F,), or (E, F)."""
        return (self.experts, self.ffn_channels) if self.experts else (self.ffn_channels,)

    @property
    def shared_width(self) -> int:
        """S, or 0 where there is no shared expert."""
        return self.shared_channels or 0

    @property
    def ffn_elements(self) -> int:
        """Channels of all its FFNs: F, or E F + S."""
        return self.ffns * self.ffn_channels + self.shared_width

    @model_serializer(mode="wrap")
    def _numbers_where_they_matter(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = serialise(self)
        return fields if self.head_numbers else {name: fields[name] for name in fields if name != "head_numbers"}


class LatentSizes(Value):
    """Channels of multi-head latent attention."""

    queries: Annotated[int, Field(ge=0, le=2**24)]
    """Of the latent that a token's queries are made of; 0 where they are made of the hidden states."""
    keys_and_values: _Size
    """Of the latent that its keys and values are made of."""
    score: _Size
    """Of one head's query and key."""
    turning: _Size
    """Of these, those that turn with the position; all heads have the same of a key, beside the latent."""

    @property
    def cached(self) -> int:
        """What a token leaves in a layer's cache."""
        return self.keys_and_values + self.turning

    def key_value(self, head_dim: int) -> int:
        """Of what a head's key and value are, without what turns."""
        return self.score - self.turning + head_dim


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
    shared_gates: bool = False
    """Whether shared experts have a gate, H weights that are never cut."""
    experts_per_token: _Heads = 0
    """k of a mixture; 0 without experts, and where a record does not say."""
    latent: LatentSizes | None = None
    """Sizes of multi-head latent attention; None where keys and values are made of the hidden states."""
    layers: tuple[LayerShape, ...]

    @model_serializer(mode="wrap")
    def _latent_where_there_is_one(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = serialise(self)
        return fields if self.latent else {name: fields[name] for name in fields if name != "latent"}

    @property
    def head_block_parameters(self) -> int:
        """Weights of one head in one projection, H D."""
        return self.hidden_size * self.head_dim

    @property
    def ffn_channel_parameters(self) -> int:
        """Weights of one FFN channel, 3 H when gated."""
        return self.ffn_matrices * self.hidden_size

    def ffn_unit_parameters(self, layer: LayerShape) -> int:
        """Weights of what an FFN loses at a time: one channel, or one of every routed expert (3 E H)."""
        return layer.ffns * self.ffn_channel_parameters

    def attention_parameters(self, layer: LayerShape) -> int:
        """Attention weights of `layer`, (2 Q + 2 K) H D; with joint norms, q_proj and k_proj have the dense Q and K.

        With latents of l channels, of queries l_q or H, scores of s channels of which r turn:
        Q (l_q s + l (s - r + D) + D H), and what makes the latents, l_q H + (l + r) H.
        """
        if self.latent is None:
            return layer.head_blocks * self.head_block_parameters
        sizes = self.latent
        queries = (sizes.queries or self.hidden_size) * sizes.score
        keys_and_values = sizes.keys_and_values * sizes.key_value(self.head_dim)
        own = layer.query_heads * (queries + keys_and_values + self.head_block_parameters)
        return own + self.joint_parameters(layer)

    def joint_parameters(self, layer: LayerShape) -> int:
        """Attention weights of `layer` that go with its last head only."""
        if self.latent is None:
            return (layer.joint_query_heads + layer.joint_key_heads) * self.head_block_parameters
        return (self.latent.queries + self.latent.cached) * self.hidden_size if layer.query_heads else 0

    def ffn_parameters(self, layer: LayerShape) -> int:
        """FFN weights of `layer`: 3 H F when gated, 3 H (E F + S) in a mixture.

        Routers and the gates of shared experts are never cut nor counted.
        """
        return layer.ffn_elements * self.ffn_channel_parameters

    def caches(self, layer: LayerShape) -> dict[str, tuple[int, int]]:
        """Heads and channels that every token has in each cache of `layer`, by name; none in a layer without heads."""
        if not layer.kv_heads:
            return {}
        if self.latent is not None:
            return {"latent": (1, self.latent.cached)}
        return dict.fromkeys(("key", "value"), (layer.kv_heads, self.head_dim))

    @property
    def attended_channels(self) -> int:
        """Channels of one head in attention: D, or all of what is cached where that is one latent for all heads."""
        return self.head_dim if self.latent is None else self.latent.cached

    @property
    def cached_channels(self) -> int:
        """Values that every token has in all caches together, the sum over layers of 2 K D, or of latents."""
        return sum(heads * width for layer in self.layers for heads, width in self.caches(layer).values())

    @property
    def decoder_parameters(self) -> int:
        """All attention and FFN weights: what a pruning ratio is a share of."""
        return sum(self.attention_parameters(layer) + self.ffn_parameters(layer) for layer in self.layers)

    @property
    def head_parameters(self) -> int:
        """Weights of the language-model head."""
        return self.vocabulary_size * self.hidden_size

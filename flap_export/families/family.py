"""What a family is: where a model keeps its attention, FFN and norms, as data.

A projection declares the space of its inputs and of its outputs. Everything that cuts, counts or exports
weights follows from these spaces; a further family is a further row of the table (`flap_export.families.table`).

    hidden   the residual stream, never cut
    query    Q heads of D channels        kv   K heads of D channels        ffn   F channels
    shared   S channels of a mixture's expert that every token passes
    joint_query, joint_key    all heads of the dense layer, over which one norm runs: those that attention kept first,
                              then those that count in the norm only
    query_latent, kv_latent   what queries, and keys and values, of all heads are made of (multi-head latent attention),
                              never cut
    score    Q heads of those channels whose products are scores
    key_value                 Q heads of a key's channels that do not turn, and a value's

In a mixture of experts every routed expert has an `ffn` space of its own; `*` in a path stands for the expert's number,
as checkpoints have it. Routers and the gates of shared experts are no projections: they read and write what is never
cut. A family may have plain FFNs in some layers and mixtures in others; each layer has the projections of its own kind.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal

from flap_export.shapes import DecoderShape, LayerShape

Space = Literal[
    "hidden",
    "query",
    "kv",
    "ffn",
    "shared",
    "joint_query",
    "joint_key",
    "query_latent",
    "kv_latent",
    "score",
    "key_value",
]
UNCUT_SPACES: Final[frozenset[Space]] = frozenset({"hidden", "query_latent", "kv_latent"})
JOINT_SPACES: Final[frozenset[Space]] = frozenset({"joint_query", "joint_key"})
Part = Literal["query", "ffn"]
"""The two parts of a layer: attention, whose heads are cut, and the FFN, a shared expert included."""
PARTS: tuple[Part, ...] = ("query", "ffn")
EVERY_EXPERT = "*"
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True)
class Projection:
    """A linear module below a decoder layer; several output spaces mean fused outputs, stacked in that order."""

    path: str
    inputs: Space
    outputs: tuple[Space, ...]
    blocks: int | None = 1
    """How many blocks the fused outputs consist of, each with an equal part of every space, in that order. One: the
    spaces follow one another. None: a block for every KV group, with its query heads, its key head and its value head.
    Several (CodeGen): the heads that stay would no longer fill them evenly, so that a layer that loses heads is laid
    out in one block for every KV group instead."""
    where: tuple[str, bool] | None = None
    """Configuration field that says whether a model has it, and whether it must hold something for that, or null."""

    def is_there(self, config: Any) -> bool:
        """Whether models of a configuration have it."""
        return self.where is None or (getattr(config, self.where[0]) is not None) == self.where[1]

    def dense_blocks(self, groups: int) -> int:
        """Blocks in a layer with so many KV groups that kept all of them."""
        return groups if self.blocks is None else self.blocks

    def pruned_blocks(self, groups: int) -> int:
        """Blocks in a layer that lost heads; `groups` are those of the dense one."""
        return 1 if self.blocks == 1 else groups

    @property
    def restores(self) -> bool:
        """Whether it maps a cut space back to the residual stream, so that compensation goes here."""
        return self.inputs not in UNCUT_SPACES and self.outputs == ("hidden",)

    @property
    def space(self) -> Space:
        """The cut space that it reads from or first writes to."""
        return self.outputs[0] if self.inputs in UNCUT_SPACES else self.inputs

    @property
    def part(self) -> Part:
        """Which part of a layer it belongs to."""
        return "ffn" if self.space in ("ffn", "shared") else "query"

    def is_of(self, layer: LayerShape) -> bool:
        """Whether a layer of this kind has it: routed experts are a mixture's, an FFN beside them is shared."""
        if self.space == "shared":
            return layer.shared_channels is not None
        return self.part == "query" or bool(layer.experts) == (EVERY_EXPERT in self.path)

    def at(self, expert: int | None) -> str:
        """The path in one expert, or in a plain FFN."""
        return self.path if expert is None else self.path.replace(EVERY_EXPERT, str(expert))


@dataclass(frozen=True)
class Norm:
    """What sets a family's own norm apart: x / sqrt(mean(x^2) + epsilon) * (weight + offset).

    Layer norms of torch need no such description; only classes that a family brings along have one.
    """

    epsilon: str | float = "variance_epsilon"
    """The module's attribute that holds it, or the number where no module does."""
    offset: float = 0.0
    is_centred: bool = False
    """Whether it is a layer norm, which takes the mean from x first; it may have a bias, and no weight at all."""
    suffix: str = "RMSNorm"
    """How its class's name ends."""

    def epsilon_of(self, module: Any) -> float:
        """The number that `module`, one of these norms, adds."""
        return float(getattr(module, self.epsilon) if isinstance(self.epsilon, str) else self.epsilon)

    def covers(self, module: object) -> bool:
        """Whether `module` is one of these norms."""
        return type(module).__name__.endswith(self.suffix)


@dataclass(frozen=True)
class Modules:
    """Where modules are, as paths relative to the causal LM; attention relative to its layer."""

    decoder: str = "model"
    layers: str = "model.layers"
    embedding: str = "model.embed_tokens"
    head: str = "lm_head"
    attention: str = "self_attn"


@dataclass(frozen=True)
class Heads:
    """What a configuration's numbers mean for attention: Q query heads and K KV heads of D channels, H hidden ones."""

    plain: bool = False
    """Whether every query head has a KV head of its own and D is H / Q, whatever else a configuration states."""
    kv_field: str | None = "num_key_value_heads"
    """Configuration field that holds K; Q where there is no such field, or nothing in it."""
    multi_query: Mapping[str, bool] | None = None
    """What configuration fields hold where all query heads share one KV head, in families that decide it so; D is
    H / Q in them."""
    size_follows: bool = False
    """Whether D is H / Q, whatever else a configuration states; so it is with plain heads."""
    size_follows_in_4: bool = False
    """Whether that holds in transformers 4 only; 5 takes what a configuration states."""
    fill_hidden: bool = False
    """Whether the class makes its output projection [H, H], or a norm of all queries [H], whatever the heads are, so
    that Q D must be H. No class of its own then holds fewer heads."""
    divide_hidden: bool = False
    """Whether the class checks that Q divides H."""
    fixed_where: Mapping[str, object] = field(default_factory=dict)
    """What configuration fields hold where the class takes H / Q for D, whatever a configuration states."""
    fixed_with_rope: tuple[str, ...] = ()
    """Kinds of rotary embedding with which it does."""
    parameters: Mapping[str, Space] = field(default_factory=dict)
    """Parameters below a layer, where a configuration has them, with something for every head of a space: a row each,
    [heads, D], a number each, [heads], or where one norm runs over all heads of a joint space, [heads D]."""

    @property
    def derived_size(self) -> bool:
        """Whether D is H / Q, whatever a configuration states."""
        return self.plain or self.size_follows or self.multi_query is not None

    @property
    def are_fixed(self) -> bool:
        """Whether the family's own class takes the dense number of heads only, at the dense head size.

        One with joint norms has no place for heads that count in these and nowhere else.
        """
        has_joint_norms = not JOINT_SPACES.isdisjoint(self.parameters.values())
        return self.derived_size or self.fill_hidden or self.size_follows_in_4 or has_joint_norms


@dataclass(frozen=True)
class Rotary:
    """How heads turn with their positions."""

    interleaved: bool = False
    """Whether channels 2i and 2i + 1 of a head turn together; in other families these are i and i + R / 2."""
    sines_first: bool = False
    """Whether the rotary embedding gives sines before cosines. The class then turns heads by a function that no other
    has, and own attention does it instead."""
    backwards: bool = False
    """Whether the class turns heads the other way than the angles that it gives."""
    angles_once: bool = False
    """Whether it gives every angle once; in other families both channels of a pair have it."""
    partial: bool = False
    """Whether the class turns only as many channels of a head as its table has; other classes turn all of them."""
    counted_apart: bool = False
    """Whether its attention counts these channels itself (`rotary_ndims`), and fails where the table, which has pairs,
    has another number."""
    in_float32: bool = False
    """Whether heads pass through single precision where they turn, whatever precision the model computes in."""
    required_fields: tuple[str, ...] = ()
    """Rotary parameters that the class reads and has no default for, beside those of the scaling's kind."""
    names_in_4: Mapping[str, str] = field(default_factory=dict)
    """What transformers 4 called rotary parameters of this family, where that is something else."""
    newer_form_only: bool = False
    """Whether the class reads none of transformers 4's fields, and warns of them."""


@dataclass(frozen=True)
class FeedForward:
    """What a configuration's numbers mean for a plain FFN of F channels."""

    width_field: str | None = "intermediate_size"
    """Configuration field that holds F; None where the class leaves no choice."""
    multiple: int | None = None
    """F in units of H where there is no such field, or nothing in it."""


@dataclass(frozen=True)
class SharedExpert:
    """What a configuration's numbers mean for the expert of a mixture that every token passes, S channels wide.

    Where neither field is named it is as wide as a routed one.
    """

    width_field: str | None = None
    """Configuration field that holds S."""
    count_field: str | None = None
    """Or the one that holds S in units of F; several shared experts are one that is as wide as they are together."""
    gated: bool = False
    """Whether a gate, which is never cut, weighs what it gives."""
    may_be_missing: bool = False
    """Whether the class makes none where a configuration states zero; others make one without channels."""


@dataclass(frozen=True)
class Mixture:
    """What a configuration's numbers mean for a mixture: E routed experts of F channels, and perhaps a shared one."""

    experts_field: str
    """Configuration field that holds E."""
    width_field: str = "moe_intermediate_size"
    """Configuration field that holds F."""
    chosen_field: str = "num_experts_per_tok"
    """Configuration field that holds k."""
    shared: SharedExpert | None = None
    layers: Callable[[Any, int], bool] | None = None
    """Says of a configuration and a layer's index whether that layer is a mixture; None where all are."""
    router: str = "mlp.gate"
    """The module that chooses experts, relative to its layer."""
    router_in_float32: bool = False
    """Whether it multiplies in single precision, whatever precision the model computes in."""


@dataclass(frozen=True)
class Stack:
    """A tensor of checkpoints whose first axis is the experts of a layer: what projections of each hold, together."""

    name: str
    """What checkpoints call it, relative to its layer."""
    parts: tuple[str, ...]
    """The tensors that each expert has of it, as the model calls them; of several, outputs stand part after part."""
    alternating: bool = False
    """Whether the first outputs of all parts stand before the second ones instead."""
    transposed: bool = False
    """Whether it holds weights as [in, out]; all of this package sees them as [out, in]."""

    def outputs_of(self, part: int, outputs: int) -> slice:
        """Where among the outputs of an expert those of one of the parts are."""
        if self.alternating:
            return slice(part, None, len(self.parts))
        width = outputs // len(self.parts)
        return slice(part * width, None if part + 1 == len(self.parts) else (part + 1) * width)


@dataclass(frozen=True)
class Stored:
    """How checkpoints differ from the model that is made of them."""

    names: Mapping[str, str] = field(default_factory=dict)
    """Parts of tensors' names in checkpoints, and what the model calls them."""
    buffers: tuple[str, ...] = ()
    """Ends of the names of what old checkpoints hold beside parameters, and the model computes."""
    unread: tuple[str, ...] = ()
    """Of these, what nothing reads any more."""
    unused: tuple[str, ...] = ()
    """Beginnings of the names of what they hold beside the model, to predict several tokens at once; `{layers}` stands
    for the number of layers."""
    transposed: bool = False
    """Whether checkpoints hold the weights of projections as [in, out]; all of this package sees them as [out, in]."""
    stacks: tuple[Stack, ...] = ()
    """Tensors of all experts together, where checkpoints hold them so; all of this package sees them one by one."""


@dataclass(frozen=True)
class Family:
    """One row of the table."""

    model_type: str
    class_stem: str
    """`<stem>Config` is the configuration's class inside transformers, and the causal LM's begins with it."""
    projections: tuple[Projection, ...]
    config_stem: str | None = None
    """Stem of the configuration's class where it is another one."""
    language_model: str = "ForCausalLM"
    """What follows the stem in the name of the causal LM's class."""
    inside: tuple[str, ...] = ()
    """Types of models for images and text whose text model this is, beyond the one that `family_of` derives from a name
    ending in `_text`."""
    since: str = "4.57"
    """Version of transformers from which on the family is supported."""
    modules: Modules = Modules()
    heads: Heads = Heads()
    ffn: FeedForward = FeedForward()
    """Of plain layers."""
    mixture: Mixture | None = None
    """Of layers that are mixtures of experts, in families that have such."""
    rotary: Rotary = Rotary()
    stored: Stored = Stored()
    norm: Norm = Norm()
    positions_field: str = "max_position_embeddings"
    """Configuration field that holds the number of positions, in families that have one."""
    latent: bool = False
    """Whether attention is multi-head latent attention."""
    alibi: str | None = None
    """Name of the argument by which the class's attention is handed ALiBi, the biases of all heads by the distance of a
    key; None in families without."""
    parallel_blocks: bool | str = False
    """Whether attention and FFN of a layer read the same hidden states behind one norm, or the configuration flag that
    says so."""
    needs_bos: bool = False
    """Whether a text without its first token, BOS, is nothing the models know: they predict it badly throughout."""
    attention_kernel: str = "sdpa"
    """Attention implementation of transformers to run; one that leaves nothing of the family out."""
    bias_flags: Mapping[Space, str | None] = field(default_factory=dict)
    """Configuration flag that gives the projection back from a space a bias, and perhaps those to it; None where they
    always have one. A family with both spaces can hold a compensated uniform plan in its own stock classes."""
    requires: Mapping[str, tuple[object, ...] | str] = field(default_factory=dict)
    """What configuration fields, or those of sections (`section.field`), must hold: one of these values, or the same as
    another field."""
    excludes: tuple[Mapping[str, object], ...] = ()
    """Values of several fields that the family's own class cannot compute together."""

    @property
    def class_name(self) -> str:
        """The causal LM's class."""
        return self.class_stem + self.language_model

    @property
    def ffn_matrices(self) -> int:
        """Matrices [H, F] that an FFN is made of: two, or three where it is gated."""
        own = [projection for projection in self.projections if EVERY_EXPERT in projection.path]
        return _spaces(own or self.projections).count("ffn")

    def of(self, config: Any) -> Family:
        """The row as it describes models of one configuration: with the projections that these have."""
        return replace(self, projections=tuple(p for p in self.projections if p.is_there(config)))

    def has_space(self, space: Space) -> bool:
        """Whether a projection reads or writes it."""
        return space in _spaces(self.projections)

    def has_bias(self, space: Space, config: Any) -> bool:
        """Whether the projection that maps `space` back to the residual stream has a bias, by a configuration."""
        if not self.can_hold_bias(space):
            return False
        flag = self.bias_flags[space]
        return flag is None or bool(getattr(config, flag, False))

    def can_hold_bias(self, space: Space) -> bool:
        """Whether its own class has, or can be told to have, a bias there."""
        return space in self.bias_flags

    def projections_of(self, layer: LayerShape) -> tuple[Projection, ...]:
        """The projections that a layer of this kind has."""
        return tuple(projection for projection in self.projections if projection.is_of(layer))

    def projection(self, path: str) -> Projection | None:
        """The projection at `path` below a layer, in whichever expert, or None."""
        general = _NUMBER.sub(EVERY_EXPERT, path)
        return next((projection for projection in self.projections if projection.path == general), None)

    def stored_name(self, name: str) -> str:
        """What checkpoints of the family's own class call a tensor."""
        for stored, called in self.stored.names.items():
            name = name.replace(called, stored)
        return name

    def stores_transposed(self, name: str) -> bool:
        """Whether checkpoints hold the tensor of this name as [in, out]: in some families, the projections' weights."""
        path, _, kind = name.removeprefix(f"{self.modules.layers}.").partition(".")[2].rpartition(".")
        return self.stored.transposed and kind == "weight" and self.projection(path) is not None

    def stack_of(self, name: str) -> tuple[Stack, int] | None:
        """In which stack checkpoints hold the tensor of this name, and as which of its parts; None where alone."""
        general = _NUMBER.sub(EVERY_EXPERT, name.removeprefix(f"{self.modules.layers}.").partition(".")[2])
        places = ((stack, part) for stack in self.stored.stacks for part, path in enumerate(stack.parts))
        return next(((stack, part) for stack, part in places if stack.parts[part] == general), None)

    def restoring(self, space: Space, layer: LayerShape | None = None) -> Projection:
        """The projection that maps `space` back to the residual stream: o_proj for query, down_proj for ffn.

        Args:
            space: that is cut.
            layer: of the kind that is meant; None in families whose layers are all of one kind.
        """
        own = self.projections if layer is None else self.projections_of(layer)
        return next(p for p in own if p.restores and p.inputs == space)

    def restoring_paths(self, space: Space, layer: LayerShape) -> list[str]:
        """Where the restoring projections of `space` are: one, or that of every expert in turn."""
        restoring = self.restoring(space, layer)
        return [restoring.at(expert) for expert in experts_of(space, layer)]


def _spaces(projections: Iterable[Projection]) -> list[Space]:
    """Of all axes of all of them."""
    return [space for projection in projections for space in (projection.inputs, *projection.outputs)]


def expert_at(path: str) -> int | None:
    """The number of the expert that a path below a layer leads into, or None."""
    number = _NUMBER.search(path)
    return None if number is None else int(number.group())


def space_widths(shape: DecoderShape, layer: LayerShape) -> dict[Space, int]:
    """Channels of every space in one layer of a decoder; in a mixture, `ffn` is one expert's."""
    latent = shape.latent
    return {
        "hidden": shape.hidden_size,
        "query": layer.query_heads * shape.head_dim,
        "kv": layer.kv_heads * shape.head_dim,
        "ffn": layer.ffn_channels,
        "shared": layer.shared_width,
        "joint_query": layer.joint_query_heads * shape.head_dim,
        "joint_key": layer.joint_key_heads * shape.head_dim,
        "query_latent": latent.queries if latent else 0,
        "kv_latent": latent.keys_and_values if latent else 0,
        "score": layer.query_heads * latent.score if latent else 0,
        "key_value": layer.query_heads * latent.key_value(shape.head_dim) if latent else 0,
    }


def experts_of(space: Space, layer: LayerShape) -> Sequence[int | None]:
    """The experts that have a `space` of their own each; (None,) where there is but one."""
    return range(layer.experts) if space == "ffn" and layer.experts else (None,)

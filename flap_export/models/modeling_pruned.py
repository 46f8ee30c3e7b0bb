"""A pruned decoder whose layers have their own head counts and FFN widths.

This file is self-contained: it needs torch and transformers only and is copied next to the weights of every
uneven checkpoint, so that `AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)` loads it.
The two import lines name the family the checkpoint came from. The configuration carries, under `pruned`:

    projections   [path, input space, [output spaces]] of each linear module of a layer; `*` is an expert's number.
                  A layer with experts has those of experts in place of a plain FFN's; `shared` are those of an expert
                  that every token passes
    layers        per layer: query_heads, kv_heads, ffn_channels, attention_bias, ffn_bias, experts, shared_channels
                  (null where there is no shared expert), shared_bias; where norms run over all heads
                  joint_query_heads, joint_key_heads: those of the dense layer; and head_numbers, which of the dense
                  layer's heads these are, where heads differ by more than their weights
    head_parameters   each parameter with something for every head, where a layer has it, and the space of these heads
    head_dim      of every head
    latent        with multi-head latent attention: channels of the latents that queries (0: there are none) and keys
                  and values are made of, of a head's query, and of a head's key and value without what turns
    alibi         what attention calls the biases of all dense heads by distance, which it is handed, if there are any
    since         the version of transformers that is needed
    attention_kernel   the attention implementation to prefer, where transformers' own choice drops the softcap

A layer that kept no head (or no channel) is reduced to the bias that compensates for what it lost. In a mixture the
router stays and weighs the biases of its experts, as does the gate of a shared one.
"""

from __future__ import annotations

import inspect
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn
from transformers import LlamaConfig as BaseConfig
from transformers import LlamaForCausalLM as BaseForCausalLM
from transformers.cache_utils import Cache
from transformers.pytorch_utils import Conv1D

EVERY_EXPERT = ".*."
TAKEN_OF = {"joint_query": "query", "joint_key": "kv"}
"""Of the heads that one norm runs over, which attention takes: as many as there are of these, the first."""


class Constant(nn.Module):
    """What is left of a linear module without inputs: its bias [out_features], or zero."""

    def __init__(self, out_features: int, like: Tensor, bias: bool) -> None:
        super().__init__()
        self.out_features = out_features
        zeros = torch.zeros(out_features, dtype=like.dtype, device=like.device)
        self.register_parameter("bias", nn.Parameter(zeros) if bias else None)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """The bias for every position: [..., in] -> [..., out]."""
        shape = (*hidden_states.shape[:-1], self.out_features)
        bias: Tensor | None = self._parameters["bias"]
        # A copy, because Falcon adds to it in place.
        output = hidden_states.new_zeros(shape) if bias is None else bias.expand(shape).clone()
        # Parallel training waits for a gradient of every parameter, of the norm before this one too.
        return output + 0 * hidden_states.sum() if self.training else output


class EmptyAttention(nn.Module):
    """Attention without heads. It still counts the tokens in the cache, whose length is read from any layer.

    Every one is of a class that is also the family's: transformers gathers attention weights from its own classes only.
    """

    def __init__(self, output: str, constant: Constant, layer_idx: int, replaced: Any) -> None:
        # The family's own would make projections.
        nn.Module.__init__(self)
        self.output, self.layer_idx, self.config = output, layer_idx, getattr(replaced, "config", None)
        self.adds_residual = _adds_residual(replaced)
        # Transformers 4.57 asks Gemma 3's attention which of the rotary embeddings it wants.
        self.is_sliding = getattr(replaced, "is_sliding", False)
        self.add_module(output, constant)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """The output bias, and the weights of no head [B, 0, n, keys] where the others give theirs.

        Arguments are as transformers passes them to attention.
        """
        keys = hidden_states.new_zeros(hidden_states.shape[0], 1, hidden_states.shape[1], 1)
        # Families and versions of transformers call the cache by different names.
        held: Any = next((value for value in (*args, *kwargs.values()) if isinstance(value, Cache)), None)
        if held is not None and getattr(held, "counts_empty_layers", True):
            keys, _ = held.update(keys, keys, self.layer_idx)
        # A class that keeps no configuration has one way to compute it, which gives weights.
        gives_weights = self.config is None or self.config._attn_implementation == "eager"
        weights = hidden_states.new_zeros(keys.shape[0], 0, hidden_states.shape[1], keys.shape[2])
        output = self.get_submodule(self.output)(hidden_states)
        output = output + _residual(args, kwargs) if self.adds_residual else output
        return output, weights if gives_weights else None

    def __reduce__(self) -> tuple[Any, ...]:
        """By the family's class: the one that is made of it cannot be found by its name."""
        return _unfilled, (type(self).__mro__[2],), self.__dict__


def _emptied(attention: type[nn.Module]) -> type[EmptyAttention]:
    return type(f"Empty{attention.__name__}", (EmptyAttention, attention), {})


def _unfilled(attention: type[nn.Module]) -> EmptyAttention:
    emptied = _emptied(attention)
    return emptied.__new__(emptied)


class EmptyFeedForward(nn.Module):
    """FFN without channels."""

    def __init__(self, output: str, constant: Constant, like: nn.Module) -> None:
        super().__init__()
        self.output, self.adds_residual = output, _adds_residual(like)
        self.add_module(output, constant)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The output bias; arguments as transformers passes them to an FFN."""
        output: Tensor = self.get_submodule(self.output)(hidden_states)
        return output + _residual(args, kwargs) if self.adds_residual else output


def _adds_residual(block: nn.Module) -> bool:
    """Whether a block is handed the residual too, and adds it to what it gives, as BLOOM's do."""
    return "residual" in inspect.signature(block.forward).parameters


def _residual(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The residual, which is the first argument after the hidden states."""
    residual: Tensor = kwargs["residual"] if "residual" in kwargs else args[0]
    return residual


class Expert(nn.Module):
    """A gated FFN, with an output bias where it lost channels; its linear modules are called as in checkpoints."""

    def __init__(self, names: list[str], stacked: Any, hidden_size: int, width: int, bias: bool) -> None:
        super().__init__()
        self.names, self.width = names, width
        self.act_fn: Any = getattr(stacked, "act_fn", None)
        self.own_gate: Any = _own_gate(stacked)
        gate, up, down = names
        if not width:
            self.add_module(down, Constant(hidden_size, stacked.down_proj, bias))
            return
        like = {"device": stacked.down_proj.device, "dtype": stacked.down_proj.dtype}
        for name in (gate, up):
            self.add_module(name, nn.Linear(hidden_size, width, bias=getattr(stacked, "has_bias", False), **like))
        self.add_module(down, nn.Linear(width, hidden_size, bias=bias, **like))

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Tokens [T, H] that were sent to this expert."""
        gate, up, down = self.names
        if self.width:
            hidden_states = self.gated(self.get_submodule(gate)(hidden_states), self.get_submodule(up)(hidden_states))
        output: Tensor = self.get_submodule(down)(hidden_states)
        return output

    def gated(self, gate: Tensor, up: Tensor) -> Tensor:
        """What the family's class makes of gate and up values [T, F], which it may have in turns."""
        if self.own_gate is None:
            gated: Tensor = self.act_fn(gate) * up
        else:
            gated = self.own_gate(torch.stack([gate, up], dim=-1).flatten(-2))
        return gated


def _own_gate(stacked: Any) -> Any:
    """How a class gates whose gate and up values stand in turns; its weights are not held. None for all others."""
    if getattr(stacked, "is_concatenated", True):
        return None
    settings = {name: value for name, value in vars(stacked).items() if not name.startswith("_")}
    return partial(type(stacked)._apply_gate, SimpleNamespace(**settings))


class Experts(nn.ModuleList):
    """The experts of a layer, one module each, in place of transformers' stacked weights."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The weighted sum of what the chosen experts give.

        Args:
            hidden_states: [T, H]
            top_k_index: [T, k], the experts chosen for every token.
            top_k_weights: [T, k]
        """
        output = torch.zeros_like(hidden_states)
        for number, expert in enumerate(self):
            choice, token = torch.eq(top_k_index.T, number).nonzero(as_tuple=True)
            if len(token):
                weighted = expert(hidden_states[token]) * top_k_weights[token, choice, None]
                output.index_add_(0, token, weighted.to(output.dtype))
        return output


def _projections_of(counts: dict[str, Any], projections: list[Any]) -> list[Any]:
    """Those of a layer of this kind, in the order they are listed."""

    def is_of_layer(path: str, block: str) -> bool:
        if block == "shared":
            return counts["shared_channels"] is not None
        return block == "query" or bool(counts["experts"]) == (EVERY_EXPERT in path)

    return [entry for entry in projections if is_of_layer(entry[0], _block_of(*entry[1:]))]


def _block_of(inputs: str, outputs: list[str]) -> str:
    """What a projection between these spaces is of: attention (`query`), the FFN or the shared expert."""
    space = inputs if inputs != "hidden" else outputs[0]
    return space if space in ("ffn", "shared") else "query"


def _separate_experts(layer: nn.Module, counts: dict[str, Any], projections: list[Any], hidden_size: int) -> None:
    """Give every routed expert of a mixture modules of its own, as wide as stated."""
    paths = [path for path, _, _ in projections if EVERY_EXPERT in path]
    if not paths:
        return
    parent = paths[0].partition(EVERY_EXPERT)[0]
    stacked: Any = layer.get_submodule(parent)
    names = [path.partition(EVERY_EXPERT)[2] for path in paths]
    width, bias = counts["ffn_channels"], counts["ffn_bias"]
    experts = (Expert(names, stacked, hidden_size, width, bias) for _ in range(counts["experts"]))
    layer.set_submodule(parent, Experts(experts))


class OwnCounts:
    """A configuration as seen by one attention with head counts of its own; everything else is the model's."""

    def __init__(self, config: Any, query_heads: int, kv_heads: int) -> None:
        self._config = config
        self.num_attention_heads, self.num_key_value_heads = query_heads, kv_heads

    def __getattr__(self, name: str) -> Any:
        if name == "_config":
            raise AttributeError(name)
        return getattr(self._config, name)


def _count_heads(attention: Any, query_heads: int, kv_heads: int, head_dim: int) -> None:
    """Tell `attention` how many heads it has, wherever its family keeps that."""
    counts = {
        "num_heads": query_heads,
        "n_heads": query_heads,
        "num_attention_heads": query_heads,
        "num_key_value_heads": kv_heads,
        "num_key_value_groups": query_heads // kv_heads,
        # Where GPT-2 and GPTBigCode cut fused outputs.
        "split_size": query_heads * head_dim,
        "embed_dim": query_heads * head_dim,
        "num_kv_heads": kv_heads,
    }
    for name, count in counts.items():
        if hasattr(attention, name):
            setattr(attention, name, count)
    config = getattr(attention, "config", None)
    if config is None:
        return
    if (config.num_attention_heads, getattr(config, "num_key_value_heads", kv_heads)) != (query_heads, kv_heads):
        attention.config = OwnCounts(config, query_heads, kv_heads)
        # What stood in blocks of several heads stands head by head where some are gone: CodeGen.
        if hasattr(attention, "mp_num"):
            attention.mp_num = query_heads


def _linear(layer: nn.Module, path: str) -> nn.Linear | Conv1D:
    module = layer.get_submodule(path)
    assert isinstance(module, nn.Linear | Conv1D), path
    return module


def _features(linear: nn.Linear | Conv1D) -> tuple[int, int]:
    """Inputs and outputs; the weight of Conv1D, GPT-2's linear module, is [in, out]."""
    rows, columns = linear.weight.shape
    return (rows, columns) if isinstance(linear, Conv1D) else (columns, rows)


def _resized(linear: nn.Linear | Conv1D, in_features: int, out_features: int, bias: bool) -> nn.Linear | Conv1D:
    if (*_features(linear), linear.bias is not None) == (in_features, out_features, bias):
        return linear
    like = {"device": linear.weight.device, "dtype": linear.weight.dtype}
    if isinstance(linear, Conv1D):
        return Conv1D(out_features, in_features).to(**like)
    # Falcon's adds its bias to a rounded product.
    return type(linear)(in_features, out_features, bias=bias, **like)


def _empty(layer: nn.Module, layer_idx: int, path: str, block: str, restores: bool, bias: bool) -> None:
    """Empty the block of a projection: nothing is left of it but the bias of the projection that restores.

    A block that is a module of its own is replaced as a whole; where its projections lie in the layer itself (OPT's
    FFN), each of them is.
    """
    parent_path, _, name = path.rpartition(".")
    if not restores:
        if not parent_path:
            layer.set_submodule(path, nn.Identity())
        return
    linear = _linear(layer, path)
    constant = Constant(_features(linear)[1], linear.weight, bias)
    if not parent_path:
        layer.set_submodule(path, constant)
        return
    parent: Any = layer.get_submodule(parent_path)
    if block == "query":
        layer.set_submodule(parent_path, _emptied(type(parent))(name, constant, layer_idx, parent))
    else:
        layer.set_submodule(parent_path, EmptyFeedForward(name, constant, parent))


def resize_layer(layer: nn.Module, layer_idx: int, pruned: dict[str, Any], hidden_size: int, head_dim: int) -> None:
    """Give `layer` the head counts and the FFN width that `pruned["layers"][layer_idx]` states."""
    counts = pruned["layers"][layer_idx]
    widths = {
        "hidden": hidden_size,
        "query": counts["query_heads"] * head_dim,
        "kv": counts["kv_heads"] * head_dim,
        "ffn": counts["ffn_channels"],
        "joint_query": counts.get("joint_query_heads", 0) * head_dim,
        "joint_key": counts.get("joint_key_heads", 0) * head_dim,
        "shared": counts["shared_channels"] or 0,
    }
    output_bias = {
        "query": counts["attention_bias"],
        "ffn": counts["ffn_bias"],
        "shared": counts["shared_bias"],
    }
    latent = pruned.get("latent", {})
    widths |= {space: latent[space] for space in ("query_latent", "kv_latent") if space in latent}
    widths |= {space: counts["query_heads"] * latent[space] for space in ("score", "key_value") if space in latent}
    projections = _projections_of(counts, pruned["projections"])
    if counts["query_heads"]:
        _resize_head_parameters(layer, pruned.get("head_parameters", {}), widths, head_dim)
    _separate_experts(layer, counts, projections, hidden_size)
    for path, inputs, outputs in projections:
        if EVERY_EXPERT in path:
            continue
        block, restores = _block_of(inputs, outputs), outputs == ["hidden"]
        if widths[block] == 0:
            _empty(layer, layer_idx, path, block, restores, output_bias[block])
            continue
        linear = _linear(layer, path)
        bias = output_bias[inputs] if restores else linear.bias is not None
        layer.set_submodule(path, _resized(linear, widths[inputs], sum(widths[space] for space in outputs), bias))
        parent: Any = layer.get_submodule(path.rpartition(".")[0])
        if block == "query":
            _count_heads(parent, counts["query_heads"], counts["kv_heads"], head_dim)
        if block != "query" and hasattr(parent, "intermediate_size"):
            parent.intermediate_size = widths[block]
        if inputs == "query" and "alibi" in pruned:
            # In families with such biases, the dense heads fill the hidden size.
            own = partial(_own_biases, pruned["alibi"], hidden_size // head_dim, counts["head_numbers"])
            parent.register_forward_pre_hook(own, with_kwargs=True)


def _own_biases(
    name: str, dense_heads: int, numbers: list[int], _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Of biases [dense heads, ...] or [B dense heads, ...] that attention is handed, those of the heads it has."""
    by_head = kwargs[name].unflatten(0, (-1, dense_heads)).unbind(1)
    # An index would have to come from the host, which no CUDA graph can hold.
    kept = torch.stack([by_head[number] for number in numbers], dim=1)
    return args, {**kwargs, name: kept.flatten(0, 1)}


def _resize_head_parameters(
    layer: nn.Module, parameters: dict[str, str], widths: dict[str, int], head_dim: int
) -> None:
    """Give parameters [heads, ...] a row for every head that is left; of norms over all heads take the first."""
    owners = dict(layer.named_modules())
    for path, space in parameters.items():
        owner_path, _, name = path.rpartition(".")
        owner = owners.get(owner_path)
        if owner is None:
            continue
        if space not in TAKEN_OF:
            dense = owner.get_parameter(name)
            owner.register_parameter(name, nn.Parameter(dense.new_ones(widths[space] // head_dim, *dense.shape[1:])))
        elif widths[TAKEN_OF[space]] < widths[space]:
            owner.register_forward_hook(partial(_first_channels, widths[TAKEN_OF[space]]))


def _first_channels(width: int, norm: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """What attention takes of the normed heads [..., heads D], as a forward hook."""
    # A copy, because OLMoE clamps it in place.
    return output[..., :width].clone()


def resize_decoder(model: Any, layers_path: str, pruned: dict[str, Any], head_dim: int) -> None:
    """Resize every decoder layer of a freshly built causal LM, before its weights are loaded.

    Raises:
        ImportError: this transformers is too old for the family.
    """
    since = pruned["since"]
    if Version(transformers.__version__).release < Version(since).release:
        name = model.config.model_type.removeprefix("flap_")
        raise ImportError(f"{name} needs transformers {since}, this is {transformers.__version__}; install it")
    for layer_idx, layer in enumerate(model.get_submodule(layers_path)):
        resize_layer(layer, layer_idx, pruned, model.config.hidden_size, head_dim)


class PrunedConfig(BaseConfig):  # type: ignore[misc]
    """The dense family's configuration plus what each layer kept."""

    model_type = f"flap_{BaseConfig.model_type}"

    def __init__(self, pruned: dict[str, Any] | None = None, **kwargs: Any) -> None:
        self.pruned = pruned or {}
        if kwargs.get("attn_implementation") is None and "attention_kernel" in self.pruned:
            kwargs["attn_implementation"] = self.pruned["attention_kernel"]
        super().__init__(**kwargs)


class PrunedForCausalLM(BaseForCausalLM):  # type: ignore[misc]
    """The dense family's causal LM with resized layers."""

    config_class = PrunedConfig

    def __init__(self, config: PrunedConfig) -> None:
        super().__init__(config)
        resize_decoder(self, config.pruned["layers_path"], config.pruned, config.pruned["head_dim"])

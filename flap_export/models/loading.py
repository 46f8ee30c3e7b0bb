"""The torch module of a model directory, dense or pruned, with or without weights, and whether they belong to it."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from flap_export.errors import ModelError
from flap_export.families import EVERY_EXPERT, Family, space_widths
from flap_export.models.double_precision import keep_double_precision
from flap_export.models.opening import Checkpoint, open_checkpoint
from flap_export.models.weights import Weights
from flap_export.shapes import DecoderShape, LayerShape

_FULL_PRECISION = ("F64", "F32", "F16", "BF16")


def pruned_section(family: Family, shape: DecoderShape) -> dict[str, Any]:
    """The `pruned` section of a configuration, which `modeling_pruned.py` reads."""
    kernel = {} if family.attention_kernel == "sdpa" else {"attention_kernel": family.attention_kernel}
    return {
        "layers_path": family.modules.layers,
        "head_dim": shape.head_dim,
        "since": family.since,
        "projections": [[p.path, p.inputs, list(p.outputs)] for p in family.projections],
        "layers": [layer.model_dump() for layer in shape.layers],
        **({"head_parameters": dict(family.heads.parameters)} if family.heads.parameters else {}),
        **({"alibi": family.alibi} if family.alibi else {}),
        **({"latent": _latent_section(shape)} if shape.latent else {}),
        **kernel,
    }


def _latent_section(shape: DecoderShape) -> dict[str, int]:
    """Channels of what keys, values and perhaps queries are made of, and of every head where it is made of that."""
    assert shape.latent is not None
    return {
        "query_latent": shape.latent.queries,
        "kv_latent": shape.latent.keys_and_values,
        "score": shape.latent.score,
        "key_value": shape.latent.key_value(shape.head_dim),
    }


def _stock_model(checkpoint: Checkpoint, dtype: torch.dtype) -> nn.Module:
    """The causal LM as transformers makes it, all layers alike."""
    from transformers import AutoModelForCausalLM

    kernel = checkpoint.family.attention_kernel
    # Transformers writes the dtype into the configuration it is given; the checkpoint's own keeps what it states.
    config = copy.deepcopy(checkpoint.config)
    try:
        model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=kernel)
    # What transformers does not validate shows where it is used, as whatever that raises.
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ModelError(
            f"transformers cannot make a {checkpoint.family.model_type} of '{checkpoint.directory / 'config.json'}' "
            f"({type(error).__name__}: {str(error).partition(chr(10))[0]}); fetch the configuration again"
        ) from error
    _put_plain_linears(model)
    return model.eval()


def _put_plain_linears(model: nn.Module) -> None:
    """Linear modules in the place of transposed ones (GPT-2's Conv1D), for weights as `Weights` gives them.

    The products stay the same to the last bit: a transpose is but another view of what is on disk.
    """
    from transformers.pytorch_utils import Conv1D

    for path, module in list(model.named_modules()):
        if isinstance(module, Conv1D):
            in_features, out_features = module.weight.shape
            like = {"device": module.weight.device, "dtype": module.weight.dtype}
            model.set_submodule(path, nn.Linear(in_features, out_features, **like))


def build_model(checkpoint: Checkpoint, dtype: torch.dtype) -> nn.Module:
    """The causal LM with its per-layer sizes, on the current default device (meta, fake or real), in eval mode."""
    from flap_export.models.modeling_pruned import resize_decoder

    model = _stock_model(checkpoint, dtype)
    if checkpoint.is_pruned or checkpoint.family.mixture:
        section = pruned_section(checkpoint.family, checkpoint.shape)
        resize_decoder(model, checkpoint.family.modules.layers, section, checkpoint.shape.head_dim)
    return model


def meta_model(checkpoint: Checkpoint, dtype: torch.dtype) -> nn.Module:
    """The causal LM with its parameters on the meta device; its buffers are real."""
    with torch.device("meta"):
        model = build_model(checkpoint, dtype)
    _compute_buffers(model, checkpoint)
    if dtype == torch.float64:
        keep_double_precision(model, checkpoint.family)
    return model


@final
class MetaLayers:
    """Decoder layers of any size, without weights: to be filled one by one, by `materialize`."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
        self._checkpoint, self._dtype = checkpoint, dtype
        with torch.device("meta"):
            model = _stock_model(checkpoint, dtype)
        _compute_buffers(model, checkpoint)
        self._layers: Any = model.get_submodule(checkpoint.family.modules.layers)

    def made(self, index: int, shape: LayerShape) -> nn.Module:
        """A new layer `index` of this shape, its parameters on the meta device."""
        from flap_export.models.modeling_pruned import resize_layer

        family, dense = self._checkpoint.family, self._checkpoint.shape
        layer: nn.Module = copy.deepcopy(self._layers[index])
        layers = (*dense.layers[:index], shape, *dense.layers[index + 1 :])
        section = pruned_section(family, dense.model_copy(update={"layers": layers}))
        resize_layer(layer, index, section, dense.hidden_size, dense.head_dim)
        if self._dtype == torch.float64:
            keep_double_precision(layer, family)
        return layer

    def precision(self, index: int, name: str) -> torch.dtype:
        """What the class of layer `index` keeps a tensor in; see `materialize`."""
        made: Tensor | None = self._layers[index].state_dict().get(name)
        return self._dtype if made is None else torch.promote_types(self._dtype, made.dtype)


def _compute_buffers(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Give values to what no checkpoint stores: rotary frequencies, the factor of scaled embeddings, masks.

    A mask that nothing reads goes: GPTBigCode still has one of all its positions.
    """
    for path, module in list(model.named_modules()):
        if type(module).__name__.endswith("RotaryEmbedding"):
            computed = type(module)(config=getattr(module, "config", checkpoint.config))
            _check_turning(computed, model, checkpoint)
            model.set_submodule(path, computed)
        for name, buffer in list(module.named_buffers(recurse=False)):
            if name == "embed_scale":
                scale: float = getattr(module, "scalar_embed_scale", checkpoint.shape.hidden_size**0.5)
                factor = torch.tensor(scale, dtype=buffer.dtype)
                module.register_buffer(name, factor, persistent=False)
            elif f"{path}.{name}".endswith(checkpoint.family.stored.unread):
                delattr(module, name)
            elif f"{path}.{name}".endswith(checkpoint.family.stored.buffers):
                module.register_buffer(name, torch.empty_like(buffer, device="cpu"), persistent=False)
                model._init_weights(module)  # type: ignore[operator]


def _check_turning(rotary: nn.Module, model: nn.Module, checkpoint: Checkpoint) -> None:
    """Whether the family's class can turn as many channels of a head as the configuration makes it."""
    family, latent = checkpoint.family, checkpoint.shape.latent
    size = latent.turning if latent else checkpoint.shape.head_dim
    attributes = [vars(module) for module in model.modules()] if family.rotary.counted_apart else []
    counted: set[int] = {own["rotary_ndims"] for own in attributes if "rotary_ndims" in own}
    for name, buffer in rotary.named_buffers(recurse=False):
        if not name.endswith("inv_freq"):
            continue
        turning = 2 * buffer.numel()
        if turning <= size and (family.rotary.partial or turning == size) and counted <= {turning}:
            continue
        possible = f"at most {size}, in pairs" if family.rotary.partial else f"all {size}"
        raise ModelError(
            f"'{checkpoint.directory / 'config.json'}' makes {max(counted, default=turning)} channels of a head turn "
            f"(partial_rotary_factor, head_dim), and transformers' {family.model_type} can turn {possible}; "
            "no such model can be computed, correct the fields"
        )


def parameter_names(model: nn.Module, checkpoint: Checkpoint) -> Iterator[str]:
    """Names of the tensors a checkpoint must hold, each once: a tied head is not listed, what is computed neither."""
    tied_head = f"{checkpoint.family.modules.head}.weight"
    for name in model.state_dict():
        if not (checkpoint.shape.tied_embeddings and name == tied_head):
            yield name


def check_weights(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Whether the tensors on disk are exactly those of `model`, by name, shape and kind of numbers.

    Raises:
        ModelError: one is missing, unknown, quantised or of another shape, or a tied head differs from the embedding.
    """
    weights, expected = checkpoint.weights, set(parameter_names(model, checkpoint))
    missing = sorted(expected - set(weights))
    known_extra = {f"{checkpoint.family.modules.head}.weight"} if checkpoint.shape.tied_embeddings else set()
    extra = sorted(set(weights) - expected - known_extra)
    if missing:
        instead = f" and hold {_listed(extra)} instead" if extra else ""
        fault = f"are not those of a {checkpoint.family.class_name}" if extra else "are incomplete"
        raise ModelError(f"weights in '{checkpoint.directory}' lack {_listed(missing)}{instead}; they {fault}")
    if extra:
        raise ModelError(
            f"weights in '{checkpoint.directory}' hold {_listed(extra)}, which a {checkpoint.family.model_type} of "
            "this configuration has no place for; configuration and weights do not belong together"
        )
    tensors = model.state_dict()
    for name in expected:
        found, required = weights.shape(name), tuple(tensors[name].shape)
        if found != required:
            raise ModelError(
                f"tensor '{name}' in '{checkpoint.directory}' has shape {list(found)}, the configuration asks for "
                f"{list(required)}; configuration and weights do not belong together"
            )
        if weights.dtype(name) not in _FULL_PRECISION:
            raise ModelError(
                f"tensor '{name}' in '{checkpoint.directory}' holds {weights.dtype(name)} numbers, expected one of "
                f"{', '.join(_FULL_PRECISION)}: its weights are quantised; start from the full-precision checkpoint"
            )
    _check_projections(model, checkpoint)
    if checkpoint.shape.tied_embeddings:
        _check_tied(checkpoint)


def _check_projections(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Whether the projections of every kind of layer have the sizes that their spaces give them.

    No configuration that has been seen asks for others; one that does would be cut in the wrong places.
    """
    kinds = {layer: index for index, layer in reversed(list(enumerate(checkpoint.shape.layers)))}
    for index in kinds.values():
        _check_layer(model, checkpoint, index)


def _check_layer(model: nn.Module, checkpoint: Checkpoint, index: int) -> None:
    """Whether the projections of one layer, but those of routed experts, have the sizes that their spaces give them."""
    shape, family = checkpoint.shape, checkpoint.family
    layer = shape.layers[index]
    widths = space_widths(shape, layer)
    for projection in family.projections_of(layer):
        if EVERY_EXPERT in projection.path or not widths[projection.space]:
            continue
        found = tuple(model.get_parameter(f"{family.modules.layers}.{index}.{projection.path}.weight").shape)
        expected = (sum(widths[space] for space in projection.outputs), widths[projection.inputs])
        if found != expected:
            channels = layer.shared_width if projection.space == "shared" else layer.ffn_channels
            raise ModelError(
                f"'{checkpoint.directory / 'config.json'}' asks for a {projection.path} of shape {list(found)}, where "
                f"{layer.query_heads} query heads, {layer.kv_heads} KV heads and {channels} FFN channels "
                f"give {list(expected)}; such models are not supported"
            )


def _check_tied(checkpoint: Checkpoint) -> None:
    """Whether a head that is stored beside the embedding it is tied to holds the same.

    Otherwise transformers 5 leaves it untied, whatever the configuration says, and 4.x ties it.
    """
    weights, family = checkpoint.weights, checkpoint.family
    head, embedding = f"{family.modules.head}.weight", f"{family.modules.embedding}.weight"
    if head in weights and not torch.equal(weights[head], weights[embedding]):
        raise ModelError(
            f"'{checkpoint.directory / 'config.json'}' ties the head to the embeddings (tie_word_embeddings), and the "
            f"weights hold a '{head}' that differs from '{embedding}'; set tie_word_embeddings to false, or remove it"
        )


def _listed(names: list[str]) -> str:
    shown = ", ".join(f"'{name}'" for name in names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more tensors"


def read_parameters(module: nn.Module, prefix: str, weights: Weights) -> Iterator[tuple[str, Tensor]]:
    """The parameters of `module` (named `prefix` in the checkpoint) as they lie on disk, with their names within it.

    Constants that checkpoints of the family hold, such as those of an activation, are among them.

    Raises:
        ModelError: a tensor is missing, or holds NaN or infinity.
    """
    for name in list(module.state_dict()):
        yield name, weights.finite(f"{prefix}.{name}" if prefix else name)


def materialize(
    module: nn.Module, parameters: Iterable[tuple[str, Tensor]], *, dtype: torch.dtype, device: str | torch.device
) -> None:
    """Give the parameters of `module` the values that `read_parameters` found.

    Some classes keep routers in single precision where the model is in half: so they were made, and so they stay.
    """
    for name, tensor in parameters:
        owner_path, _, leaf = name.rpartition(".")
        owner = module.get_submodule(owner_path)
        made: Tensor | None = owner._buffers.get(leaf, owner._parameters.get(leaf))
        precision = dtype if made is None else torch.promote_types(dtype, made.dtype)
        value = tensor.to(device=device, dtype=precision)
        if leaf in owner._buffers:
            owner.register_buffer(leaf, value)
        else:
            owner.register_parameter(leaf, nn.Parameter(value, requires_grad=False))


def release(module: nn.Module) -> None:
    """Send the parameters of `module` back to the meta device; buffers stay: they are small, or in no checkpoint."""
    for owner in module.modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            owner.register_parameter(name, nn.Parameter(parameter.to("meta"), requires_grad=False))


def load_model(path: str | Path, *, dtype: torch.dtype, device: str = "cpu") -> nn.Module:
    """A dense or pruned causal LM with its weights, in eval mode, without gradients.

    Raises:
        ModelError: the checkpoint is not usable; see `open_checkpoint` and `check_weights`.
    """
    checkpoint = open_checkpoint(path)
    model = meta_model(checkpoint, dtype)
    check_weights(model, checkpoint)
    family = checkpoint.family
    if checkpoint.shape.tied_embeddings:
        model.get_submodule(family.modules.head).register_parameter("weight", None)
    materialize(model, read_parameters(model, "", checkpoint.weights), dtype=dtype, device=device)
    if checkpoint.shape.tied_embeddings:
        embedding = model.get_submodule(family.modules.embedding)
        model.get_submodule(family.modules.head).register_parameter("weight", embedding.get_parameter("weight"))
    return model.to(device)

"""Open a model directory, dense or pruned, and build its torch module with or without weights.

Our own pruned checkpoints are read through their configuration, never by running the modelling file they carry.
"""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from types import FunctionType, MethodType
from typing import Any, final

import torch
from packaging.version import Version
from torch import Tensor, nn

from flap_export.errors import ModelError
from flap_export.families import EVERY_EXPERT, Family, Norm, Space, check_config, family_of, shape_from_config
from flap_export.rope import both_rope_forms, check_rope
from flap_export.shapes import DecoderShape, LayerShape
from flap_export.weights import Weights

PRUNED_PREFIX = "flap_"
_FULL_PRECISION = ("F64", "F32", "F16", "BF16")
_HUB_FILES = ["*.json", "*.safetensors", "tokenizer*", "*.model", "*.txt"]


@final
@dataclass(frozen=True)
class Checkpoint:
    """A model directory that has been understood: family, configuration and shape; weights stay on disk."""

    name: str
    """As the user named it: a path or a hub name."""
    directory: Path
    family: Family
    config: Any
    """The dense family's transformers configuration."""
    shape: DecoderShape
    is_pruned: bool

    @cached_property
    def weights(self) -> Weights:
        """The tensors on disk."""
        family = self.family
        return Weights(
            self.directory,
            family.stored_names,
            base=family.decoder.partition(".")[0],
            head=family.head,
            buffers=family.buffers,
            transposed=family.stores_transposed,
        )

    @property
    def dtype(self) -> torch.dtype:
        """The dtype the configuration states; float32 when it states none."""
        stated = getattr(self.config, "dtype", None) or getattr(self.config, "torch_dtype", None)
        if isinstance(stated, str):
            stated = getattr(torch, stated.removeprefix("torch."), None)
        return stated if isinstance(stated, torch.dtype) else torch.float32


def open_checkpoint(model: str | Path) -> Checkpoint:
    """Understand a Hugging Face directory or hub name, without reading weights.

    Raises:
        ModelError: no such model, an unreadable configuration, or a family outside the table.
    """
    directory = _directory_of(model)
    raw = _read_config(directory)
    model_type = raw.get("model_type")
    if not isinstance(model_type, str):
        raise ModelError(f"'{directory / 'config.json'}' states no model_type; it is not a transformers model")
    is_pruned, model_type = model_type.startswith(PRUNED_PREFIX), model_type.removeprefix(PRUNED_PREFIX)
    # As transformers does; Mistral's own class would give every layer the same window.
    family = family_of("ministral" if model_type == "mistral" and raw.get("layer_types") else model_type)
    _check_version(family)
    config = config_from(raw, family, directory)
    shape = _dense_shape(config, family, directory)
    if is_pruned:
        shape = shape.model_copy(update={"layers": _pruned_layers(raw, config.num_hidden_layers, directory)})
    return Checkpoint(str(model), directory, family, config, shape, is_pruned)


def _check_version(family: Family) -> None:
    import transformers

    found = transformers.__version__
    if Version(found).release < Version(family.since).release:
        raise ModelError(
            f"{family.model_type} is supported from transformers {family.since} on, found {found}; "
            f"pip install 'transformers>={family.since}'"
        )
    if family.model_type not in transformers.CONFIG_MAPPING:
        raise ModelError(
            f"transformers {found} does not know {family.model_type} yet; pip install --upgrade transformers"
        )


def _directory_of(model: str | Path) -> Path:
    directory = Path(model)
    if directory.is_dir():
        return directory
    if directory.exists():
        raise ModelError(f"'{model}' is a file; name the directory that holds config.json and the weights")
    name = str(model)
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise ModelError(f"no model directory at '{model}'")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=_HUB_FILES))
    # The hub's client raises a wide range of its own, of requests' and of the standard library's exceptions.
    except Exception as error:
        raise ModelError(
            f"'{name}' is neither a local directory nor could it be fetched from the hub "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no detail'})"
        ) from error


def _read_config(directory: Path) -> dict[str, Any]:
    path = directory / "config.json"
    if not path.is_file():
        raise ModelError(f"'{directory}' holds no config.json; name a Hugging Face model directory")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"'{path}' is not valid JSON: {error}") from error
    if not isinstance(raw, dict):
        raise ModelError(f"'{path}' must hold a JSON object")
    return raw


def config_from(raw: Mapping[str, Any], family: Family, directory: Path) -> Any:
    """The family's transformers configuration with the values of a `config.json`.

    Raises:
        ModelError: transformers takes them for no valid configuration; the message names `directory`.
    """
    from transformers import AutoConfig

    own = {"model_type", "pruned", "auto_map", "architectures", "transformers_version"}
    try:
        values = both_rope_forms({key: raw[key] for key in raw if key not in own}, family.rope_names)
        return AutoConfig.for_model(family.model_type, **values)
    # transformers validates configurations with exceptions of several libraries.
    except Exception as error:
        raise ModelError(
            f"'{directory / 'config.json'}' is not a valid {family.model_type} configuration: {error}"
        ) from error


def _dense_shape(config: Any, family: Family, directory: Path) -> DecoderShape:
    path = directory / "config.json"
    try:
        check_config(config, family)
        check_rope(config, family.rotary_fields)
        return shape_from_config(config, family)
    except ModelError as error:
        raise ModelError(f"'{path}': {error}") from error
    # Transformers 4.57 takes fields of any type.
    except (TypeError, ValueError) as error:
        raise ModelError(f"'{path}' is not a valid {family.model_type} configuration: {error}") from error


def _pruned_layers(raw: Mapping[str, Any], count: int, directory: Path) -> tuple[LayerShape, ...]:
    try:
        layers = tuple(LayerShape(**layer) for layer in raw["pruned"]["layers"])
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"'{directory / 'config.json'}' is a pruned model's but lacks valid pruned.layers") from error
    if len(layers) != count:
        raise ModelError(
            f"'{directory / 'config.json'}' lists {len(layers)} pruned.layers but {count} num_hidden_layers; the "
            "checkpoint is damaged, prune again"
        )
    return layers


def pruned_section(family: Family, shape: DecoderShape) -> dict[str, Any]:
    """The `pruned` section of a configuration, which `modeling_pruned.py` reads."""
    kernel = {} if family.attention_kernel == "sdpa" else {"attention_kernel": family.attention_kernel}
    return {
        "layers_path": family.layers,
        "head_dim": shape.head_dim,
        "since": family.since,
        "projections": [[p.path, p.inputs, list(p.outputs)] for p in family.projections],
        "layers": [layer.model_dump() for layer in shape.layers],
        **({"head_norms": dict(family.head_norms)} if family.head_norms else {}),
        **kernel,
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
    from flap_export.modeling_pruned import resize_decoder

    model = _stock_model(checkpoint, dtype)
    if checkpoint.is_pruned or checkpoint.family.experts:
        section = pruned_section(checkpoint.family, checkpoint.shape)
        resize_decoder(model, checkpoint.family.layers, section, checkpoint.shape.head_dim)
    return model


def meta_model(checkpoint: Checkpoint, dtype: torch.dtype) -> nn.Module:
    """The causal LM with its parameters on the meta device; its buffers are real."""
    with torch.device("meta"):
        model = build_model(checkpoint, dtype)
    _compute_buffers(model, checkpoint)
    if dtype == torch.float64:
        _keep_double_precision(model, checkpoint.family)
    return model


@final
class MetaLayers:
    """Decoder layers of any size, without weights: to be filled one by one, by `materialize`."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
        self._checkpoint, self._dtype = checkpoint, dtype
        with torch.device("meta"):
            model = _stock_model(checkpoint, dtype)
        _compute_buffers(model, checkpoint)
        self._layers: Any = model.get_submodule(checkpoint.family.layers)

    def made(self, index: int, shape: LayerShape) -> nn.Module:
        """A new layer `index` of this shape, its parameters on the meta device."""
        from flap_export.modeling_pruned import resize_layer

        family, dense = self._checkpoint.family, self._checkpoint.shape
        layer: nn.Module = copy.deepcopy(self._layers[index])
        layers = (*dense.layers[:index], shape, *dense.layers[index + 1 :])
        section = pruned_section(family, dense.model_copy(update={"layers": layers}))
        resize_layer(layer, index, section, dense.hidden_size, dense.head_dim)
        if self._dtype == torch.float64:
            _keep_double_precision(layer, family)
        return layer


def _compute_buffers(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Give values to what no checkpoint stores: rotary frequencies, and the factor of scaled embeddings.

    The masks of old families go: GPTBigCode still has one of all its positions, which nothing reads.
    """
    for path, module in list(model.named_modules()):
        if type(module).__name__.endswith("RotaryEmbedding"):
            model.set_submodule(path, type(module)(config=module.config))
        for name, buffer in list(module.named_buffers(recurse=False)):
            if name == "embed_scale":
                factor = torch.tensor(checkpoint.shape.hidden_size**0.5, dtype=buffer.dtype)
                module.register_buffer(name, factor, persistent=False)
            elif f"{path}.{name}".endswith(checkpoint.family.buffers):
                delattr(module, name)


def parameter_names(model: nn.Module, checkpoint: Checkpoint) -> Iterator[str]:
    """Names of the tensors a checkpoint must hold, each once: a tied head is not listed, what is computed neither."""
    tied_head = f"{checkpoint.family.head}.weight"
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
    known_extra = {f"{checkpoint.family.head}.weight"} if checkpoint.shape.tied_embeddings else set()
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
    """Whether the first layer's projections have the sizes that their spaces give them.

    No configuration that has been seen asks for others; one that does would be cut in the wrong places.
    """
    shape, family = checkpoint.shape, checkpoint.family
    layer = shape.layers[0]
    widths: dict[Space, int] = {
        "hidden": shape.hidden_size,
        "query": layer.query_heads * shape.head_dim,
        "kv": layer.kv_heads * shape.head_dim,
        "ffn": layer.ffn_channels,
    }
    for projection in family.projections:
        if EVERY_EXPERT in projection.path or not widths[projection.part]:
            continue
        found = tuple(model.get_parameter(f"{family.layers}.0.{projection.path}.weight").shape)
        expected = (sum(widths[space] for space in projection.outputs), widths[projection.inputs])
        if found != expected:
            raise ModelError(
                f"'{checkpoint.directory / 'config.json'}' asks for a {projection.path} of shape {list(found)}, where "
                f"{layer.query_heads} query heads, {layer.kv_heads} KV heads and {layer.ffn_channels} FFN channels "
                f"give {list(expected)}; such models are not supported"
            )


def _check_tied(checkpoint: Checkpoint) -> None:
    """Whether a head that is stored beside the embedding it is tied to holds the same.

    Otherwise transformers 5 leaves it untied, whatever the configuration says, and 4.x ties it.
    """
    weights, family = checkpoint.weights, checkpoint.family
    head, embedding = f"{family.head}.weight", f"{family.embedding}.weight"
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
    """Give the parameters of `module` the values that `read_parameters` found."""
    for name, tensor in parameters:
        owner_path, _, leaf = name.rpartition(".")
        owner, value = module.get_submodule(owner_path), tensor.to(device=device, dtype=dtype)
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
        model.get_submodule(family.head).register_parameter("weight", None)
    materialize(model, read_parameters(model, "", checkpoint.weights), dtype=dtype, device=device)
    if checkpoint.shape.tied_embeddings:
        embedding = model.get_submodule(family.embedding)
        model.get_submodule(family.head).register_parameter("weight", embedding.get_parameter("weight"))
    return model.to(device)


def _keep_double_precision(model: nn.Module, family: Family) -> None:
    """Let norms, routers and rotations compute in float64: transformers' own pass through float32."""
    for path, module in model.named_modules():
        if family.norm.covers(module):
            module.forward = partial(_double_norm, module, family.norm)
        if family.rotary_in_float32 and path.endswith(family.attention) and hasattr(module, "head_dim"):
            module.forward = MethodType(_with_double_rotary(type(module).forward, family.rotary_interleaved), module)
        if type(module).__name__.endswith("TopKRouter"):
            module.forward = partial(_double_router, module)


def _double_router(module: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    logits = nn.functional.linear(hidden_states.reshape(-1, hidden_states.shape[-1]), module.weight)
    weights, experts = torch.topk(logits.softmax(dim=-1), module.top_k, dim=-1)
    # Mixtral always does what Qwen3 asks its configuration about.
    if getattr(module, "norm_topk_prob", True):
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return logits, weights, experts


def _with_double_rotary(forward: Any, interleaved: bool) -> FunctionType:
    """An attention's `forward` that turns heads in the precision they have."""
    own: Any = inspect.unwrap(forward)
    rotate_half = own.__globals__["rotate_half"]

    def turned(query: Tensor, key: Tensor, cosine: Tensor, sine: Tensor) -> tuple[Tensor, Tensor]:
        angles = (_by_pairs(values) if interleaved else values for values in (cosine, sine))
        cosine, sine = (values.unsqueeze(1) for values in angles)
        return query * cosine + rotate_half(query) * sine, key * cosine + rotate_half(key) * sine

    seen = {**own.__globals__, "apply_rotary_pos_emb": turned}
    other = FunctionType(own.__code__, seen, own.__name__, own.__defaults__, own.__closure__)
    other.__kwdefaults__ = own.__kwdefaults__
    return other


def _by_pairs(values: Tensor) -> Tensor:
    """Each pair's value [..., R] twice in a row: some rotary embeddings give it so, others one half after the other."""
    first, second = values.chunk(2, dim=-1)
    return first.repeat_interleave(2, dim=-1) if torch.equal(first, second) else values


def _double_norm(module: Any, norm: Norm, hidden_states: Tensor) -> Tensor:
    weight, bias = (module._parameters.get(name) for name in ("weight", "bias"))
    size, epsilon = hidden_states.shape[-1:], norm.epsilon_of(module)
    normed = (
        nn.functional.layer_norm(hidden_states, size, eps=epsilon)
        if norm.is_centred
        else nn.functional.rms_norm(hidden_states, size, eps=epsilon)
    )
    scaled = normed if weight is None else normed * (weight + norm.offset)
    return scaled if bias is None else scaled + bias

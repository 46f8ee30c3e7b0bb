"""A checkpoint on PyTorch with caches of a fixed length, its decode step captured in a CUDA graph where there is one.

What engines and ONNX Runtime are measured against on a GPU, where launching the kernels of PyTorch's own loop takes
longer than they run. On the CPU, and for mixtures of experts, it computes the same without a graph. The CUDA part is
*untested on hardware*.

Notation: B sequences, n new tokens, L rows of cache, Q query heads, K KV heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Final, final

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from flap_export.devices import check_device
from flap_export.models.alibi import register_tables, slope_tables
from flap_export.models.attention import StepCache, attend_by, cache_argument, plain_attention, rotary_modules
from flap_export.models.fewer_kernels import use_fewer_kernels
from flap_export.models.loading import load_model
from flap_export.models.opening import open_checkpoint
from flap_export.precision import torch_dtype
from flap_export.runners.base import Logits, Runner, RunnerOptions, TokenIds
from flap_export.runners.sampling import Sampling, sampled
from flap_export.runners.torch_runner import torch_threads

NAME: Final = "flap_export_static"
_WARMUP_CALLS: Final = 2
_MASKED_KERNELS: Final = (SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
"""What computes attention on a GPU. From 2.11 on, PyTorch hands what has a mask to cuDNN first on H100, H200 and B200,
which builds a plan for every new shape, a tenth of a second each and more: of every number of heads there is, at every
length of the caches."""
_ROW_MULTIPLE: Final = 16
"""Caches have, and prefills see, a multiple of so many rows: a mask of another length is copied in every layer."""
Caches = Mapping[int, tuple[Tensor, ...]]
"""Those of every layer."""


@final
class StaticCache(StepCache):
    """The first `length` rows of caches that stay where they are."""

    def __init__(self, caches: Caches, write_indices: Tensor, new_tokens: int, length: int) -> None:
        super().__init__(write_indices, new_tokens, length)
        self.caches = caches

    def write(self, layer_idx: int, *new: Tensor) -> tuple[Tensor, ...]:
        """Write new rows [B, K, n, D] and return what is seen of the layer's caches, [B, K, L, D] each."""
        rows = self.position_ids[:, None, :, None].expand_as(new[0])
        written = (past.scatter_(2, rows, one) for past, one in zip(self.caches[layer_idx], new, strict=True))
        return tuple(present[:, :, : self.length] for present in written)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    step_cache: StaticCache,
    sliding_window: int | None = None,
    softcap: float | None = None,
    slopes: Tensor | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Transformers' attention interface: query [B, Q, n, D], caches [B, K, L, D] -> [B, n, Q, D]."""
    mask = step_cache.mask(sliding_window, query.dtype, slopes)
    if softcap is not None or s_aux is not None:
        output = plain_attention(query * scaling, key, value, mask, softcap=softcap, sinks=s_aux)
    else:
        output = grouped_attention(query, key, value, mask, scaling)
    return output.transpose(1, 2), None


def grouped_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float) -> Tensor:
    """Attention with the query heads of a KV head one below the other, as rows that see the same keys.

    PyTorch's fused kernels take a mask or grouped queries, not both; so they take the mask, and caches are neither
    repeated nor read more than once.

    Args:
        query: [B, Q, n, D]
        key: [B, K, L, D]
        value: [B, K, L, D]
        mask: additive, [B, 1, n, L], or [B, Q, n, L] where heads see differently.
        scaling: of the scores.
    """
    (batch, heads, tokens, size), (_, kv_heads, length, _) = query.shape, key.shape
    group = heads // kv_heads
    if kv_heads == 1 and tokens > 1 and mask.shape[1] == 1:
        # One KV head for many, as latents are: a mask repeated for each would be larger than the scores of one.
        keys, values = (cache.expand(-1, heads, -1, -1) for cache in (key, value))
        return nn.functional.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scaling)
    rows = query.reshape(batch, kv_heads, group * tokens, size)
    if mask.shape[1] > 1:
        seen = mask.reshape(batch, kv_heads, group * tokens, length)
    elif tokens == 1 or group == 1:
        # Nothing is copied: of all query heads it is the same row.
        seen = mask.expand(-1, -1, group * tokens, -1)
    else:
        seen = mask.repeat(1, 1, group, 1)
    output = nn.functional.scaled_dot_product_attention(rows, key, value, attn_mask=seen, scale=scaling)
    return output.reshape(query.shape)


def _whole_rows(rows: int) -> int:
    return -(-rows // _ROW_MULTIPLE) * _ROW_MULTIPLE


def _attention_kernels(device: torch.device) -> AbstractContextManager[Any]:
    """Let attention be computed by what suits `device`; on a CPU there is nothing to choose."""
    return nullcontext() if device.type == "cpu" else sdpa_kernel(list(_MASKED_KERNELS))


def _hold_frequencies(model: nn.Module) -> None:
    """Let dynamic rotary embeddings not ask whether a position is beyond the model's own.

    A CUDA graph cannot wait for the answer, and up to there the angles are those they begin with.
    """
    for _, rotary in rotary_modules(model):
        if getattr(rotary, "rope_type", None) == "dynamic":
            rotary.rope_type = "default"  # type: ignore[assignment]


@final
class StaticTorchRunner(Runner):
    """One call of the model for a whole batch, ragged or not, over caches that are allocated once.

    Raises:
        ModelError: the checkpoint is not usable.
        InputError: an unknown dtype or device.
        MissingRequirementError: a CUDA device was asked for and is not there.
    """

    name = "torch-static"

    def __init__(self, path: Path, options: RunnerOptions) -> None:
        checkpoint = open_checkpoint(path)
        self._dtype = torch_dtype(options.dtype or "float32")
        check_device(options.device)
        super().__init__(
            max_length=options.max_length or checkpoint.longest_sequence,
            vocabulary_size=checkpoint.shape.vocabulary_size,
            logits=options.logits,
        )
        self._device, self._threads, self._shape = torch.device(options.device), options.threads, checkpoint.shape
        model: Any = load_model(path, dtype=self._dtype, device=options.device)
        attend_by(_attention, NAME, model, checkpoint.family)
        use_fewer_kernels(model, checkpoint.family)
        if self._device.type != "cpu":
            # Memory of the projections as they were before they were joined.
            torch.cuda.empty_cache()
        register_tables(model, slope_tables(checkpoint, self._dtype, options.device))
        if self.max_length <= checkpoint.longest_sequence:
            _hold_frequencies(model)
        self._model: Any = model
        self._caches: Caches = {}
        self._graph: Any = None
        self._step: tuple[Tensor, Tensor, Tensor] | None = None
        self._generators: dict[int, torch.Generator] = {}

    @property
    def _captures(self) -> bool:
        """Whether a decode step goes into a CUDA graph.

        Which experts its tokens are sent to is asked of the device, and a graph cannot wait for the answer.
        """
        return self._device.type != "cpu" and not any(layer.experts for layer in self._shape.layers)

    def close(self) -> None:
        """Free the model and its cache."""
        self._graph, self._step, self._caches, self._model = None, None, {}, None

    def _allocate(self, batch_size: int) -> None:
        # The caches of the last batch make room before there are others.
        self._graph, self._step, self._generators, self._caches = None, None, {}, {}
        self._caches = {
            index: tuple(self._zeros(batch_size, *size) for size in self._shape.caches(layer).values())
            for index, layer in enumerate(self._shape.layers)
        }

    def _zeros(self, batch_size: int, heads: int, width: int) -> Tensor:
        shape = (batch_size, heads, _whole_rows(self.max_length), width)
        return torch.zeros(shape, dtype=self._dtype, device=self._device)

    def _forward(self, input_ids: TokenIds, write_indices: TokenIds) -> Logits:
        with torch.inference_mode(), torch_threads(self._threads):
            logits = self._on_device(input_ids, write_indices)
            kept = self._dtype if self._dtype == torch.float64 else torch.float32
            copied: Logits = logits.to("cpu", kept, copy=True).numpy()
        return copied

    def _sampled(self, input_ids: TokenIds, write_indices: TokenIds, sampling: Sampling) -> TokenIds | None:
        if self._device.type == "cpu":
            return None
        with torch.inference_mode():
            logits = self._on_device(input_ids, write_indices)[:, -1].float()
            tokens: TokenIds = sampled(logits, sampling, self._generator(sampling.seed)).cpu().numpy()
        return tokens

    def _generator(self, seed: int) -> torch.Generator:
        if seed not in self._generators:
            self._generators[seed] = torch.Generator(self._device).manual_seed(seed)
        return self._generators[seed]

    def _on_device(self, input_ids: TokenIds, write_indices: TokenIds) -> Tensor:
        ids, starts = torch.from_numpy(input_ids), torch.from_numpy(write_indices)
        if ids.shape[1] > 1 or not self._captures:
            # Rows behind the last new token hold nothing that any query sees.
            length = _whole_rows(int(write_indices.max()) + ids.shape[1])
            return self._called(ids.to(self._device), starts.to(self._device), length)
        if self._step is None:
            self._step = self._captured(ids.to(self._device), starts.to(self._device))
        fixed_ids, fixed_starts, logits = self._step
        fixed_ids.copy_(ids)
        fixed_starts.copy_(starts)
        self._graph.replay()
        return logits

    def _called(self, ids: Tensor, starts: Tensor, length: int) -> Tensor:
        """Logits [B, n, V], or [B, 1, V] of the last tokens; of the caches the first `length` rows are seen."""
        cache = StaticCache(self._caches, starts, ids.shape[1], length)
        with _attention_kernels(self._device):
            logits: Tensor = self._model(
                input_ids=ids,
                position_ids=cache.position_ids,
                use_cache=True,
                logits_to_keep=1 if self.logits == "last" else 0,
                **{cache_argument(self._model): cache},
            ).logits
        return logits[:, -1:] if self.logits == "last" else logits

    def _captured(self, ids: Tensor, starts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs and output of a decode step at fixed addresses; warming up writes the same rows again and again."""
        # What is captured is what enters one stream, and it has to be one of the device that computes.
        side: Any = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        length = _whole_rows(self.max_length)
        with torch.cuda.device(self._device):
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(_WARMUP_CALLS):
                    self._called(ids, starts, length)
            torch.cuda.current_stream().wait_stream(side)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, stream=side):
                logits = self._called(ids, starts, length)
        return ids, starts, logits

"""A checkpoint on PyTorch with caches of a fixed length, its decode step captured in a CUDA graph where there is one.

What engines and ONNX Runtime are measured against on a GPU, where launching the kernels of PyTorch's own loop takes
longer than they run. On the CPU it computes the same without a graph. The CUDA part is *untested on hardware*.

Notation: B sequences, n new tokens, L rows of cache, Q query heads, K KV heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, final

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from flap_export.attention import ask_the_interface
from flap_export.devices import check_device
from flap_export.exporting.dialect import softcapped_attention
from flap_export.loading import load_model, open_checkpoint
from flap_export.runners.base import Logits, Runner, RunnerOptions, TokenIds
from flap_export.runners.sampling import Sampling, sampled
from flap_export.runners.torch_runner import torch_dtype, torch_threads

NAME: Final = "flap_export_static"
_WARMUP_CALLS: Final = 2
Caches = Mapping[int, tuple[Tensor, Tensor]]


class StaticCache(Cache):  # type: ignore[misc]
    """Transformers' cache interface over caches [B, K_i, L, D], one call long; each layer has its own K."""

    counts_empty_layers = False

    def __init__(self, caches: Caches, write_indices: Tensor, new_tokens: int, max_length: int) -> None:
        self.caches, self.max_length = caches, max_length
        self.layers: list[Any] = []
        self.attention_arguments = {"static_cache": self}
        steps = torch.arange(new_tokens, device=write_indices.device)
        self.position_ids = write_indices.unsqueeze(1) + steps
        self._masks: dict[int | None, Tensor] = {}

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write new rows [B, K, n, D] and return the whole caches."""
        rows = self.position_ids[:, None, :, None].expand_as(key)
        past_key, past_value = self.caches[layer_idx]
        return past_key.scatter_(2, rows, key), past_value.scatter_(2, rows, value)

    def mask(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """Additive mask [B, 1, n, L]: query at position p sees keys p - window < j <= p, or all up to p."""
        if window not in self._masks:
            query = self.position_ids[:, None, :, None]
            key = torch.arange(self.max_length, device=query.device)
            hidden = key > query if window is None else (key > query) | (key <= query - window)
            mask = torch.zeros(hidden.shape, dtype=dtype, device=query.device)
            self._masks[window] = mask.masked_fill_(hidden, torch.finfo(dtype).min)
        return self._masks[window]

    def get_seq_length(self, *_: Any, **__: Any) -> int:
        """Unused: positions are always given."""
        return 0

    def get_mask_sizes(self, *_: Any, **__: Any) -> tuple[int, int]:
        """Unused: the attention below makes its own mask."""
        return self.max_length, 0


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    static_cache: StaticCache,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Transformers' attention interface: query [B, Q, n, D], caches [B, K, L, D] -> [B, n, Q, D]."""
    mask = static_cache.mask(sliding_window, query.dtype)
    if softcap is not None:
        output = softcapped_attention(query * scaling, key, value, mask, softcap)
    else:
        output = nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
        )
    return output.transpose(1, 2), None


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """Transformers' mask interface: the cache knows the mask."""


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
        from transformers import AttentionInterface
        from transformers.masking_utils import AttentionMaskInterface

        checkpoint = open_checkpoint(path)
        self._dtype = torch_dtype(options.dtype or "float32")
        check_device(options.device)
        super().__init__(
            max_length=options.max_length or checkpoint.config.max_position_embeddings,
            vocabulary_size=checkpoint.shape.vocabulary_size,
            logits=options.logits,
        )
        self._device, self._threads, self._shape = torch.device(options.device), options.threads, checkpoint.shape
        AttentionInterface.register(NAME, _attention)
        AttentionMaskInterface.register(NAME, _no_mask)
        model: Any = load_model(path, dtype=self._dtype, device=options.device)
        model.config._attn_implementation = NAME
        ask_the_interface(model)
        self._model: Any = model
        self._caches: Caches = {}
        self._graph: Any = None
        self._step: tuple[Tensor, Tensor, Tensor] | None = None
        self._generators: dict[int, torch.Generator] = {}

    def close(self) -> None:
        """Free the model and its cache."""
        self._graph, self._step, self._caches, self._model = None, None, {}, None

    def _allocate(self, batch_size: int) -> None:
        self._graph, self._step, self._generators = None, None, {}
        self._caches = {
            index: (self._zeros(batch_size, layer.kv_heads), self._zeros(batch_size, layer.kv_heads))
            for index, layer in enumerate(self._shape.layers)
            if layer.kv_heads
        }

    def _zeros(self, batch_size: int, kv_heads: int) -> Tensor:
        shape = (batch_size, kv_heads, self.max_length, self._shape.head_dim)
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
        if ids.shape[1] > 1 or self._device.type == "cpu":
            return self._called(ids.to(self._device), starts.to(self._device))
        if self._step is None:
            self._step = self._captured(ids.to(self._device), starts.to(self._device))
        fixed_ids, fixed_starts, logits = self._step
        fixed_ids.copy_(ids)
        fixed_starts.copy_(starts)
        self._graph.replay()
        return logits

    def _called(self, ids: Tensor, starts: Tensor) -> Tensor:
        """Logits [B, n, V], or [B, 1, V] of the last tokens."""
        cache = StaticCache(self._caches, starts, ids.shape[1], self.max_length)
        logits: Tensor = self._model(
            input_ids=ids,
            position_ids=cache.position_ids,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1 if self.logits == "last" else 0,
            static_cache=cache,
        ).logits
        return logits[:, -1:] if self.logits == "last" else logits

    def _captured(self, ids: Tensor, starts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs and output of a decode step at fixed addresses; warming up writes the same rows again and again."""
        # What is captured is what enters one stream, and it has to be one of the device that computes.
        side: Any = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        with torch.cuda.device(self._device):
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(_WARMUP_CALLS):
                    self._called(ids, starts)
            torch.cuda.current_stream().wait_stream(side)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, stream=side):
                logits = self._called(ids, starts)
        return ids, starts, logits

"""A dense or pruned checkpoint on PyTorch: the reference the other backends are held against."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, final

import numpy as np

from flap_export.devices import check_device
from flap_export.precision import torch_dtype
from flap_export.runners.base import Logits, Runner, RunnerOptions, TokenIds


@final
class TorchRunner(Runner):
    """Hugging Face's own forward pass; float32 unless asked otherwise, whatever the weights are stored in.

    Correct before fast: sequences share one forward pass while they are equally long and get a cache each from the
    moment they are not, so that no row ever sees padding.

    Raises:
        ModelError: the checkpoint is not usable.
        InputError: an unknown dtype or device.
        MissingRequirementError: a CUDA device was asked for and is not there.
    """

    name = "torch"

    def __init__(self, path: Path, options: RunnerOptions) -> None:
        from flap_export.models.loading import load_model
        from flap_export.models.opening import open_checkpoint

        checkpoint = open_checkpoint(path)
        dtype = torch_dtype(options.dtype or "float32")
        check_device(options.device)
        super().__init__(
            max_length=options.max_length or checkpoint.longest_sequence,
            vocabulary_size=checkpoint.shape.vocabulary_size,
            logits=options.logits,
        )
        self._device, self._threads = options.device, options.threads
        self._model: Any = load_model(path, dtype=dtype, device=options.device)
        self._caches: list[Any] = []

    def close(self) -> None:
        """Free the model and its cache."""
        self._model, self._caches = None, []

    def _allocate(self, batch_size: int) -> None:
        self._caches = [_empty_cache()]

    def _forward(self, input_ids: TokenIds, write_indices: TokenIds) -> Logits:
        is_ragged = bool((write_indices != write_indices[0]).any())
        if is_ragged and len(self._caches) == 1:
            self._caches = _caches_by_row(self._caches[0], len(write_indices))
        # One cache takes the whole batch, B caches take a row each.
        parts = np.split(input_ids, len(self._caches))
        starts = write_indices[: len(self._caches)].tolist()
        fed = zip(self._caches, parts, starts, strict=True)
        return np.concatenate([self._feed(cache, ids, start) for cache, ids, start in fed])

    def _feed(self, cache: Any, input_ids: TokenIds, start: int) -> Logits:
        """Logits of tokens [b, n] that follow the first `start` rows of `cache`."""
        import torch

        from flap_export.models.attention import cache_argument

        _crop(cache, start)
        with torch.inference_mode(), torch_threads(self._threads):
            logits: torch.Tensor = self._model(
                input_ids=torch.from_numpy(input_ids).to(self._device),
                use_cache=True,
                logits_to_keep=1 if self.logits == "last" else 0,
                **{cache_argument(self._model): cache},
            ).logits
            # OPT of transformers 4.57 gives all of them whatever it is asked.
            logits = logits[:, -1:] if self.logits == "last" else logits
            widened = logits if logits.dtype == torch.float64 else logits.float()
        array: Logits = widened.cpu().numpy()
        return array


def _empty_cache() -> Any:
    """A cache that keeps every row: made without a configuration, it drops none of a sliding window's either."""
    from transformers import DynamicCache

    return DynamicCache()


def _caches_by_row(cache: Any, batch_size: int) -> list[Any]:
    """One cache per sequence from one for the batch."""
    rows = [_empty_cache() for _ in range(batch_size)]
    for layer_idx, layer in enumerate(cache.layers):
        for row, own in enumerate(rows):
            own.update(layer.keys[row : row + 1], layer.values[row : row + 1], layer_idx)
    return rows


def _crop(cache: Any, length: int) -> None:
    """Forget all rows of `cache` after the first `length`."""
    surplus = cache.get_seq_length() - length
    if surplus:
        cache.crop(-surplus)


@contextmanager
def torch_threads(threads: int | None) -> Iterator[None]:
    """PyTorch's thread count is the process's: set it for one pass and put it back."""
    import torch

    if threads is None:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)

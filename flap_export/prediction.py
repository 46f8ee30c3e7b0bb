"""What a plan will be worth on a GPU nobody has at hand: latency and speedup from datasheets and stated assumptions.

One call takes the longer of moving its bytes and doing its operations (see `flap_export.ideal`), each at the share of
the datasheet's rate that is assumed to be sustained, and then the gaps between its kernels:

    seconds = max(bytes / (e_b bandwidth), operations / (e_m matrix rate)) + kernels * gap

Pruning shrinks the first term and leaves the second: what a small model spends between kernels stays. Of a mixture all
experts are read and computed, as engines do. What is left out: partly filled tiles of narrow matrices, sampling, and
the host. `bench` sets measurements beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Final, Literal

from pydantic import Field

from flap_export.errors import InputError, check_choice
from flap_export.ideal import Phase, Roofline, call_bytes, call_flops, stored_parameters
from flap_export.precision import PRECISIONS, DtypeName
from flap_export.shapes import DecoderShape
from flap_export.storage import Record, Value

_TERA: Final = 1e12
_GIGA: Final = 1e9
WORTHWHILE_SPEEDUP: Final = 1.05
"""Below this a plan counts as not faster: it would drown in the noise of a measurement."""

Bound = Literal["bandwidth", "operations", "kernel gaps"]


@dataclass(frozen=True)
class Gpu:
    """A row of the table: rates of the datasheet, for dense matrices."""

    bandwidth_bytes_per_s: float
    half_flops_per_s: float
    """Tensor cores in float16 and bfloat16, accumulating in float32."""
    single_flops_per_s: float
    """Float32 without TF32."""
    memory_bytes: float
    source: str

    def flops_per_s(self, dtype: DtypeName) -> float:
        """Matrix rate in a precision."""
        return self.single_flops_per_s if dtype == "float32" else self.half_flops_per_s


_A100: Final = "NVIDIA A100 Tensor Core GPU datasheet, 1758950-r4 (SXM)"
_HOPPER: Final = "NVIDIA H100 Tensor Core GPU Architecture whitepaper (SXM5)"

GPUS: Final[dict[str, Gpu]] = {
    "a100-40gb": Gpu(1555 * _GIGA, 312 * _TERA, 19.5 * _TERA, 40 * _GIGA, _A100),
    "a100-80gb": Gpu(2039 * _GIGA, 312 * _TERA, 19.5 * _TERA, 80 * _GIGA, _A100),
    "h100": Gpu(3350 * _GIGA, 989.4 * _TERA, 66.9 * _TERA, 80 * _GIGA, _HOPPER),
    "h200": Gpu(4800 * _GIGA, 989.4 * _TERA, 66.9 * _TERA, 141 * _GIGA, "NVIDIA H200 Tensor Core GPU datasheet (SXM)"),
    "l4": Gpu(300 * _GIGA, 121 * _TERA, 30.3 * _TERA, 24 * _GIGA, "NVIDIA L4 Tensor Core GPU datasheet"),
    "l40s": Gpu(864 * _GIGA, 362 * _TERA, 91.6 * _TERA, 48 * _GIGA, "NVIDIA L40S GPU datasheet"),
}


class Assumptions(Value):
    """What no datasheet says. Guesses until a measurement replaces them; every one is an option of `predict`."""

    bandwidth_efficiency: float = Field(default=0.85, gt=0, le=1)
    """Share of the datasheet's bandwidth that streaming weights sustains."""
    matrix_efficiency: float = Field(default=0.65, gt=0, le=1)
    """Share of the datasheet's matrix rate that projections sustain in a prefill."""
    kernel_gap_us: float = Field(default=2.0, ge=0, allow_inf_nan=False)
    """From the end of a kernel to the start of the next, replayed from a CUDA graph."""
    attention_kernels: int = 7
    """Of one layer: norm, projection, rotary embedding, two cache updates, attention, output projection."""
    latent_kernels: int = 16
    """Of one layer of latent attention, instead: three norms, three products that give queries and latents and one of
    queries with what makes keys, rotary embedding, two joins, cache update, scores, softmax, their product with the
    latents, and one each with what makes values and of the output projection."""
    ffn_kernels: int = 4
    """Of one layer: norm, up and gate projection, activation, down projection."""
    other_kernels: int = 5
    """Once: embedding, mask, last norm, head, copy of the logits."""


class Estimate(Value):
    """One call of one model."""

    ms: float
    bound: Bound
    """What takes the most time."""
    gap_share: float
    """Of the time, what passes between kernels."""


class PredictedPhase(Value):
    """Dense and pruned in one phase and shape."""

    phase: Phase
    batch_size: int
    length: int
    """Prompt tokens of a prefill; cached tokens before a decode step."""
    dense: Estimate
    pruned: Estimate
    speedup: float
    ideal_speedup: float
    """Without the gaps between kernels."""
    worthwhile: bool
    remark: str | None = None
    """Why it is not."""


class Prediction(Record):
    """What `predict` says."""

    kind: ClassVar[str] = "prediction"

    gpu: str
    source: str
    """Of the GPU's rates."""
    dtype: DtypeName
    assumptions: Assumptions
    phases: tuple[PredictedPhase, ...]
    dense_weights_bytes: int
    """Of all weights, the embedding among them."""
    pruned_weights_bytes: int
    fits: bool
    """Whether the dense model's weights fit the GPU's memory."""


def predict(
    dense: DecoderShape,
    pruned: DecoderShape,
    *,
    gpu: str,
    dtype: DtypeName = "float16",
    batch_sizes: Sequence[int] = (1, 8, 32),
    prompt_lengths: Sequence[int] = (128, 2048),
    context_length: int = 1024,
    assumptions: Assumptions | None = None,
) -> Prediction:
    """Expected latency and speedup of a plan.

    Args:
        dense: the decoder before the cut.
        pruned: after it.
        gpu: a row of `GPUS`.
        dtype: precision of weights and cache.
        batch_sizes: sequences of a batch.
        prompt_lengths: tokens of a prefill.
        context_length: cached tokens before a decode step.
        assumptions: what the datasheet does not say.

    Raises:
        InputError: an unknown GPU or precision, or a size that is not positive.
    """
    check_choice("gpu", gpu, GPUS)
    check_choice("dtype", dtype, PRECISIONS)
    if min((*batch_sizes, *prompt_lengths, context_length), default=0) < 1:
        raise InputError("batch sizes and lengths must be positive")
    assumed, row = assumptions or Assumptions(), GPUS[gpu]
    calls: list[tuple[Phase, int, int]] = [("prefill", size, n) for size in batch_sizes for n in prompt_lengths]
    calls += [("decode", size, context_length) for size in batch_sizes]
    weights = [PRECISIONS[dtype].bytes_per_value * stored_parameters(shape) for shape in (dense, pruned)]
    compared = partial(_phase, dense, pruned, machine=sustained(row, dtype, assumed), dtype=dtype, assumptions=assumed)
    return Prediction(
        gpu=gpu,
        source=row.source,
        dtype=dtype,
        assumptions=assumed,
        phases=tuple(compared(*call) for call in calls),
        dense_weights_bytes=weights[0],
        pruned_weights_bytes=weights[1],
        fits=weights[0] < row.memory_bytes,
    )


def sustained(gpu: Gpu, dtype: DtypeName, assumptions: Assumptions) -> Roofline:
    """What a GPU is assumed to sustain."""
    return Roofline(
        assumptions.bandwidth_efficiency * gpu.bandwidth_bytes_per_s,
        assumptions.matrix_efficiency * gpu.flops_per_s(dtype),
    )


def kernels_of(shape: DecoderShape, assumptions: Assumptions) -> int:
    """Kernels of one call; an emptied block has none."""
    kernels = assumptions.latent_kernels if shape.latent else assumptions.attention_kernels
    attention = sum(bool(layer.query_heads) for layer in shape.layers) * kernels
    ffns = sum(bool(layer.ffn_channels) + bool(layer.shared_width) for layer in shape.layers)
    ffn = ffns * assumptions.ffn_kernels
    return attention + ffn + assumptions.other_kernels


def estimate(
    shape: DecoderShape,
    phase: Phase,
    batch_size: int,
    length: int,
    *,
    machine: Roofline,
    dtype: DtypeName,
    assumptions: Assumptions,
) -> Estimate:
    """Expected time of one call on a machine that sustains `machine`, from the assumptions about kernels."""
    new_tokens, context = (length, 0) if phase == "prefill" else (1, length)
    moved = call_bytes(
        shape,
        batch_size=batch_size,
        new_tokens=new_tokens,
        context_length=context,
        bytes_per_weight=PRECISIONS[dtype].bytes_per_value,
        experts="all",
    )
    operations = call_flops(shape, batch_size=batch_size, new_tokens=new_tokens, context_length=context, experts="all")
    seconds: dict[Bound, float] = {
        "bandwidth": moved / machine.bandwidth_bytes_per_s,
        "operations": operations / machine.flops_per_s,
        "kernel gaps": kernels_of(shape, assumptions) * assumptions.kernel_gap_us * 1e-6,
    }
    total = max(seconds["bandwidth"], seconds["operations"]) + seconds["kernel gaps"]
    bound = max(seconds, key=lambda name: seconds[name])
    return Estimate(ms=total * 1e3, bound=bound, gap_share=seconds["kernel gaps"] / total)


def expected_ms(
    shape: DecoderShape, phase: Phase, batch_size: int, length: int, *, gpu: str, dtype: DtypeName
) -> float:
    """Expected time of one call on a row of `GPUS`, under the default assumptions."""
    assumed = Assumptions()
    machine = sustained(GPUS[gpu], dtype, assumed)
    return estimate(shape, phase, batch_size, length, machine=machine, dtype=dtype, assumptions=assumed).ms


def _phase(
    dense: DecoderShape,
    pruned: DecoderShape,
    phase: Phase,
    batch_size: int,
    length: int,
    *,
    machine: Roofline,
    dtype: DtypeName,
    assumptions: Assumptions,
) -> PredictedPhase:
    before, after = (
        estimate(s, phase, batch_size, length, machine=machine, dtype=dtype, assumptions=assumptions)
        for s in (dense, pruned)
    )
    speedup = before.ms / after.ms
    worthwhile = speedup >= WORTHWHILE_SPEEDUP
    return PredictedPhase(
        phase=phase,
        batch_size=batch_size,
        length=length,
        dense=before,
        pruned=after,
        speedup=speedup,
        ideal_speedup=before.ms * (1 - before.gap_share) / (after.ms * (1 - after.gap_share)),
        worthwhile=worthwhile,
        remark=None if worthwhile else _remark(after),
    )


def _remark(after: Estimate) -> str:
    if after.bound == "kernel gaps":
        return f"not faster: {after.gap_share:.0%} of the time passes between kernels, which pruning leaves as it is"
    return f"not faster: bound by {after.bound}, of which the plan saves too little"

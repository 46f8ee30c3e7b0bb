from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny import layer_plan, plan_of, tiny_checkpoint

from flap_export.errors import InputError
from flap_export.ideal import Roofline, ideal_speedup, weight_bytes
from flap_export.models.opening import open_checkpoint
from flap_export.prediction import GPUS, Assumptions, estimate, kernels_of, predict
from flap_export.shapes import DecoderShape, LatentSizes, LayerShape


def llama(
    layers: int, hidden: int, heads: int, ffn: int, *, head_dim: int = 128, vocabulary: int = 32000
) -> DecoderShape:
    layer = LayerShape(query_heads=heads, kv_heads=heads, ffn_channels=ffn)
    return DecoderShape(
        hidden_size=hidden, head_dim=head_dim, vocabulary_size=32000, ffn_matrices=3, tied_embeddings=False,
        layers=(layer,) * layers,
    )  # fmt: skip


SEVEN_B = llama(32, 4096, 32, 11008)
SEVEN_B_HALF = llama(32, 4096, 16, 5504)
NO_GAPS = Assumptions(bandwidth_efficiency=1.0, matrix_efficiency=1.0, kernel_gap_us=0.0)


def test_a_decode_step_of_7b_by_hand() -> None:
    """13.2 GB of weights and 32 * 2 * 4096 * 2 bytes a cached token, at 85 % of 2039 GB/s; 357 kernels, 2 us apart."""
    found = predict(SEVEN_B, SEVEN_B_HALF, gpu="a100-80gb", batch_sizes=(1,), context_length=1000).phases[-1]
    moved = weight_bytes(SEVEN_B, 2) + 1000 * 32 * 2 * 4096 * 2
    assert found.dense.ms == pytest.approx(1e3 * moved / (0.85 * 2039e9) + (32 * 11 + 5) * 2e-3, rel=1e-9)
    assert found.dense.bound == "bandwidth"
    assert found.worthwhile


def test_a_prefill_of_7b_is_bound_by_operations() -> None:
    found = predict(SEVEN_B, SEVEN_B_HALF, gpu="h100", batch_sizes=(1,), prompt_lengths=(2048,)).phases[0]
    assert (found.phase, found.dense.bound, found.pruned.bound) == ("prefill", "operations", "operations")
    assert found.dense.ms > 2 * SEVEN_B.decoder_parameters * 2048 / 989.4e12 * 1e3


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_without_gaps_the_speedup_is_the_ideal_one(phase: Any) -> None:
    gpu = GPUS["a100-80gb"]
    roofline = Roofline(gpu.bandwidth_bytes_per_s, gpu.half_flops_per_s)
    found = predict(
        SEVEN_B, SEVEN_B_HALF, gpu="a100-80gb", batch_sizes=(4,), prompt_lengths=(64,), context_length=64,
        assumptions=NO_GAPS,
    )  # fmt: skip
    row = next(row for row in found.phases if row.phase == phase)
    ideal = ideal_speedup(SEVEN_B, SEVEN_B_HALF, phase, batch_size=4, length=64, bytes_per_weight=2, roofline=roofline)
    assert row.speedup == pytest.approx(ideal)
    assert row.ideal_speedup == pytest.approx(ideal)


def test_a_small_model_at_batch_1_is_not_worth_pruning() -> None:
    """Twelve layers of 768 move in less time than passes between their kernels."""
    dense, pruned = llama(12, 768, 12, 2048, head_dim=64), llama(12, 768, 9, 1536, head_dim=64)
    alone, crowd = predict(dense, pruned, gpu="h200", batch_sizes=(1, 4096), prompt_lengths=(128,)).phases[-2:]
    assert not alone.worthwhile
    assert alone.remark is not None
    assert "of the time passes between kernels" in alone.remark
    assert alone.speedup < alone.ideal_speedup
    assert crowd.worthwhile
    assert crowd.remark is None


def test_emptied_blocks_have_no_kernels() -> None:
    full = llama(2, 64, 4, 128, head_dim=16)
    emptied = full.model_copy(
        update={"layers": (LayerShape(query_heads=0, kv_heads=0, ffn_channels=8), full.layers[1])}
    )
    assert kernels_of(full, Assumptions()) - kernels_of(emptied, Assumptions()) == Assumptions().attention_kernels


def test_latents_take_more_kernels() -> None:
    sizes = LatentSizes(queries=1536, keys_and_values=512, score=192, turning=64)
    latent = SEVEN_B.model_copy(update={"latent": sizes})
    more = Assumptions().latent_kernels - Assumptions().attention_kernels
    assert kernels_of(latent, Assumptions()) - kernels_of(SEVEN_B, Assumptions()) == 32 * more > 0


def test_float32_takes_twice_the_bytes_and_another_rate() -> None:
    machine = Roofline(1e12, 1e30)
    half, single = (
        estimate(SEVEN_B, "decode", 1, 1, machine=machine, dtype=dtype, assumptions=NO_GAPS)
        for dtype in ("float16", "float32")
    )
    assert single.ms == pytest.approx(2 * half.ms)
    assert GPUS["h100"].flops_per_s("float32") < GPUS["h100"].flops_per_s("bfloat16")


def test_a_model_beyond_the_memory_is_said_to_be() -> None:
    assert predict(SEVEN_B, SEVEN_B_HALF, gpu="a100-40gb").fits
    assert predict(SEVEN_B, SEVEN_B_HALF, gpu="a100-40gb").dense_weights_bytes == 2 * 6_738_415_616
    assert not predict(SEVEN_B, SEVEN_B_HALF, gpu="l4", dtype="float32").fits


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gpu": "h800"}, "gpu must be one of a100-40gb, .*, got 'h800'"),
        ({"gpu": "h100", "dtype": "int8"}, "dtype must be one of"),
        ({"gpu": "h100", "batch_sizes": (0,)}, "must be positive"),
    ],
)
def test_bad_options(options: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        predict(SEVEN_B, SEVEN_B_HALF, **options)


def test_the_command_reads_a_plan(tmp_path: Path) -> None:
    opened = open_checkpoint(tiny_checkpoint("llama", tmp_path / "dense"))
    plan_of(opened, [layer_plan(opened, i, [0], range(8)) for i in range(2)]).save(tmp_path / "plan.json")
    command = [sys.executable, "-m", "flap_export", "predict", str(tmp_path), "--gpu", "h200"]
    answer = json.loads(subprocess.run([*command, "--json"], capture_output=True, text=True, check=True).stdout)
    assert [row["phase"] for row in answer["phases"]] == ["prefill"] * 6 + ["decode"] * 3
    assert answer["pruned_weights_bytes"] < answer["dense_weights_bytes"]
    words = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "not faster" in words
    assert "assumed: bandwidth efficiency 0.85" in words

"""Matrix products of decoder layers on this CPU: PyTorch's own against those of `flap_export.calibration.products`.

Both by turns in one process, in single precision, with one thread and with all; medians of many rounds. Where
`onednn_is_faster` says no, the two are the same.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from typing import Any, Final

import common
import torch
from torch import nn

from flap_export.calibration.products import onednn_is_faster, with_fast_linears

TOKENS: Final = 512
MODELS: Final = ("demo", "160m", "7b")
COLUMNS: Final = ("model", "projection", "threads", "PyTorch, GFLOP/s", "ours, GFLOP/s", "ratio", "difference")


def main() -> None:
    """Time every projection, print a table, write JSON."""
    arguments = parsed_arguments()
    conditions = common.Conditions()
    found = list(measured(arguments))
    common.show(f"{TOKENS} tokens; oneDNN is taken: {onednn_is_faster()}", COLUMNS, map(row, found))
    print(f"written to {common.save_result(arguments, conditions, {'tokens': TOKENS, 'products': found})}")


def parsed_arguments(command_line: list[str] | None = None) -> argparse.Namespace:
    made = common.parser(__doc__, "cpu_products")
    made.add_argument("--rounds", type=int, default=15)
    made.add_argument("--models", nargs="+", choices=sorted(common.LLAMAS), default=list(MODELS))
    arguments = made.parse_args(command_line)
    if arguments.quick:
        arguments.rounds, arguments.models = 3, ["tiny"]
    return arguments


@torch.no_grad()
def measured(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Every projection of every model, with one thread and with all."""
    all_threads = torch.get_num_threads()
    for model in arguments.models:
        hidden, inner = (common.LLAMAS[model][size] for size in ("hidden_size", "intermediate_size"))
        for name, inputs, outputs in (("query", hidden, hidden), ("up", hidden, inner), ("down", inner, hidden)):
            for threads in sorted({1, all_threads}):
                torch.set_num_threads(threads)
                yield {"model": model, "projection": name, "threads": threads} | timed(
                    inputs, outputs, arguments.rounds
                )
    torch.set_num_threads(all_threads)


def timed(inputs: int, outputs: int, rounds: int) -> dict[str, float]:
    """Rates of both in GFLOP/s, and how far their outputs are apart at most, in shares of the largest."""
    torch.manual_seed(0)
    given = torch.randn(TOKENS, inputs)
    own, ours = nn.Linear(inputs, outputs, bias=False), nn.Linear(inputs, outputs, bias=False)
    ours.weight = own.weight
    with_fast_linears(ours)
    seconds: dict[str, list[float]] = {"pytorch": [], "ours": []}
    for _ in range(rounds + 1):
        for name, linear in (("pytorch", own), ("ours", ours)):
            started = time.perf_counter()
            linear(given)
            seconds[name].append(time.perf_counter() - started)
    operations = 2e-9 * TOKENS * inputs * outputs
    # The first round is there to warm up.
    rates = {name: operations / statistics.median(times[1:]) for name, times in seconds.items()}
    expected = own(given)
    difference = float((ours(given) - expected).abs().max() / expected.abs().max())
    return {**rates, "ratio": rates["ours"] / rates["pytorch"], "difference": difference}


def row(found: dict[str, Any]) -> tuple[str, ...]:
    rates = (f"{found[name]:.0f}" for name in ("pytorch", "ours"))
    named = (found["model"], found["projection"], str(found["threads"]))
    return (*named, *rates, f"{found['ratio']:.2f}", f"{found['difference']:.0e}")


if __name__ == "__main__":
    main()

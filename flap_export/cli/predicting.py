"""`predict`: a plan and a GPU's name in, expected latency out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import RenderableType

from flap_export.cli.console import table
from flap_export.models.opening import open_checkpoint
from flap_export.plan import PLAN_NAME, PruningPlan
from flap_export.prediction import Prediction, predict


def predicted(plan: str, model: str | None, **options: Any) -> Prediction:
    """What the plan in `plan` (a file, or a directory that holds one) is worth for `model`, its own by default.

    Raises:
        InputError: no such plan or GPU.
        ModelError: the dense model is not there.
        PlanError: the plan is not of this model.
    """
    path = Path(plan)
    loaded = PruningPlan.load(path / PLAN_NAME if path.is_dir() else path)
    dense = open_checkpoint(model or loaded.model).shape
    pruned = loaded.pruned_shape(dense, compensated=loaded.method.get("compensation") != "none")
    return predict(dense, pruned, **options)


def of_prediction(prediction: Prediction) -> Iterator[RenderableType]:
    """The prediction in words."""
    title = f"predicted for {prediction.gpu} in {prediction.dtype}"
    drawn = table(title, "phase", "batch", "tokens", "dense", "pruned", "speedup", "without gaps", "bound by")
    for found in prediction.phases:
        drawn.add_row(
            found.phase,
            str(found.batch_size),
            str(found.length),
            f"{found.dense.ms:.2f} ms",
            f"{found.pruned.ms:.2f} ms",
            f"{found.speedup:.2f}x",
            f"{found.ideal_speedup:.2f}x",
            found.pruned.bound,
        )
    yield drawn
    for found in prediction.phases:
        if found.remark:
            yield f"{found.phase}, batch {found.batch_size}, {found.length} tokens: [yellow]{found.remark}[/]"
    if not prediction.fits:
        yield f"[yellow]the dense weights, {prediction.dense_weights_bytes / 1e9:.1f} GB, do not fit this GPU[/]"
    told = ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in prediction.assumptions)
    yield f"assumed: {told}"
    yield f"rates: {prediction.source}"

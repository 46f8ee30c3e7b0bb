from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flap_export.errors import InputError, PlanError
from flap_export.plan import LayerPlan, PruningPlan, Ratio
from flap_export.shapes import DecoderShape, LayerShape

DENSE = DecoderShape(
    hidden_size=8,
    head_dim=4,
    vocabulary_size=11,
    ffn_matrices=3,
    tied_embeddings=False,
    layers=(LayerShape(query_heads=4, kv_heads=2, ffn_channels=6),) * 2,
)
FULL: dict[str, Any] = {"query_heads": (0, 1, 2, 3), "kv_heads": (0, 1), "ffn_channels": (0, 1, 2, 3, 4, 5)}


def plan_with(second: dict[str, Any], **changes: Any) -> PruningPlan:
    """A plan whose first layer keeps everything."""
    layers = (LayerPlan(layer=0, **FULL), LayerPlan(**{"layer": 1, **FULL, **second}))
    ratio = Ratio(requested=0.2, achieved=0.21, reason="because")
    return PruningPlan(**{"model": "m", "family": "llama", "ratio": ratio, "layers": layers, **changes})


INDICES = st.sets(st.integers(0, 50), max_size=8).map(lambda kept: tuple(sorted(kept)))


@given(
    layers=st.lists(st.tuples(INDICES, INDICES, INDICES), max_size=4),
    ratio=st.floats(0, 1),
    method=st.dictionaries(st.text(max_size=5), st.none() | st.booleans() | st.integers() | st.text(max_size=5)),
)
def test_a_saved_plan_is_the_same_plan(
    tmp_path_factory: pytest.TempPathFactory, layers: Any, ratio: float, method: Any
) -> None:
    plan = PruningPlan(
        model="org/model",
        family="llama",
        ratio=Ratio(requested=ratio, achieved=ratio / 3),
        method=method,
        layers=tuple(
            LayerPlan(layer=index, query_heads=q, kv_heads=k, ffn_channels=f) for index, (q, k, f) in enumerate(layers)
        ),
        digests={"weights": "ab"},
    )
    path = tmp_path_factory.getbasetemp() / "plan.json"
    plan.save(path)
    assert PruningPlan.load(path) == plan


def test_the_file_reads_as_the_contract_says(tmp_path: Path) -> None:
    import json

    plan_with({"query_heads": (2, 3), "kv_heads": (1,)}).save(tmp_path / "plan.json")
    raw = json.loads((tmp_path / "plan.json").read_text())
    assert raw["schema_version"] == 1
    assert raw["ratio"]["requested"] == 0.2
    assert raw["layers"][1] == {
        "layer": 1,
        "query_heads": [2, 3],
        "kv_heads": [1],
        "ffn_channels": [0, 1, 2, 3, 4, 5],
    }


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"layer": 0}, "layer 1: the plan lists layer 0 in its place; sort the layers"),
        ({"query_heads": (1, 0, 2, 3)}, "layer 1: query_heads must be ascending and distinct"),
        ({"ffn_channels": (2, 2)}, "layer 1: ffn_channels must be ascending and distinct"),
        ({"ffn_channels": (5, 6)}, r"layer 1: ffn_channels must lie in 0\.\.5, got 5\.\.6"),
        ({"kv_heads": (-1, 0)}, r"layer 1: kv_heads must lie in 0\.\.1, got -1\.\.0"),
        ({"query_heads": (0, 4)}, r"layer 1: query_heads must lie in 0\.\.3, got 0\.\.4"),
        ({"query_heads": (0, 1, 2)}, r"same number of its 2 query heads, got 3 query heads as \[2, 1\]"),
        ({"query_heads": (0, 1)}, r"got 2 query heads as \[2, 0\] on KV heads \[0, 1\]"),
        ({"query_heads": (), "kv_heads": (0,)}, r"got 0 query heads as \[0\]"),
        ({"kv_heads": ()}, r"got 4 query heads as \[\]"),
        ({"query_heads": (0, 2), "kv_heads": (0,)}, r"got 2 query heads as \[1\] on KV heads \[0\]"),
    ],
)
def test_plans_that_do_not_fit(second: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        plan_with(second).check(DENSE)
    with pytest.raises(PlanError, match=message):
        plan_with(second).pruned_shape(DENSE, compensated=True)


def test_a_plan_of_another_depth() -> None:
    plan = plan_with({})
    with pytest.raises(PlanError, match="the plan has 1 layers, the model 2; use its own plan"):
        plan.model_copy(update={"layers": plan.layers[:1]}).check(DENSE)


@pytest.mark.parametrize(
    "second",
    [
        {},
        {"query_heads": (2, 3), "kv_heads": (1,)},
        {"query_heads": (1, 2)},
        {"query_heads": (), "kv_heads": ()},
        {"ffn_channels": ()},
    ],
)
def test_plans_that_fit(second: dict[str, Any]) -> None:
    plan_with(second).check(DENSE)


def test_biases_appear_where_something_was_lost_and_compensated() -> None:
    plan = plan_with({"query_heads": (2, 3), "kv_heads": (1,), "ffn_channels": (4,)})
    first, second = plan.pruned_shape(DENSE, compensated=True).layers
    assert first == DENSE.layers[0]
    assert second == LayerShape(query_heads=2, kv_heads=1, ffn_channels=1, attention_bias=True, ffn_bias=True)
    _, bare = plan.pruned_shape(DENSE, compensated=False).layers
    assert (bare.attention_bias, bare.ffn_bias) == (False, False)
    _, only_ffn = plan_with({"ffn_channels": (4,)}).pruned_shape(DENSE, compensated=True).layers
    assert (only_ffn.attention_bias, only_ffn.ffn_bias) == (False, True)


def test_biases_that_are_there_stay() -> None:
    biased = DENSE.model_copy(
        update={"layers": (DENSE.layers[0].model_copy(update={"attention_bias": True, "ffn_bias": True}),) * 2}
    )
    shape = plan_with({"ffn_channels": ()}).pruned_shape(biased, compensated=False)
    assert all(layer.attention_bias and layer.ffn_bias for layer in shape.layers)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"not a valid pruning plan: top level: Invalid JSON"),
        ("[]", r"not a valid pruning plan: top level"),
        ('{"model": "m"}', r"not a valid pruning plan: family: Field required"),
        ('{"modle": "m"}', r"not a valid pruning plan"),
        (
            plan_with({}).model_dump_json().replace('"schema_version":1', '"schema_version":2'),
            "schema_version: .* be 1",
        ),
    ],
)
def test_files_that_are_no_plan(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "plan.json").write_text(content)
    with pytest.raises(InputError, match=message):
        PruningPlan.load(tmp_path / "plan.json")


def test_a_plan_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no pruning plan at"):
        PruningPlan.load(tmp_path / "plan.json")
    with pytest.raises(InputError, match="is a directory, expected the file of a pruning plan"):
        PruningPlan.load(tmp_path)

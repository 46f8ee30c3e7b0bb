"""Causality spelled out: what a graph must say before TensorRT's parser reads it.

The artifact's attention states causality by `is_causal` and the number of valid keys (`nonpad_kv_seqlen`), which
align the last new query with the last valid key. TensorRT's parser reads the first as a mask anchored at the upper
left corner of queries and cache, and leaves the second out without a word: a decode step would see the first row of
the cache and nothing else. No error says so, on any machine. So the graph that is parsed says the same thing in a
float mask, which has one meaning everywhere, and which ONNX Runtime can check on a CPU.

Precondition: an exported graph; attention nodes are causal with valid keys, or have a mask already.
Postcondition: no attention node is causal or has valid keys; all those that were share one mask [B, 1, n, L].
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from flap_export.artifact import INPUT_IDS, WRITE_INDICES, Artifact
from flap_export.precision import PRECISIONS

if TYPE_CHECKING:
    import onnx_ir as ir

_VALID_KEYS_INPUT: Final = 6


def mask_explicitly(model: ir.Model, artifact: Artifact) -> int:
    """Give every causal attention node of `model` a mask in place; returns how many there were."""
    causal = [node for node in model.graph if node.op_type == "Attention" and _is_causal(node)]
    if not causal:
        return 0
    mask = _causal_mask(model, artifact)
    for node in causal:
        node.attributes.pop("is_causal")
        node.resize_inputs(4)
        node.replace_input_with(3, mask)
    _drop_unused(model)
    return len(causal)


def _is_causal(node: ir.Node) -> bool:
    is_causal = "is_causal" in node.attributes and node.attributes["is_causal"].as_int() == 1
    has_valid_keys = len(node.inputs) > _VALID_KEYS_INPUT and node.inputs[_VALID_KEYS_INPUT] is not None
    assert is_causal == has_valid_keys, f"{node.name}: causality and valid keys must come together"
    return is_causal


def _causal_mask(model: ir.Model, artifact: Artifact) -> ir.Value:
    """Nodes at the graph's start for the mask [B, 1, n, L]: 0 where key j <= write index + query i, else the least."""
    import onnx_ir as ir

    tape = ir.tape.Tape()
    inputs = {value.name: value for value in model.graph.inputs}

    def integers(name: str, values: object) -> ir.Value:
        return tape.initializer(ir.tensor(np.asarray(values, np.int64)), name=f"causal_mask.{name}")

    precision = PRECISIONS[artifact.dtype]
    least, shown = (ir.tensor(number, dtype=ir.DataType[precision.onnx]) for number in (-precision.largest, 0.0))
    tokens = tape.op("Squeeze", [tape.op("Shape", [inputs[INPUT_IDS]], {"start": 1, "end": 2}), integers("zero", [0])])
    steps = tape.op("Range", [integers("start", 0), tokens, integers("step", 1)])
    first = tape.op("Unsqueeze", [inputs[WRITE_INDICES], integers("axes_first", [1, 2, 3])])
    query = tape.op("Add", [first, tape.op("Unsqueeze", [steps, integers("axes_steps", [1])])])
    keys = integers("keys", np.arange(artifact.max_length).reshape(1, 1, 1, -1))
    mask = tape.op(
        "Where",
        [
            tape.op("LessOrEqual", [keys, query]),
            tape.initializer(shown, name="causal_mask.shown"),
            tape.initializer(least, name="causal_mask.least"),
        ],
    )
    mask.dtype, mask.name = shown.dtype, "causal_mask"
    for value in tape.initializers:
        model.graph.register_initializer(value)
    model.graph.insert_before(model.graph[0], tape.nodes)
    return mask


def _drop_unused(model: ir.Model) -> None:
    from onnx_ir.passes import common

    common.RemoveUnusedNodesPass()(model)

"""The stage itself: does the artifact compute what its checkpoint computes, in prefill and in decode?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Final, get_args

import numpy as np

from flap_export.artifact import Artifact, LogitsKind
from flap_export.building.record import check_runnable, is_engine, load_engine, load_runnable, record_file
from flap_export.errors import ArtifactError, MissingRequirementError
from flap_export.precision import PRECISIONS
from flap_export.runners import Backend, Runner, natural_backend, open_runner
from flap_export.shapes import DecoderShape
from flap_export.storage import digest_of_file, digest_of_json
from flap_export.validation.cases import Case, Trace, build_cases, check_memory, run_case, run_last_case
from flap_export.validation.report import CaseName, Comparison, ParityReport, Phase, compared, not_run
from flap_export.validation.tolerance import FLOOR_ULPS, SAFETY_FACTOR

_REFERENCE: Final = "torch"

Traces = dict[CaseName, Trace]


def validate(
    artifact: str | Path,
    *,
    reference: str | Path,
    decode_steps: int = 32,
    prompt_length: int | None = None,
    batch_size: int = 4,
    seed: int = 0,
    prompts: Sequence[Sequence[int]] | None = None,
    device: str = "cpu",
    threads: int | None = None,
    backends: Sequence[Backend] | None = None,
    engine: str | Path | None = None,
) -> ParityReport:
    """Hold an artifact against the checkpoint it was exported from; the rule is in `flap_export.validation.tolerance`.

    Four cases, each prefilled and then decoded along the reference's greedy tokens: a single prompt; one that fills
    the cache to its last row, prefilled in chunks; a ragged batch; and the first and the third again through the graph
    that gives the last token's logits only. What holds no graph or engine with all logits is put to the last case only.

    Args:
        artifact: directory that `export` or `build` wrote.
        reference: the checkpoint, a directory or hub name, run on PyTorch in a higher precision.
        decode_steps: T, greedy steps after each prefill.
        prompt_length: tokens of the longest random prompt; 64 by default, less where the cache is short.
        batch_size: sequences of the ragged batch.
        seed: of the random prompts.
        prompts: token ids to use in place of random ones, at least two different lengths.
        device: where reference and candidates run.
        threads: cores one operator may use.
        backends: what to run the artifact on; by default what goes with it, ONNX Runtime or TensorRT.
        engine: built engines of the same artifact, to hold against the reference in the same report.

    Raises:
        ArtifactError: the artifact is damaged, or is not of this checkpoint.
        InputError: the cache is too short for what was asked, or it does not fit the memory.
        ModelError: the checkpoint is not usable.
    """
    from flap_export.models.opening import open_checkpoint

    path, checkpoint = Path(artifact), open_checkpoint(reference)
    opened, found = load_runnable(path), check_runnable(path, weights=True)
    _check_same_model(opened.shape, checkpoint.shape, path, checkpoint.directory)
    candidates = _candidates(path, backends, None if engine is None else Path(engine))
    fits = partial(check_memory, shape=opened.shape, dtype=PRECISIONS[opened.dtype].reference, device=device)
    fits(1, opened.max_length, opened.max_length // 2)
    cases = build_cases(
        max_length=opened.max_length,
        vocabulary_size=opened.shape.vocabulary_size,
        decode_steps=decode_steps,
        prompt_length=prompt_length,
        batch_size=batch_size,
        seed=seed,
        prompts=prompts,
    )
    inputs = _Inputs(cases, decode_steps, opened, device, threads)
    ragged = next(case for case in cases if case.name == "ragged")
    fits(len(ragged.prompts), ragged.chunk_sizes[0] + decode_steps, ragged.chunk_sizes[0])
    lacking = [_lacking(inputs, candidate, backend) for candidate, backend in candidates]
    expected: Traces = {}
    yardstick: Traces = {}
    if None in lacking:
        expected = _reference_traces(inputs, checkpoint.directory, PRECISIONS[opened.dtype].reference, forced=None)
        yardstick = _reference_traces(inputs, checkpoint.directory, opened.dtype, forced=expected)
    comparisons: list[Comparison] = []
    for (candidate, backend), missing in zip(candidates, lacking, strict=True):
        blanks = _blanks(candidate, backend)
        if missing is None:
            comparisons += _comparisons(inputs, candidate, backend, blanks, expected, yardstick)
        else:
            comparisons += [not_run(blank, missing) for blank in blanks]
    settings = _settings(inputs, seed=seed if prompts is None else None)
    digests = {"artifact": _digest_of_artifact(path, found), "reference": checkpoint.weights.digest}
    return ParityReport.of(tuple(comparisons), settings, digests)


def _candidates(artifact: Path, backends: Sequence[Backend] | None, engine: Path | None) -> list[tuple[Path, Backend]]:
    """Everything that is held against the reference: where it is, and what runs it."""
    named = (natural_backend(artifact),) if backends is None else backends
    found = [(artifact, backend) for backend in named]
    if engine is not None:
        _check_same_build(load_runnable(artifact), load_runnable(engine), artifact, engine)
        check_runnable(engine, weights=True)
        found.append((engine, natural_backend(engine)))
    return found


@dataclass(frozen=True)
class _Inputs:
    """What every runner is fed, and where."""

    cases: tuple[Case, ...]
    decode_steps: int
    artifact: Artifact
    device: str
    threads: int | None


def _reference_traces(inputs: _Inputs, checkpoint: Path, dtype: str, *, forced: Traces | None) -> Traces:
    """PyTorch's answers in `dtype`, along its own greedy tokens or those of `forced`."""
    max_length = inputs.artifact.max_length
    with open_runner(
        checkpoint, backend="torch", device=inputs.device, dtype=dtype, threads=inputs.threads, max_length=max_length
    ) as runner:
        traces = _traces(runner, inputs, forced)
    return {**traces, "last": _joined(traces["single"], traces["ragged"])}


def _candidate_traces(inputs: _Inputs, artifact: Path, backend: Backend, forced: Traces) -> Traces:
    """The artifact's answers: from its graph with all logits, and from the one with the last only where it has it."""
    opened, kinds = _opener(inputs, artifact, backend), _kinds(artifact)
    traces: Traces = {}
    if "all" in kinds:
        with opened(logits="all") as runner:
            traces = _traces(runner, inputs, forced)
    if "last" not in kinds:
        return traces
    with opened(logits="last") as runner:
        last = [
            run_last_case(runner, case, forced=forced[case.name].tokens)
            for case in inputs.cases
            if case.name in ("single", "ragged")
        ]
    return {**traces, "last": _joined(*last)}


def _kinds(artifact: Path) -> frozenset[LogitsKind]:
    """Kinds of logits it can give."""
    return frozenset(load_runnable(artifact).graphs)


def _traces(runner: Runner, inputs: _Inputs, forced: Traces | None) -> Traces:
    traces: Traces = {}
    for case in inputs.cases:
        tokens = forced[case.name].tokens if forced else None
        traces[case.name] = run_case(runner, case, decode_steps=inputs.decode_steps, forced=tokens)
    return traces


def _joined(single: Trace, ragged: Trace) -> Trace:
    """What the graph with the last logits only can show of two cases: an even batch and a ragged one."""
    last = np.concatenate([single.last, ragged.last])
    tokens = np.concatenate([single.tokens, ragged.tokens], axis=1)
    return Trace(last, last, np.concatenate([single.decode, ragged.decode]), tokens)


def _lacking(inputs: _Inputs, artifact: Path, backend: Backend) -> MissingRequirementError | None:
    """What this machine lacks to run a candidate; None where it runs.

    Candidates are opened before the reference, which takes hours for a large model, and closed again, so that the two
    are never in memory together.
    """
    largest = max(len(case.prompts) for case in inputs.cases)
    try:
        for kind in sorted(_kinds(artifact)):
            with _opener(inputs, artifact, backend)(logits=kind) as runner:
                runner.start(largest)
    except MissingRequirementError as error:
        return error
    return None


def _opener(inputs: _Inputs, artifact: Path, backend: Backend) -> Callable[..., Runner]:
    """`open_runner` of a candidate, whose files `validate` has looked at."""
    return partial(open_runner, artifact, backend=backend, device=inputs.device, threads=inputs.threads, check=False)


def _blanks(artifact: Path, backend: Backend) -> list[Comparison]:
    """What a candidate is compared in, without results."""
    kinds = _kinds(artifact)
    candidate = load_engine(artifact).flavour if is_engine(artifact) else backend
    return [
        Comparison(reference=_REFERENCE, candidate=candidate, phase=phase, case=case, passed=None)
        for case, phase in product(get_args(CaseName), get_args(Phase))
        if ("last" if case == "last" else "all") in kinds
    ]


def _comparisons(
    inputs: _Inputs,
    artifact: Path,
    backend: Backend,
    blanks: Sequence[Comparison],
    expected: Traces,
    yardstick: Traces,
) -> list[Comparison]:
    try:
        found = _candidate_traces(inputs, artifact, backend, expected)
    except MissingRequirementError as error:
        return [not_run(blank, error) for blank in blanks]
    return [
        compared(
            blank,
            getattr(expected[blank.case], blank.phase),
            getattr(yardstick[blank.case], blank.phase),
            getattr(found[blank.case], blank.phase),
            inputs.artifact.dtype,
        )
        for blank in blanks
    ]


def _check_same_model(exported: DecoderShape, checkpoint: DecoderShape, artifact: Path, reference: Path) -> None:
    # Artifacts of earlier versions do not say to how many experts a token is sent.
    said = checkpoint if exported.experts_per_token else checkpoint.model_copy(update={"experts_per_token": 0})
    if exported == said:
        return
    raise ArtifactError(
        f"artifact '{artifact}' and checkpoint '{reference}' must be of the same model, but "
        f"{_difference(exported, said)}; name the checkpoint it was exported from"
    )


def _check_same_build(artifact: Artifact, engine: Artifact, path: Path, engine_path: Path) -> None:
    for name in ("dtype", "max_length", "shape"):
        if getattr(artifact, name) != getattr(engine, name):
            raise ArtifactError(
                f"the engine '{engine_path}' and the artifact '{path}' must have the same {name}; "
                f"build it again with `flap-export build {path} --output {engine_path}`"
            )


def _difference(exported: DecoderShape, checkpoint: DecoderShape) -> str:
    """The first field or layer in which two shapes differ, in words."""
    for field in (name for name in DecoderShape.model_fields if name != "layers"):
        ours, theirs = getattr(exported, field), getattr(checkpoint, field)
        if ours != theirs:
            return f"{field} is {ours} in the artifact and {theirs} in the checkpoint"
    if len(exported.layers) != len(checkpoint.layers):
        return f"the artifact has {len(exported.layers)} layers and the checkpoint {len(checkpoint.layers)}"
    pairs = enumerate(zip(exported.layers, checkpoint.layers, strict=True))
    layer, (ours, theirs) = next((index, pair) for index, pair in pairs if pair[0] != pair[1])
    return f"layer {layer} is ({ours}) in the artifact and ({theirs}) in the checkpoint"


def _settings(inputs: _Inputs, seed: int | None) -> dict[str, str | int | float | None]:
    ragged = next(case for case in inputs.cases if case.name == "ragged")
    return {
        "dtype": inputs.artifact.dtype,
        "reference_dtype": PRECISIONS[inputs.artifact.dtype].reference,
        "safety_factor": SAFETY_FACTOR,
        "floor_ulps": FLOOR_ULPS,
        "decode_steps": inputs.decode_steps,
        "prompt_lengths": " ".join(str(len(prompt)) for prompt in ragged.prompts),
        "max_length": inputs.artifact.max_length,
        "seed": seed,
        "device": inputs.device,
        "threads": inputs.threads,
    }


def _digest_of_artifact(artifact: Path, found: Mapping[str, str]) -> str:
    """SHA-256 over the graphs, the weights and `artifact.json`; reports lie beside them and don't count.

    `found` holds the digests of files that have been read through already.
    """
    files = [file for file in sorted(artifact.iterdir()) if file.is_file() and file.suffix != ".json"]
    parts = [*files, record_file(artifact)]
    return digest_of_json({file.name: found.get(file.name) or digest_of_file(file) for file in parts})

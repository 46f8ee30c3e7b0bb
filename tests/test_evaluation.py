from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any, Self

import numpy as np
import pytest
import safetensors.numpy
from numpy.typing import NDArray

from flap_export.artifact import Artifact
from flap_export.errors import ArtifactError, InputError, ModelError, TextError
from flap_export.evaluation import QualityReport, evaluate, perplexity, perplexity_of, window_nll
from flap_export.models.weights import Weights
from flap_export.plan import PruningPlan, Ratio
from flap_export.shapes import DecoderShape
from flap_export.storage import digest_of_bytes, digest_of_file
from flap_export.text.windows import TokenWindows

VOCABULARY = 11


class BigramRunner:
    """A runner whose logits follow from the current token alone, through a table [V, V]."""

    def __init__(self, table: NDArray[Any], max_length: int = 64) -> None:
        self.table, self.max_length, self.vocabulary_size = table, max_length, len(table)
        self.started: list[int] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def start(self, batch_size: int) -> None:
        self.started.append(batch_size)

    def forward(self, input_ids: NDArray[np.int64], write_indices: NDArray[np.int64]) -> NDArray[Any]:
        assert input_ids.dtype == write_indices.dtype == np.int64
        assert write_indices.tolist() == [0] * self.started[-1]
        assert len(input_ids) == self.started[-1]
        logits: NDArray[Any] = self.table[input_ids]
        return logits


@pytest.fixture
def table() -> NDArray[np.float32]:
    return (3 * np.random.default_rng(0).standard_normal((VOCABULARY, VOCABULARY))).astype(np.float32)


def random_tokens(sequences: int, length: int) -> NDArray[np.int64]:
    return np.random.default_rng(1).integers(0, VOCABULARY, (sequences, length))


def windows_of(tokens: NDArray[np.int64]) -> TokenWindows:
    return TokenWindows("book.txt", "digest", tokens)


def reference_nlls(table: NDArray[Any], tokens: NDArray[np.int64]) -> list[float]:
    """-log p of every token but the first of each window, straight from the definition."""
    probabilities = np.exp(table.astype(np.float64))
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    return [-math.log(probabilities[a, b]) for row in tokens for a, b in pairwise(row)]


def test_perplexity_is_exp_of_the_mean() -> None:
    assert perplexity_of(2 * math.log(7.0), 2) == pytest.approx(7.0, rel=1e-14)
    assert perplexity_of(0.0, 3) == 1.0
    assert perplexity_of(1e9, 2) == math.inf
    assert math.isnan(perplexity_of(math.nan, 2))


def test_window_nll_matches_the_definition(table: NDArray[np.float32]) -> None:
    tokens = random_tokens(4, 9)
    total_nll, count = window_nll(table[tokens], tokens)
    assert count == 4 * 8
    assert total_nll == pytest.approx(sum(reference_nlls(table, tokens)), rel=1e-13)


def test_window_nll_is_computed_in_float64(table: NDArray[np.float32]) -> None:
    """A float16 sum over this vocabulary overflows, a float32 one rounds at 1e-7."""
    tokens = random_tokens(2, 6)
    half = table.astype(np.float16)
    assert window_nll(half[tokens], tokens)[0] == pytest.approx(sum(reference_nlls(half, tokens)), rel=1e-13)
    flat = np.zeros((1, 3, 200_000), dtype=np.float16)
    assert window_nll(flat, np.zeros((1, 3), dtype=np.int64))[0] == pytest.approx(2 * math.log(200_000), rel=1e-14)


def test_window_nll_survives_large_logits() -> None:
    logits = np.full((1, 2, 3), 6e4, dtype=np.float16)
    logits[0, 0, 1] = -np.inf  # a token that is ruled out, and not the one that comes
    assert window_nll(logits, np.array([[0, 2]]))[0] == pytest.approx(math.log(2), rel=1e-14)


def test_window_nll_leaves_the_logits_alone(table: NDArray[np.float32]) -> None:
    logits = table.astype(np.float64)[random_tokens(2, 4)]
    before = logits.copy()
    window_nll(logits, random_tokens(2, 4))
    np.testing.assert_array_equal(logits, before)


@pytest.mark.parametrize(("batch_size", "started"), [(1, [1] * 5), (2, [2, 2, 1]), (5, [5]), (8, [5])])
def test_perplexity_does_not_depend_on_the_batch(
    table: NDArray[np.float32], batch_size: int, started: list[int]
) -> None:
    tokens, runner = random_tokens(5, 7), BigramRunner(table)
    value, predicted = perplexity(runner, windows_of(tokens), batch_size)
    nlls = reference_nlls(table, tokens)
    assert predicted == len(nlls) == 30
    assert value == pytest.approx(math.exp(sum(nlls) / len(nlls)), rel=1e-13)
    assert runner.started == started


def test_an_even_model_has_the_perplexity_of_its_vocabulary() -> None:
    runner = BigramRunner(np.zeros((VOCABULARY, VOCABULARY), dtype=np.float32))
    assert perplexity(runner, windows_of(random_tokens(3, 5)))[0] == pytest.approx(VOCABULARY, rel=1e-14)


def test_a_window_must_fit_into_the_cache(table: NDArray[np.float32]) -> None:
    runner = BigramRunner(table, max_length=6)
    assert perplexity(runner, windows_of(random_tokens(2, 6)))[1] == 10
    with pytest.raises(ArtifactError, match=r"'book.txt' must fit into the model's max_length of 6 tokens, got 7"):
        perplexity(runner, windows_of(random_tokens(2, 7)))


def test_a_window_of_one_token_predicts_nothing(table: NDArray[np.float32]) -> None:
    with pytest.raises(TextError, match=r"'book.txt' needs windows of at least 2 tokens, got 1"):
        perplexity(BigramRunner(table), windows_of(random_tokens(2, 1)))


def test_a_batch_holds_at_least_one_window(table: NDArray[np.float32]) -> None:
    with pytest.raises(InputError, match="batch_size must be at least 1, got 0"):
        perplexity(BigramRunner(table), windows_of(random_tokens(2, 4)), 0)


@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
def test_a_perplexity_that_is_not_finite_is_an_error(table: NDArray[np.float32], broken: float) -> None:
    table[3] = broken
    with pytest.raises(ModelError, match=r"the perplexity on 'book.txt' must be finite, got (nan|inf)"):
        perplexity(BigramRunner(table), windows_of(np.array([[1, 3, 2]])))


def test_a_ruled_out_token_that_comes_makes_perplexity_infinite(table: NDArray[np.float32]) -> None:
    table[3, 2] = -np.inf
    with pytest.raises(ModelError, match="got inf"):
        perplexity(BigramRunner(table), windows_of(np.array([[1, 3, 2]])))


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch, table: NDArray[np.float32]) -> list[Any]:
    """Runners are replaced by a `BigramRunner`; the list tells what was opened, and holds the batches it started."""
    calls: list[tuple[Path, str, str | None, list[int]]] = []

    def open_runner(target: Path, *, device: str, dtype: str | None, check: bool) -> BigramRunner:
        # It was looked at before, weights and all.
        assert not check
        runner = BigramRunner(table)
        calls.append((target, device, dtype, runner.started))
        return runner

    fake = ModuleType("flap_export.runners")
    fake.open_runner = open_runner  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flap_export.runners", fake)
    return calls


def make_checkpoint(directory: Path) -> Path:
    directory.mkdir()
    config = {"model_type": "llama", "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 4}
    (directory / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1, "vocab_size": VOCABULARY}))
    safetensors.numpy.save_file({"weight": np.zeros(1)}, directory / "model.safetensors")
    return directory


def make_artifact(directory: Path) -> Path:
    directory.mkdir()
    shape = DecoderShape(
        hidden_size=8, head_dim=4, vocabulary_size=VOCABULARY, ffn_matrices=3, tied_embeddings=False, layers=()
    )
    Artifact(
        model="m",
        family="llama",
        dtype="float32",
        max_length=64,
        shape=shape,
        graphs={},
        opset=24,
        digests={},
        versions={},
    ).save(directory / "artifact.json")
    return directory


def save_tokens(path: Path, tokens: NDArray[np.int64]) -> str:
    np.save(path, tokens)
    return str(path)


@pytest.mark.parametrize(("make", "named"), [(make_checkpoint, "weights"), (make_artifact, "artifact")])
def test_evaluate_reports_every_source(
    tmp_path: Path,
    table: NDArray[np.float32],
    opened: list[Any],
    make: Callable[[Path], Path],
    named: str,
) -> None:
    target = make(tmp_path / "model")
    tokens = {save_tokens(tmp_path / f"{n}.npy", random_tokens(n, 6)): random_tokens(n, 6) for n in (3, 4)}
    report = evaluate(target, list(tokens), batch_size=2, device="cuda", dtype="float16")
    assert opened == [(target, "cuda", "float16", [2, 1, 2, 2])]
    assert [quality.source for quality in report.sources] == list(tokens)
    for quality, ids in zip(report.sources, tokens.values(), strict=True):
        assert quality.perplexity == pytest.approx(math.exp(np.mean(reference_nlls(table, ids))), rel=1e-13)
        assert quality.tokens == ids.size - len(ids)
        assert not quality.contaminated
        assert quality.dense_perplexity is None
    identity = Weights(target).digest if named == "weights" else digest_of_file(target / "artifact.json")
    texts = {f"text:{source}": digest_of_file(Path(source)) for source in tokens}
    assert report.digests == {named: identity, **texts}
    assert report.model == str(target)
    report.save(tmp_path / "quality.json")
    assert QualityReport.load(tmp_path / "quality.json") == report


def test_evaluate_passes_the_numbers_on(tmp_path: Path, opened: list[Any]) -> None:
    source = save_tokens(tmp_path / "ids.npy", random_tokens(9, 8))
    report = evaluate(make_checkpoint(tmp_path / "model"), [source], sequence_length=5, samples=3)
    assert report.sources[0].tokens == 3 * 4


def test_a_source_that_was_calibrated_on_is_marked(tmp_path: Path, opened: list[Any]) -> None:
    target = make_checkpoint(tmp_path / "model")
    seen = save_tokens(tmp_path / "seen.npy", random_tokens(3, 6))
    copied = save_tokens(tmp_path / "copied.npy", random_tokens(3, 6))
    unseen = save_tokens(tmp_path / "unseen.npy", random_tokens(4, 6))
    digests = {"calibration": digest_of_bytes(Path(seen).read_bytes()), "weights": digest_of_file(Path(unseen))}
    ratio = Ratio(requested=0.2, achieved=0.2)
    PruningPlan(model="m", family="llama", ratio=ratio, layers=(), digests=digests).save(target / "plan.json")
    report = evaluate(target, [seen, copied, unseen])
    assert [quality.contaminated for quality in report.sources] == [True, True, False]


def test_all_sources_are_checked_before_the_first_is_scored(
    tmp_path: Path, opened: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward(self: BigramRunner, *_: Any) -> NDArray[Any]:
        raise AssertionError("scored")

    monkeypatch.setattr(BigramRunner, "forward", forward)
    target = make_checkpoint(tmp_path / "model")
    good = save_tokens(tmp_path / "good.npy", random_tokens(3, 6))
    with pytest.raises(TextError, match="no text source"):
        evaluate(target, [good, str(tmp_path / "absent.npy")])
    with pytest.raises(ArtifactError, match="got 65"):
        evaluate(target, [good, save_tokens(tmp_path / "long.npy", random_tokens(3, 65))])
    with pytest.raises(TextError, match=rf"0\.\.{VOCABULARY - 1}"):
        evaluate(target, [good, save_tokens(tmp_path / "foreign.npy", np.full((1, 4), VOCABULARY))])


def test_text_needs_the_tokenizer_of_the_target(tmp_path: Path, opened: list[Any]) -> None:
    (tmp_path / "book.txt").write_text("some text")
    target = make_checkpoint(tmp_path / "model")
    with pytest.raises(ModelError, match=f"no tokenizer in '{target}'"):
        evaluate(target, [str(tmp_path / "book.txt")])


def test_evaluate_needs_a_source_and_a_model(tmp_path: Path, opened: list[Any]) -> None:
    with pytest.raises(InputError, match="at least one text source"):
        evaluate(make_checkpoint(tmp_path / "model"), [])
    with pytest.raises(ModelError, match="no model directory"):
        evaluate(tmp_path / "absent", ["book.txt"])
    assert opened == []

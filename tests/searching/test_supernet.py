"""Losses of candidates against those of the checkpoints that they stand for, rewritten, saved and run whole."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from problems import candidate_of, checkpoint_of, losses_of_model, tiny_problem
from safetensors.torch import load_file, save_file
from tiny import ALL_FAMILIES, MIXTURES, plain_model

from flap_export.errors import InputError, ModelError
from flap_export.evaluation import perplexity
from flap_export.models.loading import load_model
from flap_export.models.opening import open_checkpoint
from flap_export.runners.base import RunnerOptions
from flap_export.runners.torch_runner import TorchRunner
from flap_export.searching.fitness import fitness_value, open_losses, tokens_counted
from flap_export.searching.problem import Problem
from flap_export.searching.space import Candidate
from flap_export.searching.supernet import Supernet
from flap_export.text.windows import TokenWindows

SHARES = {
    "uneven": [(0.5, 0.3), (0.0, 0.62), (0.5, 0.0)],
    "emptied attention, whole layer": [(1.0, 0.2), (0.5, 0.7), (0.0, 0.0)],
    "emptied FFN, emptied layer": [(0.5, 1.0), (1.0, 1.0), (0.5, 0.4)],
}


def candidates_of(problem: Problem) -> list[Candidate]:
    return [candidate_of(problem.space, shares) for shares in SHARES.values()]


def check_losses(problem: Problem, folder: Path, *, rel: float = 2e-4, absolute: float = 2e-4) -> None:
    dense = plain_model(Path(problem.model), problem.dtype)
    candidates = candidates_of(problem)
    with problem.opened() as losses:
        found = losses.losses(candidates, 0, len(problem.tokens))
    for number, (candidate, loss) in enumerate(zip(candidates, found, strict=True)):
        saved = checkpoint_of(problem, candidate, folder / str(number))
        expected = float(losses_of_model(load_model(saved, dtype=problem.dtype), dense, problem).sum())
        assert loss == pytest.approx(expected, rel=rel, abs=absolute), problem.space.steps(candidate)
        assert expected > 0.1


def test_the_candidates_are_as_uneven_as_they_say(tmp_path: Path) -> None:
    problem = tiny_problem("llama", tmp_path, compensation="none", num_hidden_layers=3)
    steps = [problem.space.steps(candidate) for candidate in candidates_of(problem)]
    assert [[taken[0] for taken in layers] for layers in steps] == [[1, 0, 1], [2, 1, 0], [1, 2, 1]]
    assert steps[1][2] == (0, 0)
    assert [taken[1] for taken in steps[2][:2]] == [40, 40]
    assert 20 < steps[0][1][1] < 30


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_losses_are_those_of_the_saved_checkpoint(family: str, tmp_path: Path) -> None:
    check_losses(tiny_problem(family, tmp_path, num_hidden_layers=3), tmp_path)


@pytest.mark.parametrize("compensation", ["none", "bias"])
@pytest.mark.parametrize("family", ["gemma2", "opt", "phi3", *MIXTURES])
def test_other_compensations(family: str, compensation: Any, tmp_path: Path) -> None:
    check_losses(tiny_problem(family, tmp_path, compensation=compensation, num_hidden_layers=3), tmp_path)


@pytest.mark.parametrize(
    ("family", "given"),
    [
        ("llama", {"head_units": "queries", "num_attention_heads": 8, "attention_bias": True, "mlp_bias": True}),
        ("gemma3_text", {"tie_word_embeddings": True}),
        ("opt", {"do_layer_norm_before": False, "fitness": "perplexity"}),
        ("phi3", {"fitness": "perplexity", "sequences": 5}),
    ],
    ids=["queries and biases", "tied", "norms after", "a chunk that is not full"],
)
def test_variants(family: str, given: dict[str, Any], tmp_path: Path) -> None:
    check_losses(tiny_problem(family, tmp_path, num_hidden_layers=3, **given), tmp_path)


@pytest.mark.parametrize("family", ["cohere", "gemma2", "olmo", "olmo2", "qwen3", *MIXTURES])
def test_double_precision_is_double_throughout(family: str, tmp_path: Path) -> None:
    """Norms and rotations too, which transformers passes through single precision."""
    problem = tiny_problem(family, tmp_path, dtype=torch.float64, num_hidden_layers=3)
    dense = load_model(problem.model, dtype=torch.float64)
    candidates = candidates_of(problem)
    with problem.opened() as losses:
        found = losses.losses(candidates, 0, 6)
    for number, (candidate, loss) in enumerate(zip(candidates, found, strict=True)):
        model = load_model(checkpoint_of(problem, candidate, tmp_path / str(number)), dtype=torch.float64)
        assert loss == pytest.approx(float(losses_of_model(model, dense, problem).sum()), rel=1e-12)


def test_half_precision_is_near(tmp_path: Path) -> None:
    """Logits are compared in single precision at least."""
    check_losses(tiny_problem("llama", tmp_path, dtype=torch.bfloat16, num_hidden_layers=3), tmp_path, rel=0.05)


@pytest.mark.skipif("glm4_moe" not in ALL_FAMILIES, reason="transformers is too old")
def test_routers_stay_in_single_precision(tmp_path: Path) -> None:
    """They choose as those of the checkpoint do, where the model computes in half precision."""
    problem = tiny_problem("glm4_moe", tmp_path, dtype=torch.bfloat16)
    dense = open_checkpoint(problem.model)
    layer = problem.supernet(dense).layer(1, 1, 9)
    for name in ("mlp.gate.weight", "mlp.gate.e_score_correction_bias"):
        assert torch.equal(layer.state_dict()[name], dense.weights[f"model.layers.1.{name}"])
    assert layer.state_dict()["self_attn.q_proj.weight"].dtype == torch.bfloat16


def test_the_dense_model_loses_nothing(tmp_path: Path) -> None:
    problem = tiny_problem("llama", tmp_path)
    with problem.opened() as losses:
        assert losses.losses([candidate_of(problem.space, [(0, 0), (0, 0)])], 0, 6) == pytest.approx([0], abs=1e-4)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_not_a_bit_depends_on_what_is_evaluated_beside(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor on the order, nor on how much memory there is."""
    problem = tiny_problem(family, tmp_path, num_hidden_layers=3, sequences=4)
    space, random = problem.space, np.random.default_rng(0)
    candidates = candidates_of(problem)
    for parent in candidates[:2]:
        # Offspring share prefixes with their parent, and blocks with each other.
        steps = [list(parent.levels), list(parent.attention)]
        steps[0][-1] += 7
        candidates.append(Candidate(tuple(steps[0]), tuple(steps[1])))
    alone = []
    for candidate in candidates:
        with problem.opened() as losses:
            alone += losses.losses([candidate], 0, 4)
    assert len(set(alone)) == len(candidates)
    with problem.opened() as losses:
        assert losses.losses(candidates, 0, 4) == alone
        assert losses.losses(candidates[::-1], 0, 4) == alone[::-1]
        assert losses.losses(candidates, 0, 4) == alone
    monkeypatch.setattr("flap_export.searching.fitness.STATE_BYTES", 1)
    monkeypatch.setattr("flap_export.searching.fitness.REFERENCE_BYTES", 0)
    dense = open_checkpoint(problem.model)
    ladders = [layer.ladders for layer in space.layers]
    tiny = Supernet(dense, ladders, problem.restore, compensated=True, block_bytes=1)
    with open_losses(dense, problem.tokens, space, tiny, chunk_sequences=2) as losses:
        for _ in range(2):
            order = random.permutation(len(candidates))
            assert losses.losses([candidates[i] for i in order], 0, 4) == [alone[i] for i in order]
    assert len(tiny._blocks) == 2
    assert len(tiny._layers) <= 1
    assert tiny._bytes == sum(tensor.nbytes for block in tiny._blocks.values() for tensor in block.values())


def test_blocks_are_made_once_for_all_chunks_however_little_memory_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = tiny_problem("llama", tmp_path, num_hidden_layers=3, sequences=6)
    candidates, made = candidates_of(problem), list[tuple[int, int, int]]()
    dense, ladders = open_checkpoint(problem.model), [layer.ladders for layer in problem.space.layers]
    supernet = Supernet(dense, ladders, problem.restore, compensated=True, block_bytes=1)
    monkeypatch.setattr("flap_export.searching.fitness.STATE_BYTES", 1 << 20)
    asked = supernet.layer
    monkeypatch.setattr(supernet, "layer", lambda *layer: made.append(layer) or asked(*layer))
    with open_losses(dense, problem.tokens, problem.space, supernet, chunk_sequences=2) as losses:
        losses.losses(candidates, 0, 6)
    assert supernet.layers_at_once(problem.space.layers[0].total) == 1
    taken = {(index, *step) for candidate in candidates for index, step in enumerate(problem.space.steps(candidate))}
    assert sorted(made) == sorted(taken)


def test_rotary_frequencies_of_old_checkpoints_change_nothing(tmp_path: Path) -> None:
    """LLaMA's first checkpoints hold them in every layer, where transformers has no place for them any more."""
    problem = tiny_problem("llama", tmp_path, compensation="bias", num_hidden_layers=3)
    candidates = candidates_of(problem)
    with problem.opened() as losses:
        expected = losses.losses(candidates, 0, 6)
    path = Path(problem.model) / "model.safetensors"
    old = {f"model.layers.{index}.self_attn.rotary_emb.inv_freq": torch.ones(4) for index in range(3)}
    save_file({**load_file(path), **old}, path, metadata={"format": "pt"})
    with problem.opened() as losses:
        assert losses.losses(candidates, 0, 6) == expected
    assert not set(old) & set(load_file(checkpoint_of(problem, candidates[0], tmp_path) / "model.safetensors"))


def test_threads_change_nothing(tmp_path: Path) -> None:
    """More of them than chunks, fewer, or one; what the caller computes with is left alone.

    Not a bit depends on how many candidates the threads of one process divide among themselves.
    """
    problem = tiny_problem("llama", tmp_path, num_hidden_layers=3)
    candidates = candidates_of(problem)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 8):
            torch.set_num_threads(threads)
            with problem.opened() as losses:
                # One chunk, whose candidates are divided among threads; then all, which find its states.
                first = losses.losses(candidates, 0, 2)
                found.append(first + losses.losses(candidates, 0, 6))
                losses.forget_states()
                assert losses.losses(candidates[:1], 0, 2) == first[:1]
                assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    np.testing.assert_allclose(found, [found[0]] * 3, rtol=1e-6)


def test_what_is_evaluated_twice_is_computed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks are made once, and of a candidate only the layers from the first new one on."""
    problem = tiny_problem("llama", tmp_path, num_hidden_layers=3, sequences=4)
    made: list[Any] = []
    run: list[int] = []
    block, through = Supernet._made, torch.nn.Module.__call__
    monkeypatch.setattr(Supernet, "_made", lambda self, *key: made.append(key) or block(self, *key))
    parent = candidates_of(problem)[0]
    child = Candidate((*parent.levels[:-1], parent.levels[-1] + 7), parent.attention)
    with problem.opened() as losses:

        def counted(self: Any, *arguments: Any, **keywords: Any) -> Any:
            if type(self).__name__ == "LlamaDecoderLayer":
                run.append(1)
            return through(self, *arguments, **keywords)

        monkeypatch.setattr(torch.nn.Module, "__call__", counted)
        losses.losses([parent], 0, 4)
        assert (len(made), len(run)) == (6, 2 * 3)
        losses.losses([child, parent], 0, 4)
        assert (len(made), len(run)) == (7, 2 * 3 + 2)
        losses.losses([child, parent], 0, 4)
        assert (len(made), len(run)) == (7, 2 * 3 + 2)


@pytest.mark.parametrize("fitness", ["kl", "perplexity"])
def test_stages_add_up(fitness: Any, tmp_path: Path) -> None:
    problem = tiny_problem("llama", tmp_path, fitness=fitness, num_hidden_layers=3)
    candidates = candidates_of(problem)
    dense = plain_model(Path(problem.model))
    with problem.opened() as losses:
        whole = losses.losses(candidates, 0, 6)
        parts = [losses.losses(candidates, *rows) for rows in ((0, 2), (2, 6))]
    np.testing.assert_allclose(np.sum(parts, axis=0), whole, rtol=1e-12)
    model = load_model(checkpoint_of(problem, candidates[0], tmp_path), dtype=torch.float32)
    expected = losses_of_model(model, dense, problem)
    assert parts[0][0] == pytest.approx(float(expected[:2].sum()), rel=1e-3)
    assert parts[1][0] == pytest.approx(float(expected[2:].sum()), rel=1e-3)
    with problem.opened() as losses, pytest.raises(AssertionError, match="a look ends where a chunk does"):
        losses.losses(candidates, 0, 3)


def test_perplexity_is_that_of_evaluate(tmp_path: Path) -> None:
    problem = tiny_problem("llama", tmp_path, fitness="perplexity", num_hidden_layers=3)
    candidate = candidates_of(problem)[0]
    with problem.opened() as losses:
        (loss,) = losses.losses([candidate], 0, 6)
    runner = TorchRunner(checkpoint_of(problem, candidate, tmp_path), RunnerOptions())
    value, tokens = perplexity(runner, TokenWindows("text", "", problem.tokens.numpy()))
    assert tokens == tokens_counted("perplexity", 6, 9)
    assert fitness_value("perplexity", loss, tokens) == pytest.approx(value, rel=1e-6)


def test_fitness_from_losses() -> None:
    assert (tokens_counted("kl", 3, 8), tokens_counted("perplexity", 3, 8)) == (24, 21)
    assert fitness_value("kl", 6.0, 24) == 0.25
    assert fitness_value("kl", -1e-7, 24) == 0.0
    assert fitness_value("perplexity", 42.0, 21) == pytest.approx(math.e**2)
    assert fitness_value("perplexity", 1e6, 21) == math.inf


@pytest.mark.parametrize("fitness", ["kl", "perplexity"])
def test_logits_that_are_not_finite_are_refused(fitness: Any, tmp_path: Path) -> None:
    """The dense model's are; nothing restores what the candidate loses."""
    problem = tiny_problem("llama", tmp_path, fitness=fitness, compensation="none")
    dense = open_checkpoint(problem.model)
    supernet = problem.supernet(dense)
    with open_losses(dense, problem.tokens, problem.space, supernet, fitness=fitness, chunk_sequences=2) as losses:
        whole, cut = (candidate_of(problem.space, [(0.5, share), (0, 0)]) for share in (0.0, 0.5))
        layer = supernet.layer(0, *problem.space.steps(cut)[0])
        layer.get_parameter("mlp.down_proj.weight").data[0, 0] = math.inf
        with pytest.raises(InputError, match=r"the logits at rates \[0\.\d+, 0\.0\] are not finite.*--dtype float32"):
            losses.losses([whole, cut], 0, 6)
        assert math.isfinite(losses.losses([whole], 0, 6)[0])


def test_a_model_that_is_gone(tmp_path: Path) -> None:
    problem = tiny_problem("llama", tmp_path)
    (tmp_path / "dense").rename(tmp_path / "elsewhere")
    with pytest.raises(ModelError, match="no model directory"), problem.opened():
        pass

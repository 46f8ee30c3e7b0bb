from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import save_tokens, tiny_checkpoint, tokens_of
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from flap_export.errors import ArtifactError, InputError, TextError
from flap_export.exporting import export
from flap_export.generation import generate, pick_token, stream_text
from flap_export.pruning.stage import prune
from flap_export.runners import Logits, Runner, TokenIds, open_runner
from flap_export.runners import sampling as runners_sampling
from flap_export.runners.sampling import Sampling

VOCABULARY = 10


class CountingRunner(Runner):
    """Prefers the token after the last one, then the one after that; counts its forward passes."""

    name = "counting"

    def __init__(self, max_length: int = 100) -> None:
        super().__init__(max_length=max_length, vocabulary_size=VOCABULARY, logits="all")
        self.passes = 0

    def close(self) -> None:
        pass

    def _allocate(self, batch_size: int) -> None:
        pass

    def _forward(self, input_ids: TokenIds, write_indices: TokenIds) -> Logits:
        self.passes += 1
        distance = (np.arange(VOCABULARY) - input_ids[..., None] - 1) % VOCABULARY
        return (-distance).astype(np.float32)


def test_greedy_takes_the_most_likely_token() -> None:
    assert list(generate(CountingRunner(), [3, 5], max_new_tokens=6)) == [6, 7, 8, 9, 0, 1]


def test_stop_token_ends_and_is_not_yielded() -> None:
    assert list(generate(CountingRunner(), [3], max_new_tokens=50, stop_ids=[7])) == [4, 5, 6]


def test_nothing_is_computed_that_is_not_needed() -> None:
    runner = CountingRunner()
    list(generate(runner, [3], max_new_tokens=4))
    assert runner.passes == 4
    list(islice(generate(runner, [3], max_new_tokens=50), 2))
    assert runner.passes == 6


@pytest.mark.parametrize(("prompt_length", "expected"), [(1, 8), (7, 2), (8, 1)])
def test_cache_end_ends_the_text(prompt_length: int, expected: int) -> None:
    assert len(list(generate(CountingRunner(max_length=8), [1] * prompt_length, max_new_tokens=99))) == expected


def test_seed_decides_the_sample() -> None:
    first, again, other = (
        list(generate(CountingRunner(), [1], max_new_tokens=40, temperature=2.0, seed=seed)) for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other
    assert first != list(generate(CountingRunner(), [1], max_new_tokens=40))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"temperature": -1.0}, "temperature must be 0"),
        ({"seed": -1}, "seed must lie in 0"),
        ({"temperature": float("nan")}, "temperature must be 0"),
        ({"top_k": -1}, "top_k must be"),
        ({"top_p": 0.0}, "top_p must lie above 0"),
        ({"top_p": 1.1}, "top_p must lie above 0"),
    ],
)
def test_bad_options_are_refused_when_called(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        generate(CountingRunner(), [1], **{"max_new_tokens": 3, **options})


def test_bad_prompts() -> None:
    with pytest.raises(ArtifactError, match="must fit the cache of 4 rows, got 5"):
        generate(CountingRunner(max_length=4), [1] * 5, max_new_tokens=1)
    with pytest.raises(TextError, match="empty"):
        list(generate(CountingRunner(), [], max_new_tokens=1))


# --- picking a token


def sampled(logits: Any, count: int = 4000, **options: Any) -> np.ndarray[Any, Any]:
    generator = np.random.default_rng(0)
    picks = [pick_token(np.asarray(logits, np.float32), generator=generator, **options) for _ in range(count)]
    return np.bincount(picks, minlength=len(logits)) / count


@pytest.mark.parametrize("temperature", [1e-10, 1e-300, 1e-320])
def test_a_very_low_temperature_is_greedy(temperature: float) -> None:
    assert sampled([1.0, 3.0, 2.0], 20, temperature=temperature).tolist() == [0, 1, 0]
    sampling = Sampling(temperature=temperature)
    chosen = runners_sampling.sampled(torch.tensor([[1.0, 3.0, 2.0]]), sampling, torch.Generator().manual_seed(0))
    assert chosen.tolist() == [1]


def test_frequencies_follow_the_probabilities() -> None:
    probabilities = np.array([0.1, 0.6, 0.3])
    np.testing.assert_allclose(sampled(np.log(probabilities), temperature=1.0), probabilities, atol=0.03)
    squared = probabilities**2 / (probabilities**2).sum()
    np.testing.assert_allclose(sampled(np.log(probabilities), temperature=0.5), squared, atol=0.03)


def test_top_k_and_top_p_cut_the_tail() -> None:
    logits = np.log([0.1, 0.5, 0.25, 0.15])
    assert (sampled(logits, 500, temperature=1.0, top_k=2) > 0).tolist() == [False, True, True, False]
    assert (sampled(logits, 500, temperature=1.0, top_p=0.7) > 0).tolist() == [False, True, True, False]
    assert (sampled(logits, 500, temperature=1.0, top_p=0.8) > 0).tolist() == [False, True, True, True]
    assert (sampled(logits, 500, temperature=1.0, top_p=0.001) > 0).tolist() == [False, True, False, False]
    np.testing.assert_allclose(sampled(logits, temperature=1.0, top_k=2)[1], 2 / 3, atol=0.03)


@given(
    st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=8),
    st.floats(0.01, 10),
    st.integers(0, 9),
    st.floats(0.01, 1.0),
)
def test_any_options_pick_a_token_that_exists(
    logits: list[float], temperature: float, top_k: int, top_p: float
) -> None:
    values = np.array(logits, np.float32)
    token = pick_token(values, generator=np.random.default_rng(0), temperature=temperature, top_k=top_k, top_p=top_p)
    assert 0 <= token < len(logits)
    if top_k == 1:
        assert values[token] == values.max()
    if top_k:
        assert int((values > values[token]).sum()) < top_k


def test_a_broken_model_is_not_sampled_from() -> None:
    with pytest.raises(ArtifactError, match="NaN or infinite"):
        pick_token(np.array([0.0, np.nan], np.float32), generator=np.random.default_rng(0))


# --- text as it comes

SAMPLE = "Grüße, naïve 世界! 🙂🚀 two  spaces\nand lines — “quoted” текст"


def byte_level_tokenizer(merges: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=257 + merges, special_tokens=["<end>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([SAMPLE] * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


def stripping_tokenizer() -> PreTrainedTokenizerFast:
    """Words that carry their space in front, which decoding strips from the first: as SentencePiece does."""
    words = {"▁two": 0, "▁words": 1, "s": 2}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="s"))
    tokenizer.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


BYTES = byte_level_tokenizer(merges=0)
MERGED = byte_level_tokenizer(merges=60)


@pytest.mark.parametrize("tokenizer", [BYTES, MERGED], ids=["bytes", "merged"])
def test_pieces_join_to_the_text_and_hold_whole_characters(tokenizer: Any) -> None:
    pieces = list(stream_text(tokenizer, tokenizer(SAMPLE)["input_ids"]))
    assert "".join(pieces) == SAMPLE
    assert not any("\ufffd" in piece or piece == "" for piece in pieces)
    assert len(pieces) > 10


@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd"), max_size=20), st.booleans())
def test_any_text_comes_back(text: str, merged: bool) -> None:
    tokenizer = MERGED if merged else BYTES
    pieces = list(stream_text(tokenizer, tokenizer(text)["input_ids"]))
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_character_appears_as_soon_as_it_is_complete() -> None:
    ids = BYTES("é🙂")["input_ids"]
    seen: list[int] = []

    def spied() -> Any:
        for token in ids:
            seen.append(token)
            yield token

    stream = stream_text(BYTES, spied())
    assert (next(stream), len(seen)) == ("é", 2)
    assert (next(stream), len(seen)) == ("🙂", 6)


def test_an_incomplete_character_at_the_end_is_dropped() -> None:
    ids = BYTES("ab🙂")["input_ids"]
    assert "".join(stream_text(BYTES, ids[:-1])) == "ab"


def test_special_tokens_are_not_text() -> None:
    end = BYTES.eos_token_id
    assert "".join(stream_text(BYTES, [end, *BYTES("é")["input_ids"], end, *BYTES("x")["input_ids"]])) == "éx"


def test_spaces_between_words_survive() -> None:
    assert list(stream_text(stripping_tokenizer(), [0, 1, 2, 1])) == ["two", " words", "s", " words"]


def test_checkpoint_and_artifact_say_the_same_over_64_greedy_steps(tmp_path: Path) -> None:
    """The uneven model on PyTorch with its own cache, and its artifact on ONNX Runtime with the static one."""
    dense = tiny_checkpoint("llama", tmp_path / "dense", max_position_embeddings=96)
    source = save_tokens(tmp_path / "ids.npy", tokens_of(6, 11))
    prune(dense, tmp_path / "pruned", ratio=0.3, calibration=source)
    export(tmp_path / "pruned", tmp_path / "onnx", max_length=96)
    prompt = tokens_of(1, 9, seed=5)[0].tolist()
    written = []
    for path in (tmp_path / "pruned", tmp_path / "onnx"):
        with open_runner(path, threads=1, logits="last") as runner:
            written.append(list(generate(runner, prompt, max_new_tokens=64)))
    assert len(written[0]) == 64
    assert written[0] == written[1]
    assert len(set(written[0])) > 4

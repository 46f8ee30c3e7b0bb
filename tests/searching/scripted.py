"""Small spaces to search, and language models that answer by a script."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flap_export.allocation.ladders import ladders_from_scores
from flap_export.scoring import LayerScores
from flap_export.searching.journal import Journal
from flap_export.searching.language.language_model import LanguageModel
from flap_export.searching.language.proposers import Answer, Message, Proposer, ProposerUnavailableError
from flap_export.searching.operators import Conventional, Scored
from flap_export.searching.space import Candidate, Granularity, Space
from flap_export.shapes import DecoderShape, LayerShape

LAYERS = 6
SETTINGS = {"model": "tiny", "seed": 0}


def small_space(granularity: Granularity = "layers", *, uneven: bool = False, **options: Any) -> Space:
    """Six layers of 120 channels; every other one of 240 where they are uneven."""
    layers = tuple(
        LayerShape(query_heads=4, kv_heads=2, ffn_channels=240 if uneven and index % 2 else 120)
        for index in range(LAYERS)
    )
    shape = DecoderShape(
        hidden_size=6, head_dim=8, vocabulary_size=11, ffn_matrices=3, tied_embeddings=False, layers=layers
    )
    generator = torch.Generator().manual_seed(3)
    scores = [
        LayerScores(*(torch.rand(n, generator=generator, dtype=torch.float64) for n in (4, layer.ffn_channels)))
        for layer in layers
    ]
    return Space.of(ladders_from_scores(scores, shape), 0.3, granularity=granularity, **options)


def prompt_of(messages: Sequence[Message]) -> str:
    return "\n".join(message["content"] for message in messages)


def wanted(prompt: str) -> int:
    """How many proposals a prompt asks for."""
    found = re.search(r"End your answer with the (\d+)", prompt)
    assert found, prompt
    return int(found[1])


def well(prompt: str, seed: int) -> str:
    """An answer as it should be, with rates that need repair."""
    random, count = np.random.default_rng(seed), wanted(prompt)
    if "<parents>" in prompt:
        best = len(re.findall(r"(?m)^\d+\. loss", prompt))
        pairs = [[1, int(random.integers(2, best + 1))] for _ in range(count)]
        return f"Step 2 gives these.\n<parents>{pairs}</parents>"
    pairwise = "[rate of attention, rate of FFN]" in prompt
    rates = random.uniform(0.0, 0.7, (count, LAYERS, 2) if pairwise else (count, LAYERS)).round(3).tolist()
    return f"Here they are:\n<candidates>{rates}</candidates>"


class Scripted:
    """Answers by a function of prompt and seed, and notes what it was asked."""

    def __init__(self, script: Callable[[str, int], str] = well, *, dies_at: int | None = None) -> None:
        self.script, self.dies_at = script, dies_at
        self.prompts: list[str] = []
        self.temperatures: list[float] = []
        self.seeds: list[int] = []

    def answer(self, messages: Sequence[Message], *, temperature: float, seed: int) -> Answer:
        if len(self.prompts) == self.dies_at:
            raise ProposerUnavailableError("nobody is there", "begin again")
        self.prompts.append(prompt_of(messages))
        self.temperatures.append(temperature)
        self.seeds.append(seed)
        text = self.script(self.prompts[-1], seed)
        return Answer(text, len(self.prompts[-1]), len(text), 0.25 * len(self.prompts), attempts=1 + seed % 2)


def operators_of(space: Space, proposer: Proposer, journal: Journal, **options: Any) -> LanguageModel:
    chance = Conventional(space, np.random.default_rng(1))
    return LanguageModel(space, proposer, journal, chance, np.random.default_rng(2), **options)


def opened(folder: Path) -> Journal:
    return Journal(folder / "journal.jsonl", SETTINGS)


def fitness_of(candidate: Candidate) -> float:
    """Layers in the middle are worth less, and attention's part plays a part."""
    levels = sum(level**2 * (1 + abs(place - 2.5)) for place, level in enumerate(candidate.levels))
    return levels / 10 + sum(candidate.attention) / 100


def scored(candidates: Sequence[Candidate]) -> list[Scored]:
    """A population, best first."""
    return sorted((Scored(one, fitness_of(one)) for one in candidates), key=lambda one: one.fitness)


def bred(operators: LanguageModel, generations: int = 2, size: int = 5) -> list[Candidate]:
    """All candidates of a short search, in the order they came about."""
    found = operators.initial(size, ())
    population = scored(found)
    for _ in range(generations):
        found += operators.mutated(population[:3], found)
        found += operators.crossed(operators.parents(population, 3), found)
        population = scored(found)[:size]
        operators.observe(population[0].fitness)
    return found

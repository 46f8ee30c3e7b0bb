"""The runs of one search: strategies and seeds that share a problem and, each with a journal of its own, an account."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from flap_export.allocation.ladders import layer_plan
from flap_export.allocation.rates import rates_of_steps
from flap_export.evidence.methods import PruneOptions
from flap_export.evidence.record import CalibrationText
from flap_export.prediction import expected_ms
from flap_export.progress import Progress
from flap_export.searching.fitness import Losses
from flap_export.searching.journal import JOURNAL_NAME, Journal
from flap_export.searching.judging import Judge
from flap_export.searching.language.language_model import LanguageModel
from flap_export.searching.language.opening import open_proposer
from flap_export.searching.language.proposers import Proposer, Recorded
from flap_export.searching.operators import Conventional, Scored
from flap_export.searching.preparing import Prepared, stage_sequences
from flap_export.searching.record import Found, SearchOptions, SearchRequest, SearchRun
from flap_export.searching.selection import pareto_front
from flap_export.searching.space import Candidate
from flap_export.searching.strategies import STRATEGIES, StrategyName, Task, seeded
from flap_export.shapes import DecoderShape


@final
@dataclass(frozen=True)
class Setting:
    """What all runs of one search share."""

    ready: Prepared
    losses: Losses
    options: SearchOptions
    prune: PruneOptions
    calibration: CalibrationText
    folder: Path
    progress: Progress
    replay: bool = False
    """Whether answers come from journals only."""

    def references(self) -> dict[str, float]:
        """Fitness of the rates that are known without a search."""
        with self._journal("references", {}) as journal:
            judge = self._judge(journal)
            candidates = self.ready.references
            judge.judged(list(candidates.values()), judge.last_stage)
            return {name: judge.scored(candidate).fitness for name, candidate in candidates.items()}

    def run(self, strategy: StrategyName, proposer: str | None, seed: int) -> tuple[SearchRun, Candidate]:
        """One strategy from one seed."""
        options, space = self.options, self.ready.problem.space
        name = f"{strategy}-{seed}" if proposer is None else f"{proposer.partition(':')[0]}-{seed}"
        # A server may move: what answers depend on is its model.
        model = options.proposer_model if proposer and options.proposer_model else proposer
        with self._journal(name, {"strategy": strategy, "proposer": model, "seed": seed}) as journal:
            judge = self._judge(journal)
            chance = Conventional(space, seeded(seed, strategy))
            operators = chance if proposer is None else self._asking(proposer, journal, chance, seed)
            task = Task(
                judge,
                operators,
                chance,
                self.ready.start if options.informed else (space.uniform(),),
                options.population,
                options.mutations,
                options.crossovers,
                self.progress,
            )
            STRATEGIES[strategy](task)
            finished, seconds = judge.finished(), journal.seconds
        usage = operators.usage if isinstance(operators, LanguageModel) else None
        best = finished[0]
        found = SearchRun(
            name=name,
            strategy=strategy,
            proposer=proposer,
            seed=seed,
            best=self._found(best),
            front=tuple(map(self._found, pareto_front(finished))) if options.latency else (),
            evaluations=round(judge.spent, 6),
            looks=judge.looks,
            seconds=round(seconds, 1),
            curve=tuple(judge.curve),
            usage=usage,
            cost=usage.cost(*options.prices) if usage and options.prices else None,
        )
        return found, best.candidate

    def _asking(self, proposer: str, journal: Journal, chance: Conventional, seed: int) -> LanguageModel:
        options = self.options
        asked: Proposer = Recorded()
        if not self.replay:
            asked = open_proposer(
                proposer,
                options.proposer_model,
                pruned_model=self.ready.problem.model,
                device=self.ready.problem.device,
                timeout_s=options.proposer_timeout_s,
                max_retries=options.proposer_retries,
            )
        return LanguageModel(self.ready.problem.space, asked, journal, chance, seeded(seed, "answers"))

    def _journal(self, name: str, own: dict[str, Any]) -> Journal:
        request = SearchRequest(
            model=self.ready.dense.name, calibration=self.calibration, prune=self.prune, options=self.options
        )
        # Not asked for, but what losses depend on: weights and text, and the precision that goes with the device.
        found = {"digests": dict(self.ready.evidence.digests), "dtype": str(self.ready.problem.dtype)}
        settings = {**own, **request.settings(), **found}
        return Journal(self.folder / name / JOURNAL_NAME, settings)

    def _judge(self, journal: Journal) -> Judge:
        problem = self.ready.problem
        sequences, length = problem.tokens.shape
        return Judge(
            self.losses,
            journal,
            problem.fitness,
            length,
            stage_sequences(self.options.stages, sequences, problem.chunk_sequences),
            self.options.evaluations,
            self._latency() if self.options.latency else None,
        )

    def _latency(self) -> Callable[[Candidate], float]:
        """Expected decode latency of a candidate, in ms; see `flap_export.prediction`."""
        options, known = self.options, {}
        assert options.latency is not None
        gpu = options.latency

        def expected(candidate: Candidate) -> float:
            if candidate not in known:
                shape = self._shape(candidate)
                size, length = options.latency_batch, options.latency_context
                known[candidate] = expected_ms(shape, "decode", size, length, gpu=gpu, dtype="float16")
            return known[candidate]

        return expected

    def _shape(self, candidate: Candidate) -> DecoderShape:
        dense, space = self.ready.dense.shape, self.ready.problem.space
        compensated = self.prune.compensation != "none"
        layers = (
            layer_plan(index, dense, costs.ladders, *taken).shape(dense.layers[index], compensated=compensated)
            for index, (costs, taken) in enumerate(zip(space.layers, space.steps(candidate), strict=True))
        )
        return dense.model_copy(update={"layers": tuple(layers)})

    def _found(self, scored: Scored) -> Found:
        space = self.ready.problem.space
        rates = rates_of_steps([layer.ladders for layer in space.layers], space.steps(scored.candidate))
        return Found(
            rates=tuple(rate.rate or 0.0 for rate in rates),
            attention=tuple(rate.attention or 0.0 for rate in rates),
            ffn=tuple(rate.ffn or 0.0 for rate in rates),
            fitness=scored.fitness,
            latency_ms=scored.latency_ms,
        )

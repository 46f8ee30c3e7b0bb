"""Optimization profiles: one for decode steps and one for prefills, as data and as Polygraphy wants them."""

from __future__ import annotations

from typing import Any

from flap_export.artifact import INPUT_IDS, WRITE_INDICES, Artifact
from flap_export.building.record import Profile, Range
from flap_export.errors import InputError

USUAL_PROMPT = 128
Shapes = dict[str, tuple[tuple[int, ...], ...]]


def profiles_of(
    max_length: int, *, batch_size: int = 1, max_batch: int = 4, prompt: int | None = None, max_prompt: int | None
) -> tuple[Profile, Profile]:
    """Decode (one new token) and prefill (one to `max_prompt`), both for batches of 1 to `max_batch`.

    Args:
        max_length: rows of the cache.
        batch_size: the usual batch, which the engine is tuned for.
        max_batch: the largest batch.
        prompt: the usual number of prompt tokens; None is 128, or `max_prompt` where that is less.
        max_prompt: the most tokens of one prefill; None is the cache's length. Longer prompts are fed in pieces.

    Raises:
        InputError: a number is out of its range.
    """
    longest = max_length if max_prompt is None else max_prompt
    usual = min(USUAL_PROMPT, longest) if prompt is None else prompt
    rules = (
        (1 <= batch_size <= max_batch, f"the usual batch must lie in 1..{max_batch} (--max-batch), got {batch_size}"),
        (1 <= longest <= max_length, f"max_prompt must lie in 1..{max_length}, got {longest}"),
        (1 <= usual <= longest, f"the usual prompt must lie in 1..{longest} tokens (--max-prompt), got {usual}"),
    )
    for holds, message in rules:
        if not holds:
            raise InputError(message)
    batches: Range = (1, batch_size, max_batch)
    return (
        Profile(phase="decode", batch_sizes=batches, new_tokens=(1, 1, 1)),
        Profile(phase="prefill", batch_sizes=batches, new_tokens=(1, usual, longest)),
    )


def input_shapes(profile: Profile, artifact: Artifact) -> Shapes:
    """Least, usual and largest shape of every input, by name."""
    calls = list(zip(profile.batch_sizes, profile.new_tokens, strict=True))
    shapes: Shapes = {INPUT_IDS: tuple(calls), WRITE_INDICES: tuple((batch,) for batch, _ in calls)}
    by_call = zip(*(artifact.caches(batch) for batch, _ in calls), strict=True)
    return shapes | {three[0].past: tuple(cache.shape for cache in three) for three in by_call}


def provider_options(profile: Profile, artifact: Artifact, prefix: str) -> dict[str, str]:
    """The profile as ONNX Runtime's TensorRT providers take it; `prefix` is `trt` or `nv`."""
    shapes = input_shapes(profile, artifact)

    def listed(place: int) -> str:
        return ",".join(f"{name}:{'x'.join(map(str, three[place]))}" for name, three in shapes.items())

    return {f"{prefix}_profile_{bound}_shapes": listed(place) for place, bound in enumerate(("min", "opt", "max"))}


def polygraphy_profile(profile: Profile, artifact: Artifact, polygraphy: Any) -> Any:
    """The profile as Polygraphy takes it."""
    made = polygraphy.Profile()
    for name, (least, usual, largest) in input_shapes(profile, artifact).items():
        made.add(name, min=least, opt=usual, max=largest)
    return made

"""Which policy versions produced a group: generations are recorded, then matched to sequences.

One rollout is one asyncio task. `record_generations` around it collects every generation that it
and the tasks it starts request, whatever call of Atropos' server interface they use.
"""

import contextlib
import contextvars
import uuid
from array import array
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass
from typing import Any

from atropos_hpc.contracts.messages import Generation


@dataclass(frozen=True)
class Sampled:
    """The output tokens of a generation, and what sampled them."""

    tokens: tuple[int, ...]
    versions: tuple[int, int]  # oldest and newest policy version
    temperature: float = 1.0


_recording: contextvars.ContextVar[list[Sampled] | None] = contextvars.ContextVar(
    "recording", default=None
)


@contextlib.contextmanager
def record_generations() -> Iterator[list[Sampled]]:
    """Collect the generations of this block, and of the tasks that inherit its context."""
    seen: list[Sampled] = []
    token = _recording.set(seen)
    try:
        yield seen
    finally:
        _recording.reset(token)


def recorded() -> list[Sampled]:
    """Return what the surrounding block has collected so far."""
    return _recording.get() or []


def record(generations: list[Generation], temperature: float) -> None:
    """Add generations to the surrounding block, if there is one."""
    seen = _recording.get()
    if seen is None:
        return
    for generation in generations:
        if (versions := generation.versions) is not None:
            seen.append(Sampled(tuple(generation.token_ids), versions, temperature))


def stamp(
    group: MutableMapping[str, Any], seen: list[Sampled], environment: str | None = None
) -> None:
    """Set group_id, environment, policy_versions and temperature in a group's generation_params.

    A sequence gets the version range [oldest, newest] of the generations whose tokens it contains.
    One that contains none, because the environment tokenized the text again and got other ids, gets
    the range of the whole group, whose oldest version is never newer than the true one. None if
    nothing was generated. The temperature is set if all generations have the same one and the
    environment did not set it: the log-probs are those of the policy at that temperature.
    """
    params = dict(group.get("generation_params") or {})
    params["group_id"] = uuid.uuid4().hex
    params["policy_versions"] = None
    if environment is not None:
        params["environment"] = environment
    if seen:
        outputs = [(array("i", each.tokens).tobytes(), each.versions) for each in seen]
        whole_group = _span([each.versions for each in seen])
        ranges = []
        for tokens in group["tokens"]:
            sequence = array("i", [int(t) for t in tokens]).tobytes()
            found = [range_ for output, range_ in outputs if output and _contains(sequence, output)]
            ranges.append(_span(found) if found else whole_group)
        params["policy_versions"] = ranges
        if len(temperatures := {each.temperature for each in seen}) == 1:
            params.setdefault("temperature", *temperatures)
    group["generation_params"] = params


def _span(ranges: list[tuple[int, int]]) -> list[int]:
    return [min(oldest for oldest, _ in ranges), max(newest for _, newest in ranges)]


def _contains(sequence: bytes, part: bytes, width: int = array("i").itemsize) -> bool:
    """Return whether `part` is in `sequence` at a multiple of `width`."""
    at = sequence.find(part)
    while at % width and at != -1:
        at = sequence.find(part, at + 1)
    return at != -1

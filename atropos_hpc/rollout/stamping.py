"""Which policy versions produced a group: generations are recorded, then matched to sequences.

One rollout is one asyncio task. `record_generations` around it collects every generation that it
and the tasks it starts request, whatever call of Atropos' server interface they use.
"""

import contextlib
import contextvars
import uuid
from array import array
from collections.abc import Iterable, Iterator, MutableMapping
from dataclasses import dataclass
from typing import Any

import msgspec

from atropos_hpc.contracts.prompts import Draw
from atropos_hpc.contracts.support import Support


@dataclass(frozen=True)
class Sampled:
    """The output tokens of a generation, and what sampled them."""

    tokens: tuple[int, ...]
    versions: tuple[int, int]  # oldest and newest policy version
    temperature: float = 1.0
    prompt: tuple[int, ...] = ()
    support: Support | None = None  # None: sampled from the whole vocabulary, or not known
    bias: str | None = None  # the options that the learner cannot replay
    finish_reason: str | None = None

    @property
    def restricted(self) -> bool:
        """Return whether the tokens were sampled from something else than the vocabulary."""
        return self.support is not None or self.bias is not None


_recording: contextvars.ContextVar[list[Sampled] | None] = contextvars.ContextVar(
    "recording", default=None
)


_for_training: contextvars.ContextVar[bool] = contextvars.ContextVar("training", default=False)


@contextlib.contextmanager
def record_generations(for_training: bool = True) -> Iterator[list[Sampled]]:
    """Collect the generations of this block, and of the tasks that inherit its context."""
    seen: list[Sampled] = []
    token, training = _recording.set(seen), _for_training.set(for_training)
    try:
        yield seen
    finally:
        _recording.reset(token)
        _for_training.reset(training)


def recorded() -> list[Sampled]:
    """Return what the surrounding block has collected so far."""
    return _recording.get() or []


def is_training() -> bool:
    """Return whether generations are to be trained on: in a rollout, not in an evaluation."""
    return _for_training.get()


def record(sampled: Iterable[Sampled]) -> None:
    """Add generations to the surrounding block, if there is one."""
    if (seen := _recording.get()) is not None:
        seen.extend(sampled)


def stamp(
    group: MutableMapping[str, Any],
    seen: list[Sampled],
    environment: str | None = None,
    draw: Draw | None = None,
) -> None:
    """Set group_id, environment, draw, policy_versions, finish_reasons and temperature in its
    generation_params.

    A sequence gets the version range [oldest, newest] of the generations whose tokens it contains.
    One that contains none, because the environment tokenized the text again and got other ids, gets
    the range of the whole group, whose oldest version is never newer than the true one. None if
    nothing was generated. The temperature of these generations is set likewise, unless the
    environment did: the log-probs are those of the policy at that temperature.
    """
    params = dict(group.get("generation_params") or {})
    params["group_id"] = uuid.uuid4().hex
    params["policy_versions"] = None
    if environment is not None:
        params["environment"] = environment
    if draw is not None:
        params["draw"] = msgspec.to_builtins(draw)
    if seen:
        outputs = [(array("i", each.tokens).tobytes(), each) for each in seen]
        sources, reasons = [], list[str | None]()
        for tokens in group["tokens"]:
            sequence = array("i", [int(t) for t in tokens]).tobytes()
            matches = [pair for pair in outputs if pair[0] and _contains(sequence, pair[0])]
            sources.append([each for _, each in matches] or seen)
            last = (each for output, each in matches if sequence.endswith(output))
            reasons.append(next((each.finish_reason for each in last), None))
        if any(reasons):
            params["finish_reasons"] = reasons
        params["policy_versions"] = [_span([each.versions for each in s]) for s in sources]
        temperatures = [{each.temperature for each in source} for source in sources]
        if len(every := set[float]().union(*temperatures)) == 1:
            params.setdefault("temperature", *every)
        elif "temperature" not in params:
            given = group.get("overrides") or [{} for _ in temperatures]
            group["overrides"] = [
                {"temperature": next(iter(own)), **override} if len(own) == 1 else override
                for own, override in zip(temperatures, given, strict=True)
            ]
    group["generation_params"] = params


def _span(ranges: list[tuple[int, int]]) -> list[int]:
    return [min(oldest for oldest, _ in ranges), max(newest for _, newest in ranges)]


def _contains(sequence: bytes, part: bytes) -> bool:
    return next(find_tokens(sequence, part), None) is not None


def find_tokens(sequence: bytes, part: bytes) -> Iterator[int]:
    """Yield the indices at which `part` begins in `sequence`, both arrays of integers as bytes."""
    width = array("i").itemsize
    at = sequence.find(part)
    while at != -1:
        if at % width == 0:
            yield at // width
        at = sequence.find(part, at + 1)

"""Answers under way when a run stops, so that the resumed run continues in the middle of them.

A stopping worker writes, for each rollout that has sent nothing yet, the answers to all of its
requests, whole or not, as partial/<digest of the request>-<attempt>-<id>. When the rollout's prompt
is drawn again, the same request finds its answer: complete samples are there at once, the others
continue from their tokens. A rollout of several turns replays up to where it was, if its
environment is deterministic. Complete answers are saved too, because redrawing only them would
favour long ones.

A file is deleted before its answer is used, so it is used once. Answers are used only if the
policy that sampled them is not newer than the one served now, nor too stale to be trained on.
"""

import asyncio
import contextlib
import contextvars
import logging
import os
import secrets
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Iterator
from typing import TypeVar

import msgspec
import xxhash

from atropos_hpc.contracts.messages import (
    GenerateRequest,
    Generation,
    Logprobs,
    TokenLogprob,
    VersionSpan,
)
from atropos_hpc.contracts.saved_answers import SavedAnswer, SavedSample
from atropos_hpc.rollout.partial_answer import Sample
from atropos_hpc.runtime.run_dir import RunDir, write_file

log = logging.getLogger(__name__)

MAX_BYTES = 256 << 20  # that one worker writes when it stops
SUFFIX = ".msgpack"

T = TypeVar("T")
Under = list[tuple[GenerateRequest, list[Sample]]]  # the requests of a rollout
_rollout: contextvars.ContextVar[Under | None] = contextvars.ContextVar("rollout", default=None)
_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(SavedAnswer).decode


def forget_rollout() -> None:
    """Forget the surrounding rollout's requests: its group is on its way."""
    under = _rollout.get()
    if under is not None:
        under.clear()


class SavedAnswers:
    """Writes and finds the answers of one run. `staleness` is in policy versions."""

    def __init__(self, run: RunDir, staleness: int) -> None:
        self.directory, self.attempt, self.staleness = run.partial, run.attempt(), staleness
        self._rollouts: list[Under] = []
        self._stopping = False
        self._found: defaultdict[str, list[str]] | None = None  # digest -> names of files

    # --- the worker that stops

    @contextlib.contextmanager
    def rollout(self) -> Iterator[None]:
        """Note the requests of this block, which is one rollout."""
        under: Under = []
        token = _rollout.set(under)
        self._rollouts.append(under)
        try:
            yield
        finally:
            _rollout.reset(token)
            if not self._stopping:
                self._rollouts = [each for each in self._rollouts if each is not under]

    def note(self, request: GenerateRequest, samples: list[Sample]) -> None:
        """Add a request to the surrounding rollout."""
        under = _rollout.get()
        if under is not None:
            under.append((request, samples))

    async def follow(self, rollout: Awaitable[T]) -> T:
        """Run a rollout, noting its requests."""
        with self.rollout():
            return await rollout

    @contextlib.asynccontextmanager
    async def stopping(self) -> AsyncIterator[None]:
        """Save the rollouts that this block cancels.

        A full disk must not keep a worker from leaving.
        """
        self._stopping = True
        yield
        try:
            tokens = await asyncio.to_thread(self.write)
            log.info("saved %d tokens of answers under way", tokens)
        except OSError as error:
            log.warning("answers under way are not saved: %s", error)

    def write(self) -> int:
        """Write the rollouts that were under way, and return how many tokens that was."""
        size = tokens = 0
        requests = [each for under in self._rollouts for each in under]
        for request, samples in requests:
            data = _encode(SavedAnswer([_saved(sample) for sample in samples]))
            size += len(data)
            if size > MAX_BYTES:
                log.warning("answers under way beyond %d MB are not saved", MAX_BYTES >> 20)
                break
            self.directory.mkdir(exist_ok=True)
            name = f"{_digest(request)}-{self.attempt}-{secrets.token_hex(4)}{SUFFIX}"
            write_file(self.directory / name, data, durable=False)
            tokens += sum(len(sample.generation.token_ids) for sample in samples)
        return tokens

    # --- the worker that resumes

    def restore(self, request: GenerateRequest, samples: list[Sample], served: int | None) -> None:
        if self._found is None:
            self._found = self._list()
        if not self._found or served is None:
            return
        names = self._found.pop(digest := _digest(request), [])
        while names:
            answer = self._claim(names.pop())
            if names:
                self._found[digest] = names
            if answer is not None and self._usable(answer, len(samples), served):
                for sample, saved in zip(samples, answer.samples, strict=True):
                    sample.resume(_generation(saved))
                return

    def _list(self) -> defaultdict[str, list[str]]:
        """List the files of the attempt before; delete those of older ones."""
        found: defaultdict[str, list[str]] = defaultdict(list)
        names = os.listdir(self.directory) if self.directory.is_dir() else []
        for name in names:
            if not name.endswith(SUFFIX) or name.startswith("."):
                continue
            digest, attempt, _ = name.split("-")
            if int(attempt) >= self.attempt - 1:
                found[digest].append(name)
            else:
                (self.directory / name).unlink(missing_ok=True)
        return found

    def _claim(self, name: str) -> SavedAnswer | None:
        """Read a file and delete it; None if another worker was faster, or it is damaged."""
        path = self.directory / name
        try:
            data = path.read_bytes()
            path.unlink()
            return _decode(data)
        except (OSError, msgspec.DecodeError) as error:
            if not isinstance(error, FileNotFoundError):
                log.warning("a saved answer cannot be used: %s: %s", path, error)
            return None

    def _usable(self, answer: SavedAnswer, samples: int, served: int) -> bool:
        versions = [
            VersionSpan(label).policy_version
            for sample in answer.samples
            for label, _, _ in sample.versions
        ]
        in_range = all(served - self.staleness <= version <= served for version in versions)
        return len(answer.samples) == samples and in_range


def _digest(request: GenerateRequest) -> str:
    return xxhash.xxh3_128_hexdigest(_encode(request))


def _saved(sample: Sample) -> SavedSample:
    whole = sample.result() if sample.finished else sample.generation
    found = whole.logprobs.content if whole.logprobs else []
    top = any(len(each.top_logprobs) > 1 for each in found)
    if top or not (sample.finished or sample.continues):  # they would not be whole
        return SavedSample([], [], [], None, None, None, None)
    return SavedSample(
        whole.token_ids,
        whole.sampled_log_probs,
        [(span.version, span.start, span.end) for span in whole.weight_versions or ()],
        whole.sampling_mask,
        whole.text,
        whole.finish_reason if sample.finished else None,
        whole.stop_reason,
    )


def _generation(saved: SavedSample) -> Generation:
    return Generation(
        saved.token_ids,
        finish_reason=saved.finish_reason,
        stop_reason=saved.stop_reason,
        text=saved.text,
        logprobs=Logprobs([TokenLogprob(each) for each in saved.log_probs]),
        weight_versions=[VersionSpan(*span) for span in saved.versions],
        sampling_mask=saved.sampling_mask,
    )

"""All trained sequences of a run, in rollouts/<first step>-<rank>.jsonl.zst.

Each learner rank that has groups of its own writes them, in a thread, after the step that trained
them. A file is a sequence of zstd frames, one per step, each appended in a single write: after a
crash every frame but the last is whole, and `zstdcat` reads the file. A file that is large enough
is followed by a new one; the oldest are removed when all together exceed the limit.
"""

import errno
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import zstandard
from numpy.typing import NDArray

from atropos_hpc.contracts.group import Group
from atropos_hpc.contracts.metrics import ONLY_ENVIRONMENT, Rollout

log = logging.getLogger(__name__)

FILE_BYTES = 16 << 20  # a file is full from here on
CHUNK_BYTES = 1 << 16
LEVEL = 3  # of compression
PENDING = 2  # steps that wait to be written before the learner waits for them
NAME = re.compile(r"(\d+)-(\d+)\.jsonl\.zst")  # first step, rank

Texts = Callable[[Sequence[list[int]]], Sequence[str] | None]


@dataclass(frozen=True)
class Advantages:
    """The advantages of a batch: the rows of its included sequences, one after the other."""

    values: NDArray[np.float32]  # [R], of response tokens
    trained: NDArray[np.bool_]  # [R]
    lengths: NDArray[np.int64]  # [S], sums to R
    included: NDArray[np.bool_]  # [all sequences of the groups]


def rollouts_of(groups: Sequence[Group], step: int, advantages: Advantages) -> list[Rollout]:
    """Return the sequences of a batch's groups, without their text."""
    ends = np.cumsum(advantages.lengths)
    rows = iter(
        advantages.values[end - length : end][advantages.trained[end - length : end]]
        for end, length in zip(ends, advantages.lengths, strict=True)
    )
    included, found = iter(advantages.included), []
    for group in groups:
        params, begin = group.generation_params or {}, 0
        versions = group.policy_versions
        reasons = group.finish_reasons
        for index, length in enumerate(group.lengths.tolist()):
            sequence = slice(begin, begin + length)
            begin += length
            row = next(rows) if next(included) else None
            same = row is None or not row.size or bool((row == row[0]).all())
            score = float(group.scores[index])
            found.append(
                Rollout(
                    step=step,
                    environment=params.get("environment") or ONLY_ENVIRONMENT,
                    group=group.gid,
                    index=index,
                    score=score if np.isfinite(score) else None,
                    tokens=group.tokens[sequence].tolist(),
                    trained=_spans(group.trained[sequence]),
                    policy_versions=versions[index],
                    advantage=None if row is None or not row.size else float(row.mean()),
                    advantages=None if same or row is None else row.tolist(),
                    finish_reason=reasons[index],
                )
            )
    return found


def _spans(flags: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Return [start, end) of each run of True.

    >>> _spans(np.array([False, True, True, False, True]))
    [(1, 3), (4, 5)]
    """
    edges = np.flatnonzero(np.diff(flags.astype(np.int8), prepend=0, append=0)).tolist()
    return list(zip(edges[::2], edges[1::2], strict=True))


def with_text(rollouts: Sequence[Rollout], texts: Texts) -> list[Rollout]:
    """Return the rollouts with prompt and completion as text, where `texts` can decode them."""
    starts = [each.trained[0][0] if each.trained else len(each.tokens) for each in rollouts]
    parts = [each.tokens[:at] for each, at in zip(rollouts, starts, strict=True)]
    parts += [each.tokens[at:] for each, at in zip(rollouts, starts, strict=True)]
    decoded = texts(parts)
    if decoded is None:
        return list(rollouts)
    count = len(rollouts)
    return [
        msgspec.structs.replace(each, prompt=decoded[i], completion=decoded[count + i])
        for i, each in enumerate(rollouts)
    ]


# --- files


def files(directory: Path) -> list[tuple[int, int, Path]]:
    """Return (first step, rank, path) of every file, the oldest first."""
    if not directory.is_dir():
        return []
    found = [(NAME.fullmatch(path.name), path) for path in directory.iterdir()]
    return sorted((int(name[1]), int(name[2]), path) for name, path in found if name)


def read_file(path: Path) -> Iterator[Rollout]:
    """Yield the rollouts of a file up to its last whole frame."""
    decoder = msgspec.json.Decoder(Rollout)
    for _, content in _frames(path):
        for line in content.splitlines():
            yield decoder.decode(line)


def _frames(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield (offset of its end, content) of each whole frame."""
    with path.open("rb") as file:
        end, chunk = 0, b""
        while True:
            frame, parts = zstandard.ZstdDecompressor().decompressobj(), []
            while not frame.eof:
                chunk = chunk or file.read(CHUNK_BYTES)
                if not chunk:
                    return
                try:
                    parts.append(frame.decompress(chunk))
                except zstandard.ZstdError:  # a damaged end
                    return
                end += len(chunk) - len(frame.unused_data)
                chunk = frame.unused_data
            yield end, b"".join(parts)


def forget_after(path: Path, first: int, step: int) -> None:
    """Remove later steps from a file, which will be trained again, and what a crash cut off."""
    if first > step:
        return path.unlink()
    keep = 0
    for end, content in _frames(path):
        if msgspec.json.decode(content.partition(b"\n")[0], type=Rollout).step > step:
            break
        keep = end
    if keep < path.stat().st_size:
        with path.open("r+b") as file:
            file.truncate(keep)


@dataclass(frozen=True)
class Part:
    """A learner rank's part of the groups: number `rank` of `world`."""

    rank: int = 0
    world: int = 1


class RolloutWriter:
    """Writes the rollouts of one part, and keeps their files below its part of `max_bytes`.

    What exists of steps after `resume_at` is removed with the first step that is written.
    """

    def __init__(
        self, directory: Path, part: Part, max_bytes: int, resume_at: int, texts: Texts
    ) -> None:
        directory.mkdir(exist_ok=True)
        self._directory, self._part = directory, part
        self._max_bytes, self._texts = max_bytes // part.world, texts
        self._resume_at = resume_at
        self._sizes: dict[Path, int] | None = None  # of own files, the oldest first; None: unread
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="rollouts")
        self._pending: list[Future[None]] = []
        self._failed = False  # whether the last write did

    def submit(self, step: int, groups: Sequence[Group], advantages: Advantages) -> None:
        """Write the groups of a step in the background."""
        while len(self._pending) >= PENDING:
            self._pending.pop(0).result()
        self._pending.append(self._thread.submit(self._write, step, groups, advantages))

    def close(self) -> None:
        """Wait until everything is written."""
        self._thread.shutdown()

    def _write(self, step: int, groups: Sequence[Group], advantages: Advantages) -> None:
        try:
            rollouts = with_text(rollouts_of(groups, step, advantages), self._texts)
            if rollouts:
                lines = b"".join(msgspec.json.encode(each) + b"\n" for each in rollouts)
                self._append(step, zstandard.ZstdCompressor(LEVEL).compress(lines))
        except OSError as error:  # a full disk must not end the training
            if not self._failed:
                log.error(
                    "rollouts from step %d on are not kept until this is mended: %s", step, error
                )
            self._failed = True
        else:
            self._failed = False

    def _append(self, step: int, frame: bytes) -> None:
        if self._sizes is None:
            self._sizes = self._resume(self._resume_at)
        path = next(reversed(self._sizes), None)
        if path is None or self._sizes[path] >= min(FILE_BYTES, self._max_bytes // 4):
            path = self._directory / f"{step:08d}-{self._part.rank}.jsonl.zst"
            self._sizes[path] = 0
        with path.open("ab", buffering=0) as file:
            file.truncate(self._sizes[path])  # removes what a failed write has left
            if file.write(frame) < len(frame):
                raise OSError(errno.ENOSPC, "a part of the frame was not written", str(path))
        self._sizes[path] += len(frame)
        while sum(self._sizes.values()) > self._max_bytes and len(self._sizes) > 1:
            oldest = next(iter(self._sizes))
            oldest.unlink(missing_ok=True)
            del self._sizes[oldest]

    def _resume(self, step: int) -> dict[Path, int]:
        """Forget later steps of this part and, in part 0, of parts that are no more. Return the
        size of each file of this part, the oldest first."""
        rank, world = self._part.rank, self._part.world
        for first, owner, path in files(self._directory):
            if owner == rank or (rank == 0 and owner >= world):
                forget_after(path, first, step)
        own = [path for _, owner, path in files(self._directory) if owner == rank]
        return {path: path.stat().st_size for path in own}

"""Crash and damage the policy store at many random points: no reader may serve wrong weights.

The model is made up and small; store, codec, files and reader are the real ones. A reader is
judged as an engine would be: the output of a forward pass over the files that it was given is
compared with the output of the version's weights.

    killed publisher      SIGKILL at a random system call of a publish, or in the middle of a write
    damaged file          one bit flipped in, or the end cut off, a random file of the store
    vanished version      latest.json names a version that is not there
    killed reader         SIGKILL at a random system call of a reader that loads a version
    two publishers        two starts of the learner with different weights publish in a random order

After each, the learner restarts or publishes on, and the present reader and a fresh one have to
reach its newest version.
"""

import os
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atropos_hpc.contracts.policy import DeltaEntry, FileEntry, Manifest, PolicyVersion
from atropos_hpc.policy import delta, node_cache, shard_buffer
from atropos_hpc.policy.follower import Follower, LoadableVersion
from atropos_hpc.policy.shard_buffer import ShardBuffer, TensorSpec, tensors_of, write_shard, xxh3
from atropos_hpc.policy.store import PolicyStore, Superseded
from atropos_hpc.runtime import run_dir
from atropos_hpc.runtime.run_dir import RunDir, write_file

MEMORY = (
    "/dev/shm"  # it is the order of the calls that counts here; a disk would only make them slow
)
WIDTH = 48
SHARES = (
    (
        TensorSpec("embed", "BF16", (WIDTH, WIDTH)),
        TensorSpec("empty", "BF16", (0, 4)),
        TensorSpec("scale", "F32", (WIDTH,)),
    ),
    (
        TensorSpec("up", "BF16", (WIDTH, 2 * WIDTH)),
        TensorSpec("steps", "I64", (3,)),
        TensorSpec("down", "BF16", (2 * WIDTH, WIDTH)),
    ),
)
CALLS = (
    "open",
    "write",
    "pwritev",
    "fsync",
    "ftruncate",
    "rename",
    "close",
    "mkdir",
    "unlink",
    "rmdir",
    "preadv",
    "posix_fallocate",
)


@lru_cache(maxsize=64)
def weights(attempt: int, version: int) -> tuple[ShardBuffer, ...]:
    """The model of a start of the learner at a version: a few per cent change per version."""
    shares = tuple(ShardBuffer(tensors) for tensors in SHARES)
    for number, made in enumerate(shares):
        data = made.bytes[len(made.header) :]
        if version == 0:
            rng = np.random.default_rng((attempt, number))
            for tensor in made.tensors:
                values = (rng.standard_normal(tensor.bytes // 4) / 7).astype(np.float32)
                bits = (
                    values.view(np.uint32) >> 16
                    if tensor.dtype == "BF16"
                    else values.view(np.uint32)
                )
                made.parts[tensor.name][
                    : bits.nbytes // 2 if tensor.dtype == "BF16" else bits.nbytes
                ] = bits.astype(np.uint16 if tensor.dtype == "BF16" else np.uint32).view(np.uint8)
        else:
            data[:] = weights(attempt, version - 1)[number].bytes[len(made.header) :]
            rng = np.random.default_rng((attempt, number, version))
            numbers = data.view(np.uint16)
            numbers[rng.random(len(numbers)) < 0.03] += np.uint16(1)
    return shares


def forward(parts: dict[str, NDArray[np.uint8]]) -> bytes:
    """The made-up model's answer to a fixed question, bit by bit."""

    def matrix(name: str, *shape: int) -> NDArray[np.float32]:
        return (parts[name].view(np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(shape)

    with np.errstate(all="ignore"):
        x = matrix("embed", WIDTH, WIDTH)[::3] * parts["scale"].view(np.float32)
        answer = np.tanh(x @ matrix("up", WIDTH, 2 * WIDTH)) @ matrix("down", 2 * WIDTH, WIDTH)
    return answer.astype(np.float32).tobytes() + parts["steps"].tobytes()


def reference(key: PolicyVersion) -> bytes:
    """What a reader of that version has to answer."""
    made = weights(key.attempt, key.version)
    return forward({name: part for shard in made for name, part in shard.parts.items()})


def served(version: LoadableVersion) -> bytes:
    """What an engine answers that loads the files of that directory."""
    parts = {}
    for path in sorted(version.directory.glob("*.safetensors")):
        data = np.fromfile(path, np.uint8)
        parts |= {name: data[first:last] for name, (_, _, first, last) in tensors_of(data).items()}
    return forward(parts)


class Learner:
    """One start of a learner that publishes as `learner.publisher` does, in one process."""

    def __init__(self, root: Path, anchor_every: int = 4) -> None:
        self.store, self.anchor_every = PolicyStore(root), anchor_every
        self.attempt = self.store.claim_attempt()
        self.version = -1  # the newest that is public
        self._since_full = 0

    @property
    def newest(self) -> PolicyVersion:
        return PolicyVersion(version=self.version, attempt=self.attempt)

    def publish(self, version: int, in_full: bool = False) -> None:
        """Raises Superseded when another start has taken over."""
        base = self.version if self.version >= 0 and version != self.version else None
        in_full = in_full or base is None or self._since_full + 1 >= self.anchor_every
        key = PolicyVersion(version=version, attempt=self.attempt)
        directory = self.store.begin(key)
        files, changes = [], []
        for number, made in enumerate(weights(self.attempt, version)):
            file = f"model-{number}.safetensors"
            if in_full:
                files.append(write_shard(directory / file, made))
            else:
                files.append(FileEntry(file, made.size, xxh3(made.bytes)))
            if base is not None:
                coded = delta.encode(
                    weights(self.attempt, base)[number].bytes, made.bytes, made.regions
                )
                write_file(directory / f"model-{number}.delta", coded)
                digest = xxh3(np.frombuffer(coded, np.uint8))
                changes.append(DeltaEntry(f"model-{number}.delta", len(coded), digest, file))
        self.store.commit(
            Manifest(
                version=key,
                kind="full" if in_full else "delta",
                files=tuple(files),
                base=None if base is None else PolicyVersion(version=base, attempt=self.attempt),
                deltas=tuple(changes),
            )
        )
        self.version, self._since_full = version, 0 if in_full else self._since_full + 1
        self.store.retire(2, self.attempt)

    def meet(self, complaints: list[PolicyVersion]) -> None:
        """Publish the newest version again, if a reader has asked for that."""
        if complaints:
            complaints.clear()
            self.publish(self.version, in_full=True)


class Reader:
    """A node's follower and its engine; `wrong` counts answers of any other weights."""

    def __init__(self, root: Path, cache: Path) -> None:
        self.complaints: list[PolicyVersion] = []
        self.follower = Follower(
            PolicyStore(root), cache, "reader", lambda version, _: self.complaints.append(version)
        )
        self.wrong = 0

    def look(self) -> PolicyVersion | None:
        """Take what is new, and answer with it."""
        self.follower._retry_at = 0.0
        newest = self.follower.poll()
        if newest is None:
            return None
        self.wrong += served(newest) != reference(newest.version)
        return newest.version


class Point:
    """One store with some versions in it, and a reader that has followed some of them."""

    def __init__(self, scratch: Path, seed: int) -> None:
        self.rng = random.Random(seed)
        run = RunDir(scratch / "run")
        run.create()
        self.root, self.cache = run.policy, scratch / "memory"
        self.cache.mkdir()
        self.learner = Learner(self.root)
        self.reader = Reader(self.root, self.cache)
        for version in range(self.rng.randrange(1, 8)):
            self.learner.publish(version, in_full=self.rng.random() < 0.2)
            if self.rng.random() < 0.6:
                self.reader.look()
        self.wrong = 0

    def goes_on(self) -> bool:
        """Publish on; return whether both the reader and a fresh one reach the newest version."""
        self.learner.publish(self.learner.version + 1)
        wanted = self.learner.newest
        fresh = Reader(self.root, self.cache)
        arrived = all(self._arrives(reader, wanted) for reader in (self.reader, fresh))
        self.wrong += self.reader.wrong + fresh.wrong
        fresh.follower.close()
        self.reader.follower.close()
        return arrived and not self.wrong

    def _arrives(self, reader: Reader, wanted: PolicyVersion) -> bool:
        for _ in range(4):
            if reader.look() == wanted:
                return True
            self.learner.meet(reader.complaints)
            wanted = self.learner.newest
        return False


@contextmanager
def dying(rng: random.Random, within: int) -> Iterator[None]:
    """In a child: SIGKILL at a random one of the next system calls, or in the middle of it."""
    left = rng.randrange(1, within)
    real = {name: getattr(os, name) for name in CALLS}

    def counted(name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                if name in ("write", "pwritev") and rng.random() < 0.7:
                    fd, data, *at = arguments
                    part = memoryview(data[0] if name == "pwritev" else data)
                    part = part[: rng.randrange(len(part) + 1)]
                    real[name](fd, [part] if name == "pwritev" else part, *at)
                os.kill(os.getpid(), signal.SIGKILL)
                time.sleep(60)
            return real[name](*arguments, **named)

        return call

    for module in (run_dir.os, shard_buffer.os, node_cache.os):
        for name in CALLS:
            setattr(module, name, counted(name))
    yield


def in_child(
    work: Callable[[], Any],
    rng: random.Random,
    within: int,
    before: Callable[[], Any] = lambda: None,
) -> bool:
    """Run it in a child that dies somewhere after `before`. True: it ran to its end."""
    pid = os.fork()
    if pid == 0:
        try:
            before()
            with dying(rng, within):
                work()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def killed_publisher(point: Point) -> bool:
    old = point.learner.version
    lived = in_child(
        lambda: point.learner.publish(old + 1, in_full=point.rng.random() < 0.5), point.rng, 75
    )
    point.reader.look()
    if lived:
        point.learner.version = old + 1
    else:  # the learner is started again, from its last checkpoint
        point.learner = Learner(point.root)
        point.learner.version = -1
        point.learner.publish(max(0, old - point.rng.randrange(3)))
    return point.goes_on()


def damaged_file(point: Point) -> bool:
    files = sorted(path for path in point.root.rglob("*") if path.is_file() and path.stat().st_size)
    path = point.rng.choice(files)
    data = bytearray(path.read_bytes())
    if point.rng.random() < 0.5:
        del data[point.rng.randrange(len(data)) :]
    else:
        data[point.rng.randrange(len(data))] ^= 1 << point.rng.randrange(8)
    path.write_bytes(data)
    fresh = Reader(point.root, point.cache)
    for reader in (point.reader, fresh):
        reader.look()
    point.wrong += fresh.wrong
    fresh.follower.close()
    return point.goes_on()


def vanished_version(point: Point) -> bool:
    latest = point.learner.store.latest()
    assert latest is not None
    shutil.rmtree(point.learner.store.directory(latest))
    point.reader.look()
    return point.goes_on()


def killed_reader(point: Point) -> bool:
    """In the child, as another process must not touch this one's copy."""
    readers: list[Reader] = []

    def begin() -> None:
        readers.append(Reader(point.root, point.cache))
        if point.rng.random() < 0.5:
            readers[0].look()
            point.learner.publish(point.learner.version + 1)

    in_child(lambda: readers[0].look(), point.rng, 60, begin)
    latest = point.learner.store.latest()
    assert latest is not None
    point.learner.version = latest.version
    return point.goes_on()


def two_publishers(point: Point) -> bool:
    first, second = point.learner, Learner(point.root)
    refused = 0
    for _ in range(6):
        learner = point.rng.choice((first, second))
        try:
            learner.publish(learner.version + 1, in_full=point.rng.random() < 0.3)
        except Superseded:
            refused += learner is first
        point.reader.look()
    if first.version >= 0 and second.version < 0:
        second.publish(0)
    point.learner = second
    return point.goes_on()


KINDS: dict[str, Callable[[Point], bool]] = {
    "killed publisher": killed_publisher,
    "damaged file": damaged_file,
    "vanished version": vanished_version,
    "killed reader": killed_reader,
    "two publishers": two_publishers,
}


def try_points(kind: str, points: range) -> dict[str, Any]:
    """{"points", "wrong answers", "did not go on": seeds} of that kind."""
    wrong, stuck = 0, []
    for seed in points:
        with tempfile.TemporaryDirectory(dir=MEMORY) as scratch:
            point = Point(Path(scratch), seed)
            if not KINDS[kind](point):
                stuck.append(seed)
            wrong += point.wrong
    return {"what": kind, "points": len(points), "wrong answers": wrong, "did not go on": stuck}

"""Checkpoints that any number of ranks can write and any other number read.

Order of a save, so that a crash at any point leaves a checkpoint to go back to:
  1. checkpoints/step-<n>-<attempt>/ is made. Every rank copies its shards to host memory; training goes on from here.
  2. In the background every rank writes its shards there and syncs them, then rank 0 the index (torch.distributed.checkpoint).
  3. When all ranks are done, rank 0 writes manifest.json: step, ranks, every file's size, and the loop's own progress.
  4. checkpoints/latest.json is replaced, and names the directory. Now, and not before, the step is durable.
  5. What is no longer needed is removed: manifest first, so that what remains is recognisably incomplete.

A resume at the same number of ranks is bit-equal, random numbers included; at another number the generators are seeded anew.
"""

import json
import logging
import os
import random
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save

from atropos_hpc.learner.backends.base import Backend
from atropos_hpc.runtime.run_dir import RunDir, Unreadable, read_json, sync_directory, write_json

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
_NAME = re.compile(r"step-(\d+)-(\d+)")


class CheckpointFailed(Exception):
    """A save that some rank could not finish. The last durable checkpoint stands."""


class BadCheckpoint(Exception):
    """A checkpoint that fails its checks: no manifest, or a file missing or of another size than the manifest says."""


@dataclass(frozen=True, order=True)
class Stored:
    """A checkpoint directory, complete or not. Later attempts at a step compare greater."""

    step: int
    attempt: int
    path: Path = field(compare=False)


class Checkpoints:
    """The checkpoints of one run. Every method but `close` is collective: all ranks call it at the same place in the loop.

    The newest `keep` complete ones are kept, and those at multiples of `keep_every` steps (0: none). `timeout_s` bounds every wait for
    other ranks and for the disk.
    """

    def __init__(
        self, run: RunDir, keep: int, keep_every: int = 0, timeout_s: float = 1800.0
    ) -> None:
        self.root, self.keep, self.keep_every, self.timeout_s = (
            run.checkpoints,
            keep,
            keep_every,
            timeout_s,
        )
        limit = timedelta(seconds=timeout_s)
        self._asking = dist.new_group(backend="gloo", timeout=limit)
        self._writing = dist.new_group(
            backend="gloo", timeout=limit
        )  # the background's own: its messages must not mix with training's
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: tuple[Stored, Future[None]] | None = None
        self._newly_durable: int | None = None
        self._last: int | None = None  # the newest durable step that is known to be whole
        self.safe = 0  # nobody goes back to before this step, even if the newest checkpoint turns out to be damaged

    def save(self, backend: Backend, progress: dict[str, Any]) -> None:
        """Start to save `backend` and `progress` (JSON values), after waiting for the save before. Returns when copies are made.

        Raises CheckpointFailed if that earlier save failed.
        """
        self._settle(block=True)
        target = self._begin(backend.step_count)
        state = {**backend.state_dict(), "random": {str(dist.get_rank()): _random_state()}}
        writer = FileSystemWriter(
            target.path, single_file_per_rank=True, sync_files=True, thread_count=1
        )
        upload = async_save(state, storage_writer=writer, process_group=self._writing)
        assert isinstance(upload, Future)
        manifest = {"step": target.step, "ranks": dist.get_world_size(), "progress": progress}
        self._pending = target, self._pool.submit(self._finish, upload, target, manifest)

    def durable(self) -> int | None:
        """The greatest step that has become durable since this was last asked, if any: the same answer on every rank. Doesn't wait.

        Raises CheckpointFailed, on every rank, once, if a save failed on any.
        """
        self._settle(block=False)
        step, self._newly_durable = self._newly_durable, None
        return step

    def wait(self) -> int | None:
        """`durable`, after waiting for the save that is under way."""
        self._settle(block=True)
        return self.durable()

    def load_latest(self, backend: Backend) -> dict[str, Any] | None:
        """Bring `backend` to the newest durable step and return the progress saved with it; None if nothing was ever durable.

        If files of that checkpoint are damaged, an older one is taken, with a warning. Raises BadCheckpoint if none is whole.
        """
        chosen: list[Any] = [None]
        if dist.get_rank() == 0:
            try:
                chosen = [_newest_whole(self.root)]
            except BadCheckpoint as error:
                chosen = [error]
        dist.broadcast_object_list(chosen, src=0, group=self._asking)
        if isinstance(chosen[0], BadCheckpoint):
            raise chosen[0]
        if chosen[0] is None:
            return None
        name, manifest = chosen[0]
        self._load(backend, self.root / name, manifest)
        self._last = manifest["step"]
        log.info("continuing from checkpoint %s", name)
        progress: dict[str, Any] = manifest["progress"]
        return progress

    def close(self) -> None:
        """Wait for the background, without asking the other ranks."""
        self._pool.shutdown()

    def _load(self, backend: Backend, path: Path, manifest: dict[str, Any]) -> None:
        reader = FileSystemReader(path)
        state = backend.state_dict()
        own = str(dist.get_rank())
        same_ranks = manifest["ranks"] == dist.get_world_size()
        if same_ranks:
            size = reader.read_metadata().state_dict_metadata[f"random.{own}"].size  # type: ignore[union-attr]
            state["random"] = {own: torch.empty(size, dtype=torch.uint8)}
        load(state, storage_reader=reader, process_group=self._asking)
        generators = state.pop("random", None)
        backend.load_state_dict(state, manifest["step"])
        if same_ranks:
            _set_random_state(generators[own])
        else:
            _seed(manifest["step"])

    def _begin(self, step: int) -> Stored:
        """Make the next attempt's directory, on rank 0, and tell all."""
        number = torch.zeros(1, dtype=torch.int64)
        if dist.get_rank() == 0:
            number += (
                max(
                    (stored.attempt for stored in _stored(self.root) if stored.step == step),
                    default=-1,
                )
                + 1
            )
            (self.root / f"step-{step}-{int(number)}").mkdir()
        dist.broadcast(number, src=0, group=self._asking)
        return Stored(step, int(number), self.root / f"step-{step}-{int(number)}")

    def _finish(self, upload: "Future[Any]", target: Stored, manifest: dict[str, Any]) -> None:
        """In the background: from the last synced shard to durable."""
        upload.result()
        seen: list[dict[str, int]] = [{} for _ in range(dist.get_world_size())]
        # Each rank surely sees its own files; over NFS, rank 0's view of the others' may lag.
        dist.all_gather_object(
            seen,
            {file.name: file.stat().st_size for file in target.path.iterdir()},
            group=self._writing,
        )
        if dist.get_rank() != 0:
            return
        sizes = {name: max(view.get(name, 0) for view in seen) for view in seen for name in view}
        manifest["files"] = [{"file": name, "bytes": sizes[name]} for name in sorted(sizes)]
        write_json(target.path / MANIFEST, manifest)
        sync_directory(self.root)
        write_json(self.root / "latest.json", {"step": target.step, "directory": target.path.name})
        _retire(self.root, target, self.keep, self.keep_every)

    def _settle(self, block: bool) -> None:
        """Agree with the other ranks whether the save under way has ended, and how."""
        if self._pending is None:
            return
        target, future = self._pending
        if block:
            wait([future], self.timeout_s)
        error = future.exception() if future.done() else None
        late = block and not future.done()
        mine = 1 if future.done() and error is None else -1 if error is not None or late else 0
        agreed = torch.tensor(mine)
        dist.all_reduce(agreed, op=dist.ReduceOp.MIN, group=self._asking)
        if agreed == 0:
            return
        self._pending = None
        if agreed < 0:
            what = error or (
                f"not written after {self.timeout_s:.0f} s"
                if late
                else "another rank could not write it"
            )
            raise CheckpointFailed(f"checkpoint {target.path}: {what}") from error
        self._newly_durable = target.step
        self.safe = (self._last or 0) if self.keep > 1 else target.step
        self._last = target.step


def find(root: Path, step: int | None = None) -> tuple[Path, dict[str, Any]]:
    """Directory and manifest of the newest whole checkpoint, or of the last attempt at a step. Touches nothing, asks no other rank.

    Raises FileNotFoundError if there is none, naming those that there are, and BadCheckpoint if it is damaged.
    """
    if step is None:
        found = _newest_whole(root)
        if found is None:
            raise FileNotFoundError(f"no checkpoint under {root} yet")
        return root / found[0], found[1]
    complete = (
        [stored for stored in _stored(root) if (stored.path / MANIFEST).exists()]
        if root.is_dir()
        else []
    )
    of_step = [stored for stored in complete if stored.step == step]
    if not of_step:
        there = (
            ", ".join(str(number) for number in sorted({stored.step for stored in complete}))
            or "none"
        )
        raise FileNotFoundError(f"no checkpoint of step {step} under {root}; there are: {there}")
    path = max(of_step).path
    return path, _verify(path)


def _stored(root: Path) -> Iterator[Stored]:
    for name in os.listdir(root):
        if match := _NAME.fullmatch(name):
            yield Stored(int(match[1]), int(match[2]), root / name)


def _retire(root: Path, latest: Stored, keep: int, keep_every: int = 0) -> None:
    """Remove what is incomplete, what is newer than the latest (a branch that was left), and of what is older than the newest `keep` all
    but the last attempt at each multiple of `keep_every`.
    """
    complete = sorted(
        (s for s in _stored(root) if s <= latest and (s.path / MANIFEST).exists()), reverse=True
    )
    kept = {latest.path, *(stored.path for stored in complete[: max(1, keep)])}
    milestones = {
        stored.step: stored.path
        for stored in reversed(complete)
        if keep_every and stored.step % keep_every == 0
    }
    kept.update(milestones.values())
    for stored in _stored(root):
        if stored.path not in kept:
            (stored.path / MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(
                stored.path, ignore_errors=True
            )  # what a network filesystem holds back goes with the next save


def _newest_whole(root: Path) -> tuple[str, dict[str, Any]] | None:
    """Directory name and manifest of the checkpoint to continue from."""
    latest = read_json(root / "latest.json")
    if not latest:
        return None
    named = _NAME.fullmatch(latest["directory"])
    assert named is not None, latest
    newest = Stored(int(named[1]), int(named[2]), root / latest["directory"])
    damage = []
    for stored in [newest, *sorted((s for s in _stored(root) if s < newest), reverse=True)]:
        try:
            manifest = _verify(stored.path)
        except BadCheckpoint as error:
            damage.append(str(error))
            continue
        if damage:
            log.warning("going back to %s, because: %s", stored.path.name, "; ".join(damage))
        return stored.path.name, manifest
    raise BadCheckpoint(
        f"no checkpoint under {root} is whole: {'; '.join(damage)}. To start afresh, take another run directory"
    )


def _verify(path: Path) -> dict[str, Any]:
    try:
        manifest: dict[str, Any] = read_json(path / MANIFEST)
    except Unreadable as error:
        raise BadCheckpoint(str(error)) from None
    if not manifest:
        raise BadCheckpoint(f"{path}: no {MANIFEST}")
    for entry in manifest["files"]:
        try:
            size = (path / entry["file"]).stat().st_size
        except FileNotFoundError:
            raise BadCheckpoint(f"{path / entry['file']}: missing") from None
        if size != entry["bytes"]:
            raise BadCheckpoint(
                f"{path / entry['file']}: {size} bytes, the manifest says {entry['bytes']}"
            )
    return manifest


def _random_state() -> torch.Tensor:
    """This process's generators, as JSON in a uint8 tensor: unlike a pickle, reading it can run nothing."""
    kind, keys, position, has_gauss, cached = np.random.get_state()
    state = {
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
        "cuda": torch.cuda.get_rng_state().numpy().tobytes().hex()
        if torch.cuda.is_available()
        else None,
        "python": random.getstate(),
        "numpy": [kind, np.asarray(keys).tolist(), position, has_gauss, cached],
    }
    return torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)


def _set_random_state(stored: torch.Tensor) -> None:
    state = json.loads(stored.numpy().tobytes())
    torch.set_rng_state(torch.frombuffer(bytearray.fromhex(state["torch"]), dtype=torch.uint8))
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(
            torch.frombuffer(bytearray.fromhex(state["cuda"]), dtype=torch.uint8)
        )
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    np.random.set_state(tuple(state["numpy"]))


def _seed(step: int) -> None:
    mixed = int(
        np.random.SeedSequence([step, dist.get_rank(), dist.get_world_size()]).generate_state(1)[0]
    )
    random.seed(mixed)
    np.random.seed(mixed)
    torch.manual_seed(mixed)

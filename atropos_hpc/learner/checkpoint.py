"""Checkpoints that any number of ranks can write and any other number can read.

Order of writes of a save, so that a crash at any point leaves a valid checkpoint:

1. Rank 0 removes what earlier saves left incomplete, and makes checkpoints/step-<n>-<attempt>/.
   Every rank copies its shards to host memory. Training continues from here.
   Where a copy would take more than 1/16 of the free memory, it waits for the writing instead.
2. In the background, every rank writes its shards there and syncs them; then rank 0 writes the
   index (torch.distributed.checkpoint).
3. When all ranks are done, rank 0 writes manifest.json with every file's size.
4. latest.json is replaced. From now on the step is durable.
5. Checkpoints that are no longer needed are removed, manifest first, so that what a crash leaves
   behind is recognisably incomplete. What a failed save has written is removed, too.

A resume at the same number of ranks is bit-equal, including random numbers. At another number of
ranks the generators are seeded anew.
"""

import logging
from concurrent.futures import Future, ThreadPoolExecutor, wait
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save, save
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

from atropos_hpc.contracts.checkpoint import CheckpointFile, CheckpointManifest, LatestCheckpoint
from atropos_hpc.learner.backends.base import Backend
from atropos_hpc.learner.checkpoint_files import (
    LATEST,
    MANIFEST,
    BadCheckpoint,
    CheckpointDir,
    list_checkpoints,
    newest_valid,
    remove_incomplete,
    remove_obsolete,
)
from atropos_hpc.learner.split_adamw import in_stored_form, take_weights
from atropos_hpc.learner.state import TrainState
from atropos_hpc.runtime.deadlines import HINT
from atropos_hpc.runtime.run_dir import RunDir, sync_directory, write_struct
from atropos_hpc.runtime.sizing import free_memory

log = logging.getLogger(__name__)

COPIED_PART = 16  # of the free memory that a copy of tensors on the host may take
TRAIN = "train"  # the key of TrainState in a checkpoint


class CheckpointFailed(Exception):
    """A save that some rank could not finish. The last durable checkpoint stands."""


class Checkpoints:
    """The checkpoints of one run. Every method but `close` is collective.

    The newest `keep` complete ones are kept, and those at multiples of `keep_every` steps (0:
    none). `timeout_s` bounds every wait for other ranks and for the disk. `keep_staging`: every
    save is copied to the host memory of the one before, which is pinned; None: if on a GPU.
    """

    def __init__(
        self,
        run: RunDir,
        keep: int,
        keep_every: int = 0,
        timeout_s: float = 1800.0,
        keep_staging: bool | None = None,
    ) -> None:
        self.root, self.keep, self.keep_every = run.checkpoints, keep, keep_every
        self.timeout_s = timeout_s
        # Two groups: messages of the background must not mix with those of training.
        timeout = timedelta(seconds=timeout_s)
        self._foreground = dist.new_group(backend="gloo", timeout=timeout)
        self._background = dist.new_group(backend="gloo", timeout=timeout)
        gpu = torch.cuda.is_available()
        self._stager = None
        if gpu if keep_staging is None else keep_staging:
            self._stager = DefaultStager(
                StagingOptions(
                    use_pinned_memory=gpu,
                    use_shared_memory=False,
                    use_async_staging=False,
                    use_non_blocking_copy=gpu,
                )
            )
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: tuple[CheckpointDir, Future[None]] | None = None
        self._newly_durable: int | None = None
        self.last: int | None = None  # the newest durable step that is known to be valid
        # No resume goes back before this step, even if the newest checkpoint is damaged.
        self.safe_step = 0

    def save(self, backend: Backend, state: TrainState) -> None:
        """Wait for the previous save, copy the state, and write it in the background.

        Raises CheckpointFailed if the previous save failed.
        """
        self._settle(block=True)
        target = self._begin(state.version)
        tensors = {**backend.state_dict(), TRAIN: state.state_dict()}
        writer = FileSystemWriter(
            target.path, single_file_per_rank=True, sync_files=True, thread_count=1
        )
        written: Future[None] = Future()
        upload: Future[Any] = written
        if self._is_short_of_memory(tensors):
            log.info("memory is short: training waits until the checkpoint is written")
            try:
                save(tensors, storage_writer=writer, process_group=self._background)
                written.set_result(None)
            except (Exception, CheckpointException) as error:  # the latter is no Exception
                written.set_exception(error)
        else:
            saving = async_save(
                tensors,
                storage_writer=writer,
                process_group=self._background,
                async_stager=self._stager,
            )
            assert isinstance(saving, Future)
            upload = saving
        self._pending = target, self._thread.submit(self._finish, upload, target)

    def _is_short_of_memory(self, tensors: dict[str, Any]) -> bool:
        """Whether, on any rank, a copy of its tensors would take a part of the free memory.

        Written in the background, they would be there three times. Tensors on a GPU are copied in
        any case.
        """
        own = sum(
            local.numel() * local.element_size()
            for leaf in tree_leaves(tensors)
            if isinstance(leaf, torch.Tensor)
            and (local := leaf.to_local() if isinstance(leaf, DTensor) else leaf).device.type
            == "cpu"
        )
        short = torch.tensor(int(own > free_memory() / COPIED_PART))
        dist.all_reduce(short, op=dist.ReduceOp.MAX, group=self._foreground)
        return bool(short)

    def newly_durable(self) -> int | None:
        """Return the step that has become durable since the last call, if any. Does not wait.

        All ranks get the same answer. Raises CheckpointFailed, on every rank, once, if a save
        failed on any.
        """
        self._settle(block=False)
        step, self._newly_durable = self._newly_durable, None
        return step

    def wait(self) -> int | None:
        """Wait for the save under way, then return `newly_durable`."""
        self._settle(block=True)
        return self.newly_durable()

    def load_latest(self, backend: Backend, state: TrainState) -> bool:
        """Restore the newest durable step. Return False if there is none.

        If that checkpoint is damaged or cannot be loaded, an older one is taken, with a warning.
        Raises BadCheckpoint if none is valid.
        """
        failed: CheckpointDir | None = None
        while (found := self._newest_valid(failed)) is not None:
            checkpoint, manifest = found
            if self._try_to_load(backend, state, checkpoint, manifest):
                self.last = manifest.step
                log.info("resuming from checkpoint %s", checkpoint.path.name)
                return True
            failed = checkpoint
        return False

    def _newest_valid(
        self, before: CheckpointDir | None
    ) -> tuple[CheckpointDir, CheckpointManifest] | None:
        """Return the checkpoint that rank 0 chooses; see `checkpoint_files.newest_valid`."""
        found: list[Any] = [None]
        if dist.get_rank() == 0:
            try:
                found = [newest_valid(self.root, before)]
            except BadCheckpoint as error:
                found = [error]
        dist.broadcast_object_list(found, src=0, group=self._foreground)
        if isinstance(found[0], BadCheckpoint):
            raise found[0]
        return found[0]  # type: ignore[no-any-return]

    def _try_to_load(
        self,
        backend: Backend,
        state: TrainState,
        checkpoint: CheckpointDir,
        manifest: CheckpointManifest,
    ) -> bool:
        """Load a checkpoint; return False, on every rank, if its content is damaged on any."""
        loaded = torch.tensor(1)
        try:
            self._load(backend, state, checkpoint, manifest)
        except (Exception, CheckpointException) as error:  # the latter is no Exception
            loaded = torch.tensor(0)
            reason = str(error).strip().splitlines()[-1:] or [type(error).__name__]
            log.error("cannot load %s: %s", checkpoint.path, reason[0])
        dist.all_reduce(loaded, op=dist.ReduceOp.MIN, group=self._foreground)
        return bool(loaded)

    def close(self) -> None:
        """Wait for this rank's background work only."""
        self._thread.shutdown()
        if self._stager is not None:
            self._stager.close()

    def _load(
        self,
        backend: Backend,
        state: TrainState,
        checkpoint: CheckpointDir,
        manifest: CheckpointManifest,
    ) -> None:
        reader = FileSystemReader(checkpoint.path)
        stored = reader.read_metadata().state_dict_metadata
        train = state.state_dict()
        if manifest.ranks == dist.get_world_size():
            rank = str(dist.get_rank())
            entry: Any = stored[f"{TRAIN}.rng.{rank}"]
            train["rng"] = {rank: torch.empty(entry.size, dtype=torch.uint8)}
        else:
            del train["rng"]
        tensors = backend.state_dict()
        read = in_stored_form(tensors, stored)
        load({**read, TRAIN: train}, storage_reader=reader, process_group=self._foreground)
        take_weights(tensors, read)
        backend.load_state_dict(tensors)
        state.load_state_dict(train)  # last, because it sets the generators

    def _begin(self, step: int) -> CheckpointDir:
        """Make the directory of the next attempt at the step, on rank 0."""
        attempt = torch.zeros(1, dtype=torch.int64)
        if dist.get_rank() == 0:
            attempts = [each.attempt for each in list_checkpoints(self.root) if each.step == step]
            attempt += max(attempts, default=-1) + 1
            remove_incomplete(self.root)
            CheckpointDir.make_path(self.root, step, int(attempt)).path.mkdir()
        dist.broadcast(attempt, src=0, group=self._foreground)
        return CheckpointDir.make_path(self.root, step, int(attempt))

    def _finish(self, upload: "Future[Any]", target: CheckpointDir) -> None:
        """In the background: make the checkpoint durable once all shards are synced."""
        upload.result()
        # A rank surely sees its own files; over NFS, rank 0's view of the others' may lag.
        views: list[dict[str, int]] = [{} for _ in range(dist.get_world_size())]
        own = {file.name: file.stat().st_size for file in target.path.iterdir()}
        dist.all_gather_object(views, own, group=self._background)
        if dist.get_rank() != 0:
            return
        names = sorted({name for view in views for name in view})
        files = tuple(
            CheckpointFile(name, max(view.get(name, 0) for view in views)) for name in names
        )
        manifest = CheckpointManifest(target.step, dist.get_world_size(), files)
        write_struct(target.path / MANIFEST, manifest)
        sync_directory(self.root)
        write_struct(self.root / LATEST, LatestCheckpoint(target.step, target.path.name))
        remove_obsolete(self.root, target, self.keep, self.keep_every)

    def _settle(self, block: bool) -> None:
        """Agree with the other ranks on whether the save under way has ended, and how."""
        if self._pending is None:
            return
        target, future = self._pending
        if block:
            wait([future], self.timeout_s)
        error = future.exception() if future.done() else None
        timed_out = block and not future.done()
        outcome = 0
        if error is not None or timed_out:
            outcome = -1
        elif future.done():
            outcome = 1
        agreed = torch.tensor(outcome)
        dist.all_reduce(agreed, op=dist.ReduceOp.MIN, group=self._foreground)
        if agreed == 0:
            return
        self._pending = None
        if agreed < 0:
            if dist.get_rank() == 0 and future.done():
                remove_incomplete(self.root)
            what = str(error or "another rank could not write it")
            if timed_out:
                what = f"not written after {self.timeout_s:.0f} s; {HINT}"
            raise CheckpointFailed(f"checkpoint {target.path}: {what}") from error
        self._newly_durable = target.step
        self.safe_step = (self.last or 0) if self.keep > 1 else target.step
        self.last = target.step

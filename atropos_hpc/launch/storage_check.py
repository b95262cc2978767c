"""Check the space that a run writes to, before it starts: a full disk shows itself as a wait.

A learner that cannot publish a version keeps every server waiting for it, and the servers keep the
learner waiting for a batch.
"""

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from atropos_hpc.config import Config
from atropos_hpc.contracts.answers import Problem
from atropos_hpc.launch import base_model
from atropos_hpc.policy.store import RESERVE_BYTES
from atropos_hpc.runtime import sizing
from atropos_hpc.validate import Refused

MIB = 2**20


def existing(path: Path) -> Path:
    """Return the nearest directory of a path that exists."""
    while not path.exists():
        path = path.parent
    return path


def unwritable(key: str, directory: Path) -> Problem | None:
    """Return the problem of a directory in which no file can be written, or locked."""
    try:
        with tempfile.TemporaryFile(dir=directory, buffering=0) as file:
            file.write(bytes(4096))
            os.fsync(file.fileno())  # where a full quota shows
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                return Problem(key, _no_locks(directory, error))
    except OSError as error:
        return Problem(key, f"cannot write to {directory}: {error.strerror}")
    return None


def _no_locks(path: Path, error: OSError) -> str:
    return (
        f"cannot lock a file in {path}: {error.strerror}; a run needs a filesystem with flock (on"
        " Lustre, the mount option flock)"
    )


@contextmanager
def locked(path: Path, timeout_s: float = 0) -> Iterator[None]:
    """Hold a lock, which the kernel releases when this process ends, however it ends. Raises
    filelock.Timeout, and Refused where the filesystem has no locks."""
    try:
        held = FileLock(path, timeout=timeout_s, fallback_to_soft=False).acquire()
    except OSError as error:
        if error.filename is not None or isinstance(error, Timeout):
            raise
        raise Refused(Problem("run_dir", _no_locks(path.parent, error))) from None
    with held:
        yield


def check(config: Config, run_dir: Path) -> Iterator[Problem]:
    """Report a filesystem without space for one policy version and one checkpoint.

    A resumed run needs as much: both are written beside the ones that exist.
    """
    version, checkpoint = sizing.stored_bytes(config)
    yield from _run_directory(existing(run_dir), version, checkpoint)
    if config.policy.max_bytes is not None and config.policy.max_bytes < version:
        found = f"{config.policy.max_bytes:,} bytes are less than one version of this model needs"
        yield Problem("policy.max_bytes", f"{found}, {version:,}")
    if config.model.path is None:
        cache = existing(base_model.cache())
        if (problem := unwritable("model.make", cache)) is not None:
            where = "$ATROPOS_HPC_CACHE names another directory for created models"
            yield Problem(problem.key, f"{problem.message}; {where}")
    if config.launch.allocation == "local":  # of other nodes, nothing is known here
        yield from _cache(config, version)


def _run_directory(home: Path, version: int, checkpoint: int) -> Iterator[Problem]:
    status = os.statvfs(home)
    free, needed = status.f_bavail * status.f_frsize, version + checkpoint + RESERVE_BYTES
    if free < needed:
        parts = f"{version // MIB:,} for a policy version, {checkpoint // MIB:,} for a checkpoint"
        yield Problem(
            "run_dir",
            f"{home} has {free // MIB:,} MiB free, but the run needs at least"
            f" {needed // MIB:,} MiB: {parts}, {RESERVE_BYTES // MIB} stay free",
        )
    if status.f_files and not status.f_favail:
        yield Problem("run_dir", f"{home} has no inode free, so no file can be created")


def _cache(config: Config, version: int) -> Iterator[Problem]:
    cache = existing(Path(config.policy.cache).expanduser().absolute())
    if (problem := unwritable("policy.cache", cache)) is not None:
        yield problem
        return
    status = os.statvfs(cache)
    free, needed = status.f_bavail * status.f_frsize, 2 * version
    if config.policy.sync == "delta" and free < needed:  # full versions are read from the store
        yield Problem(
            "policy.cache",
            f"{cache} has {free // MIB:,} MiB free, but two versions, which policy.sync=delta"
            f" needs, take {needed // MIB:,} MiB",
        )

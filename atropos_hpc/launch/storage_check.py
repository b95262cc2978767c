"""Check the space that a run writes to, before it starts: a full disk shows itself as a wait.

A learner that cannot publish a version keeps every server waiting for it, and the servers keep the
learner waiting for a batch.
"""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from atropos_hpc.config import Config
from atropos_hpc.contracts.answers import Problem
from atropos_hpc.policy.store import RESERVE_BYTES
from atropos_hpc.runtime import model_sizes, sizing

MIB = 2**20


def existing(path: Path) -> Path:
    """Return the nearest directory of a path that exists."""
    while not path.exists():
        path = path.parent
    return path


def unwritable(key: str, directory: Path) -> Problem | None:
    """Return the problem of a directory in which no file can be created."""
    try:
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        return Problem(key, f"cannot write to {directory}: {error.strerror}")
    return None


def check(config: Config, run_dir: Path) -> Iterator[Problem]:
    """Report a filesystem without space for one policy version and one checkpoint.

    A resumed run needs as much: both are written beside the ones that exist.
    """
    model = model_sizes.sizes_of(config)
    version, checkpoint = sizing.stored_bytes(config, model) if model else (0, 0)
    yield from _run_directory(existing(run_dir), version, checkpoint)
    if config.policy.max_bytes is not None and config.policy.max_bytes < version:
        found = f"{config.policy.max_bytes:,} bytes are less than one version of this model needs"
        yield Problem("policy.max_bytes", f"{found}, {version:,}")
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

"""Find, verify and remove checkpoint directories. Needs no torch and no other rank."""

import logging
import os
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from atropos_hpc.contracts.checkpoint import CheckpointManifest, LatestCheckpoint
from atropos_hpc.runtime.run_dir import Unreadable, read_struct

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
LATEST = "latest.json"
_NAME = re.compile(r"step-(\d+)-(\d+)")


class BadCheckpoint(Exception):
    """A checkpoint that fails its checks: no manifest, or a file missing or of another size."""


@dataclass(frozen=True, order=True)
class CheckpointDir:
    """A checkpoint directory, complete or not. Later attempts at a step compare greater."""

    step: int
    attempt: int
    path: Path = field(compare=False)

    @classmethod
    def make_path(cls, root: Path, step: int, attempt: int) -> "CheckpointDir":
        """Describe the directory of that attempt at that step. It need not exist."""
        return cls(step, attempt, root / f"step-{step}-{attempt}")

    @property
    def complete(self) -> bool:
        """Whether it has a manifest, which is written last."""
        return (self.path / MANIFEST).exists()


def list_checkpoints(root: Path) -> list[CheckpointDir]:
    """Return all checkpoint directories, oldest first."""
    found = ((_NAME.fullmatch(name), root / name) for name in os.listdir(root))
    return sorted(CheckpointDir(int(name[1]), int(name[2]), path) for name, path in found if name)


def find(root: Path, step: int | None = None) -> tuple[Path, CheckpointManifest]:
    """Return directory and manifest of the newest valid checkpoint, or of the last one of a step.

    Raises FileNotFoundError, naming the steps that there are, and BadCheckpoint if it is damaged.
    """
    if step is None:
        found = newest_valid(root)
        if found is None:
            raise FileNotFoundError(f"no checkpoint under {root} yet")
        return found[0].path, found[1]
    complete = [each for each in list_checkpoints(root) if each.complete] if root.is_dir() else []
    matching = [each for each in complete if each.step == step]
    if not matching:
        steps = ", ".join(str(number) for number in sorted({each.step for each in complete}))
        raise FileNotFoundError(
            f"no checkpoint of step {step} under {root}; there are: {steps or 'none'}"
        )
    return matching[-1].path, verify(matching[-1].path)


def newest_valid(
    root: Path, before: CheckpointDir | None = None
) -> tuple[CheckpointDir, CheckpointManifest] | None:
    """Return the checkpoint to resume from; None before the first.

    It is the one that latest.json names. If that is damaged, the newest valid one before it is
    returned, with a warning; if latest.json itself is missing, empty or damaged, the newest valid
    one of all. `before`: consider only checkpoints older than this one, which could not be loaded.
    Raises BadCheckpoint if there is a checkpoint, or latest.json is damaged, and none is valid.
    """
    candidates, failures = _candidates(root)
    if before is not None:
        candidates, failures = [each for each in candidates if each < before], [str(before.path)]
    for candidate in candidates:
        try:
            manifest = verify(candidate.path)
        except BadCheckpoint as error:
            failures.append(str(error))
            continue
        if failures:
            reasons = "; ".join(failures)
            log.warning("resuming from %s, because: %s", candidate.path.name, reasons)
        return candidate, manifest
    if not failures:
        return None
    raise BadCheckpoint(
        f"no checkpoint under {root} is valid: {'; '.join(failures)}."
        " Nothing was changed. To start afresh, use another run directory"
    )


def _candidates(root: Path) -> tuple[list[CheckpointDir], list[str]]:
    """Return the checkpoints to try, best first, and what is wrong with latest.json."""
    found = list_checkpoints(root)[::-1]
    complete = [each for each in found if each.complete]
    try:
        latest = read_struct(root / LATEST, LatestCheckpoint)
    except Unreadable as error:
        return complete, [str(error)]
    if latest is None:
        return complete, [f"{root / LATEST} names no checkpoint"] if complete else []
    if (match := _NAME.fullmatch(latest.directory)) is None:
        return complete, [f"{root / LATEST} names {latest.directory!r}, which is no checkpoint"]
    newest = CheckpointDir.make_path(root, int(match[1]), int(match[2]))
    return [newest, *(each for each in found if each < newest)], []


def verify(path: Path) -> CheckpointManifest:
    """Check that every file has the size in the manifest, and return the manifest."""
    try:
        manifest = read_struct(path / MANIFEST, CheckpointManifest)
    except (Unreadable, OSError) as error:
        raise BadCheckpoint(str(error)) from None
    if manifest is None:
        raise BadCheckpoint(f"{path}: no {MANIFEST}")
    for entry in manifest.files:
        try:
            size = (path / entry.file).stat().st_size
        except FileNotFoundError:
            raise BadCheckpoint(f"{path / entry.file}: missing") from None
        except OSError as error:
            raise BadCheckpoint(str(error)) from None
        if size != entry.bytes:
            raise BadCheckpoint(
                f"{path / entry.file}: {size} bytes, the manifest says {entry.bytes}"
            )
    return manifest


def remove_obsolete(root: Path, latest: CheckpointDir, keep: int, keep_every: int = 0) -> None:
    """Remove checkpoints that nobody needs.

    Kept are the newest `keep` complete ones up to `latest`, and the last attempt at each multiple
    of `keep_every` steps. What is newer than `latest` belongs to an abandoned branch and goes too.
    """
    found = list_checkpoints(root)
    complete = [each for each in found if each <= latest and each.complete]
    milestones = {
        each.step: each for each in complete if keep_every and each.step % keep_every == 0
    }
    kept = {latest, *complete[-max(1, keep) :], *milestones.values()}
    for each in found:
        if each not in kept:
            (each.path / MANIFEST).unlink(missing_ok=True)
            # Files that an NFS client holds open stay; the next save removes them.
            shutil.rmtree(each.path, ignore_errors=True)


def remove_incomplete(root: Path) -> None:
    """Remove what saves that failed or were killed have left, so that the next one has space."""
    for each in list_checkpoints(root):
        if not each.complete:
            shutil.rmtree(each.path, ignore_errors=True)

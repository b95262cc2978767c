"""Directories on a node that only this user can enter, removed with their owner.

The owner holds a lock in its directory, which the kernel releases however the owner ends: `sweep`
removes directories that nobody holds. One kind is for temporary files: vLLM keeps Unix sockets,
over which its processes exchange pickled objects, and rendezvous files in the temporary directory,
where every user of the node could connect to them.
"""

import contextlib
import fcntl
import os
import shutil
import stat
import tempfile
import time
from pathlib import Path

# The path of a Unix socket has at most 107 bytes, and vLLM's sockets have names of 36.
LONGEST_PARENT = 40
UNLOCKED_S = 60.0  # a directory without a lock is being made, unless it is older than this
LOCK = "lock"


class OwnedDirectory:
    """A directory in `parent` with mode 0700 that belongs to this process."""

    def __init__(self, parent: Path, prefix: str) -> None:
        sweep(parent, prefix)
        while True:
            self.path = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
            self._lock = os.open(self.path / LOCK, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
            with contextlib.suppress(OSError):  # without locks, as on Lustre, sweeps remove nothing
                fcntl.flock(self._lock, fcntl.LOCK_EX)
            if (self.path / LOCK).exists():
                return
            os.close(self._lock)  # removed by a sweep before it was locked

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


class PrivateDirectory(OwnedDirectory):
    """The temporary files of a node's servers."""

    def __init__(self) -> None:
        sweep_private()
        super().__init__(_parent(), _prefix())

    def empty(self, name: str) -> Path:
        """Return a subdirectory, made anew."""
        made = self.path / name
        shutil.rmtree(made, ignore_errors=True)
        made.mkdir(mode=0o700)
        return made


def compile_caches(*more: str) -> dict[str, str]:
    """Return the variables that keep compiled code on this node, where it stays; {} if impossible.

    The libraries' own caches are in the home directory, which nodes share, or, torch's, have a name
    that another user can take first, with code of his choice in it.
    """
    if (path := _compile_cache()) is None:
        return {}
    caches = {"TORCHINDUCTOR_CACHE_DIR": path, "TRITON_CACHE_DIR": path / "triton"}
    if "vllm" in more:
        caches["VLLM_CACHE_ROOT"] = path / "vllm"
    return {name: str(cache) for name, cache in caches.items()}


def _compile_cache() -> Path | None:
    path = _parent() / f"atropos-compiled-{os.getuid()}"
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=0o700)
    status = path.lstat()
    own = status.st_uid == os.getuid() and stat.S_IMODE(status.st_mode) == 0o700
    return path if own and stat.S_ISDIR(status.st_mode) else None


def sweep_private() -> None:
    """Remove this user's private directories on this node whose owners have ended."""
    for parent in {_parent(), Path("/tmp")}:
        sweep(parent, _prefix())


def sweep(parent: Path, prefix: str) -> None:
    """Remove this user's directories of that prefix whose owners have ended."""
    for path in parent.glob(f"{prefix}*"):
        with contextlib.suppress(OSError):
            status = path.lstat()
            if status.st_uid != os.getuid() or not stat.S_ISDIR(status.st_mode):
                continue
            if not (path / LOCK).exists():
                if time.time() - status.st_mtime > UNLOCKED_S:
                    shutil.rmtree(path, ignore_errors=True)
                continue
            lock = os.open(path / LOCK, os.O_WRONLY | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises while it is owned
                shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(lock)


def _parent() -> Path:
    given = Path(tempfile.gettempdir())
    return given if len(os.fsencode(given)) <= LONGEST_PARENT else Path("/tmp")


def _prefix() -> str:
    return f"atropos-{os.getuid()}-"

"""Directories of runs and sweeps that do not exist yet: the default one is made exclusively, and a
refused command leaves none behind."""

import contextlib
import itertools
from collections.abc import Iterator
from pathlib import Path

HYDRAS_FILE = "multirun.yaml"
LOCK = ".submission.lock"
_claimed: list[Path] = []  # by this process, at most one


def claim(path: str) -> str:
    """Create a directory that nobody else has: `path`, or `path`-2 and so on. The resolver
    ${new_directory:...}; every call of a process returns the same one."""
    if not _claimed:
        for number in itertools.count(1):
            directory = Path(path if number == 1 else f"{path}-{number}")
            directory.parent.mkdir(parents=True, exist_ok=True)
            try:
                directory.mkdir()
            except FileExistsError:
                continue
            _claimed.append(directory)
            break
    return str(_claimed[0])


def remove_unused() -> None:
    """Remove the claimed directory if nothing was put into it."""
    for directory in _claimed:
        for path in (directory, directory.parent):
            with contextlib.suppress(OSError):
                path.rmdir()


@contextlib.contextmanager
def left_as_found(directory: Path) -> Iterator[None]:
    """Around a multirun: if it leaves nothing but Hydra's file in a new directory, remove that and
    the parents that were made for it; if it fails, restore Hydra's file of an older sweep."""
    made = [path for path in (directory, *directory.parents) if not path.exists()]
    file = directory / HYDRAS_FILE
    before = file.read_bytes() if file.exists() else None
    try:
        yield
    except BaseException:
        if before is not None:
            file.write_bytes(before)
        raise
    finally:
        with contextlib.suppress(OSError):
            if {path.name for path in directory.iterdir()} <= {HYDRAS_FILE, LOCK}:
                file.unlink(missing_ok=True)
                (directory / LOCK).unlink(missing_ok=True)
                for path in made or [directory]:
                    path.rmdir()

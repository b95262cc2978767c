"""What a run writes is its user's alone, and nothing temporary stays."""

import contextlib
import errno
import fcntl
import os
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from atropos_hpc import train
from atropos_hpc.config import Config
from atropos_hpc.launch import new_directory, run
from atropos_hpc.runtime import private_tmp, process
from atropos_hpc.runtime.private_tmp import PrivateDirectory

OWN = """
import signal
from atropos_hpc.runtime.private_tmp import PrivateDirectory
made = PrivateDirectory()
print(made.empty("0"), flush=True)
signal.pause()
"""


@pytest.fixture
def parent(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A temporary directory with a short name, used instead of /tmp."""
    with tempfile.TemporaryDirectory(dir="/tmp") as path:
        monkeypatch.setenv("TMPDIR", path)
        monkeypatch.setattr(tempfile, "tempdir", None)
        yield Path(path)


@contextlib.contextmanager
def owner() -> Iterator[tuple["subprocess.Popen[str]", Path]]:
    """Another process with a directory of its own."""
    command = [sys.executable, "-c", OWN]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        try:
            yield running, Path(running.stdout.readline().strip())
        finally:
            running.kill()


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_private_directory_is_for_its_user_alone_and_fits_a_socket_of_vllm(parent: Path) -> None:
    made = PrivateDirectory()
    servers = made.empty("12")
    assert made.path.parent == parent
    assert (mode(made.path), mode(servers)) == (0o700, 0o700)
    assert len(os.fsencode(servers / ("x" * 36))) <= 107
    (servers / "socket").touch()
    assert not list(made.empty("12").iterdir())
    made.remove()
    assert not list(parent.iterdir())


def test_private_directory_is_elsewhere_when_the_temporary_directory_has_a_long_name(
    parent: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = parent / ("x" * 60)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    made = PrivateDirectory()
    try:
        assert made.path.parent == Path("/tmp")
        assert len(os.fsencode(made.empty("12") / ("x" * 36))) <= 107
    finally:
        made.remove()


def test_private_directory_of_a_killed_owner_is_removed_at_the_next_start(parent: Path) -> None:
    with owner() as (running, directory):
        (directory / "vllm_dist_0").touch()
        private_tmp.sweep_private()
        assert (directory / "vllm_dist_0").exists()  # its owner lives
        running.send_signal(signal.SIGKILL)
        running.wait()
        PrivateDirectory().remove()
        assert not directory.parent.exists()


def test_private_directory_can_be_made_where_the_filesystem_has_no_locks(
    parent: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*_: Any) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", flock)
    made, other = PrivateDirectory(), PrivateDirectory()
    assert made.path.is_dir() and other.path.is_dir(), "neither is taken for left over"
    made.remove()
    other.remove()


def test_private_directories_of_others_and_links_are_left_alone(parent: Path) -> None:
    target = parent / "target"
    target.mkdir()
    (target / private_tmp.LOCK).touch()
    (parent / f"atropos-{os.getuid()}-link").symlink_to(target)
    fresh = parent / f"atropos-{os.getuid()}-fresh"
    fresh.mkdir()  # being made: it has no lock yet
    old = parent / f"atropos-{os.getuid()}-old"
    old.mkdir()
    hour_ago = time.time() - 3600
    os.utime(old, (hour_ago, hour_ago))
    private_tmp.sweep_private()
    assert target.exists() and fresh.exists() and not old.exists()


def test_compiled_code_is_kept_in_a_directory_that_nobody_else_has_made(parent: Path) -> None:
    caches = private_tmp.compile_caches("vllm")
    made = Path(caches["TORCHINDUCTOR_CACHE_DIR"])
    assert made.parent == parent and mode(made) == 0o700
    assert all(Path(cache).is_relative_to(made) for cache in caches.values())
    assert set(caches) == {"TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "VLLM_CACHE_ROOT"}
    assert private_tmp.compile_caches("vllm") == caches
    PrivateDirectory().remove()
    assert made.exists()
    made.chmod(0o777)  # anybody may have written into it
    assert private_tmp.compile_caches() == {}
    made.rmdir()
    made.symlink_to(parent)
    assert private_tmp.compile_caches() == {}


def test_private_files_are_what_every_child_of_a_run_creates(tmp_path: Path) -> None:
    previous = os.umask(0o022)
    try:
        made = tmp_path / "made"
        child = process.start("child", ["touch", str(made)], tmp_path / "child.log")
        assert child.process.wait(30) == 0
        assert mode(made) == 0o600
    finally:
        os.umask(previous)


def test_private_files_are_what_the_command_creates_before_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def launch(config: Config, run_dir: Path, *_: object) -> int:
        (run_dir / "file").touch()  # a directory without one is removed again
        return 0

    monkeypatch.setattr(run, "launch", launch)
    monkeypatch.setattr(process, "die_with_parent", lambda *_: None)
    monkeypatch.setattr(new_directory, "_claimed", [])
    monkeypatch.setattr(sys, "argv", ["train"])
    monkeypatch.chdir(tmp_path)
    previous = os.umask(0o022)
    try:
        assert train.main() == 0
    finally:
        os.umask(previous)
    created = list(tmp_path.rglob("*"))
    assert len(created) == 3  # runs, the run's directory, the file
    assert all(mode(path) & 0o077 == 0 for path in created)

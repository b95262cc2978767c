"""A reader of the store sees whole versions only, whatever happened to the publisher."""

import os
import shutil
from pathlib import Path

import pytest
import xxhash

from atropos_hpc import run_dir
from atropos_hpc.policy.follower import Follower
from atropos_hpc.policy.store import BadVersion, PolicyStore, Published, verify
from atropos_hpc.run_dir import RunDir, write_file


@pytest.fixture
def store(tmp_path: Path) -> PolicyStore:
    run = RunDir(tmp_path)
    run.create()
    return PolicyStore(run.policy)


def publish(store: PolicyStore, version: int, attempt: int = 1, content: bytes | None = None) -> Published:
    directory = store.begin(version, attempt)
    files = []
    for shard in range(2):
        data = content or f"weights {version} {attempt} {shard}".encode() * 100
        write_file(directory / f"model-{shard}.safetensors", data)
        files.append({"file": f"model-{shard}.safetensors", "bytes": len(data), "xxh3": xxhash.xxh3_64_hexdigest(data), "names": []})
    return store.commit(version, attempt, files)


def test_latest_is_what_was_committed_last(store: PolicyStore) -> None:
    assert store.latest() is None
    published = publish(store, 3)
    assert store.latest() == published
    verify(published)


def test_versions_of_a_later_attempt_are_newer_even_after_going_back(store: PolicyStore) -> None:
    before, after = publish(store, 12, attempt=1), publish(store, 10, attempt=store.next_attempt())
    assert after > before and after.attempt == 2
    follower = Follower(store)
    follower.newest = before
    assert follower.look() == after


@pytest.mark.parametrize("harm", ["truncate", "flip", "remove", "manifest"])
def test_a_damaged_version_is_refused_by_name_and_the_old_one_stays(store: PolicyStore, harm: str) -> None:
    follower = Follower(store)
    publish(store, 1)
    good = follower.look()
    bad = publish(store, 2)
    path = bad.directory / "model-1.safetensors"
    data = bytearray(path.read_bytes())
    if harm == "truncate":
        path.write_bytes(data[:-1])
    elif harm == "flip":
        data[7] ^= 1
        path.write_bytes(data)
    elif harm == "remove":
        path.unlink()
    else:
        (bad.directory / "manifest.json").unlink()
    with pytest.raises(BadVersion, match=r"manifest\.json" if harm == "manifest" else r"model-1\.safetensors"):
        verify(bad)
    assert follower.look() == good and follower.bad
    follower._look_again = 0
    newer = publish(store, 3)
    assert follower.look() == newer and follower.bad is None


def test_retire_keeps_the_newest_and_sweeps_what_is_incomplete(store: PolicyStore) -> None:
    for version in range(5):
        publish(store, version)
    store.begin(7, 1)  # a publisher that was killed
    store.retire(keep=2)
    assert sorted(name for name in os.listdir(store.root) if name != "latest.json") == ["3-1", "4-1"]


def test_a_publisher_killed_at_any_write_leaves_a_whole_latest(store: PolicyStore) -> None:
    """Fork a publisher and have it die at its n-th system call of those that matter, for every n."""
    old = publish(store, 1)
    points = 0
    for n in range(1, 100):
        if (pid := os.fork()) == 0:
            left = n

            def counted(name: str, real: object) -> object:
                def call(*args: object, **kwargs: object) -> object:
                    nonlocal left
                    left -= 1
                    if left == 0:
                        os._exit(9)
                    return real(*args, **kwargs)  # type: ignore[operator]

                return call

            for name in ("open", "write", "fsync", "rename", "close"):
                setattr(run_dir.os, name, counted(name, getattr(os, name)))
            publish(store, 2)
            os._exit(0)
        if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0:
            break
        points += 1
        latest = store.latest()
        assert latest is not None
        verify(latest)
        assert latest.version in (1, 2)
    assert points > 15
    store.retire(keep=1)
    assert store.latest() != old


def test_a_follower_outlives_a_store_that_vanishes(store: PolicyStore) -> None:
    publish(store, 1)
    follower = Follower(store)
    good = follower.look()
    gone = publish(store, 2)
    shutil.rmtree(gone.directory)
    assert follower.look() == good

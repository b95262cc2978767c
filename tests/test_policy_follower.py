"""A node agent's reader of the store, when memory is short, or files go away."""

import errno
import os
import shutil
import time
from collections.abc import Callable

import pytest
from policy_crashes import Learner
from test_policy_store import key, publish, taken

from atropos_hpc.contracts.policy import PolicyVersion
from atropos_hpc.policy import leases, node_cache
from atropos_hpc.policy.follower import Follower
from atropos_hpc.policy.leases import LEASE_S
from atropos_hpc.policy.manifest import verify
from atropos_hpc.policy.store import PolicyStore
from atropos_hpc.runtime.run_dir import RunDir


@pytest.fixture
def store(run: RunDir) -> PolicyStore:
    return PolicyStore(run.policy)


def test_without_room_in_memory_servers_read_the_store_and_deltas_are_complained_of(
    store: PolicyStore, follow: Callable[..., Follower], monkeypatch: pytest.MonkeyPatch
) -> None:
    learner, complaints = Learner(store.root), list[PolicyVersion]()
    follower = follow(store, request_republish=lambda version, why: complaints.append(version))
    learner.publish(0)
    status = os.statvfs(store.root)
    full = type("Full", (), {"f_bavail": 0, "f_frsize": status.f_frsize})
    monkeypatch.setattr(node_cache.os, "statvfs", lambda path: full)
    newest = follower.poll()
    assert newest is not None and newest.directory == store.root / "0-1"
    monkeypatch.undo()
    learner.publish(1)
    monkeypatch.setattr(node_cache.os, "statvfs", lambda path: full)
    for _ in range(2):
        follower._retry_at = 0
        assert follower.poll() == newest
    assert "see policy.cache" in str(follower.failure) and [
        version.version for version in complaints
    ] == [1]
    learner.publish(1, in_full=True)
    follower._retry_at = 0
    newest = follower.poll()
    assert newest is not None and newest.directory == store.root / "1-1"


def test_memory_that_others_take_meanwhile_is_short_as_well(
    store: PolicyStore, follow: Callable[..., Follower], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    publish(store, 1)
    follower = follow(store, request_republish=lambda version, why: pytest.fail(why))
    monkeypatch.setattr(node_cache.os, "posix_fallocate", fails)
    newest = follower.poll()
    assert newest is not None and newest.directory == store.root / "1-1"
    assert follower.failure is None


def test_a_follower_outlives_a_store_that_vanishes(
    store: PolicyStore, follow: Callable[..., Follower]
) -> None:
    publish(store, 1)
    follower = follow(store)
    good = taken(follower)
    gone = publish(store, 2)
    shutil.rmtree(store.directory(gone))
    assert taken(follower) == good


def test_a_node_whose_copy_was_removed_makes_it_anew(
    store: PolicyStore, follow: Callable[..., Follower]
) -> None:
    """As systemd-logind does in /dev/shm when the user logs out of the node (RemoveIPC)."""
    publish(store, 1)
    follower = follow(store, request_republish=lambda version, why: pytest.fail(why))
    assert taken(follower) == key("1-1")
    shutil.rmtree(follower.cache.root)
    newest = follower.poll()  # which a server that is restarted now has to load
    assert newest is not None and verify(newest.directory).version == key("1-1")
    shutil.rmtree(follower.cache.root)
    publish(store, 2)
    newest = follower.poll()
    assert newest is not None and verify(newest.directory).version == key("2-1")
    assert follower.failure is None


def test_what_servers_read_in_the_store_stays_and_its_check_can_be_aborted(
    store: PolicyStore, follow: Callable[..., Follower], monkeypatch: pytest.MonkeyPatch
) -> None:
    status = os.statvfs(store.root)
    full = type("Full", (), {"f_bavail": 0, "f_frsize": status.f_frsize})
    publish(store, 0)
    follower = follow(store)
    monkeypatch.setattr(node_cache.os, "statvfs", lambda path: full)
    first = follower.poll()
    assert first is not None and first.directory == store.root / "0-1"
    now, step_s = time.monotonic(), 0.0
    monkeypatch.setattr(leases.time, "monotonic", lambda: now + step_s)
    with follower.loading(first):
        for version in range(1, 5):
            step_s += LEASE_S / 2
            publish(store, version)
            assert taken(follower) == key(f"{version}-1")
            store.retire(1, attempt=1)
        verify(first.directory)
    for version in (5, 6):
        publish(store, version)
        taken(follower)
        store.retire(1, attempt=1)
    assert not first.directory.exists()
    publish(store, 7)
    follower.stop()
    assert taken(follower) == key("6-1"), "the version is not read to its end"


def test_a_copy_stays_while_a_server_loads_it_and_goes_afterwards(
    store: PolicyStore, follow: Callable[..., Follower]
) -> None:
    """A server that waits for its requests reads an adapter long after it was told of it."""
    publish(store, 1)
    follower = follow(store)
    first = follower.poll()
    assert first is not None
    with follower.loading(first):
        for version in (2, 3):
            publish(store, version)
            assert taken(follower) == key(f"{version}-1")
        verify(first.directory)
        assert not (first.directory.parent / "2-1").exists()
    publish(store, 4)
    assert taken(follower) == key("4-1")
    assert [path.name for path in first.directory.parent.iterdir() if path.is_dir()] == ["4-1"]


def test_a_reader_that_ends_does_not_read_to_the_end(
    store: PolicyStore, follow: Callable[..., Follower]
) -> None:
    publish(store, 1)
    follower = follow(store, request_republish=lambda version, why: pytest.fail(why))
    follower.stop()
    for _ in range(3):
        assert taken(follower) is None
    assert follower.failures == 0

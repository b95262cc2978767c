"""A reader of the store sees whole versions only, whatever happened to the publisher."""

import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import xxhash
from policy_crashes import KINDS, MEMORY, Learner, try_points, weights

from atropos_hpc.contracts.policy import DeltaEntry, FileEntry, Manifest, PolicyVersion
from atropos_hpc.policy import leases, node_cache
from atropos_hpc.policy.follower import Follower
from atropos_hpc.policy.leases import LEASE_S, Lease
from atropos_hpc.policy.manifest import BadVersion, UnreadableManifest, verify
from atropos_hpc.policy.routes import find_routes
from atropos_hpc.policy.store import PolicyStore, StoreFull, Superseded
from atropos_hpc.runtime import run_dir
from atropos_hpc.runtime.run_dir import RunDir, write_file


@pytest.fixture
def store(tmp_path: Path) -> PolicyStore:
    run = RunDir(tmp_path)
    run.create()
    return PolicyStore(run.policy)


def publish(
    store: PolicyStore, version: int, attempt: int = 1, content: bytes | None = None
) -> PolicyVersion:
    key = PolicyVersion(version=version, attempt=attempt)
    directory = store.begin(key)
    files = []
    for shard in range(2):
        data = content or f"weights {version} {attempt} {shard}".encode() * 100
        write_file(directory / f"model-{shard}.safetensors", data)
        digest = xxhash.xxh3_64_hexdigest(data)
        files.append(FileEntry(f"model-{shard}.safetensors", len(data), digest))
    store.commit(Manifest(version=key, kind="full", files=tuple(files)))
    return key


def taken(follower: Follower) -> PolicyVersion | None:
    """The version that the follower has after another look."""
    newest = follower.poll()
    return newest and newest.version


def key(text: str) -> PolicyVersion:
    return PolicyVersion.parse(text)


def test_latest_is_what_was_committed_last(store: PolicyStore) -> None:
    assert store.latest() is None
    published = publish(store, 3)
    assert store.latest() == published
    verify(store.directory(published))


def test_versions_of_a_later_attempt_are_newer_even_after_going_back(
    store: PolicyStore, follow: Callable[..., Follower]
) -> None:
    before = publish(store, 12, attempt=store.claim_attempt())
    follower = follow(store)
    assert taken(follower) == before
    after = publish(store, 10, attempt=store.claim_attempt())
    assert after > before and after.attempt == 2
    assert taken(follower) == after


@pytest.mark.parametrize("harm", ["truncate", "flip", "remove", "manifest"])
def test_a_damaged_version_is_refused_by_name_and_the_old_one_stays(
    store: PolicyStore, follow: Callable[..., Follower], harm: str
) -> None:
    complaints: list[PolicyVersion] = []
    follower = follow(store, request_republish=lambda version, why: complaints.append(version))
    publish(store, 1)
    good = taken(follower)
    bad = publish(store, 2)
    path = store.directory(bad) / "model-1.safetensors"
    data = bytearray(path.read_bytes())
    if harm == "truncate":
        path.write_bytes(data[:-1])
    elif harm == "flip":
        data[7] ^= 1
        path.write_bytes(data)
    elif harm == "remove":
        path.unlink()
    else:
        (store.directory(bad) / "manifest.json").unlink()
    with pytest.raises(
        BadVersion, match=r"manifest\.json" if harm == "manifest" else r"model-1\.safetensors"
    ):
        verify(store.directory(bad))
    assert taken(follower) == good and follower.failure and not complaints
    follower._retry_at = 0
    assert taken(follower) == good and complaints == [bad], (
        "asked for again, when reading it again has not helped"
    )
    follower._retry_at = 0
    newer = publish(store, 3)
    assert taken(follower) == newer and follower.failure is None


def names(store: PolicyStore) -> list[str]:
    return sorted(name for name in os.listdir(store.root) if name[0].isdigit())


def test_what_is_retired_is_first_not_found_any_more_and_then_removed(store: PolicyStore) -> None:
    for version in range(5):
        publish(store, version)
    store.begin(key("7-1"))  # a publisher that was killed
    store.retire(2, attempt=1)
    assert names(store) == ["0-1", "1-1", "2-1", "3-1", "4-1"]
    with pytest.raises(BadVersion, match="no readable manifest"):
        store.manifest(key("2-1"))
    store.retire(2, attempt=1)
    assert names(store) == ["3-1", "4-1"]


def test_what_a_reader_reads_stays_until_it_has_read_it_or_its_lease_has_ended(
    store: PolicyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    for version in range(5):
        publish(store, version)
    reads, dies = Lease(store.root, "a"), Lease(store.root, "b")
    reads.take([key("1-1")])
    dies.take([key("2-1")])
    for _ in range(3):
        store.retire(1, attempt=1)
    assert names(store) == ["1-1", "2-1", "4-1"]
    now = time.monotonic()
    monkeypatch.setattr(leases.time, "monotonic", lambda: now + LEASE_S + 1)
    reads.renew()
    for _ in range(2):
        store.retire(1, attempt=1)
    assert names(store) == ["1-1", "4-1"]
    reads.take([])
    store.retire(1, attempt=1)
    store.retire(1, attempt=1)
    assert names(store) == ["4-1"]


def test_nothing_is_removed_while_a_manifest_cannot_be_read(store: PolicyStore) -> None:
    for version in range(4):
        publish(store, version)
    manifest = store.directory(key("2-1")) / "manifest.json"
    manifest.rename(manifest.with_name("aside"))
    manifest.symlink_to(manifest.name)  # reading it fails with ELOOP, as elsewhere with EIO
    for _ in range(2):
        with pytest.raises(UnreadableManifest):
            store.retire(1, attempt=1)
    assert names(store) == ["0-1", "1-1", "2-1", "3-1"]
    manifest.with_name("aside").rename(manifest)
    for _ in range(2):
        store.retire(1, attempt=1)
    assert names(store) == ["3-1"]


def test_no_two_starts_have_the_same_attempt_and_the_older_may_not_publish(
    store: PolicyStore,
) -> None:
    (store.root / "publisher-7.old").mkdir()
    first, second = PolicyStore(store.root), PolicyStore(store.root)
    attempts = [first.claim_attempt(), second.claim_attempt(), first.claim_attempt()]
    assert attempts == [1, 2, 3]
    publish(store, 4, attempt=3)
    with pytest.raises(Superseded, match="attempt 3 publishes here now; this is attempt 2"):
        publish(second, 5, attempt=2)
    latest = store.latest()
    assert latest == key("4-3")
    second.retire(1, attempt=2)
    assert "4-3" in names(store)


def test_a_publish_that_would_not_fit_is_refused_before_it_writes(store: PolicyStore) -> None:
    publish(store, 1, content=b"x" * 1000)
    store.check_quota(1000, limit=4000)
    with pytest.raises(StoreFull, match=r"policy\.max_bytes is 4000"):
        store.check_quota(3000, limit=4000)
    with pytest.raises(StoreFull, match="has .* left"):
        store.check_quota(1 << 60, limit=None)


def chain(kinds: str, sizes: dict[str, int] | None = None) -> Callable[[PolicyVersion], Manifest]:
    """Return manifests of versions 0, 1, ...: F full, B full with a delta, D delta, - lost.

    Files have 100 bytes, deltas 10.
    """

    def manifest(version: PolicyVersion) -> Manifest:
        kind = kinds[version.version]
        if kind == "-":
            raise BadVersion("lost")
        deltas = (DeltaEntry("x.delta", 10, "", "x"),) if kind in "BD" else ()
        return Manifest(
            version=version,
            kind="delta" if kind == "D" else "full",
            files=(FileEntry("x", 100, ""),),
            base=key(f"{version.version - 1}-1") if deltas else None,
            deltas=deltas,
        )

    return manifest


@pytest.mark.parametrize(
    ("kinds", "have", "ways"),
    [
        ("F", None, [(0, [])]),
        ("FDD", None, [(0, [1, 2])]),
        ("FDD", 1, [(None, [2]), (0, [1, 2])]),
        ("FDDB", 2, [(None, [3]), (3, [])]),  # everything is there, but the delta is less
        ("FDDB", None, [(3, [])]),
        ("F" + "D" * 12, 0, [(None, list(range(1, 13))), (0, list(range(1, 13)))]),
        ("F" + "D" * 10 + "B", 0, [(11, []), (None, list(range(1, 12)))]),  # here it is not
        ("F-DB", 1, [(None, [2, 3]), (3, [])]),
        ("F-DB", 0, [(3, [])]),  # it cannot be chained, and is read whole
        ("FDD", 5, [(0, [1, 2])]),
    ],
)
def test_the_shortest_way_to_a_version_comes_first(
    kinds: str, have: int | None, ways: list[tuple[int | None, list[int]]]
) -> None:
    held = None if have is None else key(f"{have}-1")
    found = find_routes(chain(kinds), key(f"{len(kinds) - 1}-1"), held)
    shown = [
        (
            way.start.version.version if way.start else None,
            [step.version.version for step in way.deltas],
        )
        for way in found
    ]
    assert sorted(shown, key=str) == sorted(ways, key=str)
    assert found[0].bytes == min(way.bytes for way in found)


def test_a_version_without_a_way_is_bad() -> None:
    with pytest.raises(BadVersion, match="neither from a full version nor from the one held: lost"):
        find_routes(chain("F-D"), key("2-1"), key("0-1"))


@pytest.fixture
def quick() -> Iterator[PolicyStore]:
    """A store in memory, for many versions."""
    with tempfile.TemporaryDirectory(dir=MEMORY) as scratch:
        run = RunDir(Path(scratch))
        run.create()
        yield PolicyStore(run.policy)


def test_two_hundred_versions_with_random_misses_are_exact(
    quick: PolicyStore, follow: Callable[..., Follower]
) -> None:
    store = quick
    learner, follower, rng = Learner(store.root, anchor_every=16), follow(store), random.Random(0)
    read = 0
    for version in range(200):
        learner.publish(version)
        if rng.random() < 0.3:
            newest = follower.poll()
            assert newest is not None and newest.version.version == version
            parts = weights(learner.attempt, version)
            for number, part in enumerate(parts):
                assert (
                    newest.directory / f"model-{number}.safetensors"
                ).read_bytes() == part.bytes.tobytes()
            read += 1
    assert read > 40
    assert len(names(store)) <= 2 * 16 + 3


@pytest.mark.parametrize("kind", KINDS)
def test_after_a_crash_no_reader_is_wrong_and_the_run_goes_on(kind: str) -> None:
    """Try a few points of each kind; bench/policy_crash.py tries 500."""
    tried = try_points(kind, range(1000, 1020))
    assert tried["wrong answers"] == 0 and tried["did not go on"] == []


def test_hashes_are_what_keeps_a_reader_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """The crash tests can fail: without the comparison, damaged files are served."""
    same = type(
        "Same", (str,), {"__ne__": lambda *_: False, "__eq__": lambda *_: True, "__hash__": None}
    )()
    monkeypatch.setattr(node_cache, "read_into", lambda *arguments: real(*arguments) and same)
    monkeypatch.setattr(node_cache, "xxh3", lambda data: same)
    with pytest.raises((AssertionError, ValueError, IndexError)):
        tried = try_points("damaged file", range(60))
        assert tried["wrong answers"] == 0


real = node_cache.read_into


def test_a_publisher_killed_at_any_write_leaves_a_whole_latest(store: PolicyStore) -> None:
    """Kill a forked publisher at its n-th write call, for every n."""
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
        verify(store.directory(latest))
        assert latest.version in (1, 2)
    assert points > 15
    assert store.latest() != old

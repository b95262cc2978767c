"""Members see each other through the roster that the supervisor publishes."""

import os
import random
import threading
import time
from pathlib import Path

import psutil
import pytest

from atropos_hpc.contracts.members import (
    AgentState,
    Roster,
    ServerState,
    StopRequest,
    TrainerState,
    TrajectoriesState,
    Wait,
)
from atropos_hpc.contracts.policy import PolicyVersion
from atropos_hpc.runtime import membership
from atropos_hpc.runtime.membership import (
    SMALL_RUN,
    Member,
    RosterPublisher,
    RosterReader,
    RosterWatch,
    pending_request,
    post_request,
    read_members,
    withdraw_request,
)
from atropos_hpc.runtime.run_dir import RunDir, Unreadable, read_struct, write_struct


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path)
    run.create()
    return run


def published(run: RunDir) -> Roster:
    roster = read_struct(run.roster, Roster)
    assert roster is not None
    return roster


def test_the_supervisor_wakes_up_when_a_member_changes(run: RunDir) -> None:
    publisher, agent = RosterPublisher(run), Member(run, AgentState(), "n0")
    publisher.publish()
    threading.Timer(0.05, agent.update, kwargs={"state": "serving"}).start()
    start, members = time.monotonic(), publisher.publish()
    while members[agent.name].state != "serving":
        publisher.await_change(60)
        members = publisher.publish()
    assert time.monotonic() - start < 30  # it did not sleep until the deadline


def test_a_member_reports_the_most_memory_that_it_has_held(run: RunDir) -> None:
    member = Member(run, AgentState(), "n0")
    block = bytearray(b"x") * (256 << 20)
    del block
    member.leave()
    (found,) = read_members(run)
    assert found.peak_bytes > psutil.Process().memory_info().rss + (128 << 20)


def test_members_appear_in_the_roster_with_their_state(run: RunDir) -> None:
    publisher, roster = RosterPublisher(run), RosterReader(run.roster)
    assert roster.members(AgentState) == []
    servers = [
        ServerState(url="http://a", version=PolicyVersion(version=3, attempt=1)),
        ServerState(url="http://b"),
    ]
    agent = Member(run, AgentState(servers=servers), "n0")
    server = Member(run, TrajectoriesState(url="http://t"), "n1")
    publisher.publish()
    assert roster.servers() == {"http://a": 3}
    assert roster.trajectory_server() == "http://t"
    agent.update(servers=[ServerState(url="http://b", version=PolicyVersion(version=4, attempt=1))])
    publisher.publish()
    assert roster.servers() == {"http://b": 4}
    agent.leave()
    publisher.publish()
    assert roster.servers() == {} and roster.members(AgentState, alive=False)[0].state == "ended"
    server.leave()


def test_a_field_that_a_kind_does_not_have_is_refused(run: RunDir) -> None:
    member = Member(run, AgentState(), "n0")
    with pytest.raises(AttributeError):
        member.update(rank=3)
    member.leave()


def test_the_jitter_of_heartbeats_leaves_the_global_generator_alone() -> None:
    """Heartbeats run in a thread beside an environment that shuffles its prompts."""
    before = random.getstate()
    assert {membership.jittered(10.0) for _ in range(3)} != {10.0}
    assert random.getstate() == before


def test_a_member_whose_heartbeat_stops_is_not_alive(run: RunDir) -> None:
    publisher, roster = RosterPublisher(run, dead_s=0.3), RosterReader(run.roster)
    beating = Member(run, AgentState(), "n0", beat_s=0.05)
    silent = Member(run, AgentState(), "n1", beat_s=0.05)
    silent.stop_beating()
    deadline = time.monotonic() + 20
    while len(roster.members(AgentState)) != 1 and time.monotonic() < deadline:
        publisher.publish()
        time.sleep(0.02)
    assert [m.node for m in roster.members(AgentState)] == ["n0"]
    assert [m.node for m in published(run).members.values() if m.silent] == ["n1"]
    beating.leave()


def test_a_clock_that_is_hours_off_does_not_matter(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(membership.time, "time", lambda: 12345.0)
    member = Member(run, AgentState(), "n0")
    os.utime(member.path, (0, 0))
    assert RosterPublisher(run).publish()["agent-n0-0"].alive
    member.leave()


@pytest.mark.parametrize(
    "content", ['{"name": "agent-x-0", "ki', '{"kind": "agent", "number": "four"}', "[]"]
)
def test_an_invalid_member_file_is_skipped(run: RunDir, content: str) -> None:
    (run.members / "agent-x-0.json").write_text(content)
    member = Member(run, AgentState(), "n0")
    assert list(RosterPublisher(run).publish()) == ["agent-n0-0"]
    member.leave()


def test_a_damaged_member_file_does_not_make_its_owner_dead(run: RunDir) -> None:
    publisher = RosterPublisher(run, dead_s=0.3)
    member = Member(run, TrajectoriesState(url="http://a"), "n0", beat_s=0.05)
    publisher.publish()
    os.truncate(member.path, 20)
    deadline = time.monotonic() + 1
    while time.monotonic() < deadline:
        seen = publisher.publish()["trajectories-n0-0"]
        assert isinstance(seen, TrajectoriesState)
        assert seen.alive and seen.url == "http://a", "the last known state, with heartbeats"
        time.sleep(0.02)
    member.stop_beating()
    deadline = time.monotonic() + 20
    while publisher.publish()["trajectories-n0-0"].alive:
        assert time.monotonic() < deadline, "damage does not keep alive either"
        time.sleep(0.02)


def test_a_member_with_a_damaged_or_lost_file_is_marked_as_ended(run: RunDir) -> None:
    publisher = RosterPublisher(run)
    members = [Member(run, AgentState(), f"n{number}") for number in range(2)]
    publisher.publish()
    os.truncate(members[0].path, 20)
    members[1].path.unlink()
    for member in members:  # killed
        member.stop_beating()
    publisher.mark_ended(*(member.name for member in members))
    seen = publisher.publish()
    assert {name: (member.state, member.alive) for name, member in seen.items()} == {
        "agent-n0-0": ("ended", False),
        "agent-n1-0": ("ended", False),
    }


def test_a_wait_is_shown_while_it_lasts(run: RunDir) -> None:
    member = Member(run, TrainerState(), "n0")
    member.show_wait(Wait("batch 7", "the trajectory server", since=1.0))
    member.show_wait(Wait("batch 7", "the trajectory server", since=9.0))
    wait = RosterPublisher(run).publish()["trainer-n0-0"].waiting
    assert wait is not None and (wait.what, wait.since) == ("batch 7", 1.0), "the same wait"
    member.show_wait(None)
    assert RosterPublisher(run).publish()["trainer-n0-0"].waiting is None
    member.leave()


def test_requests_are_posted_seen_and_withdrawn(run: RunDir) -> None:
    assert pending_request(run, StopRequest) is None
    post_request(run, StopRequest(by="a test"))
    request = pending_request(run, StopRequest)
    assert request is not None and request.by == "a test" and request.asked > 0
    withdraw_request(run, StopRequest)
    assert pending_request(run, StopRequest) is None
    (run.requests / "stop.json").write_text("{ cut")
    with pytest.raises(Unreadable, match=r"stop\.json"):
        pending_request(run, StopRequest)


def test_in_a_large_run_a_change_is_seen_between_scans_and_scans_are_rare(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    # No heartbeats: 300 threads have nothing to do here.
    monkeypatch.setattr(membership.threading.Thread, "start", lambda thread: None)
    publisher = RosterPublisher(run, scan_s=1.0, read_s=0.0)
    roster = RosterReader(run.roster, read_s=0.0)
    members = [Member(run, AgentState(), f"n{i}") for i in range(300)]
    publisher.publish()
    assert len(roster.members(AgentState)) == 300
    scans: list[float] = []
    monkeypatch.setattr(publisher, "_scan", scans.append)
    members[7].update(
        servers=[ServerState(url="http://a", version=PolicyVersion(version=3, attempt=1))]
    )
    Member(run, TrajectoriesState(url="http://t"), "n0")
    publisher.publish()
    assert roster.servers() == {"http://a": 3} and roster.trajectory_server() == "http://t"
    assert not scans


def test_in_a_large_run_the_roster_is_read_now_and_then(run: RunDir) -> None:
    now = 0.0
    roster = RosterReader(run.roster, clock=lambda: now)
    members = {f"agent-{i}-0": AgentState() for i in range(1000)}
    write_struct(run.roster, Roster(beat=1, members=members))
    assert len(roster.members(AgentState)) == 1000
    write_struct(run.roster, Roster(beat=2, members=members))
    assert roster.read().beat == 1
    now = 1000 * membership.READ_S * 1.2
    assert roster.read().beat == 2


def test_the_last_roster_is_written_at_once_in_a_large_run_too(run: RunDir) -> None:
    members = [Member(run, AgentState(), f"n{i}") for i in range(SMALL_RUN + 5)]
    publisher = RosterPublisher(run)
    try:
        publisher.publish()
        members[3].update(state="ending")
        publisher.publish(at_once=True)
        assert published(run).members["agent-n3-0"].state == "ending"
    finally:
        for member in members:
            member.leave()


def test_the_supervisor_is_silent_for_as_long_as_the_roster_does_not_change(run: RunDir) -> None:
    now = 0.0
    watch = RosterWatch(RosterReader(run.roster), clock=lambda: now)
    write_struct(run.roster, Roster(beat=1))
    assert watch.silent_s() == 0
    now = 8.0
    assert watch.silent_s() == 8
    write_struct(run.roster, Roster(beat=2))
    assert watch.silent_s() == 0

"""Members see each other through the leader's roster; waits end, and say what they waited for."""

import os
import time
from pathlib import Path

import pytest

from atropos_hpc.runtime import membership
from atropos_hpc.runtime.membership import (
    FEW,
    Leader,
    Member,
    Roster,
    ask,
    asked,
    wait_for,
    withdraw,
)
from atropos_hpc.runtime.run_dir import RunDir, read_json, write_json


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path)
    run.create()
    return run


def test_members_appear_in_the_roster_with_what_they_say(run: RunDir) -> None:
    leader, roster = Leader(run), Roster(run.roster)
    assert roster.members("agent") == []
    agent = Member(
        run,
        "agent",
        "n0",
        servers=[{"url": "http://a", "version": 3}, {"url": "http://b", "version": None}],
    )
    server = Member(run, "trajectories", "n1", url="http://t")
    leader.look()
    assert roster.servers() == {"http://a": 3}
    assert roster.trajectory_server() == "http://t"
    agent.update(servers=[{"url": "http://b", "version": 4}])
    leader.look()
    assert roster.servers() == {"http://b": 4}
    agent.leave()
    leader.look()
    assert roster.servers() == {} and roster.members("agent", alive=False)[0]["state"] == "ended"
    server.leave()


def test_a_member_whose_beat_stops_is_not_alive(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(membership, "DEAD_S", 0.3)
    monkeypatch.setattr(membership, "BEAT_S", 0.05)
    leader, roster = Leader(run), Roster(run.roster)
    beating, silent = Member(run, "agent", "n0"), Member(run, "agent", "n1")
    silent._stop.set()
    silent._thread.join()
    deadline = time.monotonic() + 20
    while len(roster.members("agent")) != 1 and time.monotonic() < deadline:
        leader.look()
        time.sleep(0.02)
    assert [m["node"] for m in roster.members("agent")] == ["n0"]
    beating.leave()


def test_a_clock_that_is_hours_off_does_not_matter(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(membership.time, "time", lambda: 12345.0)
    member = Member(run, "agent", "n0")
    os.utime(member.path, (0, 0))
    leader = Leader(run)
    assert leader.look()["agent-n0-0"]["alive"]
    member.leave()


def test_a_half_written_member_file_is_passed_over(run: RunDir) -> None:
    (run.members / "agent-x-0.json").write_text('{"name": "agent-x-0", "ki')
    member = Member(run, "agent", "n0")
    assert list(Leader(run).look()) == ["agent-n0-0"]
    member.leave()


def test_a_damaged_member_file_does_not_kill_its_owner(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(membership, "DEAD_S", 0.3)
    leader = Leader(run)
    monkeypatch.setattr(membership, "BEAT_S", 0.05)
    member = Member(run, "agent", "n0", url="http://a")
    leader.look()
    os.truncate(member.path, 20)
    deadline = time.monotonic() + 1
    while time.monotonic() < deadline:
        seen = leader.look()["agent-n0-0"]
        assert seen["alive"] and seen["url"] == "http://a", (
            "as it was seen last, as its file is touched still"
        )
        time.sleep(0.02)
    member._stop.set()
    member._thread.join()
    deadline = time.monotonic() + 20
    while leader.look()["agent-n0-0"]["alive"]:
        assert time.monotonic() < deadline, "damage does not keep alive either"
        time.sleep(0.02)


def test_a_member_with_a_damaged_or_lost_file_is_marked_as_ended(run: RunDir) -> None:
    leader, members = Leader(run), [Member(run, "agent", f"n{number}") for number in range(2)]
    leader.look()
    os.truncate(members[0].path, 20)
    members[1].path.unlink()
    for member in members:  # killed
        member._stop.set()
        member._thread.join()
    leader.ended(*(member.name for member in members))
    assert {name: (seen["state"], seen["alive"]) for name, seen in leader.look().items()} == {
        "agent-n0-0": ("ended", False), "agent-n1-0": ("ended", False),
    }  # fmt: skip


def test_waits_are_shown_and_end_with_a_story(run: RunDir) -> None:
    member = Member(run, "trainer", "n0")
    with member.waiting("batch 7", "the trajectory server"):
        assert Leader(run).look()["trainer-n0-0"]["waiting"]["what"] == "batch 7"
    assert Leader(run).look()["trainer-n0-0"]["waiting"] is None
    with pytest.raises(TimeoutError, match=r"for a sign from nobody"):
        wait_for("a sign", "nobody", lambda: None, 0.1, 0.02, member)
    member.leave()


def test_requests_are_left_seen_and_withdrawn(run: RunDir) -> None:
    assert asked(run, "stop") is None
    ask(run, "stop", by="a test")
    assert (asked(run, "stop") or {})["by"] == "a test"
    withdraw(run, "stop")
    assert asked(run, "stop") is None


def test_in_a_crowd_a_change_is_seen_between_rounds_and_rounds_are_rare(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        membership.threading.Thread, "start", lambda thread: None
    )  # no beats: 300 threads have nothing to do here
    monkeypatch.setattr(membership, "ROUND_S", 1.0)
    monkeypatch.setattr(membership, "READ_S", 0.0)
    leader, roster = Leader(run), Roster(run.roster)
    members = [Member(run, "agent", f"n{i}", servers=[]) for i in range(300)]
    leader.look()
    assert len(roster.members("agent")) == 300
    rounds = []
    monkeypatch.setattr(leader, "_look_at_all", rounds.append)
    members[7].update(servers=[{"url": "http://a", "version": 3}])
    Member(run, "trajectories", "n0", url="http://t")
    leader.look()
    assert roster.servers() == {"http://a": 3} and roster.trajectory_server() == "http://t"
    assert not rounds


def test_a_crowd_looks_at_the_roster_now_and_then(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    roster = Roster(run.roster)
    members = {f"agent-{i}-0": {"kind": "agent", "alive": True, "servers": []} for i in range(1000)}
    write_json(run.roster, {"beat": 1, "members": members})
    assert len(roster.members("agent")) == 1000
    write_json(run.roster, {"beat": 2, "members": members})
    assert roster.read()["beat"] == 1
    now = time.monotonic()
    monkeypatch.setattr(membership.time, "monotonic", lambda: now + 1000 * membership.READ_S * 1.2)
    assert roster.read()["beat"] == 2


def test_the_last_look_is_written_at_once_in_a_crowd_too(run: RunDir) -> None:
    members = [Member(run, "agent", f"n{i}") for i in range(FEW + 5)]
    leader = Leader(run)
    try:
        leader.look()
        members[3].update(state="ending")
        leader.look(at_once=True)
        assert read_json(run.roster)["members"]["agent-n3-0"]["state"] == "ending"
    finally:
        for member in members:
            member.leave()

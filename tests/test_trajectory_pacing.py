"""How much each environment may start, and what it is told. No I/O."""

from typing import Any

from trajectory_parts import add, item, paced

from atropos_hpc.contracts.messages import Quota, StatusRequest
from atropos_hpc.trajectories.events import BatchFormed, Environment, EnvironmentAdded
from atropos_hpc.trajectories.pacing import Demand, Pacing, Timeouts, admission_quota

LIMITS = Timeouts()


def report(pacing: Pacing, env_id: int, now: float, in_flight: int, served: int = 0) -> None:
    pacing.report(StatusRequest(env_id, in_flight, served), now)


def demand(pacing: Pacing, env_id: int, now: float) -> Demand:
    weight = pacing.status(env_id, now).env_weight
    return pacing.demand(env_id, weight, pacing.minimums(now), now)


def groups(batches: int = 1, **changes: Any) -> int:
    """The quota in groups of 8, for batches of 64, with one worker and nothing under way."""
    return admission_quota(
        Demand(**{"batches": batches, "batch_size": 64, "group_size": 8} | changes)
    )


def test_on_policy_a_batch_is_begun_only_when_its_version_is_served() -> None:
    state, pacing = paced(64, [{"group_size": 8}])
    for batch in range(4):
        state.apply(BatchFormed(batch, [], batch))
    assert pacing.status(0, 0.0).quota is None  # an Atropos client, which does not report
    report(pacing, 0, 0.0, in_flight=0, served=4)
    assert pacing.status(0, 0.0).quota == Quota(groups=8, oldest_version=4)
    report(pacing, 0, 0.0, in_flight=0, served=3)
    assert pacing.status(0, 0.0).quota == Quota(groups=0, oldest_version=4)
    pacing.report(StatusRequest(0, in_flight=0), 0.0)  # no server is there
    assert pacing.status(0, 0.0).quota == Quota(groups=0, oldest_version=4)


def test_staleness_allows_so_many_batches_ahead() -> None:
    state, pacing = paced(64, [{"group_size": 8}], max_staleness=2)
    for batch, quota in ((4, 24), (6, 8), (7, 0)):
        state.next_batch = batch
        report(pacing, 0, 0.0, in_flight=0, served=4)
        assert pacing.status(0, 0.0).quota == Quota(quota, batch - 2)


def test_what_is_queued_and_in_flight_reduces_the_quota() -> None:
    assert groups(queued=24) == 5
    assert groups(queued=24, in_flight=16, others_in_flight=8) == 2
    assert groups(in_flight=64) == 0
    assert groups(queued=60) == 1  # a batch waits for these 4 sequences
    assert groups(queued=640) == 0


def test_workers_that_ask_at_once_divide_the_quota_by_weight() -> None:
    started = [groups(weight=1 / 3) for _ in range(3)]
    assert sum(started) >= 8 and sum(started) - 8 < 3
    assert groups(weight=1 / 3, in_flight=24) == 0  # its part is under way
    assert groups(weight=0.01) == 1
    assert [groups(batches=4, weight=weight) for weight in (0.75, 0.25)] == [24, 8]


def test_a_minimum_allocation_is_reserved() -> None:
    assert groups(weight=0.1) == 1
    assert groups(weight=0.1, minimum=16) == 2  # though its weight would give it less
    assert groups(batches=3, weight=0.1, minimum=16) == 6
    assert groups(weight=0.1, minimum=16, own_queued=8) == 1
    assert groups(weight=0.1, minimum=16, in_flight=16) == 0
    assert groups(other_minimums=[(16, 0)]) == 6  # the rest, for the others
    assert groups(other_minimums=[(16, 8), (8, 8)], queued=8, others_in_flight=8) == 5
    assert groups(batches=3, other_minimums=[(16, 0)]) == 18


def test_a_minimum_is_admitted_though_others_fill_all_batches_to_come() -> None:
    assert groups(minimum=16, queued=64) == 2
    assert groups(batches=3, minimum=16, queued=192) == 2
    assert groups(minimum=16, queued=64, in_flight=16) == 0
    assert groups(minimum=16, queued=64, own_queued=16) == 0
    assert groups(batches=0, minimum=16) == 0  # no batch that it could enter


def test_queue_size_counts_what_waits_to_be_trained_on() -> None:
    state, pacing = paced(8, [{}])
    add(state, *(item(gid) for gid in range(5)))
    state.apply(BatchFormed(0, [0, 1], 0))
    state.apply(BatchFormed(1, [2, 3], 0))
    # the learner, at version 0, has not finished batch 0
    assert pacing.status(0, 0.0).queue_size == 5
    state.version = 1
    assert pacing.status(0, 0.0).queue_size == 3
    state.version = 2
    status = pacing.status(0, 0.0)
    assert (status.queue_size, status.self_queue_size, status.current_step) == (1, 1, 2)


def test_silent_environments_count_no_longer_until_heard_again() -> None:
    _, pacing = paced(
        8, [{"min_batch_allocation": 0.25}, {"min_batch_allocation": 0.5, "weight": 3.0}]
    )
    report(pacing, 0, 0.0, in_flight=5)
    report(pacing, 1, 0.0, in_flight=7)
    status = pacing.status(0, 1.0)
    assert (status.env_weight, status.unallocated_fraction) == (0.25, 0.25)
    assert demand(pacing, 0, 1.0).others_in_flight == 7
    assert demand(pacing, 0, LIMITS.report_s + 1).others_in_flight == 0
    pacing.report(StatusRequest(0), LIMITS.disconnected_s)
    status = pacing.status(0, LIMITS.disconnected_s + 1)
    assert (status.env_weight, status.unallocated_fraction) == (1.0, 0.75)
    pacing.report(StatusRequest(1), LIMITS.disconnected_s + 2)
    assert pacing.status(0, LIMITS.disconnected_s + 2).env_weight == 0.25


def test_a_quota_reserves_the_minimums_that_are_awaited() -> None:
    state, pacing = paced(16, [{}, {"min_batch_allocation": 0.25}, {"min_batch_allocation": 0.5}])
    assert demand(pacing, 0, 0.0).other_minimums == []  # none has delivered yet; it may never
    pacing.deliver(1, 0.0)
    pacing.deliver(2, 0.0)
    add(state, item(0, env_id=2), item(1, env_id=2), item(2, env_id=0))
    report(pacing, 2, 0.0, in_flight=3)
    asked = [demand(pacing, env_id, 0.0) for env_id in range(3)]
    assert [(each.own_queued, each.minimum) for each in asked] == [(4, 0), (0, 4), (8, 8)]
    assert [each.other_minimums for each in asked] == [[(4, 0), (8, 11)], [(8, 11)], [(4, 0)]]
    assert pacing.next_batch(1.0) is None  # a batch is requested, and 1 keeps silent
    report(pacing, 2, 2 + LIMITS.allocation_s, in_flight=3)
    # the others may fill its place
    assert demand(pacing, 0, 2 + LIMITS.allocation_s).other_minimums == [(8, 11)]


def test_when_all_have_gone_the_answer_is_still_one() -> None:
    _, pacing = paced(8, [{}])
    pacing.presence[0].heard = None
    assert pacing.status(0, 0.0).env_weight == 0.01


def test_a_late_group_does_not_reconnect_an_environment() -> None:
    _, pacing = paced(8, [{}, {}])
    pacing.presence[1].heard = None
    pacing.deliver(1, 1.0)
    assert [e.env_id for e in pacing.connected(1.0)] == [0]


def test_an_environment_that_is_just_being_registered_does_not_break_the_answers_to_others() -> (
    None
):
    state, pacing = paced(64, [{"group_size": 8}])
    state.apply(EnvironmentAdded(Environment(1, "new", "new_0", 10, 8, 1.0)))
    report(pacing, 0, 0.0, in_flight=0)
    assert pacing.status(0, 0.0).quota == Quota(groups=8, oldest_version=0)

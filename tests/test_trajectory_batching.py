"""Which groups make a batch, who gets which, and what survives a restart. No I/O."""

import random

import pytest
from trajectory_parts import add, item, paced

from atropos_hpc.contracts.messages import Registration, StatusRequest
from atropos_hpc.contracts.wal_record import header_at
from atropos_hpc.trajectories import events
from atropos_hpc.trajectories.batching import select_groups, split_by_tokens
from atropos_hpc.trajectories.events import BatchFormed, Environment
from atropos_hpc.trajectories.pacing import Pacing, Timeouts
from atropos_hpc.trajectories.state import TrajectoryState

LIMITS = Timeouts()


def test_batches_are_first_in_first_out():
    state, pacing = paced()
    add(state, *(item(gid) for gid in range(5)))
    assert pacing.next_batch(0.0) == [0, 1]
    state.apply(BatchFormed(0, [0, 1], 0))
    assert pacing.next_batch(0.0) == [2, 3]
    state.apply(BatchFormed(1, [2, 3], 1))
    assert pacing.next_batch(0.0) is None
    assert state.queued_sequences == 4


@pytest.mark.parametrize(
    ("sizes", "want", "chosen"),
    [
        ([8, 8], 16, [0, 1]),
        ([12, 8, 8, 8], 16, [1, 2]),  # 12 fits nothing here; it waits for a 4
        ([12, 8, 8, 4], 16, [0, 3]),
        ([3, 3, 3, 3, 3], 16, None),
        ([3, 3, 3, 3, 3, 1], 16, [0, 1, 2, 3, 4, 5]),
        ([3, 8, 8], 16, [1, 2]),
        ([20, 16], 16, [1]),
        ([5, 5, 5, 2, 4], 16, [0, 1, 3, 4]),
        ([], 4, None),
    ],
)
def test_mixed_sizes_sum_exactly_and_do_not_stall(sizes, want, chosen):
    assert select_groups([item(gid, size) for gid, size in enumerate(sizes)], want) == chosen


def test_a_batch_is_found_whenever_there_is_one():
    dice = random.Random(0)
    for _ in range(500):
        sizes = [dice.randint(1, 9) for _ in range(dice.randint(1, 8))]
        want = dice.randint(1, 24)
        sums = {0}
        for size in sizes:
            sums |= {total + size for total in sums}
        chosen = select_groups([item(gid, size) for gid, size in enumerate(sizes)], want)
        assert (chosen is not None) == (want in sums), (sizes, want)
        assert chosen is None or sum(sizes[gid] for gid in chosen) == want


@pytest.mark.parametrize(
    ("sizes", "want", "chosen"),
    [
        ([3] * 6, 16, [0, 1, 2, 3, 4]),
        ([12, 8, 8], 16, [1, 2]),
        ([20], 16, None),
        ([7, 20, 7], 16, [0, 2]),
        ([5, 5, 5, 2], 16, [0, 1, 2]),
    ],
)
def test_sizes_that_never_add_up_fill_a_batch_as_far_as_they_go(sizes, want, chosen):
    assert (
        select_groups([item(gid, size) for gid, size in enumerate(sizes)], want, exactly=False)
        == chosen
    )


def test_a_batch_is_short_only_when_no_group_comes_any_more():
    state, pacing = paced(16)
    add(state, *(item(gid, 3) for gid in range(6)))
    pacing.deliver(0, 100.0)
    assert pacing.next_batch(100.0 + LIMITS.quiet_s - 1) is None
    assert pacing.next_batch(100.0 + LIMITS.quiet_s + 1) == [0, 1, 2, 3, 4]
    state.apply(BatchFormed(0, [0, 1, 2, 3, 4], 0))
    assert pacing.next_batch(200.0) is None, "fewer than a batch are waited for, however long"


def test_a_minimum_share_goes_before_older_groups_of_others():
    state, pacing = paced(16, [{}, {"min_batch_allocation": 0.5}])
    add(state, *(item(gid) for gid in range(6)), item(6, env_id=1), item(7, env_id=1))
    assert pacing.next_batch(0.0) == [0, 1, 6, 7]


def test_a_share_is_waited_for_while_its_environment_delivers_and_no_longer():
    state, pacing = paced(16, [{}, {"min_batch_allocation": 0.5}])
    add(state, *(item(gid) for gid in range(6)))
    assert pacing.next_batch(0.0) == [0, 1, 2, 3]  # it has never delivered
    pacing.deliver(1, 100.0)
    assert pacing.next_batch(100.0 + LIMITS.allocation_s - 1) is None
    assert pacing.next_batch(100.0 + LIMITS.allocation_s + 1) == [0, 1, 2, 3]
    add(state, item(6, env_id=1), item(7, env_id=1))
    assert pacing.next_batch(100.0) == [0, 1, 6, 7]


def test_who_keeps_silent_holds_up_one_batch_and_then_no_other_until_it_delivers():
    state, pacing = paced(8, [{}, {"min_batch_allocation": 0.5}])
    add(state, *(item(gid) for gid in range(10)))
    pacing.deliver(1, 0.0)
    assert (
        pacing.next_batch(50.0) is None
    )  # from when the batch is asked for: before, the learner was busy
    assert pacing.next_batch(50.0 + LIMITS.allocation_s) == [0, 1]
    state.apply(BatchFormed(0, [0, 1], 0))
    assert pacing.next_batch(70.0) == [2, 3]
    pacing.deliver(1, 71.0)
    assert pacing.next_batch(72.0) is None
    pacing.report(
        StatusRequest(1, in_flight=4), 73.0
    )  # it generates: then it is worth a longer wait
    assert pacing.next_batch(71.0 + LIMITS.allocation_s) is None
    pacing.report(StatusRequest(1, in_flight=4), 71.0 + LIMITS.busy_allocation_s)
    assert pacing.next_batch(71.0 + LIMITS.busy_allocation_s) == [2, 3]


def test_shares_of_more_than_a_batch_are_scaled_down():
    state, pacing = paced(8, [{"min_batch_allocation": 0.9}, {"min_batch_allocation": 0.9}])
    add(state, *(item(gid) for gid in range(4)), item(4, env_id=1))
    assert pacing.next_batch(0.0) == [0, 4]


def test_stale_groups_are_those_before_the_version_and_not_the_unknown():
    state, _ = paced()
    add(state, item(0, oldest=3), item(1, oldest=4), item(2, oldest=-1), item(3, oldest=5))
    assert state.stale(3) == []
    assert state.stale(5) == [0, 1]
    state.apply(events.GroupsDropped([0, 1], oldest=5, sequences=8))
    assert (state.stale_groups, state.stale_sequences, state.queued_sequences) == (2, 8, 8)
    assert state.stale(5) == [] and state.live == {0: 2}


def test_ranks_get_whole_groups_balanced_by_tokens():
    items = [item(gid, tokens=tokens) for gid, tokens in enumerate([100, 10, 10, 10, 70, 50])]
    shares = split_by_tokens(items, 2)
    assert sorted(one.gid for share in shares for one in share) == [0, 1, 2, 3, 4, 5]
    assert [sum(one.tokens for one in share) for share in shares] == [130, 120]
    assert all([one.gid for one in share] == sorted(one.gid for one in share) for share in shares)
    assert split_by_tokens(items, 2) == split_by_tokens(items[::-1], 2)
    assert [len(share) for share in split_by_tokens(items[:2], 4)] == [1, 1, 0, 0]


def test_an_acknowledged_batch_frees_its_segment():
    state, _ = paced()
    add(state, item(0, segment=0), item(1, segment=1), item(2, segment=1), item(3, segment=1))
    state.apply(BatchFormed(0, [0, 1], 0))
    assert state.live == {0: 1, 1: 3}
    state.apply(events.BatchesAcknowledged(0))
    assert state.live == {1: 2} and not state.batches


def test_a_learner_that_resumes_may_still_go_back_further():
    state, _ = paced()
    add(state, *(item(gid) for gid in range(6)))
    for batch in range(3):
        state.apply(BatchFormed(batch, [2 * batch, 2 * batch + 1], batch))
    for step in (2, 0):
        state.apply(events.TrainerRegistered(Registration(8, 0, starting_step=step)))
        assert list(state.batches) == [0, 1, 2] and state.next_batch == 3
    state.apply(events.TrainerRegistered(Registration(8, 0, starting_step=7)))
    assert state.next_batch == 7


def test_a_snapshot_is_the_whole_state():
    state, pacing = paced(8, [{"member": "m"}], starting_step=4)
    items = [item(gid, oldest=gid, segment=gid % 2) for gid in range(5)]
    add(state, *items)
    state.apply(events.Started())
    state.apply(events.GroupsDropped([0], oldest=1, sequences=4))
    state.apply(BatchFormed(4, [1, 2], 4))
    again = TrajectoryState()
    for one in items:
        again.add(one, one.gid, replay=True)
    again.restore(state.snapshot(), state.known)
    assert again.end_replay() == []
    assert again.snapshot() == state.snapshot()
    assert list(again.known) == list(state.known) and again.live == state.live
    after = Pacing(again)
    after.restart(0.0)
    assert after.next_batch(0.0) == pacing.next_batch(0.0) and again.stale(4) == state.stale(4)
    assert after.status(0, 0.0) == pacing.status(0, 0.0)


def test_a_group_that_is_needed_and_missing_is_noticed():
    state, _ = paced()
    add(state, item(0), item(1))
    again = TrajectoryState()
    again.add(item(1), 1, replay=True)
    again.restore(state.snapshot(), state.known)
    assert again.end_replay() == [0]


def test_events_survive_the_journal():
    for event in (
        events.TrainerRegistered(Registration(8, 0)),
        events.EnvironmentAdded(Environment(0, "e", "e_0", 10, 4, 1.0)),
        events.Started(),
        BatchFormed(1, [2, 3], 1),
        events.BatchesAcknowledged(1),
        events.Reset(),
    ):
        record = events.event_record(event).to_bytes()
        assert events.read_event(header_at(record, 0), memoryview(record)) == event

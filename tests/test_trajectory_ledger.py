"""Which groups make a batch, who gets which, and what environments are told. No I/O."""

import random

import pytest

from atropos_hpc.trajectories.batching import (
    BUSY_WAIT_S,
    QUIET_S,
    SHARE_WAIT_S,
    SILENT_S,
    Item,
    Ledger,
    Presence,
    choose,
    share_out,
)
from atropos_hpc.trajectories.journal import Place


def item(gid, sequences=4, tokens=10, env_id=0, oldest=-1, segment=0):
    return Item(gid, Place(segment, gid * 100, 100), sequences, tokens, env_id, oldest)


def ledger(batch_size=8, environments=(), **registration):
    """A ledger with a trainer, and environments given as dicts, all heard of at time 0."""
    made = Ledger()
    made.apply(
        {
            "event": "register",
            "data": {"batch_size": batch_size, "max_token_len": 0, **registration},
        }
    )
    for env_id, more in enumerate(environments):
        data = {
            "env_id": env_id,
            "desired_name": "e",
            "real_name": "e",
            "max_token_length": 10,
            "group_size": 4,
            "weight": 1.0,
            **more,
        }
        made.apply({"event": "environment", "data": data})
        made.presence[env_id] = Presence(0.0)
    return made


def add(to, *items):
    for one in items:
        to.add(one, payload_hash=one.gid)


def test_batches_are_first_in_first_out():
    led = ledger()
    add(led, *(item(gid) for gid in range(5)))
    assert led.choose(0.0) == [0, 1]
    led.apply({"event": "batch", "batch": 0, "groups": [0, 1], "version": 0})
    assert led.choose(0.0) == [2, 3]
    led.apply({"event": "batch", "batch": 1, "groups": [2, 3], "version": 1})
    assert led.choose(0.0) is None
    assert led.queued_sequences == 4


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
    assert choose([item(gid, size) for gid, size in enumerate(sizes)], want) == chosen


def test_a_batch_is_found_whenever_there_is_one():
    dice = random.Random(0)
    for _ in range(500):
        sizes = [dice.randint(1, 9) for _ in range(dice.randint(1, 8))]
        want = dice.randint(1, 24)
        sums = {0}
        for size in sizes:
            sums |= {total + size for total in sums}
        chosen = choose([item(gid, size) for gid, size in enumerate(sizes)], want)
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
        choose([item(gid, size) for gid, size in enumerate(sizes)], want, exactly=False) == chosen
    )


def test_a_batch_is_short_only_when_no_group_comes_any_more():
    led = ledger(16)
    add(led, *(item(gid, 3) for gid in range(6)))
    led.deliver(0, 100.0)
    assert led.choose(100.0 + QUIET_S - 1) is None
    assert led.choose(100.0 + QUIET_S + 1) == [0, 1, 2, 3, 4]
    led.apply({"event": "batch", "batch": 0, "groups": [0, 1, 2, 3, 4], "version": 0})
    assert led.choose(200.0) is None, "fewer than a batch are waited for, however long"


def test_a_minimum_share_goes_before_older_groups_of_others():
    led = ledger(16, [{}, {"min_batch_allocation": 0.5}])
    add(led, *(item(gid) for gid in range(6)), item(6, env_id=1), item(7, env_id=1))
    assert led.choose(0.0) == [0, 1, 6, 7]


def test_a_share_is_waited_for_while_its_environment_delivers_and_no_longer():
    led = ledger(16, [{}, {"min_batch_allocation": 0.5}])
    add(led, *(item(gid) for gid in range(6)))
    assert led.choose(0.0) == [0, 1, 2, 3]  # it has never delivered
    led.deliver(1, 100.0)
    assert led.choose(100.0 + SHARE_WAIT_S - 1) is None
    assert led.choose(100.0 + SHARE_WAIT_S + 1) == [0, 1, 2, 3]
    add(led, item(6, env_id=1), item(7, env_id=1))
    assert led.choose(100.0) == [0, 1, 6, 7]


def test_who_keeps_silent_holds_up_one_batch_and_then_no_other_until_it_delivers():
    led = ledger(8, [{}, {"min_batch_allocation": 0.5}])
    add(led, *(item(gid) for gid in range(10)))
    led.deliver(1, 0.0)
    assert (
        led.choose(50.0) is None
    )  # from when the batch is asked for: before, the learner was busy
    assert led.choose(50.0 + SHARE_WAIT_S) == [0, 1]
    led.apply({"event": "batch", "batch": 0, "groups": [0, 1], "version": 0})
    assert led.choose(70.0) == [2, 3]
    led.deliver(1, 71.0)
    assert led.choose(72.0) is None
    led.hear(1, 73.0, in_flight=4)  # it generates: then it is worth a longer wait
    assert led.choose(71.0 + SHARE_WAIT_S) is None
    led.hear(1, 71.0 + BUSY_WAIT_S, in_flight=4)
    assert led.choose(71.0 + BUSY_WAIT_S) == [2, 3]


def test_shares_of_more_than_a_batch_are_scaled_down():
    led = ledger(8, [{"min_batch_allocation": 0.9}, {"min_batch_allocation": 0.9}])
    add(led, *(item(gid) for gid in range(4)), item(4, env_id=1))
    assert led.choose(0.0) == [0, 4]


def test_stale_groups_are_those_before_the_version_and_not_the_unknown():
    led = ledger()
    add(led, item(0, oldest=3), item(1, oldest=4), item(2, oldest=-1), item(3, oldest=5))
    assert led.stale(3) == []
    assert led.stale(5) == [0, 1]
    led.apply({"event": "drop", "groups": [0, 1], "oldest": 5, "sequences": 8})
    assert (led.stale_groups, led.stale_sequences, led.queued_sequences) == (2, 8, 8)
    assert led.stale(5) == [] and led.live == {0: 2}


def test_ranks_get_whole_groups_balanced_by_tokens():
    items = [item(gid, tokens=tokens) for gid, tokens in enumerate([100, 10, 10, 10, 70, 50])]
    shares = share_out(items, 2)
    assert sorted(one.gid for share in shares for one in share) == [0, 1, 2, 3, 4, 5]
    assert [sum(one.tokens for one in share) for share in shares] == [130, 120]
    assert all([one.gid for one in share] == sorted(one.gid for one in share) for share in shares)
    assert share_out(items, 2) == share_out(items[::-1], 2)
    assert [len(share) for share in share_out(items[:2], 4)] == [1, 1, 0, 0]


def test_an_acknowledged_batch_frees_its_segment():
    led = ledger()
    add(led, item(0, segment=0), item(1, segment=1), item(2, segment=1), item(3, segment=1))
    led.apply({"event": "batch", "batch": 0, "groups": [0, 1], "version": 0})
    assert led.live == {0: 1, 1: 3}
    led.apply({"event": "ack", "batch": 0})
    assert led.live == {1: 2} and not led.batches


def test_a_learner_that_resumes_may_still_go_back_further():
    led = ledger()
    add(led, *(item(gid) for gid in range(6)))
    for batch in range(3):
        led.apply(
            {
                "event": "batch",
                "batch": batch,
                "groups": [2 * batch, 2 * batch + 1],
                "version": batch,
            }
        )
    for step in (2, 0):
        led.apply(
            {
                "event": "register",
                "data": {"batch_size": 8, "max_token_len": 0, "starting_step": step},
            }
        )
        assert list(led.batches) == [0, 1, 2] and led.formed == 3
    led.apply(
        {"event": "register", "data": {"batch_size": 8, "max_token_len": 0, "starting_step": 7}}
    )
    assert led.formed == 7


def test_queue_size_counts_what_waits_to_be_trained_on():
    led = ledger(8, [{}])
    add(led, *(item(gid) for gid in range(5)))
    led.apply({"event": "batch", "batch": 0, "groups": [0, 1], "version": 0})
    led.apply({"event": "batch", "batch": 1, "groups": [2, 3], "version": 0})
    assert (
        led.status_of(0, 0.0)["queue_size"] == 5
    )  # the learner, at version 0, has not finished batch 0
    led.version = 1
    assert led.status_of(0, 0.0)["queue_size"] == 3
    led.version = 2
    status = led.status_of(0, 0.0)
    assert (
        status["queue_size"],
        status["self_queue_size"],
        status["queued_sequences"],
        status["formed"],
    ) == (1, 1, 4, 2)


def test_silent_environments_count_no_longer_until_heard_again():
    led = ledger(8, [{"min_batch_allocation": 0.25}, {"min_batch_allocation": 0.5, "weight": 3.0}])
    led.hear(0, 0.0, in_flight=5)
    led.hear(1, 0.0, in_flight=7)
    status = led.status_of(0, 1.0)
    assert (status["env_weight"], status["unallocated_fraction"], status["others_in_flight"]) == (
        0.25,
        0.25,
        7,
    )
    assert led.status_of(0, 31.0)["others_in_flight"] == 0
    led.hear(0, SILENT_S)
    status = led.status_of(0, SILENT_S + 1)
    assert (status["env_weight"], status["unallocated_fraction"]) == (1.0, 0.75)
    led.hear(1, SILENT_S + 2)
    assert led.status_of(0, SILENT_S + 2)["env_weight"] == 0.25


def test_environments_are_told_of_shares_and_of_who_lacks_them():
    led = ledger(16, [{}, {"min_batch_allocation": 0.25}, {"min_batch_allocation": 0.5}])
    assert (
        led.status_of(0, 0.0)["shares_of_others"] == []
    )  # nobody has delivered: who knows whether they will
    led.deliver(1, 0.0)
    led.deliver(2, 0.0)
    add(led, item(0, env_id=2), item(1, env_id=2), item(2, env_id=0))
    led.hear(2, 0.0, in_flight=3)
    told = [led.status_of(env_id, 0.0) for env_id in range(3)]
    assert [(status["own_queued"], status["share"]) for status in told] == [(4, 0), (0, 4), (8, 8)]
    assert [status["shares_of_others"] for status in told] == [
        [[4, 0], [8, 11]],
        [[8, 11]],
        [[4, 0]],
    ]
    assert led.choose(1.0) is None  # a batch is asked for, and 1 keeps silent
    led.hear(2, 2 + SHARE_WAIT_S, in_flight=3)
    assert led.status_of(0, 2 + SHARE_WAIT_S)["shares_of_others"] == [
        [8, 11]
    ]  # the others may fill its place


def test_when_all_have_gone_the_answer_is_still_one():
    led = ledger(8, [{}])
    led.presence[0].heard = None
    assert led.status_of(0, 0.0)["env_weight"] == 0.01


def test_a_late_group_does_not_bring_back_who_said_goodbye():
    led = ledger(8, [{}, {}])
    led.presence[1].heard = None
    led.deliver(1, 1.0)
    assert [e.env_id for e in led.connected(1.0)] == [0]


def test_a_snapshot_is_the_whole_state():
    led = ledger(8, [{"member": "m"}], starting_step=4)
    items = [item(gid, oldest=gid, segment=gid % 2) for gid in range(5)]
    add(led, *items)
    led.apply({"event": "started"})
    led.apply({"event": "drop", "groups": [0], "oldest": 1, "sequences": 4})
    led.apply({"event": "batch", "batch": 4, "groups": [1, 2], "version": 4})
    again = Ledger()
    for one in items:
        again.add(one, one.gid, replay=True)
    again.restore(led.snapshot(), led.known)
    assert again.replayed(0.0) == []
    assert again.snapshot() == led.snapshot()
    assert list(again.known) == list(led.known) and again.live == led.live
    assert again.choose(0.0) == led.choose(0.0) and again.stale(4) == led.stale(4)
    assert again.status_of(0, 0.0) == led.status_of(0, 0.0)


def test_a_group_that_is_needed_and_missing_is_noticed():
    led = ledger()
    add(led, item(0), item(1))
    again = Ledger()
    again.add(item(1), 1, replay=True)
    again.restore(led.snapshot(), led.known)
    assert again.replayed(0.0) == [0]

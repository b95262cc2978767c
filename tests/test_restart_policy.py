"""The restart policy is complete, and docs/failures.md shows it."""

import itertools
from pathlib import Path

import pytest

from atropos_hpc.runtime.restart_policy import (
    TABLE,
    Action,
    Event,
    ExitFacts,
    Kind,
    Phase,
    RunEnding,
    classify,
)

DOCS = Path(__file__).resolve().parent.parent / "docs" / "failures.md"
SUPERVISED = (Kind.TRAINER, Kind.AGENT, Kind.LAST_AGENT, Kind.TRAJECTORIES)
ON_A_NODE = (Kind.SERVER, Kind.ENVIRONMENT, Kind.EVALUATOR)


def test_every_kind_event_and_phase_has_an_action() -> None:
    assert set(TABLE) == set(itertools.product(Kind, Event, Phase))
    assert all(isinstance(action, Action) for action in TABLE.values())


@pytest.mark.parametrize("kind", Kind)
def test_every_exit_is_an_event_of_the_table(kind: Kind) -> None:
    causes = (None, Event.PREEMPTED, Event.NODE_LOST, Event.CANCELLED)
    for code, hung, done, left, cause, slurm in itertools.product(
        (0, 1, 2, 69, 70, 75, -9), (False, True), (False, True), (0, 1), causes, (False, True)
    ):
        facts = ExitFacts(code, hung, done, left, cause, slurm)
        assert classify(kind, facts) in Event


def test_a_run_that_ends_ends_once_the_learner_has_and_starts_nothing_but_the_server() -> None:
    for kind, event in itertools.product(Kind, Event):
        action = TABLE[kind, event, Phase.ENDING]
        if kind is Kind.TRAINER:
            expected = {Action.FINISH if event is Event.COMPLETED else Action.END}
        else:
            restarted = kind is Kind.TRAJECTORIES
            expected = {Action.DROP, Action.RESTART} if restarted else {Action.DROP}
        assert action in expected


def test_nothing_is_restarted_past_its_limit() -> None:
    for kind, phase in itertools.product(Kind, Phase):
        for event in (Event.CRASH_LIMIT, Event.HANG_LIMIT, Event.REFUSED, Event.GAVE_UP):
            assert TABLE[kind, event, phase] not in (Action.RESTART, Action.RESTART_ALL)


def test_a_node_agent_can_apply_what_the_table_says_for_its_processes() -> None:
    known = {Action.RESTART, Action.DROP, Action.FAIL}
    for kind, event, phase in itertools.product(ON_A_NODE, Event, Phase):
        assert TABLE[kind, event, phase] in known


def test_without_slurm_a_hang_at_the_limit_fails_the_run_and_with_slurm_it_is_requeued() -> None:
    hung = {"hung": True, "restarts_left": 0}
    for slurm, expected in ((False, Action.FAIL), (True, Action.REQUEUE)):
        event = classify(Kind.TRAINER, ExitFacts(-9, slurm=slurm, **hung))
        assert TABLE[Kind.TRAINER, event, Phase.RUNNING] is expected


def test_the_first_decision_about_the_end_stays() -> None:
    ending = RunEnding(save_timeout_s=60)
    assert not ending.expired(1e9)
    assert ending.request(Action.REQUEUE, now=10.0)
    assert not ending.request(Action.FAIL, now=11.0)
    assert ending.action is Action.REQUEUE
    assert not ending.expired(69.0) and ending.expired(71.0)


def rendered(kinds: tuple[Kind, ...]) -> str:
    """The table of docs/failures.md for these kinds."""
    lines = ["| event | " + " | ".join(kind.value for kind in kinds) + " |"]
    lines += ["|---" * (len(kinds) + 1) + "|"]
    for event in Event:
        cells = [cell(kind, event) for kind in kinds]
        lines.append(f"| {event.label}: {event.value} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def cell(kind: Kind, event: Event) -> str:
    assert TABLE[kind, event, Phase.STARTING] is TABLE[kind, event, Phase.RUNNING]
    running, ending = (TABLE[kind, event, phase].name for phase in (Phase.RUNNING, Phase.ENDING))
    names = (name.lower().replace("_", " ") for name in dict.fromkeys((running, ending)))
    return "; ".join(names)


@pytest.mark.parametrize("kinds", [SUPERVISED, ON_A_NODE])
def test_the_page_about_failures_shows_the_table(kinds: tuple[Kind, ...]) -> None:
    assert rendered(kinds) in DOCS.read_text(), f"docs/failures.md lacks:\n{rendered(kinds)}"


def test_the_page_about_failures_explains_every_action() -> None:
    page = DOCS.read_text()
    for action in Action:
        assert f"| {action.name.lower().replace('_', ' ')} | {action.value} |" in page

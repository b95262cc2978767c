"""Inject random faults into a live run with the real parts, and check its invariants afterwards.

    .venv/bin/python tests/faults.py --seed 0-9 --minutes 0.5

For each seed: start a small run of the arithmetic experiment (its run directory on a small
filesystem of its own, where this user may mount one), inject a random fault of fault_kinds.py every
few seconds for the given minutes, let the run end, and check the invariants (promises.py). A run
that a fault ends as it should (a killed supervisor, a TERM) is resumed with the same command, as
its user or Slurm would.

The seed fixes the number of servers and environment workers, the order of the faults and the pauses
between them. The moments in the run's life depend on the machine. Exit code 0: no seed had a
violation. Lost nodes are simulated by tests/test_slurm_*.py.
"""

import argparse
import contextlib
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import msgspec
from fault_kinds import (
    ON_ANY_DISK,
    ON_ITS_OWN,
    Fault,
    jumping_clock,
    kill_supervisor,
    small_filesystem,
    stop,
    terminate,
)
from promises import BATCH, STALENESS, final_accuracy, violations
from prompt_coverage import FEW_PROBLEMS, history
from rich.console import Console
from rich.table import Table
from run_files import step_metrics
from run_parts import Started

from atropos_hpc.contracts.metrics import StepMetrics
from atropos_hpc.runtime.run_dir import append_record, last_records, read_json, read_records

SETTINGS = [
    f"algorithm.batch_size={BATCH}",
    f"staleness.max={STALENESS}",
    "evaluation.after=true",
    "environment.config.eval_problems=300",
    FEW_PROBLEMS,
]
STEPS_PER_MINUTE = 100  # of faults; most runs then last longer than their faults
ENDLESS = 1_000_000  # steps, where the run is ended by time
RECOVERY_S = 300.0  # for the next step after a fault; vLLM starts slowly on a busy machine
EXPECTED_ENDS = {75, -signal.SIGKILL}  # a run that was stopped; a killed supervisor
OVERLAP = 0.3  # probability that a fault does not wait for recovery from the one before


@dataclass
class Schedule:
    """Which faults are injected, and when."""

    minutes: float
    gap: tuple[float, float]  # minimum and maximum seconds from recovery to the next fault
    faults: dict[Fault, int]  # with their weights
    overlap: float = OVERLAP


class Injected(msgspec.Struct):
    """A fault that was injected, and its consequence."""

    fault: str
    to: str
    step: int  # of the learner, at that time
    recovered_s: float | None = None  # until the next step was complete
    came: str = ""  # what the run did, other than to go on


class Outcome(msgspec.Struct):
    """The result of one schedule."""

    seed: int
    minutes: float
    steps: int  # of the run, in the end
    groups: int  # in its journal
    accuracy: float | None  # of the last version, on held-out problems
    faults: list[Injected]
    violations: list[str]


def inject_faults(
    started: Started, dice: random.Random, schedule: Schedule, done: list[Injected]
) -> None:
    """Inject faults from the first step on, until the time is over or the run has ended. Each is
    recorded in `done`.

    Raises AssertionError, with the logs, when the run makes no progress.
    """
    if not schedule.faults:
        return
    kinds, weights = list(schedule.faults), list(schedule.faults.values())
    started.step(1)
    end = time.monotonic() + 60 * schedule.minutes
    while time.monotonic() < end and started.process.poll() != 0:
        fault = dice.choices(kinds, weights)[0]
        note = Injected(fault.__name__, "", line.step if (line := last_line(started)) else 0)
        done.append(note)
        # The process may just have ended, by itself or because of the previous fault.
        with contextlib.suppress(ProcessLookupError):
            note.to = fault(started, dice)
        if dice.random() < schedule.overlap:
            time.sleep(dice.uniform(0.2, 3))
            continue
        recover(started, done)
        time.sleep(dice.uniform(*schedule.gap))
    recover(started, done)


def recover(started: Started, done: list[Injected]) -> None:
    """Wait for the next step, or the end; resume the run if it ended as it should."""
    began = time.monotonic()
    # A resume may truncate the file to one of these.
    known = {(line.step, line.time) for line in step_metrics(started.run)}
    while not (line := last_line(started)) or (line.step, line.time) in known:
        code = started.process.poll()
        if code == 0:
            done[-1].came = "came to its end"
            return
        if code is not None:
            assert code in EXPECTED_ENDS, f"the run ended with {code}:\n{started.story()}"
            done[-1].came = f"ended with {code}, resumed"
            started.process = started.start()
        assert time.monotonic() - began < RECOVERY_S, (
            f"no step for {RECOVERY_S:.0f} s after {done[-1]}:\n{started.story()}"
        )
        time.sleep(0.1)
    done[-1].recovered_s = time.monotonic() - began


def run_to_end(started: Started) -> None:
    """Wait for success; resume the run if the last fault ended it."""
    if (code := started.end()) in EXPECTED_ENDS:
        started.process = started.start()
        code = started.end()
    assert code == 0, f"the run ended with {code}:\n{started.story()}"


def last_line(started: Started) -> StepMetrics | None:
    """The last line of the metrics; None before the first."""
    lines = last_records(started.run.metrics, StepMetrics, 1)
    return lines[0] if lines else None


def finish(started: Started) -> int:
    """Stop the run, resume it for three more steps, and return its last step."""
    if started.process.poll() is None:
        started.process.send_signal(signal.SIGTERM)
        started.end()
    steps = read_json(started.run.checkpoints / "latest.json").get("step", 0) + 3
    started.command = [
        f"trainer.steps={steps}" if part.startswith("trainer.steps=") else part
        for part in started.command
    ]
    started.process = started.start()
    code = started.end()
    assert code == 0, f"the resumed run ended with {code}:\n{started.story()}"
    return steps


def one_seed(seed: int, schedule: Schedule, scratch: Path, console: Console) -> Outcome:
    """Run one schedule and print its result."""
    with small_filesystem(scratch / "run") as mounted:
        if not mounted:
            schedule.faults = {
                fault: weight
                for fault, weight in schedule.faults.items()
                if fault not in ON_ITS_OWN
            }
        dice, steps = random.Random(seed), round(schedule.minutes * STEPS_PER_MINUTE)
        numbers = [
            f"{key}={dice.choice([1, 2])}" for key in ("rollout.servers", "environment.workers")
        ]
        started = Started(scratch, steps, *SETTINGS, *numbers, env=jumping_clock(scratch))
        done: list[Injected] = []
        found: list[str] = []
        try:
            try:
                inject_faults(started, dice, schedule, done)
                run_to_end(started)
                started.assert_nothing_is_left()
                found = violations(started, steps)
            except AssertionError as error:
                found = [str(error)]
            steps_done, groups = len(step_metrics(started.run)), len(history(started.run).groups)
            outcome = Outcome(
                seed,
                schedule.minutes,
                steps_done,
                groups,
                final_accuracy(started.run, steps),
                done,
                found,
            )
            console.print(table(outcome))
            console.print(
                "\n".join(found)
                if found
                else "nothing lost, nothing trained on twice, finished with success",
                markup=False,
            )
            return outcome
        finally:
            if started.process.poll() is None:
                started.process.kill()
                started.process.wait()
            if found:
                kept = Path(tempfile.gettempdir()) / f"faults-seed-{seed}"
                shutil.rmtree(kept, ignore_errors=True)
                shutil.copytree(
                    scratch, kept, symlinks=True, ignore=shutil.ignore_patterns("*.image")
                )
                console.print(f"kept in {kept}")


def table(outcome: Outcome) -> Table:
    """The injected faults and their consequences."""
    title = f"seed {outcome.seed}: {outcome.steps} steps, {outcome.minutes} minutes"
    drawn = Table("fault", "to", "at step", "next step after s", "the run", title=title)
    for each in outcome.faults:
        again = "" if each.recovered_s is None else f"{each.recovered_s:.1f}"
        drawn.add_row(each.fault, each.to, str(each.step), again, each.came)
    return drawn


def summary(outcomes: list[Outcome]) -> Table:
    """The consequences of each kind of fault, over all schedules."""
    faults = [fault for outcome in outcomes for fault in outcome.faults]
    disturbed = [outcome for outcome in outcomes if outcome.faults]
    if not disturbed:
        return Table(title=f"undisturbed: {spread(outcomes)}")
    steps, groups, bad = (
        sum(of)
        for of in zip(*((o.steps, o.groups, bool(o.violations)) for o in disturbed), strict=True)
    )
    title = f"{len(disturbed)} schedules, {len(faults)} faults, {steps} steps, {groups} groups;"
    title += f" {bad} schedules with violations\nfinal accuracy: {spread(disturbed)}; undisturbed: "
    title += spread([outcome for outcome in outcomes if not outcome.faults])
    drawn = Table(
        "fault",
        "count",
        "seconds to the next step, median",
        "maximum",
        "ended the run, which was resumed",
        title=title,
    )
    ends = [fault.fault for outcome in disturbed for fault in ended(outcome)]
    for kind in sorted({fault.fault for fault in faults}):
        own = [fault for fault in faults if fault.fault == kind]
        waits = [fault.recovered_s for fault in own if fault.recovered_s is not None]
        middle, longest = (
            (f"{statistics.median(waits):.1f}", f"{max(waits):.1f}") if waits else ("", "")
        )
        drawn.add_row(kind, str(len(own)), middle, longest, str(ends.count(kind)))
    return drawn


def ended(outcome: Outcome) -> list[Injected]:
    """The faults that ended the run before it was done.

    An end is recorded at the fault after which it was noticed. It belongs to the last fault that
    asked for it, or else to that one itself.
    """
    found = []
    for at, noticed in enumerate(outcome.faults):
        if "resumed" in noticed.came:
            asked = (fault for fault in reversed(outcome.faults[: at + 1]) if asks_to_end(fault))
            found.append(next(asked, noticed))
    return found


def asks_to_end(fault: Injected) -> bool:
    """Whether a fault asks the run to end. A learner rank passes a TERM on to its run."""
    to_a_rank = fault.fault == terminate.__name__ and fault.to.startswith("trainer-")
    return to_a_rank or fault.fault in (stop.__name__, kill_supervisor.__name__)


def spread(outcomes: list[Outcome]) -> str:
    """The mean and the range of the final accuracy."""
    known = [outcome.accuracy for outcome in outcomes if outcome.accuracy is not None]
    return (
        f"{statistics.mean(known):.3f} ({min(known):.3f} to {max(known):.3f} in {len(known)} runs)"
        if known
        else "not measured"
    )


def main() -> int:
    kinds = {fault.__name__: fault for fault in ON_ANY_DISK | ON_ITS_OWN}
    parser = argparse.ArgumentParser(description="Random faults against a live run.")
    parser.add_argument("--seed", default="0", help="one, or a range such as 0-9")
    parser.add_argument("--minutes", type=float, default=2.0, help="of faults, for each seed")
    parser.add_argument("--gap", default="1-10", help="seconds from recovery to the next fault")
    parser.add_argument(
        "--record",
        type=Path,
        help="append a JSON line per seed to this file, and summarise the whole file",
    )
    parser.add_argument("--only", choices=kinds, help="inject no other fault")
    parser.add_argument(
        "--undisturbed",
        action="store_true",
        help="inject no fault, to get the accuracy to compare with",
    )
    options = parser.parse_args()
    first, _, last = options.seed.partition("-")
    low, _, high = options.gap.partition("-")
    # So that what was started is ended, and what was mounted is unmounted.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    console = Console(width=140)
    earlier = read_records(options.record, Outcome) if options.record is not None else []
    outcomes = {(outcome.seed, bool(outcome.faults)): outcome for outcome in earlier}
    for seed in range(int(first), int(last or first) + 1):
        faults = (
            {}
            if options.undisturbed
            else {kinds[options.only]: 1}
            if options.only
            else ON_ANY_DISK | ON_ITS_OWN
        )
        with tempfile.TemporaryDirectory(prefix="faults-") as scratch:
            outcome = one_seed(
                seed,
                Schedule(options.minutes, (float(low), float(high or low)), faults),
                Path(scratch),
                console,
            )
        outcomes[seed, bool(outcome.faults)] = outcome
        if options.record is not None:
            append_record(options.record, outcome)
    console.print(summary(list(outcomes.values())))
    failed = [outcome.seed for outcome in outcomes.values() if outcome.violations]
    console.print(f"seeds with violations: {failed}" if failed else "no seed had a violation")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

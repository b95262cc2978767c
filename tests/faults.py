"""Random faults against a live run with the real parts, and then: was anything lost, doubled, or let in?

    .venv/bin/python tests/faults.py --seed 0-9 --minutes 0.5

For each seed: start a small run of the arithmetic experiment (its run directory on a small filesystem of its own, where this user may
mount one), do a random fault of fault_kinds.py every few seconds for so many minutes, let the run come to its end, and check what DESIGN
promises (promises.py). A run that a fault ends in the way it should (a killed supervisor, a TERM) is started again with the same command,
as its user or Slurm would.

The seed fixes how many servers and environment workers there are, which faults come in which order, and after which pauses; the moments
in the run's life shift with the machine.
Exit code 0: no seed had a violation. Lost nodes are not simulated here: tests/test_slurm_*.py lose them.
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
from dataclasses import asdict, dataclass
from pathlib import Path

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
from promises import BATCH, STALENESS, final_accuracy, history, violations
from rich.console import Console
from rich.table import Table
from run_files import step_metrics
from run_parts import Started

from atropos_hpc.contracts.metrics import StepMetrics
from atropos_hpc.runtime.run_dir import append_line, last_records, read_json, read_lines

SETTINGS = [
    f"algorithm.batch_size={BATCH}", f"staleness.max={STALENESS}", "evaluation.after=true", "environment.config.eval_problems=300",
]  # fmt: skip
STEPS_PER_MINUTE = 100  # of faults: a run then mostly outlives them
ENDLESS = 1_000_000  # steps: the first part of a run is ended by time
RECOVERY_S = 300.0  # for the next step after a fault; a restarted vLLM server takes its time on a busy machine
ENDED_WELL = {
    75,
    -signal.SIGKILL,
}  # a run that was asked to stop, and one whose supervisor was killed
TOGETHER = (
    0.3  # probability that a fault comes right after the one before, without waiting for recovery
)


@dataclass
class Schedule:
    """Which faults come, and when."""

    minutes: float
    gap: tuple[float, float]  # least and most seconds from recovery to the next fault
    faults: dict[Fault, int]  # with their weights
    together: float = TOGETHER


@dataclass
class Done:
    """A fault that was done, and what came of it."""

    fault: str
    to: str
    step: int  # of the learner, at that time
    recovered_s: float | None = None  # until the next step was done
    came: str = ""  # what the run did, other than to go on


@dataclass
class Outcome:
    """Of one schedule."""

    seed: int
    minutes: float
    steps: int  # that the run had in the end
    groups: int  # that its journal has
    accuracy: float | None  # of the last version, on held-out problems
    faults: list[Done]
    violations: list[str]


def harass(started: Started, dice: random.Random, schedule: Schedule, done: list[Done]) -> None:
    """Faults for so many minutes, beginning with the first step, or until the run has come to its end; each is put down in `done`.

    Raises AssertionError, with the story, when the run does not get on.
    """
    if not schedule.faults:
        return
    kinds, weights = list(schedule.faults), list(schedule.faults.values())
    started.step(1)
    end = time.monotonic() + 60 * schedule.minutes
    while time.monotonic() < end and started.process.poll() != 0:
        fault = dice.choices(kinds, weights)[0]
        note = Done(fault.__name__, "", line.step if (line := last_line(started)) else 0)
        done.append(note)
        with contextlib.suppress(
            ProcessLookupError
        ):  # it ended just now, by itself or from the fault before
            note.to = fault(started, dice)
        if dice.random() < schedule.together:
            time.sleep(dice.uniform(0.2, 3))
            continue
        recover(started, done)
        time.sleep(dice.uniform(*schedule.gap))
    recover(started, done)


def recover(started: Started, done: list[Done]) -> None:
    """Wait for the next step, or the end; start the run again where it ended as it should."""
    began = time.monotonic()
    known = {
        (line.step, line.time) for line in step_metrics(started.run)
    }  # a resume may cut the file back to one of these
    while not (line := last_line(started)) or (line.step, line.time) in known:
        code = started.process.poll()
        if code == 0:
            done[-1].came = "came to its end"
            return
        if code is not None:
            assert code in ENDED_WELL, f"the run ended with {code}:\n{started.story()}"
            done[-1].came = f"ended with {code}, resumed"
            started.process = started.start()
        assert time.monotonic() - began < RECOVERY_S, (
            f"no step for {RECOVERY_S:.0f} s after {done[-1]}:\n{started.story()}"
        )
        time.sleep(0.1)
    done[-1].recovered_s = time.monotonic() - began


def to_its_end(started: Started) -> None:
    """Wait for success; start the run once more where the last fault ended it."""
    if (code := started.end()) in ENDED_WELL:
        started.process = started.start()
        code = started.end()
    assert code == 0, f"the run ended with {code}:\n{started.story()}"


def last_line(started: Started) -> StepMetrics | None:
    """Of the metrics; None while there is none."""
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
    """Run one schedule, and show it."""
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
        done: list[Done] = []
        found: list[str] = []
        try:
            try:
                harass(started, dice, schedule, done)
                to_its_end(started)
                started.assert_nothing_is_left()
                found = violations(started, steps)
            except AssertionError as error:
                found = [str(error)]
            told, groups = len(step_metrics(started.run)), len(history(started).groups)
            outcome = Outcome(
                seed,
                schedule.minutes,
                told,
                groups,
                final_accuracy(started.run, steps),
                done,
                found,
            )
            console.print(table(outcome))
            console.print(
                "\n".join(found)
                if found
                else "nothing lost, nothing doubled, finished with success",
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
    """What was done, and what came of each."""
    title = f"seed {outcome.seed}: {outcome.steps} steps, {outcome.minutes} minutes"
    drawn = Table("fault", "to", "at step", "next step after s", "the run", title=title)
    for each in outcome.faults:
        again = "" if each.recovered_s is None else f"{each.recovered_s:.1f}"
        drawn.add_row(each.fault, each.to, str(each.step), again, each.came)
    return drawn


def summary(outcomes: list[Outcome]) -> Table:
    """What each kind of fault did, over all schedules."""
    faults = [fault for outcome in outcomes for fault in outcome.faults]
    disturbed = [outcome for outcome in outcomes if outcome.faults]
    if not disturbed:
        return Table(title=f"undisturbed: {spread(outcomes)}")
    steps, groups, bad = (
        sum(of)
        for of in zip(*((o.steps, o.groups, bool(o.violations)) for o in disturbed), strict=True)
    )
    title = f"{len(disturbed)} schedules, {len(faults)} faults, {steps} steps, {groups} groups; {bad} schedules with violations"
    title += f"\nfinal accuracy: {spread(disturbed)}; undisturbed: {spread([outcome for outcome in outcomes if not outcome.faults])}"
    drawn = Table(
        "fault",
        "how often",
        "next step after s, median",
        "at most",
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


def ended(outcome: Outcome) -> list[Done]:
    """The faults that ended the run before it was done.

    An end is noted at the fault after which it was noticed; it belongs to the last one that asked for it, or else to that one itself.
    """
    found = []
    for at, noticed in enumerate(outcome.faults):
        if "resumed" in noticed.came:
            asked = (fault for fault in reversed(outcome.faults[: at + 1]) if asks_to_end(fault))
            found.append(next(asked, noticed))
    return found


def asks_to_end(fault: Done) -> bool:
    """A learner rank hands a TERM on to its run."""
    to_a_rank = fault.fault == terminate.__name__ and fault.to.startswith("trainer-")
    return to_a_rank or fault.fault in (stop.__name__, kill_supervisor.__name__)


def spread(outcomes: list[Outcome]) -> str:
    """Of the final accuracy."""
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
        help="append a line of JSON for each seed to this file, and sum up all that is in it",
    )
    parser.add_argument("--only", choices=kinds, help="no other fault")
    parser.add_argument(
        "--undisturbed",
        action="store_true",
        help="no fault at all: what the final accuracy is compared with",
    )
    options = parser.parse_args()
    first, _, last = options.seed.partition("-")
    low, _, high = options.gap.partition("-")
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(1)
    )  # so that what was started is ended, and what was mounted is not left
    console = Console(width=140)
    outcomes = {
        (outcome.seed, bool(outcome.faults)): outcome for outcome in recorded(options.record)
    }  # of one tried again, the last
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
            append_line(options.record, asdict(outcome))
    console.print(summary(list(outcomes.values())))
    failed = [outcome.seed for outcome in outcomes.values() if outcome.violations]
    console.print(f"seeds with violations: {failed}" if failed else "no seed had a violation")
    return 1 if failed else 0


def recorded(path: Path | None) -> list[Outcome]:
    """What earlier calls have recorded there."""
    lines = read_lines(path) if path is not None and path.exists() else []
    return [
        Outcome(**{**line, "faults": [Done(**fault) for fault in line["faults"]]}) for line in lines
    ]


if __name__ == "__main__":
    sys.exit(main())

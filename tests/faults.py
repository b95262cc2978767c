"""Random faults against a live run with the real parts, and then: was anything lost, doubled, or let in?

    .venv/bin/python tests/faults.py --seed 0-9 --minutes 2

For each seed: start a small run of the arithmetic experiment (its run directory on a small filesystem of its own, where this user may
mount one), do a random fault every few seconds for so many minutes, ask the run to stop, resume it without faults for three more steps,
and check what DESIGN promises, from the journal, the metrics and the checkpoints (`violations`). A run that a fault ends in the way it
should (a killed supervisor, a TERM) is started again with the same command, as its user or Slurm would.

The seed fixes which faults come in which order, after which pauses; the moments in the run's life shift with the machine.
Exit code 0: no seed had a violation. Not simulated here: clocks that jump, slow disks, lost nodes.
"""

import argparse
import contextlib
import math
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import orjson
from rich.console import Console
from rich.table import Table
from run_parts import Started

from atropos_hpc import process
from atropos_hpc.run_dir import append_line, read_json, read_lines
from atropos_hpc.trajectories.record import EVENT, GROUP, HEADER_BYTES, scan
from atropos_hpc.trajectories.schema import Group, read_group

BATCH, STALENESS = 64, 1
SETTINGS = [
    f"algorithm.batch_size={BATCH}", f"staleness.max={STALENESS}", "evaluation.after=true", "environment.config.eval_problems=300",
    "rollout.servers=2", "environment.workers=2",
]  # fmt: skip
ENDLESS = 1_000_000  # steps: the first part of a run is ended by time
DISK_MB = 96
RECOVERY_S = 300.0  # for the next step after a fault; a restarted vLLM server takes its time on a busy machine
ENDED_WELL = {75, -signal.SIGKILL}  # a run that was asked to stop, and one whose supervisor was killed
TOGETHER = 0.3  # probability that a fault comes right after the one before, without waiting for recovery
WORST_ACCURACY = 0.28  # the base policy has 0.38; five standard deviations of 300 answers below is a policy that was harmed
WORST_MISMATCH = 0.3  # mean |log-prob of the server - of the learner|; with the right weights it stays below 0.05


@dataclass
class Done:
    """A fault that was done, and what came of it."""

    fault: str
    to: str
    step: int  # of the learner, at that time
    recovered_s: float | None = None  # until the next step was done
    came: str = ""  # what the run did, other than to go on


# --- faults. Each takes the run and the dice, does its harm, and returns what it was done to.


def kill(started: Started, dice: random.Random) -> str:
    name, pid = dice.choice(members(started))
    os.kill(pid, signal.SIGKILL)
    return name


def terminate(started: Started, dice: random.Random) -> str:
    name, pid = dice.choice(members(started))
    os.kill(pid, signal.SIGTERM)
    return name


def pause(started: Started, dice: random.Random) -> str:
    name, pid = dice.choice(members(started))
    seconds = dice.uniform(1, 12)
    os.kill(pid, signal.SIGSTOP)
    time.sleep(seconds)
    os.kill(pid, signal.SIGCONT)
    return f"{name}, {seconds:.0f} s"


def freeze(started: Started, dice: random.Random) -> str:
    """As `pause`, for ever: somebody has to notice, and end it. (Not an engine: one that hangs in a push is given 10 minutes.)"""
    name, pid = dice.choice([(name, pid) for name, pid in members(started) if not name.endswith("engine")])
    os.kill(pid, signal.SIGSTOP)
    return name


def kill_supervisor(started: Started, dice: random.Random) -> str:
    started.process.kill()
    return "supervisor"


def stop(started: Started, dice: random.Random) -> str:
    number = dice.choice([signal.SIGTERM, signal.SIGINT])
    started.process.send_signal(number)
    return number.name


def fill_disk(started: Started, dice: random.Random) -> str:
    """Where the run has a filesystem of its own. A few pages at a time: to the last one, though others write."""
    ballast = started.run.path / "ballast"
    seconds = dice.uniform(1, 10)
    until = time.monotonic() + seconds
    try:
        with ballast.open("wb", buffering=0) as file:
            while time.monotonic() < until:
                try:
                    file.write(b"\0" * 65536)
                except OSError:
                    time.sleep(0.02)
    finally:
        ballast.unlink()
    return f"{seconds:.0f} s"


def damage_policy(started: Started, dice: random.Random) -> str:
    """Flip a byte of, cut, or remove a file of the newest policy version."""
    named = read_json(started.run.policy / "latest.json").get("directory")
    files = sorted((started.run.policy / named).iterdir()) if named else []
    return _damage(dice.choice(files), dice) if files else "nothing there yet"


def damage_rendezvous(started: Started, dice: random.Random) -> str:
    """Cut or remove the roster or a member's file; their owners write them again."""
    return _damage(dice.choice([started.run.roster, *sorted(started.run.members.glob("*.json"))]), dice, flip=False)


def damage_checkpoint(started: Started, dice: random.Random) -> str:
    """Cut or remove a file of the newest checkpoint, and kill the learner, which must go back to the one before."""
    named = read_json(started.run.checkpoints / "latest.json").get("directory")
    if sum(map(whole, started.run.checkpoints.glob("step-*"))) < 2:
        return "too few there"
    harm = _damage(dice.choice(sorted((started.run.checkpoints / named).iterdir())), dice, flip=False)
    with contextlib.suppress(KeyError):
        os.kill(dict(members(started))["trainer-trainer0-0"], signal.SIGKILL)
    return harm


def whole(checkpoint: Path) -> bool:
    """Is everything there that its manifest names?"""
    files = read_json(checkpoint / "manifest.json").get("files", [])
    return bool(files) and all((checkpoint / f["file"]).exists() and (checkpoint / f["file"]).stat().st_size == f["bytes"] for f in files)


def _damage(path: Path, dice: random.Random, flip: bool = True) -> str:
    how = dice.choice(["flip", "cut", "remove"] if flip else ["cut", "remove"])
    where = str(Path(path.parent.name) / path.name)
    try:
        data = bytearray(path.read_bytes())
        if how == "remove":
            path.unlink()
        elif how == "cut":
            os.truncate(path, len(data) // 2)
        elif data:
            data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
            with path.open("r+b") as file:
                file.write(data)
    except FileNotFoundError:
        return f"{where} (gone)"
    return f"{how} {where}"


def drop_connections(started: Started, dice: random.Random) -> str:
    """Reset all TCP connections to one of the run's servers (ss -K; needs root)."""
    urls = [m["url"] for m in roster(started) if m["kind"] == "trajectories" and m.get("url")]
    urls += [server["url"] for m in roster(started) if m["kind"] == "agent" for server in m["servers"] if server["url"]]
    if not urls:
        return "nothing there yet"
    port = dice.choice(urls).rpartition(":")[2]
    subprocess.run(["ss", "-K", "dport", "=", port], capture_output=True, check=False)
    return f"port {port}"


FAULTS: dict[Callable[[Started, random.Random], str], int] = {  # with their weights
    kill: 6, terminate: 2, pause: 4, freeze: 1, kill_supervisor: 1, stop: 1, fill_disk: 2, damage_policy: 2, damage_rendezvous: 2,
    damage_checkpoint: 1, drop_connections: 2,
}  # fmt: skip


def roster(started: Started) -> list[dict[str, Any]]:
    """The members that live, as they themselves say it: the roster may be damaged."""
    found = []
    for path in sorted(started.run.members.glob("*.json")):
        with contextlib.suppress(ValueError, OSError):
            found.append(read_json(path))
    return [m for m in found if m and m["state"] != "ended" and Path(f"/proc/{m['pid']}").exists()]


def members(started: Started) -> list[tuple[str, int]]:
    """(name, pid) of every process but the supervisor, vLLM's own children included."""
    found = []
    for member in roster(started):
        if member["kind"] != "supervisor":
            found.append((member["name"], member["pid"]))
        for server in member.get("servers") or []:
            if server["pid"] is not None:
                found.append((server["name"], server["pid"]))
                found += [(f"{server['name']}'s engine", pid) for pid in engines(server["pid"])]
    return found or [("supervisor", started.process.pid)]


def engines(server: int) -> list[int]:
    """Pids of vLLM's engine behind a server, which has other children too. None while it starts, or has ended."""
    with contextlib.suppress(OSError):
        return [pid for pid in process.children_of(server) if b"EngineCore" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    return []


# --- a run


@contextlib.contextmanager
def small_filesystem(path: Path) -> Iterator[bool]:
    """A filesystem of DISK_MB at `path`. False where this user may not mount one."""
    path.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m", "faults", str(path)], capture_output=True, check=False)
    try:
        yield mounted.returncode == 0
    finally:
        if mounted.returncode == 0:
            subprocess.run(["umount", "--lazy", str(path)], check=False)


def harass(started: Started, dice: random.Random, minutes: float, gap: tuple[float, float], disk: bool, done: list[Done]) -> None:
    """Faults for so many minutes, beginning with the first step; each is put down in `done`.

    Raises AssertionError, with the story, when the run does not get on.
    """
    kinds = [fault for fault in FAULTS if disk or fault is not fill_disk]
    started.step(1)
    end = time.monotonic() + 60 * minutes
    while time.monotonic() < end:
        fault = dice.choices(kinds, [FAULTS[kind] for kind in kinds])[0]
        note = Done(fault.__name__, "", last_step(started))
        done.append(note)
        with contextlib.suppress(ProcessLookupError):  # it ended just now, by itself or from the fault before
            note.to = fault(started, dice)
        if dice.random() < TOGETHER:
            time.sleep(dice.uniform(0.2, 3))
            continue
        recover(started, done, time.time())
        time.sleep(dice.uniform(*gap))
    recover(started, done, time.time())


def recover(started: Started, done: list[Done], since: float) -> None:
    """Wait for the next step; start the run again where it ended as it should."""
    began = time.monotonic()
    while not any(line["time"] > since for line in read_lines(started.run.metrics)[-1:]):
        code = started.process.poll()
        if code is not None:
            assert code in ENDED_WELL, f"the run ended with {code}:\n{started.story()}"
            done[-1].came = f"ended with {code}, resumed"
            started.process = started.start()
        assert time.monotonic() - began < RECOVERY_S, f"no step for {RECOVERY_S:.0f} s after {done[-1]}:\n{started.story()}"
        time.sleep(0.1)
    done[-1].recovered_s = time.monotonic() - began


def last_step(started: Started) -> int:
    return max((line["step"] for line in read_lines(started.run.metrics)), default=0)


def finish(started: Started) -> int:
    """Stop the run, resume it for three more steps, and return its last step."""
    if started.process.poll() is None:
        started.process.send_signal(signal.SIGTERM)
        started.end()
    steps = read_json(started.run.checkpoints / "latest.json").get("step", 0) + 3
    started.command = [f"trainer.steps={steps}" if part.startswith("trainer.steps=") else part for part in started.command]
    started.process = started.start()
    code = started.end()
    assert code == 0, f"the resumed run ended with {code}:\n{started.story()}"
    return steps


# --- what must hold


@dataclass
class History:
    """All that the journal tells."""

    groups: dict[int, Group]
    hashes: Counter[int]
    batches: dict[int, list[int]]
    dropped: list[int]
    problems: list[str]


def history(started: Started) -> History:
    """From the first segment on. Events beyond these (registrations) do not matter here."""
    found = History({}, Counter(), {}, [], [])
    for path in sorted(started.run.trajectories.glob("*.journal")):
        data = bytearray(path.read_bytes())
        for start, _, header in scan(data):
            if header.kind == GROUP:
                found.groups[header.gid] = read_group(data, start, header)
                found.hashes[header.hash] += 1
            elif header.kind == EVENT:
                event = orjson.loads(bytes(data[start + HEADER_BYTES : start + HEADER_BYTES + header.meta_size]))
                if event["event"] == "batch":
                    if event["batch"] != len(found.batches):
                        found.problems.append(f"batch {event['batch']} was formed after batch {len(found.batches) - 1}")
                    found.batches[event["batch"]] = event["groups"]
                elif event["event"] == "drop":
                    found.dropped += event["groups"]
                elif event["event"] == "reset":
                    found.problems.append("the journal was reset")
    return found


def violations(started: Started, steps: int) -> list[str]:
    """What of the promises does not hold, after a run that ended with success at `steps`."""
    past, lines = history(started), read_lines(started.run.metrics)
    problems = list(past.problems)

    def check(holds: bool, what: str) -> None:
        if not holds:
            problems.append(what)

    used = Counter(gid for gids in past.batches.values() for gid in gids) + Counter(past.dropped)
    check(all(count == 1 for count in used.values()), f"groups in two batches: {[gid for gid, n in used.items() if n > 1]}")
    check(set(used) <= set(past.groups), f"batches name groups that were never journalled: {sorted(set(used) - set(past.groups))}")
    check(all(count == 1 for count in past.hashes.values()), "a group was journalled twice")
    left = len(past.groups) - len(used)
    told = read_json(started.run.members / "trajectories-trainer0-0.json").get("queued_groups")
    check(told == left, f"{left} groups should be left in the queue, the server has {told}")
    check([line["step"] for line in lines] == list(range(1, steps + 1)), "the steps in metrics.jsonl are not each there once")
    for line in lines:
        number = line["step"] - 1
        groups = [past.groups[gid] for gid in past.batches.get(number, []) if gid in past.groups]
        sequences = sum(len(group.lengths) for group in groups)
        check(sequences == BATCH, f"batch {number} has {sequences} sequences")
        if not sequences:
            continue
        reward = math.fsum(float(score) for group in groups for score in group.scores) / sequences
        versions = [pair for group in groups for pair in group.policy_versions if pair is not None]
        check(abs(line["reward"] - reward) < 1e-6, f"step {line['step']}: trained on rewards of {line['reward']}, its batch has {reward}")
        check(
            line["tokens"] == sum(len(group.tokens) for group in groups), f"step {line['step']}: trained on other tokens than its batch's"
        )
        check(all(oldest >= number - STALENESS for oldest, _ in versions), f"batch {number}: too stale")
        check(all(newest <= number for _, newest in versions), f"batch {number}: sampled by a version that was not there yet")
        mean = math.fsum(number - oldest for oldest, _ in versions) / max(1, len(versions))
        check(abs(line["staleness_mean"] - mean) < 1e-6, f"step {line['step']}: staleness of another batch")
        check(line["mismatch_mean"] < WORST_MISMATCH, f"step {line['step']}: the servers' log-probs are off by {line['mismatch_mean']}")
    check(read_json(started.run.checkpoints / "latest.json").get("step") == steps, "the last step is not durable")
    check(read_json(started.run.done).get("version") == steps, "done.json does not tell the last step")
    accuracies = [line["accuracy"] for line in read_lines(started.run.evaluations) if line["version"] == steps]
    check(len(accuracies) == 1 and (accuracies[0] or 0) > WORST_ACCURACY, f"the final accuracy is {accuracies}")
    token = started.run.token().encode()
    telling = [path for path in started.run.path.rglob("*") if path.is_file() and path != started.run.secret and token in path.read_bytes()]
    check(not telling and token not in started.output.read_bytes(), f"the token stands in {telling or started.output}")
    check(not started.left(), f"processes were left: {started.left()}")
    return problems


@dataclass
class Outcome:
    """Of one schedule."""

    seed: int
    minutes: float
    steps: int  # that the run had in the end
    groups: int  # that its journal has
    faults: list[Done]
    violations: list[str]


def one_seed(seed: int, minutes: float, gap: tuple[float, float], scratch: Path, console: Console) -> Outcome:
    """Run one schedule, and show it."""
    dice = random.Random(seed)
    with small_filesystem(scratch / "run") as disk:
        started = Started(scratch, ENDLESS, *SETTINGS)
        done: list[Done] = []
        found: list[str] = []
        try:
            try:
                harass(started, dice, minutes, gap, disk, done)
                steps = finish(started)
                started.assert_nothing_is_left()
                found = violations(started, steps)
            except AssertionError as error:
                found = [str(error)]
            lines = read_lines(started.run.metrics)
            table = Table(
                "fault", "to", "at step", "next step after s", "the run", title=f"seed {seed}: {len(lines)} steps, {minutes} minutes"
            )
            for each in done:
                again = "with the next" if each.recovered_s is None else f"{each.recovered_s:.1f}"
                table.add_row(each.fault, each.to, str(each.step), again, each.came)
            console.print(table)
            console.print("\n".join(found) if found else "nothing lost, nothing doubled, finished with success", markup=False)
            return Outcome(seed, minutes, len(lines), len(history(started).groups), done, found)
        finally:
            if started.process.poll() is None:
                started.process.kill()
                started.process.wait()
            if found:
                kept = Path(tempfile.gettempdir()) / f"faults-seed-{seed}"
                shutil.rmtree(kept, ignore_errors=True)
                shutil.copytree(scratch, kept, symlinks=True)
                console.print(f"kept in {kept}")


def summary(outcomes: list[Outcome]) -> Table:
    """What each kind of fault did, over all schedules."""
    faults = [fault for outcome in outcomes for fault in outcome.faults]
    steps, groups, bad = (sum(of) for of in zip(*((o.steps, o.groups, bool(o.violations)) for o in outcomes), strict=True))
    title = f"{len(outcomes)} schedules, {len(faults)} faults, {steps} steps, {groups} groups; {bad} schedules with violations"
    table = Table("fault", "how often", "next step after s, median", "at most", "the run ended, and was resumed", title=title)
    for kind in sorted({fault.fault for fault in faults}):
        own = [fault for fault in faults if fault.fault == kind]
        waits = [fault.recovered_s for fault in own if fault.recovered_s is not None]
        middle, longest = (f"{statistics.median(waits):.1f}", f"{max(waits):.1f}") if waits else ("", "")
        table.add_row(kind, str(len(own)), middle, longest, str(sum(bool(fault.came) for fault in own)))
    return table


def main() -> int:
    parser = argparse.ArgumentParser(description="Random faults against a live run.")
    parser.add_argument("--seed", default="0", help="one, or a range such as 0-9")
    parser.add_argument("--minutes", type=float, default=2.0, help="of faults, for each seed")
    parser.add_argument("--gap", default="1-10", help="seconds from recovery to the next fault")
    parser.add_argument("--record", type=Path, help="append a line of JSON for each seed to this file, and sum up all that is in it")
    parser.add_argument("--only", choices=[fault.__name__ for fault in FAULTS], help="no other fault")
    options = parser.parse_args()
    first, _, last = options.seed.partition("-")
    low, _, high = options.gap.partition("-")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what was started is ended, and what was mounted is not left
    console = Console(width=140)
    outcomes = recorded(options.record)
    for fault in FAULTS:
        FAULTS[fault] *= options.only in (None, fault.__name__)
    for seed in range(int(first), int(last or first) + 1):
        with tempfile.TemporaryDirectory(prefix="faults-") as scratch:
            outcome = one_seed(seed, options.minutes, (float(low), float(high or low)), Path(scratch), console)
        outcomes.append(outcome)
        if options.record is not None:
            append_line(options.record, asdict(outcome))
    console.print(summary(outcomes))
    failed = [outcome.seed for outcome in outcomes if outcome.violations]
    console.print(f"seeds with violations: {failed}" if failed else "no seed had a violation")
    return 1 if failed else 0


def recorded(path: Path | None) -> list[Outcome]:
    """What earlier calls have recorded there."""
    lines = read_lines(path) if path is not None and path.exists() else []
    return [Outcome(**{**line, "faults": [Done(**fault) for fault in line["faults"]]}) for line in lines]


if __name__ == "__main__":
    sys.exit(main())

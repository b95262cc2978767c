"""The faults that tests/faults.py injects into a live run.

Each takes the run and a random generator, and returns what it was applied to.
"""

import contextlib
import os
import random
import signal
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from run_parts import Started

from atropos_hpc.runtime import process
from atropos_hpc.runtime.run_dir import read_json

DISK_MB = 112
CLOCK = Path(__file__).resolve().parent / "jumping_clock"

Fault = Callable[[Started, random.Random], str]


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
    """Like `pause`, for ever: the run has to notice and kill it.

    Not an engine: one that hangs in a push is killed after 10 minutes only.
    """
    name, pid = dice.choice(
        [(name, pid) for name, pid in members(started) if not name.endswith("engine")]
    )
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
    """Fill the disk a few pages at a time, to the last one, while others write."""
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


def slow_disk(started: Started, dice: random.Random) -> str:
    """Block writes for up to some seconds, repeatedly, by freezing the filesystem."""
    seconds = dice.uniform(3, 12)
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            _fsfreeze("--freeze", started.run.path)
            time.sleep(dice.uniform(0.2, 3))
        finally:
            _fsfreeze("--unfreeze", started.run.path)
        time.sleep(dice.uniform(0.02, 0.5))
    return f"{seconds:.0f} s"


def damage_policy(started: Started, dice: random.Random) -> str:
    """Flip a bit of, truncate or remove a file of the newest policy version."""
    named = read_json(started.run.policy / "latest.json").get("directory")
    files = sorted((started.run.policy / named).iterdir()) if named else []
    return _damage(dice.choice(files), dice) if files else "nothing there yet"


def damage_rendezvous(started: Started, dice: random.Random) -> str:
    """Truncate or remove the roster or a member file; their owners write them again."""
    return _damage(
        dice.choice([started.run.roster, *sorted(started.run.members.glob("*.json"))]),
        dice,
        flip=False,
    )


def damage_checkpoint(started: Started, dice: random.Random) -> str:
    """Truncate or remove a file of the newest checkpoint, and kill the learner, which has to resume
    from the one before."""
    named = read_json(started.run.checkpoints / "latest.json").get("directory")
    if sum(map(_whole, started.run.checkpoints.glob("step-*"))) < 2:
        return "too few there"
    harm = _damage(
        dice.choice(sorted((started.run.checkpoints / named).iterdir())), dice, flip=False
    )
    with contextlib.suppress(KeyError):
        os.kill(dict(members(started))["trainer-trainer0-0"], signal.SIGKILL)
    return harm


def drop_connections(started: Started, dice: random.Random) -> str:
    """Reset all TCP connections to one of the run's servers (ss -K; needs root)."""
    if (server := a_server(started, dice)) is None:
        return "nothing there yet"
    name, _, port = server
    subprocess.run(["ss", "-K", "dport", "=", port], capture_output=True, check=False)
    return name


def delay_connections(started: Started, dice: random.Random) -> str:
    """Make one of the servers answer late and in bursts, by running it a tenth of the time."""
    seconds = dice.uniform(3, 12)
    until = time.monotonic() + seconds
    if (server := a_server(started, dice)) is None:
        return "nothing there yet"
    name, pid, _ = server
    while time.monotonic() < until:
        late = dice.uniform(0.05, 1.5)
        os.kill(pid, signal.SIGSTOP)
        time.sleep(0.9 * late)
        os.kill(pid, signal.SIGCONT)
        time.sleep(0.1 * late)
    return f"{name}, {seconds:.0f} s"


def jump_clock(started: Started, dice: random.Random) -> str:
    """Set the clock forward or back by up to two hours, for all processes of the run."""
    jump = dice.choice([-1, 1]) * dice.uniform(1, 7200)
    path = clock_file(started.output.parent)
    with path.open("r+b") as file:
        (offset,) = struct.unpack("d", file.read(8))
        os.pwrite(file.fileno(), struct.pack("d", offset + jump), 0)
    return f"{jump:+.0f} s"


# The faults with their weights
ON_ANY_DISK: dict[Fault, int] = {
    kill: 6,
    terminate: 2,
    pause: 4,
    freeze: 1,
    kill_supervisor: 1,
    stop: 1,
    damage_policy: 2,
    damage_rendezvous: 2,
    damage_checkpoint: 1,
    drop_connections: 2,
    delay_connections: 2,
    jump_clock: 2,
}
# These need a filesystem that the run does not share.
ON_ITS_OWN: dict[Fault, int] = {fill_disk: 2, slow_disk: 2}


@contextlib.contextmanager
def small_filesystem(path: Path) -> Iterator[bool]:
    """Mount a filesystem of DISK_MB at `path`. Gives False where this user may not do that."""
    path.mkdir()
    image = path.with_suffix(".image")
    with image.open("wb") as file:
        file.truncate(DISK_MB << 20)
    commands = (
        ["mkfs.ext4", "-q", "-m", "0", str(image)],
        ["mount", "-o", "loop,noatime", str(image), str(path)],
    )
    mounted = os.geteuid() == 0 and all(
        subprocess.run(command, capture_output=True, check=False).returncode == 0
        for command in commands
    )
    try:
        if mounted:
            (path / "lost+found").rmdir()
        yield mounted
    finally:
        if mounted:
            _fsfreeze("--unfreeze", path)
            subprocess.run(["umount", "--lazy", str(path)], check=False)


def clock_file(scratch: Path) -> Path:
    return scratch / "clock"


def jumping_clock(scratch: Path) -> dict[str, str]:
    """The environment variables of a run whose clock `jump_clock` can set."""
    clock_file(scratch).write_bytes(struct.pack("d", 0.0))
    path = os.pathsep.join(filter(None, (str(CLOCK), os.environ.get("PYTHONPATH"))))
    return {"PYTHONPATH": path, "JUMPING_CLOCK": str(clock_file(scratch))}


def roster(started: Started) -> list[dict[str, Any]]:
    """The live members, by their member files: the roster may be damaged."""
    found = []
    for path in sorted(started.run.members.glob("*.json")):
        with contextlib.suppress(ValueError, OSError):
            found.append(read_json(path))
    return [m for m in found if m and m["state"] != "ended" and Path(f"/proc/{m['pid']}").exists()]


def members(started: Started) -> list[tuple[str, int]]:
    """(name, pid) of every process except the supervisor, vLLM's engines included."""
    found = []
    for member in roster(started):
        if member["kind"] != "supervisor":
            found.append((member["name"], member["pid"]))
        for server in member.get("servers") or []:
            if server["pid"] is not None:
                found.append((server["name"], server["pid"]))
                found += [(f"{server['name']}'s engine", pid) for pid in engines(server["pid"])]
    return found or [("supervisor", started.process.pid)]


def a_server(started: Started, dice: random.Random) -> tuple[str, int, str] | None:
    """(name, pid, port) of a trajectory server or vLLM server that listens; None if none does."""
    found = []
    for member in roster(started):
        for server in [member] if member["kind"] == "trajectories" else member.get("servers") or []:
            if server.get("url") and server["pid"] is not None:
                found.append((server["name"], server["pid"], server["url"].rpartition(":")[2]))
    return dice.choice(found) if found else None


def engines(server: int) -> list[int]:
    """Pids of vLLM's engine behind a server; [] while it starts, or has ended."""
    with contextlib.suppress(OSError):
        return [
            pid
            for pid in process.descendants_of(server)
            if b"EngineCore" in Path(f"/proc/{pid}/cmdline").read_bytes()
        ]
    return []


def _fsfreeze(what: str, path: Path) -> None:
    subprocess.run(["fsfreeze", what, str(path)], capture_output=True, check=False)


def _whole(checkpoint: Path) -> bool:
    """Whether every file of its manifest exists in full."""
    files = read_json(checkpoint / "manifest.json").get("files", [])
    return bool(files) and all(
        (checkpoint / f["file"]).exists() and (checkpoint / f["file"]).stat().st_size == f["bytes"]
        for f in files
    )


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

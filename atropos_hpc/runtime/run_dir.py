"""Every path inside a run directory, and the one way in which files there are written and read.

A file that others read is written as: temporary name, fsync, checked close, rename, fsync of the directory. So a reader sees
the old content or the new, never a part. A reader opens the name anew at each look; names that are polled exist from the
start (`create`), because NFS remembers for a while that a name was missing.
"""

import errno
import json
import os
import secrets
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from atropos_hpc.config import Config
from atropos_hpc.contracts.run_info import RunInfo

STALE_RETRIES = 20  # reads of a file that was replaced under us, 50 ms apart
TAIL_BYTES = 1 << 16  # the first look at a long file's end


@dataclass(frozen=True)
class RunDir:
    """The layout of one run directory. Building it touches no file; `create` does."""

    path: Path

    @property
    def run_json(self) -> Path:
        return self.path / "run.json"

    @property
    def lock(self) -> Path:
        return self.path / "lock"

    @property
    def holder(self) -> Path:
        """Who holds the lock: job id, node, pid, since."""
        return self.path / "holder.json"

    @property
    def secret(self) -> Path:
        return self.path / "secret"

    @property
    def members(self) -> Path:
        return self.path / "rendezvous" / "members"

    @property
    def roster(self) -> Path:
        return self.path / "rendezvous" / "roster.json"

    @property
    def requests(self) -> Path:
        return self.path / "rendezvous" / "requests"

    @property
    def policy(self) -> Path:
        return self.path / "policy"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def trajectories(self) -> Path:
        return self.path / "trajectories"

    @property
    def logs(self) -> Path:
        """The newest attempt's logs, one file per member."""
        return self.path / "logs" / "latest"

    @property
    def metrics(self) -> Path:
        """One JSON line per optimizer step."""
        return self.path / "metrics.jsonl"

    @property
    def evaluations(self) -> Path:
        """One JSON line per held-out evaluation."""
        return self.path / "evaluations.jsonl"

    @property
    def activity(self) -> Path:
        """What members did over time: observe/activity.py."""
        return self.path / "activity.jsonl"

    @property
    def samples(self) -> Path:
        """Some of the sequences that were trained on: observe/samples.py."""
        return self.path / "samples.jsonl"

    @property
    def done(self) -> Path:
        """Written by the learner when its last step is durable; the run's own word that it is complete."""
        return self.path / "done.json"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    def create(self) -> None:
        """Make the directories (0700), the secret (0600), and the names that others poll. Keeps what is already there."""
        for directory in (
            self.path,
            self.members,
            self.requests,
            self.policy,
            self.checkpoints,
            self.trajectories,
            self.path / "logs",
        ):
            directory.mkdir(parents=True, exist_ok=True)
        self.path.chmod(0o700)
        for polled in (self.roster, self.policy / "latest.json", self.checkpoints / "latest.json"):
            if not polled.exists():
                write_json(polled, {})
        if not self.secret.exists():
            write_file(self.secret, secrets.token_urlsafe(32).encode(), mode=0o600)

    def new_attempt(self) -> Path:
        """Make logs/attempt-<n> for the next n, point logs/latest at it, and return it."""
        logs = self.path / "logs"
        taken = [
            int(name.removeprefix("attempt-"))
            for name in os.listdir(logs)
            if name.startswith("attempt-")
        ]
        attempt = logs / f"attempt-{max(taken, default=-1) + 1}"
        attempt.mkdir()
        link = logs / f".latest.{os.getpid()}"
        link.symlink_to(attempt.name)
        link.replace(logs / "latest")
        return attempt

    def token(self) -> str:
        """The run's bearer token."""
        return self.secret.read_text().strip()

    def info(self) -> RunInfo | None:
        """Decode run.json; None before the run has one. Raises Unreadable."""
        if not (known := read_json(self.run_json)):
            return None
        try:
            return msgspec.convert(known, RunInfo)
        except msgspec.ValidationError as error:
            raise Unreadable(f"{self.run_json} does not describe a run: {error}") from None

    def config(self) -> Config:
        """Return the resolved config of the run. Raises Unreadable."""
        if (info := self.info()) is None:
            raise Unreadable(f"{self.run_json} does not exist: no run was started here yet")
        return info.config


def write_file(path: Path, data: bytes, mode: int = 0o644, durable: bool = True) -> None:
    """Replace `path` by `data`, atomically. Raises OSError (full disk, quota) and then leaves the old content.

    `durable`: it also survives a power cut. What only tells the others of this moment (who lives) need not, and is cheaper.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(fd, view) :]
            if durable:
                os.fsync(fd)
        finally:
            os.close(fd)  # NFS reports a full disk here
        os.rename(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if durable:
        sync_directory(path.parent)


def write_json(path: Path, value: Any, durable: bool = True) -> None:
    """`write_file` of `value` as JSON."""
    write_file(path, json.dumps(value, indent=1).encode() + b"\n", durable=durable)


def sync_directory(directory: Path) -> None:
    """Make renames inside `directory` durable."""
    fd = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class Unreadable(ValueError):
    """A file that is not what it should be; the message names it."""


def read_json(path: Path) -> Any:
    """The parsed content, or {} when there is no such file. Retries when the file was replaced meanwhile (ESTALE).

    Raises Unreadable when it is not JSON.
    """
    for retry in range(STALE_RETRIES):
        try:
            return json.loads(path.read_bytes() or b"{}")
        except FileNotFoundError:
            return {}
        except ValueError as error:
            raise Unreadable(
                f"{path} is not JSON ({error}): it was not written by this program, or is damaged"
            ) from None
        except OSError as error:
            if error.errno != errno.ESTALE or retry == STALE_RETRIES - 1:
                raise
            time.sleep(0.05)
    raise AssertionError("unreachable")


def append_line(path: Path, value: Mapping[str, Any]) -> None:
    """Append one JSON line in a single write. One process appends to a file."""
    with path.open("ab") as file:
        file.write(json.dumps(value).encode() + b"\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All whole JSON lines; a torn last line, left by a crash, is passed over. [] when there is no such file."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return []
    return _parsed(data.split(b"\n"))


def last_lines(path: Path, count: int) -> list[dict[str, Any]]:
    """The last `count` whole JSON lines, read from the file's end, however long it is; [] when there is no such file."""
    try:
        with path.open("rb") as file:
            at, data = file.seek(0, os.SEEK_END), b""
            while at > 0 and data.count(b"\n") <= count + 1:
                step = min(at, max(TAIL_BYTES, len(data)))
                at -= step
                file.seek(at)
                data = file.read(step) + data
    except FileNotFoundError:
        return []
    whole = data if at == 0 else data.partition(b"\n")[2]
    return _parsed(whole.split(b"\n")[-count - 2 :])[-count:]


def _parsed(data: Iterable[bytes]) -> list[dict[str, Any]]:
    lines = []
    for line in data:
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return [line for line in lines if isinstance(line, dict)]

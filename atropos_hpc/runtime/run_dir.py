"""Every path inside a run directory, and the one way in which files there are written and read.

A file that others read is written as: temporary name, fsync, checked close, rename, fsync of the
directory. So a reader sees the old content or the new, never a part. A reader opens the name anew
at each look; names that are polled exist from the start (`create`), because NFS caches the absence
of a name.
"""

import errno
import json
import logging
import os
import re
import secrets
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import msgspec

from atropos_hpc.config import Config
from atropos_hpc.contracts.run_info import Private, RunInfo, SecretValue
from atropos_hpc.runtime import masking

log = logging.getLogger(__name__)

T = TypeVar("T")

STALE_RETRIES = 20  # reads of a file that was replaced meanwhile (ESTALE), 50 ms apart
OLD_LAYOUT = "0.1.0"  # the version whose run directories are refused
TAIL_BYTES = 1 << 16  # the first read at a long file's end


class RunDir:
    """The layout of one run directory. The constructor touches no file; `create` does."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.run_json = path / "run.json"  # contracts.run_info.RunInfo
        self.lock = path / "lock"
        self.holder = path / "holder.json"  # contracts.members.Holder
        self.secret = path / "secret"
        self.private = path / "private.json"  # contracts.run_info.Private
        self.members = path / "rendezvous" / "members"
        self.roster = path / "rendezvous" / "roster.json"
        self.requests = path / "rendezvous" / "requests"
        self.policy = path / "policy"
        self.checkpoints = path / "checkpoints"
        self.trajectories = path / "trajectories"
        self.logs = path / "logs" / "latest"  # of the newest attempt, one file per process
        self.metrics = path / "metrics.jsonl"  # one line per optimizer step
        self.tracked = path / "tracked.jsonl"  # what trackers are given: observe/tracker_feed.py
        self.evaluations = path / "evaluations.jsonl"  # one line per held-out evaluation
        self.activity = path / "activity.jsonl"  # what members did over time: observe/timeline.py
        self.environments = path / "environments.jsonl"  # what environments log for training
        self.partial = path / "partial"  # answers under way at a stop: rollout/saved_answers.py
        self.rollouts = path / "rollouts"  # all trained sequences: observe/rollouts.py
        self.exports = path / "exports"  # of export.every: learner/periodic_export.py
        self.done = path / "done.json"  # contracts.members.Done: the last step is durable
        self.summary = path / "summary.json"

    def __repr__(self) -> str:
        return f"RunDir({self.path})"

    def create(self) -> None:
        """Make the directories (0700), the secret (0600) and the files that others poll.

        Keeps what exists.
        """
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
        attempt = logs / f"attempt-{max(numbered(logs, 'attempt-'), default=-1) + 1}"
        attempt.mkdir()
        link = logs / f".latest.{os.getpid()}"
        link.symlink_to(attempt.name)
        link.replace(logs / "latest")
        return attempt

    def attempts(self) -> list[Path]:
        """The log directories of all attempts, in order. A copy or an archive of one is none."""
        return [path for _, path in sorted(numbered(self.path / "logs", "attempt-").items())]

    def attempt(self) -> int:
        """The number of the newest attempt; 0 before the first."""
        name = self.logs.resolve().name
        return int(name.removeprefix("attempt-")) if name.startswith("attempt-") else 0

    def token(self) -> str:
        return self.secret.read_text().strip()

    def info(self) -> RunInfo | None:
        """Decode run.json; None before the run's first start. Raises Unreadable.

        A run directory of atropos_hpc 0.1 is refused: its other files have another layout.
        """
        known = read_json(self.run_json)
        if isinstance(known, dict) and known.get("version") == OLD_LAYOUT:
            raise Unreadable(
                f"{self.path} was made by atropos_hpc {OLD_LAYOUT}, whose run directories have"
                " another layout. Finish it with that version, or start in a new run_dir with"
                " model.path set to a checkpoint exported from it"
            )
        return read_struct(self.run_json, RunInfo)

    def config(self) -> Config:
        """Return the resolved config of the run, with its secrets. Raises Unreadable."""
        if (info := self.info()) is None:
            raise Unreadable(f"{self.run_json} does not exist: no run was started here yet")
        found = self.learn_secrets()
        try:
            return masking.unmask_config(info.config, found)
        except (LookupError, TypeError) as error:
            raise _unreadable(self.private, "not of this run's config", error) from None

    def learn_secrets(self) -> list[SecretValue]:
        """Have this process mask the run's secrets in what it logs and shows; return them."""
        found = (read_struct(self.private, Private) or Private()).secrets
        masking.learn(found)
        return found

    def write_info(self, info: RunInfo) -> None:
        """Write run.json, masked, and what is masked there to private.json."""
        config, values = masking.mask_config(info.config)
        masking.learn(values)
        write_file(self.private, msgspec.json.encode(Private(values)), mode=0o600)
        command = [masking.mask_assignments(word) for word in info.command]
        write_struct(self.run_json, msgspec.structs.replace(info, config=config, command=command))


def numbered(directory: Path, before: str, after: str = "") -> dict[int, Path]:
    """Return the entries <before><number><after> of a directory by number. Copies, archives and
    temporary files have other names."""
    name = re.compile(rf"{re.escape(before)}(\d+){re.escape(after)}")
    found = ((name.fullmatch(path.name), path) for path in directory.glob("*"))
    return {int(match[1]): path for match, path in found if match}


def write_file(path: Path, data: bytes, mode: int = 0o644, durable: bool = True) -> None:
    """Replace `path` by `data`, atomically. Raises OSError (full disk, quota) and then leaves the
    old content.

    `durable`: the file also survives a power failure. Files that describe the present only do not
    need that, and fsync is expensive.
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
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # so that every message names what cannot be written
        raise
    if durable:
        sync_directory(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON, with `write_file`."""
    write_file(path, json.dumps(value, indent=1).encode() + b"\n")


def write_struct(
    path: Path, value: msgspec.Struct | Sequence[msgspec.Struct], durable: bool = True
) -> None:
    """Write a struct of contracts/, or a list of them, as JSON, with `write_file`."""
    data = msgspec.json.format(msgspec.json.encode(value), indent=1)
    write_file(path, data + b"\n", durable=durable)


def sync_directory(directory: Path) -> None:
    """Make renames inside `directory` durable."""
    fd = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class Unreadable(ValueError):
    """A file does not have the content that it should have; the message names it."""


def read_struct(path: Path, kind: type[T]) -> T | None:
    """Read a struct of contracts/; None when the file is missing, empty or holds `{}`.

    Raises Unreadable when the content is something else.
    """
    data = _read_bytes(path)
    if data.strip() in (b"", b"{}"):
        return None
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.MsgspecError as error:
        raise _unreadable(path, f"not a valid {_name_of(kind)}", error) from None


def read_intact(path: Path, kind: type[T]) -> T | None:
    """Read as `read_struct` does; None, with a warning, when the file is damaged.

    For files that the run can do without, or that are soon replaced.
    """
    try:
        return read_struct(path, kind)
    except Unreadable as error:
        log.warning("%s; going on without it", error)
        return None


def read_json(path: Path) -> Any:
    """Read JSON; {} when there is no such file. Raises Unreadable when the content is not JSON."""
    try:
        return json.loads(_read_bytes(path) or b"{}")
    except ValueError as error:
        raise _unreadable(path, "not JSON", error) from None


def _name_of(kind: Any) -> str:
    return getattr(kind, "__name__", None) or str(kind)


def _unreadable(path: Path, what: str, error: Exception) -> Unreadable:
    return Unreadable(
        f"{path} is {what} ({error}): it was not written by this program, or is damaged"
    )


def _read_bytes(path: Path) -> bytes:
    """The content; b"" when there is no such file. Retries when the file was replaced meanwhile."""
    for retry in range(STALE_RETRIES):
        try:
            return path.read_bytes()
        except FileNotFoundError:
            return b""
        except OSError as error:
            if error.errno != errno.ESTALE or retry == STALE_RETRIES - 1:
                raise
            time.sleep(0.05)
    raise AssertionError("unreachable")


def _last_whole_lines(path: Path, count: int) -> list[bytes]:
    """The last lines of a file, at least `count` of them, however long the file is."""
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
    return whole.split(b"\n")[-count - 2 :]


# --- JSON lines of the structs in contracts/


def append_record(path: Path, record: msgspec.Struct) -> None:
    """Append a struct as one JSON line in a single write. One process appends to a file.

    A line that a crash or a full disk has cut off is ended first, and lost alone.
    """
    with path.open("a+b") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(0, end - 1))
        torn = file.read(1) not in (b"", b"\n")
        file.write(b"\n" * torn + msgspec.json.encode(record) + b"\n")


def read_records(path: Path, kind: type[T]) -> list[T]:
    """Decode every JSON line of a file; [] without the file.

    Skips lines that are not JSON: a crash or a full disk leaves them. Raises Unreadable when a line
    is JSON but does not match the struct.
    """
    return _decoded(path, _read_bytes(path).split(b"\n"), kind)


def last_records(path: Path, kind: type[T], count: int) -> list[T]:
    """Decode the last `count` JSON lines of a file, reading only its end; see `read_records`."""
    return _decoded(path, _last_whole_lines(path, count), kind)[-count:]


class RecordReader(Generic[T]):
    """Decodes the JSON lines that have been appended to a file since the last call."""

    def __init__(self, path: Path, kind: type[T], at_end: bool = False) -> None:
        """Start at the file's beginning, or at its present end."""
        self._path, self._kind = path, kind
        self._offset = path.stat().st_size if at_end and path.exists() else 0

    def take(self) -> list[T]:
        """Return the new whole lines; see `read_records`."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return []
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        return _decoded(self._path, whole.split(b"\n"), self._kind)


def _decoded(path: Path, lines: Iterable[bytes], kind: type[T]) -> list[T]:
    decoder, records = msgspec.json.Decoder(kind), []
    for line in lines:
        try:
            records.append(decoder.decode(line))
        except msgspec.ValidationError as error:
            what = f"a file with a line that is no {_name_of(kind)}"
            raise _unreadable(path, what, error) from None
        except msgspec.DecodeError:
            continue
    return records

"""Files that others read are old or new, never a part; and the layout is private."""

import errno
import os
from pathlib import Path

import pytest

from atropos_hpc.contracts.members import Done
from atropos_hpc.runtime import run_dir
from atropos_hpc.runtime.run_dir import (
    RunDir,
    Unreadable,
    append_record,
    last_records,
    read_json,
    read_records,
    read_struct,
    write_file,
    write_json,
    write_struct,
)


def test_create_makes_a_private_directory_with_a_secret(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    run.create()
    assert run.path.stat().st_mode & 0o777 == 0o700
    assert run.secret.stat().st_mode & 0o777 == 0o600
    token = run.token()
    run.create()
    assert run.token() == token and len(token) >= 32


def test_a_full_disk_leaves_the_old_content_and_no_debris(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file.json"
    write_json(path, {"n": 1})

    def full(_fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(run_dir.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_json(path, {"n": 2})
    assert read_json(path) == {"n": 1}
    assert os.listdir(tmp_path) == ["file.json"]


@pytest.mark.parametrize("crash_at", ["write", "fsync", "rename"])
def test_a_crash_at_any_point_of_a_write_leaves_old_or_new(tmp_path: Path, crash_at: str) -> None:
    path = tmp_path / "file"
    write_file(path, b"old")
    if (pid := os.fork()) == 0:
        setattr(run_dir.os, crash_at, lambda *_: os._exit(9))
        write_file(path, b"new")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    assert path.read_bytes() == b"old"


def test_lines_of_a_torn_file_are_read_up_to_the_tear(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert read_records(path, Done) == []
    append_record(path, Done(version=1))
    append_record(path, Done(version=2))
    with path.open("ab") as file:
        file.write(b'{"version": 3, "rew')
    assert read_records(path, Done) == [Done(version=1), Done(version=2)]
    assert last_records(path, Done, 1) == [Done(version=2)]


@pytest.mark.parametrize("cut", [1, 5])
def test_a_torn_line_is_lost_alone(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "lines.jsonl"
    for version in (1, 2):
        append_record(path, Done(version=version))
    os.truncate(path, path.stat().st_size - cut)
    append_record(path, Done(version=3))
    kept = [Done(version=1), *([Done(version=2)] if cut == 1 else []), Done(version=3)]
    assert read_records(path, Done) == kept


def test_each_attempt_has_its_logs_and_latest_points_at_the_newest(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.create()
    first, second = run.new_attempt(), run.new_attempt()
    assert (first.name, second.name) == ("attempt-0", "attempt-1")
    assert run.logs.resolve() == second.resolve()


def test_a_struct_is_none_before_it_is_written_and_validated_when_read(tmp_path: Path) -> None:
    path = tmp_path / "done.json"
    assert read_struct(path, Done) is None
    path.write_text("{}\n")
    assert read_struct(path, Done) is None
    write_struct(path, Done(version=3))
    assert read_struct(path, Done) == Done(version=3)
    for wrong in ('{"version": "three"}', '{"version": 3', "[]"):
        path.write_text(wrong)
        with pytest.raises(Unreadable, match=r"done\.json is not a valid Done"):
            read_struct(path, Done)


def test_a_run_directory_of_the_previous_layout_is_refused(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    write_json(run.run_json, {"version": "0.1.0", "id": "x", "config": {"trainer": {"steps": 3}}})
    with pytest.raises(Unreadable, match=r"made by atropos_hpc 0\.1\.0, .* another layout"):
        run.info()

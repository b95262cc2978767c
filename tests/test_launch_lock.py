"""A second start of a run in one Slurm job: refused at once, unless Slurm has requeued the job."""

from pathlib import Path

import pytest
from config_parts import composed
from filelock import FileLock, Timeout

from atropos_hpc.contracts.members import Holder
from atropos_hpc.launch import preflight, run, storage_check
from atropos_hpc.runtime.run_dir import RunDir, write_struct


@pytest.mark.parametrize(
    "restarts_before, restarts_now, waits",
    [(None, None, False), ("1", "1", False), (None, "1", True), ("1", "2", True)],
)
def test_only_a_requeued_job_waits_for_the_lock_of_its_earlier_start(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    restarts_before: str | None,
    restarts_now: str | None,
    waits: bool,
) -> None:
    directory = RunDir(tmp_path)
    write_struct(directory.holder, Holder(job="7", restarts=restarts_before))
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    if restarts_now is not None:
        monkeypatch.setenv("SLURM_RESTART_COUNT", restarts_now)
    waited = []

    class Lock(FileLock):
        def acquire(self, timeout: float | None = None, **rest: object) -> object:  # type: ignore[override]
            waited.append(self.timeout)
            return super().acquire(timeout=0, **rest)  # type: ignore[arg-type]

    monkeypatch.setattr(storage_check, "FileLock", Lock)
    with FileLock(directory.lock), pytest.raises(Timeout), run._locked(directory):
        pass
    assert waited == [run.OLD_LOCK_S if waits else 0]


@pytest.mark.parametrize("checked", [True, False])
def test_a_job_repeats_no_check_of_its_submission(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checked: bool
) -> None:
    asked = []
    monkeypatch.setattr(
        preflight,
        "check",
        lambda *_, roles, **__: (asked.append(roles), [run.Problem("x", "y")])[1],
    )
    assert run.launch(composed(), tmp_path / "run", lambda: None, checked=checked) == 2
    assert asked == [not checked]

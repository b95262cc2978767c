"""A point of a sweep whose run has not begun, or never will: what status and logs show of it."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from atropos_hpc.contracts.metrics import SweepPoint
from atropos_hpc.observe import logs, report, status, status_view
from atropos_hpc.runtime.run_dir import write_struct

REASON = "  model.path: there is no /models/[bold]x"


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Two points of a job each, with overrides that look like markup."""
    overrides = ["cluster.shared=[/]"]
    rows = [
        SweepPoint(
            num, [*overrides, f"seed={num}"], f"{tmp_path}/{num}", 3, str(num + 7), None, log, 1.0
        )
        for num, log in enumerate([f"{tmp_path}/job.out", f"{tmp_path}/none.out"])
    ]
    (tmp_path / "job.out").write_text(f"The config was refused; nothing was started.\n{REASON}\n")
    write_struct(tmp_path / "jobs.json", rows)
    return tmp_path


def shown(directory: Path, **jobs: str) -> str:
    states = {name.removeprefix("job"): state for name, state in jobs.items()}
    out = Console(width=160, file=io.StringIO())
    out.print(status_view.draw(status.read_status(directory, lambda _: states)))
    text: str = out.file.getvalue()  # type: ignore[attr-defined]
    return text


@pytest.mark.parametrize("state", ["FAILED", "TIMEOUT", "CANCELLED"])
def test_a_point_that_ended_before_its_run_began_shows_its_jobs_log(
    sweep: Path, state: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = shown(sweep / "0", job7=state, job8="PENDING")
    assert REASON in text and "atropos-hpc resume" in text
    assert "ended before the run began" in shown(sweep, job7=state, job8="PENDING")
    (point,) = report.require_points(sweep / "0")
    logs.show_point(point, logs.LogOptions())
    logs.show_points(report.require_points(sweep), 20)
    assert capsys.readouterr().out.count(REASON) == 2


def test_a_queued_point_is_shown_before_it_has_a_directory(
    sweep: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "queued" in shown(sweep / "1", job7="FAILED", job8="PENDING")
    logs.show_point(report.require_points(sweep / "1")[0], logs.LogOptions())
    assert "job 8 has written no log yet" in capsys.readouterr().out


def test_a_pending_job_that_has_lost_a_component_is_named(sweep: Path) -> None:
    text = shown(sweep / "1", job8="PENDING, but a component is FAILED: never starts")
    assert "failed" in text and "a component is FAILED: never starts" in text

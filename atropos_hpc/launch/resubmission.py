"""Which points of a sweep that is submitted again are complete, live, changed or still to be run.

A point is what its config says, whatever its number. `points.json` in the sweep's directory has the
config of every submitted point; once a point's run has begun, its run.json is what counts.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import msgspec
from filelock import Timeout

from atropos_hpc.config import Config
from atropos_hpc.contracts.answers import Problem
from atropos_hpc.contracts.metrics import SweepPoint
from atropos_hpc.contracts.run_info import PointConfig
from atropos_hpc.contracts.status import LIVE, PointStatus
from atropos_hpc.launch import storage_check
from atropos_hpc.launch.new_directory import LOCK
from atropos_hpc.launch.preflight import flat
from atropos_hpc.launch.sweep_point import Point
from atropos_hpc.observe import report
from atropos_hpc.runtime import masking, slurm
from atropos_hpc.runtime.run_dir import RunDir, read_struct, write_struct
from atropos_hpc.validate import Refused

T = TypeVar("T")
ABSENT = object()
# How and where a point runs, and for how long: no part of what it is, unless the sweep varies it.
OPERATIONAL = (
    "run_dir",
    "cluster.",
    "launch.",
    "roles.",
    "wandb.",
    "tensorboard",
    "mlflow.",
    "trackio.",
    "export.",
    "trainer.steps",
    "trainer.checkpoint_every",
    "trainer.keep_checkpoints",
)


@dataclass(frozen=True)
class Sorted:
    """The points of a submission: those to submit, and those that need nothing, with their state.
    `problems` names the points whose directory has another point."""

    new: list[Point]
    skipped: list[tuple[Point, PointStatus]]
    problems: list[Problem]


@contextmanager
def locked(sweep_dir: Path) -> Iterator[None]:
    """Keep a second submission into the same directory out. Raises Refused."""
    sweep_dir.mkdir(parents=True, exist_ok=True)
    try:
        with storage_check.locked(sweep_dir / LOCK):
            yield
    except Timeout:
        reason = f"another submission into {sweep_dir} is under way; nothing was submitted"
        raise Refused(Problem("run_dir", reason)) from None


def sort(points: Sequence[Point], sweep_dir: Path, resumed: bool = False) -> Sorted:
    """Compare the points with those that the directory has. A point that is there already, under
    whatever number, takes its place; `resumed`: each is in its own. Raises Refused when Slurm does
    not answer."""
    rows = {row.run_dir: row for row in report.find_points(sweep_dir)}
    known = known_configs(sweep_dir, [*rows, *(str(point.run_dir) for point in points)])
    found = Sorted([], [], [])
    masked = [(str(point.run_dir), masking.mask_config(point.config)[0]) for point in points]
    own: list[str | Problem] = [place for place, _ in masked]
    matched = own if resumed else match(masked, known)
    jobs = _job_states([row.job for row in rows.values()])
    for point, place in zip(points, matched, strict=True):
        if isinstance(place, Problem):
            found.problems.append(place)
            continue
        row = rows.get(place)
        if row is not None:
            point.num, point.run_dir, point.config.run_dir = row.num, Path(place), place
        status = _status(point, row, jobs)
        if status is None:
            found.new.append(point)
        else:
            found.skipped.append((point, status))
    return found


def match(points: Sequence[tuple[str, Config]], known: Mapping[str, Config]) -> list[str | Problem]:
    """Return the run directory of each (run directory, config): that of the known point with the
    same config, else its own; a Problem if that has a point with another config."""
    new = [flat(config) for _, config in points]
    old = {place: flat(config) for place, config in known.items()}
    varied = _varied(new) | _varied(list(old.values()))
    places: list[str | Problem] = []
    for (own, _), now in zip(points, new, strict=True):
        same = [place for place, was in old.items() if not _differing(was, now, varied)]
        if same and own not in same:
            places.append(same[0])
        elif own in old and not same:
            key = _differing(old[own], now, varied)[0]
            message = (
                f"is {now.get(key)!r}, but {own} has the point with {old[own].get(key)!r}; give"
                " another run_dir, or the values that this sweep was submitted with"
            )
            places.append(Problem(key, message))
        else:
            places.append(own)
    return places


def _differing(was: Mapping[str, object], now: Mapping[str, object], varied: set[str]) -> list[str]:
    """Return the keys in which two configs are different points; those that are varied first."""
    differing = [
        key
        for key in sorted(was.keys() | now.keys())
        if was.get(key, ABSENT) != now.get(key, ABSENT)
        and (key in varied or not key.startswith(OPERATIONAL))
        # a model that was made has got a path by now
        and not (key == "model.path" and now.get(key) is None and now.get("model.make"))
    ]
    return sorted(differing, key=lambda key: (key not in varied, key.count(".")))


def _varied(configs: Sequence[Mapping[str, object]]) -> set[str]:
    keys = {key for each in configs for key in each} - {"run_dir", "wandb.group"}
    return {key for key in keys if any(each.get(key) != configs[0].get(key) for each in configs)}


def _job_states(jobs: Sequence[str | None]) -> dict[str, str | None]:
    wanted = [job for job in jobs if job]
    if not wanted or not slurm.is_installed():
        return {}
    try:
        found = slurm.job_states(wanted)
    except slurm.SlurmError as error:
        reason = f"cannot tell which points of this sweep are live: {error}"
        raise Refused(Problem("cluster", reason)) from None
    return {job: found.get(job) for job in wanted}


def _status(point: Point, row: SweepPoint | None, jobs: report.JobStates) -> PointStatus | None:
    """Return the state of a point that needs nothing: complete, or live; None: it is to be run."""
    steps, job = point.config.trainer.steps, row.job if row is not None else None
    shown = [masking.mask_assignments(override) for override in point.overrides]
    where = SweepPoint(point.num, shown, str(point.run_dir), steps, job)
    status = report.point_status(where, jobs)
    if status.state == "complete":
        return status
    live = status.state in LIVE and (job in jobs or report.is_held(RunDir(point.run_dir)))
    return status if live else None


# --- the configs of points


def known_configs(sweep_dir: Path, run_dirs: Sequence[str]) -> dict[str, Config]:
    """Map run directories to what runs there, or was submitted to run there."""
    submitted = {each.run_dir: each.config for each in _read(sweep_dir)}
    known = {}
    for place in run_dirs:
        info = RunDir(Path(place)).info()
        config = info.config if info is not None else submitted.get(place)
        if config is not None:
            known[place] = config
    return known


def record(sweep_dir: Path, points: Sequence[Point]) -> None:
    """Add the configs of points to points.json, before they are submitted."""
    new = {str(point.run_dir) for point in points}
    kept = [each for each in _read(sweep_dir) if each.run_dir not in new]
    masked = [(str(point.run_dir), masking.mask_config(point.config)[0]) for point in points]
    added = [PointConfig(run_dir, config) for run_dir, config in masked]
    write_struct(sweep_dir / "points.json", [*kept, *added])


def _read(sweep_dir: Path) -> list[PointConfig]:
    found = read_struct(sweep_dir / "points.json", list[PointConfig]) or []
    here = report.paths_in(sweep_dir, [each.run_dir for each in found])
    return [msgspec.structs.replace(each, run_dir=here(each.run_dir)) for each in found]

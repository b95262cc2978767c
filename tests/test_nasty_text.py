"""Paths and names of users with characters that mean something to Hydra, a shell, Slurm or rich."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from atropos_hpc import cli
from atropos_hpc.config import Config, WandbConf
from atropos_hpc.contracts.metrics import SweepPoint
from atropos_hpc.contracts.run_info import RunInfo
from atropos_hpc.launch import doctor, hydra_api, preflight, sweep
from atropos_hpc.launch.slurm import sbatch
from atropos_hpc.launch.sweep_point import Point
from atropos_hpc.observe import html_report, report
from atropos_hpc.observe.console import Console
from atropos_hpc.observe.terminal import terminal
from atropos_hpc.runtime import shell
from atropos_hpc.runtime.run_dir import RunDir, write_struct

ROOT = Path(__file__).parents[1]
NASTY = [
    "a,b",
    "a=b",
    "a(b)",
    "a)b",
    "[a]",
    "a]b[",
    "{a}",
    "{a: b",
    "it's",
    'say "a"',
    "''",
    "a #b",
    "#a",
    "a&b;c|d>e",
    "~a",
    "a b  c",
    " a ",
    "+a",
    "a:b",
    "a@b",
    "$HOME",
    "${oc.env:HOME}",
    "${hydra:job.num}",
    "`a`",
    "a*?!",
    "größe-模型",
    "null",
    "1e3",
    "true",
    "[/tmp]",
    "[red]",
    ":bell:",
    "-a",
]
BACKSLASHES = ["a\\b", "a\\", "\\'", "a\\\\'", "50%", "%j", "%%"]
SLURM_ONLY = [name for name in BACKSLASHES if "%" in name or "\\" in name]


@pytest.mark.parametrize("value", [*NASTY, *BACKSLASHES, "\\${a}", "a\\\\${b}"])
def test_nasty_value_of_a_generated_override_is_what_hydra_sets(value: str) -> None:
    config = hydra_api.compose([shell.override("wandb.project", value)])
    assert config.wandb.project == value
    (parsed,) = OverridesParser.create().parse_overrides([shell.override("run_dir", value)])
    assert parsed.key_or_group == "run_dir"


def set_by(overrides: list[str]) -> dict[str, object]:
    """What Hydra's parser makes of overrides."""
    parsed = OverridesParser.create().parse_overrides(overrides)
    return {each.key_or_group: each.value() for each in parsed}


def escaped(text: object) -> str:
    """A text for OmegaConf, which would replace an interpolation."""
    return str(text).replace("${", "\\${")


def words(line: str) -> list[str]:
    """What a shell makes of a printed command line."""
    script = f"printf '%s\\0' {line}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, check=True, cwd="/")
    return done.stdout.decode().split("\0")[:-1]


@pytest.mark.parametrize("name", [*NASTY, *BACKSLASHES])
def test_nasty_path_in_a_printed_command_is_one_word(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    assert words(shell.printed("atropos-hpc", "status", path)) == [
        "atropos-hpc",
        "status",
        str(path),
    ]


@pytest.mark.parametrize("name", [*NASTY, *BACKSLASHES])
def test_nasty_path_of_a_local_multirun_reaches_every_point(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = Config()
    config.launch.dry_run = True
    run_dir = tmp_path / name / "0"
    point = Point(0, ["wandb.tags=[red]", "run_dir=x"], config, run_dir)
    sweep.here([point], tmp_path / name, 1)
    printed = capsys.readouterr().out.splitlines()[0]
    _, *command = words(printed)
    assert command[:2] == ["-m", "atropos_hpc.train"]
    assert set_by(command[2:]) == {"wandb.tags": ["red"], "run_dir": escaped(run_dir)}


@pytest.mark.parametrize("name", NASTY)
def test_nasty_path_in_an_sbatch_script_is_one_word_and_no_option(name: str) -> None:
    config = Config()
    config.launch.allocation = "het"
    text = sbatch.script(config, f"/x/{name}/log", shlex.join(["python", f"/x/{name}"]))
    (line,) = [line for line in text.splitlines() if "--output" in line]
    assert shlex.split(line.removeprefix("#SBATCH ")) == [f"--output=/x/{name}/log"]
    assert words(text.splitlines()[-1].removeprefix("exec ")) == ["python", f"/x/{name}"]


@pytest.mark.parametrize("name", SLURM_ONLY)
def test_nasty_path_that_slurm_takes_for_a_pattern_is_refused_on_slurm_only(
    name: str, tmp_path: Path
) -> None:
    config = Config()
    assert list(preflight._log_names(config, tmp_path / name)) == []
    config.launch.allocation = "het"
    (problem,) = preflight._log_names(config, tmp_path / name)
    assert problem.key == "run_dir" and "Slurm takes" in problem.message


def a_run(path: Path) -> RunDir:
    run = RunDir(path)
    run.create()
    run.new_attempt()
    config = Config(run_dir=str(path), wandb=WandbConf(tags=["red"], group="[/tmp]"))
    command = ["train.py", "cluster.shared=[/tmp]", "wandb.tags=[red]"]
    run.write_info(RunInfo(config, id="x", created=1.0, command=command))
    return run


@pytest.mark.parametrize("name", [*NASTY, *BACKSLASHES])
def test_nasty_path_of_a_run_is_shown_by_status_report_and_logs(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = a_run(tmp_path / name)
    (run.logs / "trainer-0.log").write_text("[/red] a line\n")
    assert cli.main(["status", str(run.path), "--once"]) == 0
    flat = re.sub(r"\s+", "", capsys.readouterr().out)
    assert re.sub(r"\s+", "", str(run.path)) in flat
    assert cli.main(["logs", str(run.path)]) == 0
    assert "[/red] a line" in capsys.readouterr().out
    row = report.point_status(report.find_points(run.path)[0], {})
    again = words(html_report.command(row))
    values = set_by(again[3:])
    assert values["wandb.tags"] == ["red"] and values["cluster.shared"] == ["/tmp"]
    assert str(values["run_dir"]).endswith(escaped(Path(name).name))


def test_nasty_path_passes_the_command_line_of_a_multirun_and_its_checks(tmp_path: Path) -> None:
    run_dir = tmp_path / "it's [a,b] {c: 1} (größe) #&~=1"
    command = [
        *(sys.executable, "-m", "atropos_hpc.train", "-m", "launch.dry_run=true"),
        *("algorithm.kl_coef=0,0.5", "wandb.tags=[red]", "hydra/launcher=submitit_local"),
        *("hydra.sweep.subdir=${hydra.job.override_dirname}", shell.override("run_dir", run_dir)),
    ]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    printed = [line for line in done.stdout.splitlines() if "atropos_hpc.train" in line]
    assert len(printed) == 2
    for line, kl_coef in zip(printed, (0, 0.5), strict=True):
        overrides = [word for word in words(line) if "=" in word]
        config = hydra_api.compose(overrides)
        assert config.algorithm.kl_coef == kl_coef
        assert config.run_dir.startswith(f"{run_dir}/algorithm.kl_coef={kl_coef},")
        assert preflight.check(config, Path(config.run_dir), None, roles=False) == []


def test_nasty_path_of_further_configs_is_found(tmp_path: Path) -> None:
    for name in ("a,b", "it's [a] {b}", "größe (1)"):
        directory = tmp_path / name
        (directory / "experiment").mkdir(parents=True)
        text = "# @package _global_\nseed: 7\n"
        (directory / "experiment" / "own.yaml").write_text(text)
        overrides = [
            "experiment=own",
            "model.path=x",
            "environment.target=a:B",
            "model.max_length=8",
        ]
        assert hydra_api.compose(overrides, directory).seed == 7


# --- rich


MARKUP = ["cluster.shared=[/tmp]", "wandb.tags=[red]", "a=[bold]b[/bold]", "b=:bell:", "c=[/]"]


@pytest.fixture
def markup_sweep(tmp_path: Path) -> Path:
    """A sweep whose points are called like markup."""
    directory = tmp_path / "[red] sweep"
    rows = []
    for number, text in enumerate(MARKUP):
        run = a_run(directory / str(number))
        rows.append(SweepPoint(number, [text, "wandb.name=[/]"], str(run.path), 3))
    write_struct(directory / "jobs.json", rows)
    return directory


def test_markup_in_overrides_is_shown_by_status_as_it_is(
    markup_sweep: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["status", str(markup_sweep), "--once"]) == 0
    shown = capsys.readouterr().out
    for text in [*MARKUP, "[red] sweep"]:
        assert text in shown


def test_markup_in_messages_is_shown_by_the_live_view_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import logging

    run = a_run(tmp_path / "[red]")
    live = Console(run, 3)
    live.terminal = terminal(stderr=True, force_terminal=True, width=200)
    live.progress.live.console = live.terminal
    with live.logging_to(run.logs / "supervisor.log"):
        for text in MARKUP:
            logging.getLogger("x").warning("failed: %s", text)
        live.progress.update(live.task, description="[/x]", metrics="[red]1[/red]")
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().err)
    for text in MARKUP:
        assert text in plain


def test_markup_in_findings_of_the_doctor_is_shown_as_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = [doctor.Finding(False, text, f"fix {text}") for text in MARKUP]
    for name in ("_machine", "_slurm", "_role"):
        monkeypatch.setattr(doctor, name, lambda *_: found)
    doctor.examine([])
    shown = capsys.readouterr().out
    for text in MARKUP:
        assert text in shown and f"fix {text}" in shown


def test_markup_is_never_parsed_because_every_console_is_made_in_one_place() -> None:
    made = re.compile(r"rich\.print|rich import print|rich\.console import Console\b|TextColumn\(")
    places = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "atropos_hpc").rglob("*.py")
        if made.search(path.read_text())
    }
    assert places == {"atropos_hpc/observe/terminal.py"}
    with (made_there := terminal(width=80)).capture() as captured:
        for text in MARKUP:
            made_there.print(text)
    assert captured.get().split("\n")[:-1] == MARKUP

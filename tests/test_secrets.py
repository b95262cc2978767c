"""Secrets that a user gives in the config are masked by name and by value wherever it is shown."""

import copy
import logging
import stat
from pathlib import Path
from typing import Any

import msgspec
import pytest
from config_parts import composed

from atropos_hpc.config import Config, EnvironmentConf
from atropos_hpc.contracts.answers import Problem
from atropos_hpc.contracts.run_info import RunInfo
from atropos_hpc.launch import preflight, resubmission, sweep
from atropos_hpc.launch.sweep_point import Point
from atropos_hpc.observe import html_report, logs, status, trackers
from atropos_hpc.observe.console import Console
from atropos_hpc.runtime import masking, process
from atropos_hpc.runtime.run_dir import RunDir
from atropos_hpc.validate import refuse

SECRET = "correct-horse-battery-staple"
HF = "hf_" + "Ab3" * 8
COMMAND = [
    "train.py",
    f"rollout.variables={{JUDGE_API_KEY: {SECRET}, PLAIN: plain}}",
    f"environment.config.password={SECRET}",
    "trainer.steps=3",
]


def secret_config() -> Config:
    config = composed("run_dir=runs/x")
    config.rollout.variables = {"JUDGE_API_KEY": SECRET, "PLAIN": "plain", "COPY": f"x{SECRET}"}
    config.environment.config = {"password": SECRET, "nested": [{"api_key": SECRET}], "max": 3}
    config.more_environments = {
        "b": EnvironmentConf(target="a:B", config={"auth": {"access_token": SECRET}})
    }
    config.cluster.setup = [f"export HF_TOKEN={HF}", f"curl https://me:{SECRET}@host", "module x"]
    return config


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    monkeypatch.setattr(masking, "_learned", set())
    made = RunDir(tmp_path / "sweep" / "0")
    made.create()
    made.new_attempt()
    made.write_info(RunInfo(secret_config(), id="x", created=1.0, command=COMMAND))
    return made


def is_masked(text: str) -> bool:
    """Return whether a text has neither secret, and something where they were."""
    return SECRET not in text and HF not in text and masking.MASK in text


NAMES = {
    **dict.fromkeys(("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "db_password"), True),
    **dict.fromkeys(("apikey", "api-key", "GOOGLE_APPLICATION_CREDENTIALS", "key"), True),
    **dict.fromkeys(("max_tokens", "pad_token", "TOKENIZERS_PARALLELISM", "keys", "monkey"), False),
    **dict.fromkeys(("OMP_NUM_THREADS", "tokenizer_name", "secretary"), False),
}


@pytest.mark.parametrize("name", NAMES)
def test_secret_is_known_by_the_name_of_its_key(name: str) -> None:
    assert masking.is_secret_name(name) is NAMES[name]


@pytest.mark.parametrize(
    "value",
    [
        HF,
        "sk-" + "a1" * 12,
        "ghp_" + "a1" * 12,
        "AKIA" + "A1" * 8,
        "eyJhbGciOiJIUzI1.eyJzdWIiOiIx.abcdefghi",
    ],
)
def test_secret_is_known_by_its_value(value: str) -> None:
    assert masking.mask(f"say '{value}' there") == "say '***' there"


def test_secret_is_masked_in_run_json_and_kept_for_the_processes(run: RunDir) -> None:
    assert is_masked(run.run_json.read_text())
    assert run.config() == secret_config()
    assert stat.S_IMODE(run.private.stat().st_mode) == 0o600
    info = run.info()
    assert info is not None and info.config.rollout.variables["PLAIN"] == "plain"
    assert info.config.environment.config["max"] == 3


def test_secret_does_not_make_a_resumed_run_another_one(run: RunDir) -> None:
    assert list(preflight._changes(secret_config(), run.info())) == []
    changed = secret_config()
    changed.environment.config["max"] = 4
    (problem,) = preflight._changes(changed, run.info())
    assert problem.key == "environment.config.max"


def test_secret_is_masked_in_the_config_for_wandb(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    given: dict[str, Any] = {}

    class Run:
        def define_metric(self, *_: Any, **__: Any) -> None: ...

    monkeypatch.setattr(wandb, "init", lambda **options: given.update(options) or Run())
    trackers.WandbTracker(run, run.config().wandb)
    assert is_masked(str(given)), given


def shown_by_refusal(_run: RunDir, capsys: pytest.CaptureFixture[str]) -> str:
    refuse([Problem("", f"cannot parse rollout.variables.HF_TOKEN={HF}")])
    return capsys.readouterr().err


def shown_by_report(run: RunDir, _capsys: pytest.CaptureFixture[str]) -> str:
    from atropos_hpc.observe import report

    row = report.find_points(run.path)[0]
    return html_report.command(report.point_status(row, {}))


def shown_by_logs(run: RunDir, capsys: pytest.CaptureFixture[str]) -> str:
    (run.logs / "server-0.log").write_text(f"vLLM prints {SECRET}\n")
    logs.show(run, logs.LogOptions(lines=5))
    return capsys.readouterr().out


def shown_by_status(run: RunDir, _capsys: pytest.CaptureFixture[str]) -> str:
    line = f"2026-01-01 00:00:00,000 E atropos_hpc: cannot log in with {SECRET}\n"
    (run.logs / "server-0.log").write_text(line)
    return str(status.log_warnings(run))


def shown_by_own_log(run: RunDir, _capsys: pytest.CaptureFixture[str]) -> str:
    run.config()
    with Console(run, 3).logging_to(run.logs / "supervisor.log"):
        logging.getLogger("x").error("failed with %s", SECRET)
    return (run.logs / "supervisor.log").read_text()


def shown_by_tail(run: RunDir, _capsys: pytest.CaptureFixture[str]) -> str:
    run.config()
    path = run.logs / "server-0.log"
    path.write_text(f"vLLM prints {SECRET}\n")
    return process.tail(path)


def point(run: RunDir) -> Point:
    return Point(0, COMMAND[1:], copy.deepcopy(secret_config()), run.path)


def shown_by_local_dry_run(run: RunDir, capsys: pytest.CaptureFixture[str]) -> str:
    each = point(run)
    each.config.launch.dry_run = True
    sweep.here([each], run.path.parent, 1)
    return capsys.readouterr().out


def shown_by_slurm_dry_run(run: RunDir, capsys: pytest.CaptureFixture[str]) -> str:
    each = point(run)
    sweep._dry_run([each], run.path.parent, [None], True)
    return capsys.readouterr().out


def shown_by_sweep_table(run: RunDir, _capsys: pytest.CaptureFixture[str]) -> str:
    sweep._write_table(run.path.parent, [sweep._row(point(run), "7", None, None)])
    return (run.path.parent / "jobs.json").read_text()


def shown_by_points_json(run: RunDir, _capsys: pytest.CaptureFixture[str]) -> str:
    resubmission.record(run.path.parent, [point(run)])
    return (run.path.parent / "points.json").read_text()


PLACES = {
    name.removeprefix("shown_by_"): function
    for name, function in list(globals().items())
    if name.startswith("shown_by_")
}


@pytest.mark.parametrize("place", PLACES)
def test_secret_is_masked_where_a_run_is_shown(
    place: str, run: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = PLACES[place](run, capsys)
    assert is_masked(shown), shown


def test_secret_of_a_resumed_run_is_its_own(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    from atropos_hpc.launch import resume

    started: list[Config] = []
    monkeypatch.setattr(resume.run, "launch", lambda config, *_: started.append(config) or 0)
    assert resume.resume(run.path, ["trainer.steps=9"]) == 0
    assert started[0].rollout.variables == secret_config().rollout.variables
    assert started[0].cluster.setup == secret_config().cluster.setup


def test_secret_of_the_shell_is_masked_in_logs(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_PASSWORD", "tell-nobody")
    path = run.logs / "member.log"
    path.write_text("it is tell-nobody\n")
    assert process.tail(path) == "it is ***"


def test_config_without_secrets_is_unchanged() -> None:
    config = composed()
    masked, found = masking.mask_config(config)
    assert masked == config and found == []
    assert msgspec.to_builtins(masked) == msgspec.to_builtins(config)

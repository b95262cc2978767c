"""The trial of an environment that `validate` and submission make before anything is queued."""

import json
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

pytestmark = pytest.mark.vllm
pytest.importorskip("atroposlib")

from atropos_hpc.config import Config, EnvironmentConf, ModelConf  # noqa: E402
from atropos_hpc.contracts.answers import Problem  # noqa: E402
from atropos_hpc.contracts.run_info import RunInfo  # noqa: E402
from atropos_hpc.rollout import trial  # noqa: E402
from atropos_hpc.rollout.env_loader import check_target  # noqa: E402

BROKEN = Path(__file__).parent / "broken_envs.py"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from atropos_hpc.environments.make_base import make_tokenizer

    path = tmp_path_factory.mktemp("model")
    make_tokenizer().save_pretrained(path)
    return path


def run_json(model: Path, target: str, metric: str = "") -> bytes:
    conf = EnvironmentConf(target=target, group_size=4, metric=metric, trial_timeout_s=4)
    return msgspec.json.encode(
        RunInfo(Config(model=ModelConf(path=str(model), max_length=96), environment=conf))
    )


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("Works", None),
        ("BooleanScores", None),
        ("Truncates", None),
        ("Penalizes", "biased sampling: presence_penalty"),
        ("EqualScores", None),  # random answers may all be wrong
        ("RaisesSometimes", None),  # one prompt of three is good
        ("RaisesAtOnce", "LookupError: no such tool"),
        ("ReturnsNone", "returned None"),
        ("LongPrompts", "the prompt has 120 tokens, no shorter than model.max_length=96"),
        ("WrongScores", "scores: 5 for 4 sequences"),
        ("NaNScores", "scores: NaN or Inf"),
        ("SystemTurn", "TemplateError: System role not supported"),
        ("NumbersForAnswers", "'int' object has no attribute 'strip'"),
        ("NoPrompt", "FileNotFoundError: /data/train.jsonl"),
        ("Exits", "it called sys.exit(0)"),
    ],
)
def test_a_trial_finds_what_is_wrong_with_an_environment(
    model: Path, name: str, says: str | None
) -> None:
    parts: list[str] = []
    wrong = trial.try_out(run_json(model, f"{BROKEN}:{name}"), parts.append)
    assert parts[:2] == ["the constructor", "setup()"]
    if says is None:
        assert wrong is None
    else:
        assert wrong is not None and wrong.key == "target" and says in wrong.message
        if says.startswith(("Lookup", "Template", "'int'", "File", "it called", "returned")):
            assert f"({BROKEN}:" in wrong.message


@pytest.mark.parametrize(
    ("name", "metric", "says"),
    [
        ("Reports", "eval/score", None),
        ("Reports", "eval/skore", "eval/skore is not what evaluate() reports: eval/score"),
        ("Works", "eval/score", None),  # it reports nothing
        ("HangsInEvaluation", "eval/score", None),  # nothing is known
    ],
)
def test_a_metric_that_evaluation_never_reports_is_found_by_a_trial(
    model: Path, name: str, metric: str, says: str | None
) -> None:
    wrong = trial.try_out(run_json(model, f"{BROKEN}:{name}", metric), lambda _: None)
    assert wrong == (says and Problem("metric", says))


def test_a_class_that_exits_on_import_is_reported_by_name(tmp_path: Path) -> None:
    path = tmp_path / "exiting_env.py"
    path.write_text("import sys\nsys.exit(3)\n")
    (problem,) = check_target(f"{path}:Env", {})
    assert problem.key == "target"
    assert f"{path}:Env: cannot be imported: it called sys.exit(3) ({path}:2" in problem.message


def test_a_class_that_hangs_on_import_is_reported_by_name(tmp_path: Path) -> None:
    path = tmp_path / "hanging_env.py"
    path.write_text("import time\n\ntime.sleep(3600)\n")
    command = [sys.executable, "-m", "atropos_hpc.rollout.env_worker", "--check"]
    command += ["--timeout-s", "2"]
    info = run_json(tmp_path, f"{path}:Env")
    done = subprocess.run(command, input=info, capture_output=True, check=True, timeout=200)
    (problem,) = json.loads(done.stdout.splitlines()[-1])
    assert problem["key"] == "target"
    says = f"{path}:Env: the import has not ended after 2 s (it is at {path}:3"
    assert says in problem["message"]


def test_a_rollout_that_hangs_is_reported_with_the_key_that_skips_the_trial(
    model: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "atropos_hpc.rollout.env_worker", "--check", "--trial"]
    command += ["--timeout-s", "8", "--environment", "environment"]
    info = run_json(model, f"{BROKEN}:Hangs")
    done = subprocess.run(command, input=info, capture_output=True, check=True, timeout=200)
    (problem,) = json.loads(done.stdout.splitlines()[-1])
    for text in ("a rollout has not ended after 8 s", f"{BROKEN}:", "in collect_trajectories"):
        assert text in problem["message"]
    assert "environment.trial_timeout_s=0 skips the trial" in problem["message"]

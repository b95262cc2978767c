"""The command line: `train` and `submit` pass on to Hydra; codes, JSON and completion."""

import json
import os
import subprocess
import sys
from pathlib import Path

import click
import pytest

from atropos_hpc import cli
from atropos_hpc.cli_arguments import EXIT_CODES
from atropos_hpc.runtime.run_dir import RunDir, write_json

COMMAND = [sys.executable, "-m", "atropos_hpc.cli"]
ROOT = Path(__file__).resolve().parent.parent


def call(directory: Path, *words: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    env = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    return subprocess.run(
        [*COMMAND, *words], cwd=directory, env=env, capture_output=True, text=True, check=False
    )


def a_run(path: Path) -> RunDir:
    run = RunDir(path)
    run.create()
    run.new_attempt()
    write_json(run.run_json, {"id": "x", "config": {"trainer": {"steps": 3}}})
    return run


def test_train_passes_overrides_and_options_on_to_hydra(tmp_path: Path) -> None:
    done = call(tmp_path, "train", "--cfg", "job", "--package", "algorithm", "algorithm.kl_coef=.5")
    assert done.returncode == 0 and "kl_coef: 0.5" in done.stdout, done.stderr
    refused = call(tmp_path, "train", "algorithm.kl_coeff=1")
    assert refused.returncode == 2 and "did you mean algorithm.kl_coef?" in refused.stderr
    assert "experiment: arithmetic_cpu" in call(tmp_path, "train", "--help").stdout


@pytest.mark.parametrize(("overrides", "jobs"), [([], 1), (["algorithm.kl_coef=0,0.01"], 2)])
def test_submit_renders_one_heterogeneous_job_per_point_one_point_too(
    tmp_path: Path, overrides: list[str], jobs: int
) -> None:
    where = ["launch.dry_run=true", "run_dir=sweep", f"roles.rollout.python={sys.executable}"]
    done = call(tmp_path, "submit", *where, "launch.check_versions=false", *overrides)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("#SBATCH hetjob") == jobs and "Nothing was submitted" in done.stdout


def test_help_imports_neither_hydra_nor_a_role() -> None:
    probe = (
        "import sys\nfrom atropos_hpc import cli\n"
        "assert cli.main(['--help']) == 0 and cli.main(['report', '--help']) == 0\n"
        "heavy = {'torch', 'ray', 'verl', 'vllm', 'hydra', 'numpy', 'rich', 'submitit'}\n"
        "assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", probe], check=True, stdout=subprocess.DEVNULL)


def test_help_has_every_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"{code}  {text.partition(':')[0]}" in shown for code, text in EXIT_CODES.items())


def test_commands_with_json_print_one_document_on_stdout_also_when_they_refuse(
    tmp_path: Path,
) -> None:
    with_json = {
        name
        for name, command in cli.app.commands.items()
        if any(parameter.name == "as_json" for parameter in command.params)
    }
    run = str(a_run(tmp_path / "run").path)
    calls = {
        "status": [run],
        "report": [run],
        "samples": [run],
        "validate": ["trainer.steps=many"],
        "doctor": ["roles.trainer.python=/no/python", "roles.rollout.python=/no/python"],
        "templates": ["copies"],
    }
    assert with_json == {*calls, "export"}  # test_learner_run.py exports
    for name, words in calls.items():
        done = call(tmp_path, name, *words, "--json")
        assert done.returncode in EXIT_CODES and "Traceback" not in done.stderr, done.stderr
        found = json.loads(done.stdout)
        if name == "validate":
            assert done.returncode == 2 and found["problems"][0]["key"] == "trainer.steps"
        if name == "doctor":
            assert {"this machine", "Slurm"} <= {finding["area"] for finding in found}


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_offers_commands_choices_and_the_logs_of_a_run(
    shell: str, tmp_path: Path
) -> None:
    script = call(tmp_path, "completion", shell).stdout
    assert f"_ATROPOS_HPC_COMPLETE={shell}_complete" in script
    run = a_run(tmp_path / "run")
    (run.logs / "trainer-0.log").touch()
    for words, offered in (
        (["st"], {"status", "stop"}),
        (["samples", "run", "--sort", "le"], {"length"}),
        (["logs", "run", "tr"], {"trainer-0"}),
    ):
        line = " ".join(["atropos-hpc", *words])
        variables = {"COMP_WORDS": line, "COMP_CWORD": str(len(words))}
        if shell == "fish":
            variables["COMP_CWORD"] = words[-1]
        done = call(tmp_path, _ATROPOS_HPC_COMPLETE=f"{shell}_complete", **variables)
        words_offered = set(done.stdout.replace(",", "\n").split())
        assert offered <= words_offered and "report" not in words_offered, done.stdout


def test_every_command_and_option_has_a_help_text() -> None:
    for command in cli.app.commands.values():
        assert command.help
        options = [each for each in command.params if isinstance(each, click.Option)]
        assert all(option.help for option in options), command.name

"""Workflows, versions and containers: what is beside the code fits to it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from run_workflow import ROOT, WORKFLOWS, read, steps

import atropos_hpc

NAMES = sorted(path.stem for path in WORKFLOWS.glob("*.yml"))
STEPS = [step for name in NAMES for step in steps(name)]
COMMANDS = sorted({step.command for step in STEPS if step.command})
PREPARATION = re.compile(r"(sudo )?apt-get |uv python install ")
LIGHT = ["lint", "files"]  # jobs that take less than two minutes here
DOCKERFILES = sorted((ROOT / "containers").glob("Dockerfile.*"))
ROLES = ["rollout", "trainer"]


@pytest.mark.parametrize("command", [c for c in COMMANDS if not PREPARATION.match(c)])
def test_a_workflow_s_command_is_a_target_that_make_can_plan(command: str) -> None:
    assert command.startswith("make "), command
    words = command.replace('"$(uv python find 3.11)"', sys.executable).split()
    planned = subprocess.run(
        ["make", "--dry-run", *words[1:]], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert planned.returncode == 0 and planned.stdout, planned.stderr


def test_workflows_test_both_pythons_and_both_debians_and_every_job_has_a_limit() -> None:
    jobs = {name: job for each in NAMES for name, job in read(each)["jobs"].items()}
    assert all("timeout-minutes" in job for job in jobs.values())
    matrices = {name: job["strategy"]["matrix"] for name, job in jobs.items() if "strategy" in job}
    assert matrices["fast"]["python"] == matrices["wheel"]["python"] == ["3.11", "3.12"]
    assert matrices["slurm"]["debian"] == ["12", "13"]


@pytest.mark.skipif(
    not os.environ.get("ATROPOS_HPC_LONG"), reason="takes minutes; ATROPOS_HPC_LONG=1 runs it"
)
def test_the_light_jobs_of_the_workflow_pass_here() -> None:
    subprocess.run([sys.executable, "tests/run_workflow.py", "ci", *LIGHT], cwd=ROOT, check=True)


def test_citation_and_changelog_name_the_package_s_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    (newest, *_) = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert str(citation["version"]) == newest == atropos_hpc.__version__


def test_containers_copy_what_a_build_needs_and_install_their_role_from_the_cuda_pins() -> None:
    assert [path.suffix[1:] for path in DOCKERFILES] == ROLES
    apptainer = (ROOT / "containers" / "atropos-hpc.def").read_text()
    base = re.findall(r"^From: (\S+)", apptainer, re.M)
    files = set(re.findall(r"^    (\S+) /opt/atropos_hpc/\1$", apptainer, re.M))
    uv = re.findall(r"uv==\S+", apptainer)
    for path in DOCKERFILES:
        text, role = path.read_text(), path.suffix[1:]
        copied = {
            word for line in re.findall(r"^COPY (.*)", text, re.M) for word in line.split()[:-1]
        }
        assert copied == files and all((ROOT / name).exists() for name in copied)
        assert base == re.findall(r"^FROM (\S+)", text, re.M) and uv == re.findall(r"uv==\S+", text)
        assert f"containers/install.sh {role}\n" in text
        assert (ROOT / "requirements" / f"{role}-cuda.txt").exists()
    assert {"pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"} <= files
    grafted = re.findall(r"^graft (\S+)", (ROOT / "MANIFEST.in").read_text(), re.M)
    assert set(grafted) <= files


def test_the_install_script_of_the_containers_asks_for_one_role_s_pins(tmp_path: Path) -> None:
    fake = tmp_path / "uv"
    fake.write_text('#!/bin/sh\necho "$DS_BUILD_OPS" "$@"\n')
    fake.chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    script = ["sh", str(ROOT / "containers" / "install.sh"), "rollout", "--dry-run"]
    done = subprocess.run(script, env=env, capture_output=True, text=True, check=True)
    first, second = done.stdout.splitlines()
    assert first.endswith("--dry-run -r requirements/rollout-cuda.txt") and first.startswith("0 ")
    assert second.endswith("--no-deps --dry-run .")

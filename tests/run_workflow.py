"""Run the commands of a workflow's jobs on this machine, in a clone of HEAD.

    python tests/run_workflow.py ci lint files

runs the jobs `lint` and `files` of .github/workflows/ci.yml, each `run` step by bash, for the first
value of every matrix. Steps that use an action are named and skipped: the clone takes the place of
the checkout, and this clone's environments that of what would be installed.
"""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
WORKFLOWS = ROOT / ".github" / "workflows"


@dataclass(frozen=True)
class Step:
    """A step of a job, for one combination of its matrix. Either an action or a command."""

    workflow: str
    job: str
    action: str = ""
    command: str = ""


def steps(workflow: str, every: bool = True) -> Iterator[Step]:
    """Yield the steps of all jobs, for every combination of the matrix or only for the first."""
    for name, job in read(workflow)["jobs"].items():
        matrix = job.get("strategy", {}).get("matrix", {})
        combinations = [
            dict(zip(matrix, values, strict=True)) for values in product(*matrix.values())
        ]
        for combination in combinations if every else combinations[:1]:
            for step in job["steps"]:
                command = re.sub(
                    r"\$\{\{ *matrix\.(\w+) *\}\}",
                    lambda found, values=combination: str(values[found[1]]),
                    step.get("run", ""),
                )
                yield Step(workflow, name, step.get("uses", ""), command)


def read(workflow: str) -> dict[str, Any]:
    return yaml.safe_load((WORKFLOWS / f"{workflow}.yml").read_text())


def clone(directory: Path) -> None:
    """Clone HEAD, with this clone's environments, which count as up to date there."""
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(directory)], check=True)
    for path in [directory / "pyproject.toml", *(directory / "requirements").iterdir()]:
        os.utime(path, (0, 0))
    for path in ROOT.glob(".venv*"):
        (directory / path.name).symlink_to(path.resolve())


def main(workflow: str, jobs: list[str]) -> int:
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch, "clone")
        clone(directory)
        for step in steps(workflow, every=False):
            if step.job not in jobs:
                continue
            print(f"[{step.job}] {step.command or f'skipped: {step.action}'}", flush=True)
            if step.command:
                shell = ["bash", "-e", "-o", "pipefail", "-c", step.command]
                code = subprocess.run(shell, cwd=directory, check=False).returncode
                if code:
                    print(f"[{step.job}] failed with exit code {code}")
                    return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))

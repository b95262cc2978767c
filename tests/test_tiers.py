"""What tests/conftest.py does to a session: the fast tier, and the limit of retries."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

FLAKY = """
import pytest
from pathlib import Path

@pytest.mark.run
@pytest.mark.parametrize("number", range({count}))
def test_fails_at_first(number):
    seen = Path(__file__).with_name(f"seen-{{number}}")
    if not seen.exists():
        seen.touch()
        raise AssertionError("once")
"""
HEAVY = """
import pytest

@pytest.mark.verl
def test_of_the_trainer():
    import torch

def test_that_imports_torch():
    import torch
"""


def session(
    directory: Path, content: str, role: str
) -> tuple["subprocess.CompletedProcess[str]", Path]:
    """Run pytest on one file beside a copy of conftest.py; return what it did and the durations."""
    shutil.copy(Path(__file__).with_name("conftest.py"), directory)
    (directory / "test_it.py").write_text(content)
    durations = directory / "durations.json"
    variables = {"TEST_ROLE": role, "TEST_DURATIONS": str(durations), "ATROPOS_HPC_RERUNS": "1"}
    variables["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # hypothesis takes a second and a half
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    plugins = ["-p", "xdist", "-p", "pytest_rerunfailures"]
    command = [sys.executable, "-m", "pytest", "-q", *plugins]
    command += ["--rootdir", str(directory), str(directory)]
    env |= variables
    done = subprocess.run(command, cwd=directory, env=env, capture_output=True, text=True)
    return done, durations


@pytest.mark.parametrize(("count", "code"), [(2, 0), (3, 1)])
def test_more_than_two_retries_fail_the_session(tmp_path: Path, count: int, code: int) -> None:
    done, durations = session(tmp_path, FLAKY.format(count=count), "trainer")
    assert done.returncode == code, done.stdout
    assert f"{count} retries (at most 2)" in done.stdout
    recorded = json.loads(durations.read_text())
    assert len(recorded["rerun"]) == count == len(recorded["tests"])


def test_the_fast_tier_leaves_out_marked_tests_and_blocks_heavy_imports(tmp_path: Path) -> None:
    done, _ = session(tmp_path, HEAVY, "fast")
    assert done.returncode == 1 and "1 failed, 1 deselected" in done.stdout
    assert "import of torch halted" in done.stdout

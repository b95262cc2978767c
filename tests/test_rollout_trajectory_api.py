"""Atropos' own API tests, from the installed package, against this trajectory server."""

import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

pytestmark = pytest.mark.vllm
atroposlib = pytest.importorskip("atroposlib")

FILES = ("test_api_legacy.py", "test_api_compression.py", "test_api_messages_handling.py")
# Atropos' server accepts and serves it
MISMATCHED = "posts advantages of another length than the tokens, which is a 422 here"
# The tests that fail here, and why
EXCEPTIONS = {
    "test_sft_batch_processing": MISMATCHED,
    "test_messages_with_numeric_strings_as_content": MISMATCHED,
}


def test_atropos_own_api_tests_pass_but_for_the_listed(tmp_path: Path) -> None:
    here, report = Path(__file__).parent, tmp_path / "report.xml"
    published = Path(atroposlib.__file__).parent / "tests"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "upstream_api",
        "-p",
        "no:cacheprovider",
        f"--rootdir={published}",
    ]
    command += [f"--junitxml={report}", *(str(published / name) for name in FILES)]
    env = {
        **os.environ,
        "PYTHONPATH": f"{here}{os.pathsep}{here.parent}",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTEST_ADDOPTS": "",
    }
    done = subprocess.run(
        command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300, check=False
    )
    cases = ElementTree.parse(report).getroot().findall(".//testcase")
    outcome = {
        case.attrib["name"]: next(
            (child.tag for child in case if child.tag != "system-out"), "passed"
        )
        for case in cases
    }
    assert len(outcome) >= 30, done.stdout + done.stderr
    assert {name for name, how in outcome.items() if how != "passed"} == set(EXCEPTIONS), (
        done.stdout[-6000:]
    )

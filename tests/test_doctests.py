"""The examples in docstrings are true."""

import doctest
import importlib
from pathlib import Path

import pytest

import atropos_hpc

ROOT = Path(atropos_hpc.__file__).parent
PACKAGES = ("contracts", "launch", "launch/slurm", "observe", "runtime", ".")  # without torch
LIGHT = [
    path
    for package in PACKAGES
    for path in sorted((ROOT / package).glob("*.py"))
    if ">>> " in path.read_text()
]


@pytest.mark.parametrize("path", LIGHT, ids=lambda path: path.stem)
def test_examples(path: Path) -> None:
    name = ".".join(("atropos_hpc", *path.relative_to(ROOT).with_suffix("").parts))
    tried = doctest.testmod(importlib.import_module(name))
    assert tried.attempted > 0 and tried.failed == 0

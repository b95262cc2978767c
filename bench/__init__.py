"""Benchmarks. Code shared with the tests (Slurm cluster, crash points) is in tests/."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

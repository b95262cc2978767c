"""Measure the start of `python -m atropos_hpc.train` on a login node: help, and a refused config.

CPU time of the whole process, interpreter included; the least of several rounds, since whatever
else the machine does only adds to it.
"""

import os
import resource
import subprocess
import sys
import tempfile

from bench.result import Result

ROUNDS = 5
MAX_CPU_S = 1.5
COMMANDS = {
    "help": (["--help"], 0),
    "refusal": (["roles.rollout.python=/no/python", "algorithm.kl_coef=-1"], 2),
}


def cpu_s(arguments: list[str], code: int, directory: str) -> float:
    """Return the user and system time of one start."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "atropos_hpc.train", *arguments]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=directory, env=env, capture_output=True, check=False)
    assert done.returncode == code, done.stderr.decode()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> Result:
    with tempfile.TemporaryDirectory() as scratch:
        rows = [
            {name: cpu_s(arguments, code, scratch) for name, (arguments, code) in COMMANDS.items()}
            for _ in range(ROUNDS)
        ]
    result = Result(list(rows))
    for name in COMMANDS:
        result.at_most(f"CPU seconds of {name}, least", min(row[name] for row in rows), MAX_CPU_S)
    return result

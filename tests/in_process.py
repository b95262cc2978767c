"""The commands in the process of a test, which saves each the start of an interpreter and imports.

Not for tests of what the command's own process does: its imports, its signals, its children.
"""

import contextlib
import io
import subprocess
import sys
from collections.abc import Callable
from unittest import mock

from atropos_hpc import cli
from atropos_hpc.runtime import process

Done = subprocess.CompletedProcess[str]


def command(*words: object) -> Done:
    """Run `atropos-hpc WORDS`."""
    return _run(lambda: cli.main([str(word) for word in words]), *words)


def train(*overrides: str) -> Done:
    """Run `python -m atropos_hpc.train OVERRIDES`, which must start no process."""
    from atropos_hpc import train

    with (
        mock.patch.object(sys, "argv", ["train", *overrides]),
        mock.patch.object(process, "die_with_parent"),
        mock.patch.object(subprocess, "Popen", None),  # starting a process raises TypeError
    ):
        return _run(train.main, *overrides)


def _run(main: Callable[[], int], *words: object) -> Done:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main()
    return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())

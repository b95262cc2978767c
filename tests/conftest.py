"""Which tests run where, and what all of them share.

verl and vLLM cannot live in one environment, so each test file belongs to one role's: TEST_ROLE (set by `make test`) says which one
this is. A part that is missing skips its tests, with the reason, on a user's machine; in CI it is an error.
"""

import importlib.util
import os
import signal
from pathlib import Path

import pytest

from atropos_hpc.runtime.run_dir import RunDir

ROLE = os.environ.get("TEST_ROLE") or ("rollout" if importlib.util.find_spec("vllm") else "trainer")
ROLLOUT_FILES = ("test_rollout_", "test_environments", "test_policy_vllm")
NEEDS = {
    "trainer": {"verl": ("torch", "verl"), "deepspeed": ("torch", "verl", "deepspeed")},
    "rollout": {"vllm": ("vllm", "atroposlib")},
}


signal.signal(
    signal.SIGINT, signal.default_int_handler
)  # in a shell's background it is ignored, by what the tests start as well


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    if collection_path.name.startswith("test_"):
        return collection_path.name.startswith(ROLLOUT_FILES) != (ROLE == "rollout")
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for marker, modules in NEEDS[ROLE].items():
        missing = [module for module in modules if importlib.util.find_spec(module) is None]
        if missing and os.environ.get("CI"):
            raise pytest.UsageError(
                f"the {ROLE} environment lacks {', '.join(missing)}: run `make setup`"
            )
        for item in items:
            if missing and item.get_closest_marker(marker):
                item.add_marker(
                    pytest.mark.skip(reason=f"needs {', '.join(missing)}; `make setup` installs it")
                )
    for item in items:
        # Whole runs and clusters, killed at moments that a busy machine shifts: one more try, which pytest reports as a rerun.
        if item.get_closest_marker("run") or item.get_closest_marker("slurm"):
            item.add_marker(
                pytest.mark.flaky(reruns=int(os.environ.get("ATROPOS_HPC_RERUNS", "1")))
            )


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """An empty run directory."""
    made = RunDir(tmp_path / "run")
    made.create()
    return made


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of one layer and random weights, for the learner."""
    from learner_ranks import tiny_model

    return tiny_model(tmp_path_factory.mktemp("small-model"), layers=1)

"""Which tests run where, how long they take, and fixtures that many of them share.

verl, vLLM and verifiers cannot live in one environment, so each test file belongs to one of them.
TEST_ROLE, set by the Makefile, selects the tests:

    trainer, rollout, verifiers   the tests of the role whose environment this is
    fast               every test that needs no heavy package, no whole run and no Slurm

Without a missing part, a test is skipped with the reason on a user's machine; in CI it is an error.
"""

import functools
import importlib.util
import json
import os
import re
import resource
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from atropos_hpc.runtime.run_dir import RunDir

if TYPE_CHECKING:
    from slurm_cluster import Cluster

    from atropos_hpc.policy.follower import Follower
    from atropos_hpc.policy.store import PolicyStore

FOUND = [name for name in ("verifiers", "vllm") if importlib.util.find_spec(name)]
ROLE = os.environ.get("TEST_ROLE") or {"verifiers": "verifiers", "vllm": "rollout"}.get(
    FOUND[0] if FOUND else "", "trainer"
)
FILES = {
    "rollout": ("test_rollout_", "test_environments", "test_policy_vllm"),
    "verifiers": ("test_verifiers",),
}
NEEDS = {
    "trainer": {"verl": ("torch", "verl"), "deepspeed": ("torch", "verl", "deepspeed")},
    "rollout": {"vllm": ("vllm", "atroposlib")},
    "verifiers": {"verifiers": ("verifiers", "atroposlib")},
    "fast": {},
}
SLOW_MARKERS = {"verifiers", "vllm", "verl", "deepspeed", "environments", "wheel", "slurm", "run"}
SLOW_FILE = re.compile(rf"^pytestmark = [^#]*?\b({'|'.join(sorted(SLOW_MARKERS))})\b", re.M)
HEAVY = ("torch", "transformers", "verl", "deepspeed", "ray", "vllm", "atroposlib")
RERUNS = int(os.environ.get("ATROPOS_HPC_RERUNS", "1"))  # of a test that runs a run or a cluster
MAX_RERUNS = 2  # in one session

# A shell ignores SIGINT in what it starts in the background, and children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
if ROLE == "fast":
    for module in HEAVY:  # importing one fails, as it would on a login node
        sys.modules[module] = None  # type: ignore[assignment]


# --- which tests


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    if not collection_path.name.startswith("test_"):
        return None
    if ROLE == "fast":
        return bool(SLOW_FILE.search(collection_path.read_text()))
    roles = (role for role, names in FILES.items() if collection_path.name.startswith(names))
    return next(roles, "trainer") != ROLE


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if ROLE == "fast":
        slow = [item for item in items if any(m.name in SLOW_MARKERS for m in item.iter_markers())]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]
    for marker, modules in NEEDS[ROLE].items():
        missing = [module for module in modules if importlib.util.find_spec(module) is None]
        if missing and os.environ.get("CI"):
            reason = f"the {ROLE} environment lacks {', '.join(missing)}: run `make setup`"
            raise pytest.UsageError(reason)
        reason = f"needs {', '.join(missing)}; `make setup` installs it"
        for item in items:
            if missing and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))
    for item in items:
        # They kill processes at moments that a busy machine shifts, so a failure is retried once.
        if item.get_closest_marker("run") or item.get_closest_marker("slurm"):
            item.add_marker(pytest.mark.flaky(reruns=RERUNS))
    order = ["slurm", "test_runs", "run"]
    items.sort(key=lambda item: [*order, name := group_of(item.path)].index(name))


@functools.cache
def group_of(path: Path) -> str:
    """Return the group of a file's tests: one process runs a group in order.

    Clusters of stand-ins mostly wait, so they run beside two whole runs, which compute for half of
    their time. Everything else goes by file, to whichever process is free.
    """
    found = re.search(r"^pytestmark = (\[[^]]*\]|.*)", path.read_text(), re.M)
    markers = found.group() if found else ""
    if "mark.run" in markers and path.stem != "test_runs":
        return "run"
    return "slurm" if "mark.slurm" in markers and "mark.run" not in markers else path.stem


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Schedule by group. pytest-xdist's own `loadgroup` has no effect with pytest 9.2."""
    from xdist.scheduler import LoadScopeScheduling

    class ByGroup(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(config.rootpath / nodeid.partition("::")[0])

    return ByGroup(config, log)


# --- how long they take, and how many were retried


class Durations:
    """Wall and CPU seconds of every test, and the tests that were retried.

    Each process that runs tests measures their CPU time; the main one collects the reports.
    """

    def __init__(self) -> None:
        self.started = time.time()
        self.wall_s: defaultdict[str, float] = defaultdict(float)
        self.cpu_s: defaultdict[str, float] = defaultdict(float)
        self.rerun: list[str] = []

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Iterator[None]:
        self.cpu_before = cpu_seconds()
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> Iterator[None]:
        try:
            return (yield)
        finally:
            item.user_properties.append(("cpu_s", cpu_seconds() - self.cpu_before))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        name = report.nodeid
        self.wall_s[name] += report.duration
        if report.when == "teardown":
            self.cpu_s[name] += dict(report.user_properties).get("cpu_s", 0.0)
        if report.outcome == "rerun":
            self.rerun.append(name)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if len(self.rerun) > MAX_RERUNS:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
        path = os.environ.get("TEST_DURATIONS")
        if path and not hasattr(session.config, "workerinput"):  # not in a worker of pytest-xdist
            self.record(Path(path))

    def record(self, path: Path) -> None:
        """Write the durations for tests/write_durations.py."""
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {
            "tier": ROLE,
            "cores": os.cpu_count(),
            "total_s": time.time() - self.started,
            "cpu_s": sum(self.cpu_s.values()),
            "rerun": self.rerun,
            "tests": {name: [self.wall_s[name], self.cpu_s[name]] for name in self.wall_s},
        }
        path.write_text(json.dumps(content, indent=1) + "\n")

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        cpu_s = sum(self.cpu_s.values())
        total = f"{time.time() - self.started:.0f} s, {cpu_s:.0f} s of CPU"
        terminalreporter.write_line(f"{len(self.wall_s)} tests in {total}")
        if self.rerun:
            names = ", ".join(self.rerun)
            terminalreporter.write_line(
                f"{len(self.rerun)} retries (at most {MAX_RERUNS}): {names}"
            )


def cpu_seconds() -> float:
    """Return the CPU time of this process and of its children that have been waited for."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Durations(), "durations")


# --- fixtures


@pytest.fixture(autouse=True)
def no_variables_of_ray() -> None:
    """verl imports Ray, which sets variables in this process; a run would report and drop them."""
    for name in [name for name in os.environ if name.startswith("RAY_")]:
        del os.environ[name]


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """Create an empty run directory."""
    made = RunDir(tmp_path / "run")
    made.create()
    return made


@pytest.fixture
def follow(tmp_path: Path) -> "Iterator[Callable[..., Follower]]":
    """Make readers of a policy store, each with a node cache of its own."""
    from atropos_hpc.policy.follower import Follower

    made: list[Follower] = []

    def begin(store: "PolicyStore", **options: Any) -> "Follower":
        cache = tmp_path / f"memory-{len(made)}"
        cache.mkdir()
        made.append(Follower(store, cache, f"reader-{len(made)}", **options))
        return made[-1]

    yield begin
    for follower in made:
        follower.close()
        assert os.listdir(follower.cache.root.parent) == [], "its memory is free again"


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a model of one layer and random weights, for the learner."""
    from learner_ranks import tiny_model

    return tiny_model(tmp_path_factory.mktemp("small-model"), layers=1)


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a model of two layers and random weights, for the learner."""
    from learner_ranks import tiny_model

    return tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def model64(model_path: Path) -> Any:
    """Load the model of two layers in float64."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        model_path, dtype=torch.float64, attn_implementation="eager"
    ).eval()


@pytest.fixture(scope="module")
def whole_cluster(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> "Iterator[Cluster]":
    """Start a private Slurm cluster of as many nodes as the test's module says in NODES."""
    from slurm_cluster import Cluster
    from slurm_parts import require_slurm

    require_slurm()
    directory = tmp_path_factory.mktemp("slurm") / "cluster"
    with Cluster(directory, nodes=request.module.NODES) as cluster:
        yield cluster


@pytest.fixture
def cluster(whole_cluster: "Cluster") -> "Iterator[Cluster]":
    """The module's cluster; after the test all nodes are up again and the queue is empty."""
    yield whole_cluster
    whole_cluster.clear()

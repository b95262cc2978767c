"""The benchmarks still import and measure; their values are not checked."""

import importlib
import pkgutil
from pathlib import Path

import pytest

import bench
from bench.parts.trajectory_servers import SEQUENCES, body, numbered, own_server
from bench.trajectories import push_and_pull, waits_of_others


@pytest.mark.verl
def test_every_bench_imports_what_exists_and_has_a_main() -> None:
    names = [module.name for module in pkgutil.walk_packages(bench.__path__, "bench.")]
    own = [n for n in names if not n.endswith("__main__") and n != "bench.trl.grpo"]  # TRL's Python
    modules = {name: importlib.import_module(name) for name in own}
    benches = set(own) - {"bench.gpu", "bench.parts", "bench.result", "bench.trl"}
    for name in benches:
        assert name.count(".") > 1 or callable(modules[name].main), name


def test_the_trajectory_server_is_measured(tmp_path: Path) -> None:
    template = body(SEQUENCES, 16)
    bodies = [numbered(template, number) for number in range(16)]
    with own_server(tmp_path) as server:
        assert push_and_pull(server, bodies, {}) > 0
        waits, taken = waits_of_others(server, template)
        assert waits and taken > 0

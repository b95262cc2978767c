"""A benchmark still starts and measures; its values are not checked."""

from pathlib import Path

from bench.parts.trajectory_servers import SEQUENCES, body, numbered, own_server
from bench.trajectories import push_and_pull, waits_of_others


def test_the_trajectory_server_is_measured(tmp_path: Path) -> None:
    template = body(SEQUENCES, 16)
    bodies = [numbered(template, number) for number in range(16)]
    with own_server(tmp_path) as server:
        assert push_and_pull(server, bodies, {}) > 0
        waits, taken = waits_of_others(server, template)
        assert waits and taken > 0

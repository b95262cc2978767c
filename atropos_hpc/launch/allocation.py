"""What runs where: the steps of a run, and the processes of each.

A step is what is started, watched and restarted as one: all learner ranks are one (a collective lives and dies as a whole), each
rollout node is one (a lost node ends nobody else), the trajectory server is one.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from atropos_hpc.config import Config

PACKAGE_HOME = Path(__file__).resolve().parent.parent.parent


@dataclass(frozen=True)
class Process:
    """One process: its log's name, its command line and what it finds in its environment beside ours."""

    name: str
    command: tuple[str, ...]
    variables: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Step:
    """Processes that are started and ended together. `kind` is what the supervisor's table goes by."""

    name: str
    kind: str  # trajectories | agent | trainer
    processes: tuple[Process, ...]


def trainer_python(config: Config) -> str:
    """The trainer role's interpreter."""
    return config.roles.trainer.python or sys.executable


def rollout_python(config: Config) -> str:
    """The rollout role's interpreter."""
    return config.roles.rollout.python or str(PACKAGE_HOME / ".venv-rollout" / "bin" / "python")


def local_steps(config: Config, run_dir: Path) -> list[Step]:
    """The steps of a run on this machine; several nodes of a role become several sets of processes."""
    where = ("--run-dir", str(run_dir))
    trajectories = Step("trajectories", "trajectories", (_trajectory_server(config, where),))
    agents = []
    for i in range(config.roles.rollout.nodes):
        command = (rollout_python(config), "-m", "atropos_hpc.rollout.agent", *where, "--index", str(i))
        agents.append(Step(f"agent-{i}", "agent", (Process(f"agent-{i}", command, {"ATROPOS_HPC_NODE": f"rollout{i}"}),)))
    return [trajectories, *agents, Step("trainer", "trainer", _ranks(config, where))]


def _trajectory_server(config: Config, where: tuple[str, str]) -> Process:
    upstream = config.trajectories.server == "atropos"
    python = rollout_python(config) if upstream else sys.executable  # upstream's API is part of atroposlib
    module = "atropos_hpc.trajectories.upstream" if upstream else "atropos_hpc.trajectories.server"
    return Process("trajectories", (python, "-m", module, *where), {"ATROPOS_HPC_NODE": "trainer0"})


def _ranks(config: Config, where: tuple[str, str]) -> tuple[Process, ...]:
    role = config.roles.trainer
    world = role.nodes * role.ranks_per_node
    ranks = []
    for rank in range(world):
        node, local = divmod(rank, role.ranks_per_node)
        variables = {
            "ATROPOS_HPC_NODE": f"trainer{node}",
            "RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(local), "LOCAL_WORLD_SIZE": str(role.ranks_per_node),
        }  # fmt: skip
        ranks.append(Process(f"trainer-{rank}", (trainer_python(config), "-m", "atropos_hpc.learner", *where), variables))
    return tuple(ranks)

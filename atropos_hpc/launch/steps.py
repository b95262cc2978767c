"""What runs where: the steps of a run, and the processes of each.

A step is what is started, watched and restarted as one: all learner ranks are one (a collective lives and dies as a whole), each
rollout node is one (a lost node ends nobody else), the trajectory server is one. On one machine a step's processes are the programs
themselves; on Slurm's nodes a step is one srun.
"""

import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from atropos_hpc import resources
from atropos_hpc.config import Config
from atropos_hpc.launch.slurm import sbatch
from atropos_hpc.launch.slurm.sbatch import Group
from atropos_hpc.runtime.network import HOST
from atropos_hpc.runtime.process import END_TASKS

PACKAGE_HOME = resources.HOME


@dataclass(frozen=True)
class Process:
    """One process: its log's name, its command line, what it finds in its environment beside ours, and the signal that asks it to end."""

    name: str
    command: tuple[str, ...]
    variables: Mapping[str, str] = field(default_factory=dict)
    end_by: int = signal.SIGTERM


@dataclass(frozen=True)
class Step:
    """Processes that are started and ended together. `kind` is what the supervisor's table goes by."""

    name: str
    kind: str  # trajectories | agent | trainer
    processes: tuple[Process, ...]
    nodes: tuple[str, ...] = ()  # Slurm's names of the nodes it runs on; none without Slurm


def trainer_python(config: Config) -> str:
    """The trainer role's interpreter."""
    return config.roles.trainer.python or sys.executable


def rollout_python(config: Config) -> str:
    """Return the rollout role's interpreter: the configured one, or that of .venv-rollout/."""
    beside = resources.HOME if resources.is_clone() else Path.cwd()
    return config.roles.rollout.python or str(beside / ".venv-rollout" / "bin" / "python")


def local_steps(config: Config, run_dir: Path) -> list[Step]:
    """The steps of a run on this machine; several nodes of a role become several sets of processes."""
    agents = []
    for i in range(config.roles.rollout.nodes):
        agents.append(
            Step(
                f"agent-{i}",
                "agent",
                (Process(f"agent-{i}", _agent(config, run_dir, str(i)), _node(f"rollout{i}")),),
            )
        )
    ranks, role = [], config.roles.trainer
    for rank in range(role.nodes * role.ranks_per_node):
        node, local = divmod(rank, role.ranks_per_node)
        variables = {
            **_node(f"trainer{node}"),
            "RANK": str(rank), "WORLD_SIZE": str(role.nodes * role.ranks_per_node),
            "LOCAL_RANK": str(local), "LOCAL_WORLD_SIZE": str(role.ranks_per_node),
        }  # fmt: skip
        ranks.append(Process(f"trainer-{rank}", _learner(config, run_dir), variables))
    return [_trajectories(config, run_dir), *agents, Step("trainer", "trainer", tuple(ranks))]


def slurm_steps(
    config: Config,
    run_dir: Path,
    groups: Mapping[str, Group],
    addresses: Mapping[str, str],
    logs: Path,
) -> list[Step]:
    """The steps of a run in a Slurm job, seen from its batch step: the trajectory server beside the supervisor, the rest by srun.

    `addresses`: of every node. A role that is not in `groups` has a job of its own.
    """
    leader = addresses[groups["trainer"].nodes[0]]
    steps = [_trajectories(config, run_dir, {HOST: leader})]
    if "rollout" in groups:
        steps += [
            agent_step(config, run_dir, groups["rollout"], node, addresses, logs, i)
            for i, node in enumerate(groups["rollout"].nodes)
        ]
    return [*steps, _trainer_step(config, run_dir, groups["trainer"], addresses, logs)]


def agent_step(
    config: Config,
    run_dir: Path,
    group: Group,
    node: str,
    addresses: Mapping[str, str],
    logs: Path,
    index: int,
) -> Step:
    """The node agent on one of Slurm's nodes."""
    name, role, cluster = f"agent-{index}", config.roles.rollout, config.cluster
    variables = {**_node(f"rollout{index}"), HOST: addresses[node]}
    program = sbatch.program(
        _agent(config, run_dir, str(index)), role, cluster.setup, cluster.container, variables
    )
    command = sbatch.srun(
        name, group, [node], role, 1, cluster.container, f"{logs}/{name}.log", program
    )
    return Step(
        name,
        "agent",
        (Process(f"{name}.srun", command, _node(f"rollout{index}"), END_TASKS),),
        (node,),
    )


def _trainer_step(
    config: Config, run_dir: Path, group: Group, addresses: Mapping[str, str], logs: Path
) -> Step:
    role, cluster = config.roles.trainer, config.cluster
    of_nodes = " ".join(addresses[node] for node in group.nodes)
    variables = {
        **_node("trainer$SLURM_NODEID"),
        HOST: "${addresses[$SLURM_NODEID]}",
        "RANK": "$SLURM_PROCID", "WORLD_SIZE": "$SLURM_NTASKS", "LOCAL_RANK": "$SLURM_LOCALID",
        "LOCAL_WORLD_SIZE": str(role.ranks_per_node),
    }  # fmt: skip
    setup = [*cluster.setup, f"addresses=({of_nodes})"]
    program = sbatch.program(_learner(config, run_dir), role, setup, cluster.container, variables)
    command = sbatch.srun(
        "trainer",
        group,
        group.nodes,
        role,
        role.ranks_per_node,
        cluster.container,
        f"{logs}/trainer-%t.log",
        program,
    )
    return Step(
        "trainer", "trainer", (Process("trainer.srun", command, end_by=END_TASKS),), group.nodes
    )


def _trajectories(
    config: Config, run_dir: Path, variables: Mapping[str, str] | None = None
) -> Step:
    upstream = config.trajectories.server == "atropos"
    python = (
        rollout_python(config) if upstream else sys.executable
    )  # upstream's API is part of atroposlib
    module = (
        "atropos_hpc.trajectories.atropos_compat" if upstream else "atropos_hpc.trajectories.server"
    )
    command = (python, "-m", module, "--run-dir", str(run_dir))
    return Step(
        "trajectories",
        "trajectories",
        (Process("trajectories", command, {**_node("trainer0"), **(variables or {})}),),
    )


def _agent(config: Config, run_dir: Path, index: str) -> tuple[str, ...]:
    return (
        rollout_python(config),
        "-m",
        "atropos_hpc.rollout.node_agent",
        "--run-dir",
        str(run_dir),
        "--index",
        index,
    )


def _learner(config: Config, run_dir: Path) -> tuple[str, ...]:
    return (trainer_python(config), "-m", "atropos_hpc.learner", "--run-dir", str(run_dir))


def _node(name: str) -> dict[str, str]:
    return {"ATROPOS_HPC_NODE": name}

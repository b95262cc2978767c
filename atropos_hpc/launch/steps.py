"""The steps of a run: which processes there are, and how each is started.

A step is started, watched and restarted as a whole. All learner ranks are one step, because a
collective cannot go on without a rank; each rollout node is one, because a lost node ends nobody
else; the trajectory server is one. On one machine the processes of a step are the programs
themselves; on Slurm's nodes a step is one srun.
"""

import os
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from atropos_hpc import resources
from atropos_hpc.config import Config
from atropos_hpc.launch.slurm.sbatch import Allocation
from atropos_hpc.launch.slurm.srun import StepRequest, program, srun
from atropos_hpc.runtime import cores, devices
from atropos_hpc.runtime.network import HOST
from atropos_hpc.runtime.process import END_TASKS, NODE, ProcessSpec


@dataclass(frozen=True)
class Step:
    """Processes that are started and ended together. `kind` is a value of restart_policy.Kind;
    `nodes` are Slurm's names of the nodes that it runs on, () without Slurm."""

    name: str
    kind: str
    processes: tuple[ProcessSpec, ...]
    nodes: tuple[str, ...] = ()


def trainer_python(config: Config) -> str:
    return config.roles.trainer.python or sys.executable


def rollout_python(config: Config) -> str:
    """Return the rollout role's interpreter: the configured one, or that of .venv-rollout/."""
    beside = resources.HOME if resources.is_clone() else Path.cwd()
    return config.roles.rollout.python or str(beside / ".venv-rollout" / "bin" / "python")


def local_steps(config: Config, run_dir: Path) -> list[Step]:
    """Return the steps of a run on this machine, with a set of processes per node of a role."""
    role, rollout = config.roles.trainer, config.roles.rollout
    visible = devices.visible_devices(os.environ, devices.machine_devices())
    of_trainer, of_rollout = devices.role_devices(
        visible, role.gpus_per_node, rollout.gpus_per_node
    )
    agents = []
    for i in range(rollout.nodes):
        variables = {NODE: f"rollout{i}", devices.VISIBLE: ",".join(of_rollout)}
        spec = ProcessSpec(f"agent-{i}", _agent(config, run_dir, i), variables)
        agents.append(Step(spec.name, "agent", (spec,)))
    ranks = []
    world = role.nodes * role.ranks_per_node
    for rank in range(world):
        node, local = divmod(rank, role.ranks_per_node)
        variables = {
            NODE: f"trainer{node}",
            "RANK": str(rank),
            "WORLD_SIZE": str(world),
            "LOCAL_RANK": str(local),
            "LOCAL_WORLD_SIZE": str(role.ranks_per_node),
            devices.VISIBLE: ",".join(of_trainer),
            **cores.variables(rank, world, bind=not role.gpus_per_node),
        }
        ranks.append(ProcessSpec(f"trainer-{rank}", _learner(config, run_dir), variables))
    return [_trajectories(config, run_dir), *agents, Step("trainer", "trainer", tuple(ranks))]


@dataclass(frozen=True)
class SlurmSteps:
    """Builds the steps of a run in a Slurm job, as its batch step starts them.

    `addresses`: of every node. A role without an allocation has a job of its own. `logs`: the
    directory of the steps' logs.
    """

    config: Config
    run_dir: Path
    allocations: Mapping[str, Allocation]
    addresses: Mapping[str, str]
    logs: Path

    def all(self) -> list[Step]:
        """The trajectory server beside the supervisor, the rest by srun."""
        leader = self.addresses[self.allocations["trainer"].nodes[0]]
        rollout = self.allocations.get("rollout")
        agents = [self.agent(node, i) for i, node in enumerate(rollout.nodes if rollout else ())]
        return [_trajectories(self.config, self.run_dir, {HOST: leader}), *agents, self.trainer()]

    def agent(self, node: str, index: int) -> Step:
        """The node agent on one of Slurm's nodes."""
        config, name = self.config, f"agent-{index}"
        role, cluster, own_node = config.roles.rollout, config.cluster, {NODE: f"rollout{index}"}
        command = _agent(config, self.run_dir, index)
        variables = {**own_node, HOST: self.addresses[node]}
        step = StepRequest(
            name,
            [node],
            1,
            program(command, role, cluster.setup, cluster.container, variables, self._log(name)),
            cluster.container,
        )
        command_line = srun(step, self.allocations["rollout"], role)
        spec = ProcessSpec(f"{name}.srun", command_line, own_node, END_TASKS)
        return Step(name, "agent", (spec,), (node,))

    def trainer(self) -> Step:
        config, allocation = self.config, self.allocations["trainer"]
        role, cluster = config.roles.trainer, config.cluster
        addresses = " ".join(self.addresses[node] for node in allocation.nodes)
        variables = {
            NODE: "trainer$SLURM_NODEID",
            HOST: "${addresses[$SLURM_NODEID]}",
            "RANK": "$SLURM_PROCID",
            "WORLD_SIZE": "$SLURM_NTASKS",
            "LOCAL_RANK": "$SLURM_LOCALID",
            "LOCAL_WORLD_SIZE": str(role.ranks_per_node),
        }
        setup = [*cluster.setup, f"addresses=({addresses})"]
        command, name = _learner(config, self.run_dir), "trainer-$SLURM_PROCID"
        step = StepRequest(
            "trainer",
            allocation.nodes,
            role.ranks_per_node,
            program(command, role, setup, cluster.container, variables, self._log(name)),
            cluster.container,
        )
        spec = ProcessSpec("trainer.srun", srun(step, allocation, role), end_by=END_TASKS)
        return Step("trainer", "trainer", (spec,), allocation.nodes)

    def _log(self, name: str) -> str:
        """The path of a task's log for the shell, which expands the variables in `name`."""
        return f"{shlex.quote(str(self.logs))}/{name}.log"


def _trajectories(
    config: Config, run_dir: Path, variables: Mapping[str, str] | None = None
) -> Step:
    python, module = sys.executable, "atropos_hpc.trajectories.server"
    if config.trajectories.server == "atropos":  # whose API is part of atroposlib
        python, module = rollout_python(config), "atropos_hpc.trajectories.atropos_compat"
    command = (python, "-m", module, "--run-dir", str(run_dir))
    spec = ProcessSpec("trajectories", command, {NODE: "trainer0", **(variables or {})})
    return Step("trajectories", "trajectories", (spec,))


def _agent(config: Config, run_dir: Path, index: int) -> tuple[str, ...]:
    module = ("-m", "atropos_hpc.rollout.node_agent")
    return (rollout_python(config), *module, "--run-dir", str(run_dir), "--index", str(index))


def _learner(config: Config, run_dir: Path) -> tuple[str, ...]:
    return (trainer_python(config), "-m", "atropos_hpc.learner", "--run-dir", str(run_dir))

"""`atropos-hpc doctor`: what works here, what is missing, and how to get it. Looks at this machine, at Slurm, and at both roles'
environments, as a config with the overrides given would use them; starts nothing and changes nothing.
"""

import importlib.util
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from atropos_hpc.config import Config
from atropos_hpc.launch import base_model, cluster_check, hydra_api, preflight
from atropos_hpc.launch.slurm import commands
from atropos_hpc.launch.steps import rollout_python, trainer_python
from atropos_hpc.validate import refuse

ASK_TIMEOUT_S = 20.0
ENOUGH_BYTES = 5 << 30
OPTIONAL = {"matplotlib": "report's page", "tokenizers": "samples as text"}


@dataclass(frozen=True)
class Finding:
    """One line. ok: True works, False is broken, None is only worth knowing. `fix`: what to do about it."""

    area: str
    ok: bool | None
    said: str
    fix: str = ""


def examine(overrides: Sequence[str], config_dir: Path | None = None) -> int:
    """Print every finding. 1 when something is broken that a run on this machine, or from it, would need; 2: the overrides are refused."""
    from rich.console import Console
    from rich.text import Text

    try:
        config = hydra_api.compose(overrides, config_dir)
    except hydra_api.ERRORS as error:
        return refuse(hydra_api.problems(error), "The overrides were refused.")
    terminal = Console(highlight=False, soft_wrap=True)
    area, broken = "", False
    for finding in findings(config):
        if finding.area != area:
            area = finding.area
            terminal.print(Text(area, style="bold"))
        sign, style = {True: ("ok ", "green"), False: ("NO ", "bold red"), None: ("-  ", "")}[
            finding.ok
        ]
        terminal.print(Text.assemble("  ", (sign, style), finding.said))
        if finding.fix:
            terminal.print(Text(f"       {finding.fix}", style="yellow"))
        broken = broken or finding.ok is False
    return 1 if broken else 0


def findings(config: Config) -> Iterator[Finding]:
    """All there is to say, in the order in which it is printed."""
    yield from _machine(Path(config.run_dir).absolute())
    yield from _cluster(config)
    for role, python in (("trainer", trainer_python(config)), ("rollout", rollout_python(config))):
        yield from _role(config, role, python)


def _machine(run_dir: Path) -> Iterator[Finding]:
    area = "this machine"
    cores = len(os.sched_getaffinity(0))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    yield Finding(
        area, True, f"Python {platform.python_version()}, {cores} cores, {memory:.0f} GiB of memory"
    )
    gpus = _gpus()
    yield Finding(area, True if gpus else None, f"GPUs: {', '.join(gpus) or 'none seen here'}")
    home = run_dir
    while not home.exists():
        home = home.parent
    free, writable = shutil.disk_usage(home).free, os.access(home, os.W_OK)
    kind = cluster_check.filesystem(home) or "unknown"
    yield Finding(area, writable, f"run directories under {home}: {kind} filesystem, {free / 2**30:.0f} GiB free",
                  "" if writable else "not writable: start where you may write, or set run_dir")  # fmt: skip
    if writable and free < ENOUGH_BYTES:
        yield Finding(
            area,
            False,
            f"little space under {home}",
            "policy.keep and trainer.keep_checkpoints say how much a run keeps",
        )
    yield Finding(
        area, None, f"made base models are kept in {base_model.cache()} ($ATROPOS_HPC_CACHE)"
    )
    for module, what in OPTIONAL.items():
        there = importlib.util.find_spec(module) is not None
        yield Finding(area, True if there else None, f"{module}, for {what}" + ("" if there else ": missing"),
                      "" if there else "pip install 'atropos-hpc[login]'")  # fmt: skip


def _gpus() -> list[str]:
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
    try:
        done = subprocess.run(
            query, capture_output=True, text=True, timeout=ASK_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return []
    return done.stdout.strip().splitlines() if done.returncode == 0 else []


def _cluster(config: Config) -> Iterator[Finding]:
    area = "Slurm"
    if not commands.is_installed():
        needed = config.launch.allocation != "local"
        yield Finding(area, False if needed else None, "no sbatch and srun here: runs of this machine only",
                      "run this on a login node of the cluster" if needed else "")  # fmt: skip
        return
    try:
        cluster = cluster_check.look()
    except commands.SlurmError as error:
        needed = config.launch.allocation != "local"
        said = str(error).partition(": ")[2].partition("; ")[0]
        yield Finding(
            area,
            False if needed else None,
            f"the controller does not answer: {said}",
            "`sinfo` has to work here first",
        )
        return
    yield Finding(area, True, f"the controller answers; scheduler {cluster.scheduler or 'unknown'}")
    if cluster.scheduler and cluster.scheduler != "sched/backfill":
        yield Finding(
            area,
            None,
            "heterogeneous jobs are started by the backfill scheduler only",
            "use launch=single or launch=split here",
        )
    for partition in cluster.partitions.values():
        nodes = sum(group.count for group in partition.nodes)
        gpus = max((group.gpus() for group in partition.nodes), default=0)
        limit = (
            "no limit"
            if partition.minutes == float("inf")
            else f"at most {partition.minutes / 60:.0f} h"
        )
        said = f"partition {partition.name}{' (default)' if partition.default else ''}: {nodes} nodes, {gpus} GPUs each, {limit}"
        yield Finding(
            area, True if partition.up else None, said + ("" if partition.up else ", not up")
        )
    if not config.cluster.shared:
        yield Finding(area, None, "cluster.shared is empty: nothing checks that run directories are on a shared filesystem",
                      "copy configs/cluster/generic_slurm.yaml to a file of your site's name, and fill it in")  # fmt: skip


def _role(config: Config, role: str, python: str) -> Iterator[Finding]:
    area = f"the {role}'s environment"
    container = getattr(config.roles, role).container
    if container:
        yield Finding(area, None, f"in {container}, which cannot be looked into from here")
        return
    wrong = preflight.interpreter(config, role, imports=True)
    for problem in wrong:
        yield Finding(
            area, False, problem.message, f"or point {problem.key} at an environment that has it"
        )
    if not wrong:
        versions = ", ".join(
            f"{module} {version}.*" if version else module
            for module, (_, version) in preflight.needed(config, role).items()
        )
        yield Finding(area, True, f"{python}: {versions}")

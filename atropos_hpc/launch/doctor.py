"""Report what works here, what is missing and how to get it: `atropos-hpc doctor [OVERRIDE ...]`.

Checks this machine, Slurm, and both roles' Python environments, as a config with these overrides
would use them. Starts nothing and changes nothing.
"""

import importlib.util
import os
import platform
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import msgspec

from atropos_hpc.config import Config
from atropos_hpc.contracts.answers import Finding
from atropos_hpc.launch import base_model, cluster_check, hydra_api, role_environment
from atropos_hpc.launch.slurm.cluster import Partition, read_cluster
from atropos_hpc.launch.steps import rollout_python, trainer_python
from atropos_hpc.launch.storage_check import existing, unwritable
from atropos_hpc.runtime import devices, slurm
from atropos_hpc.validate import refuse

ENOUGH_BYTES = 5 << 30
OPTIONAL = {"matplotlib": "the page of `report`", "tokenizers": "texts in `samples`"}
SIGNS = {True: ("ok ", "green"), False: ("NO ", "bold red"), None: ("-  ", "")}


def examine(overrides: Sequence[str], config_dir: Path | None = None, as_json: bool = False) -> int:
    """Print every finding.

    Returns 1 if something is broken that a run on or from this machine needs, 2 if the overrides
    are refused.
    """
    try:
        config = hydra_api.compose(overrides, config_dir)
    except hydra_api.ERRORS as error:
        return refuse(hydra_api.problems(error), "The overrides were refused.")
    areas = {
        "this machine": _machine(Path(config.run_dir).absolute()),
        "Slurm": _slurm(config),
        "the trainer's environment": _role(config, "trainer"),
        "the rollout's environment": _role(config, "rollout"),
    }
    found = (
        msgspec.structs.replace(each, area=area)
        for area, each_of in areas.items()
        for each in each_of
    )
    shown = list(found) if as_json else _shown(found)
    if as_json:
        print(msgspec.json.format(msgspec.json.encode(shown), indent=1).decode())
    return 1 if any(finding.ok is False for finding in shown) else 0


def _shown(findings: Iterable[Finding]) -> list[Finding]:
    from rich.text import Text

    from atropos_hpc.observe.terminal import terminal as make_terminal

    terminal = make_terminal(highlight=False, soft_wrap=True)
    shown: list[Finding] = []
    for finding in findings:
        if not shown or shown[-1].area != finding.area:
            terminal.print(Text(finding.area, style="bold"))
        terminal.print(Text.assemble("  ", SIGNS[finding.ok], finding.text))
        if finding.fix:
            terminal.print(Text(f"       {finding.fix}", style="yellow"))
        shown.append(finding)
    return shown


def _machine(run_dir: Path) -> Iterator[Finding]:
    cores = len(os.sched_getaffinity(0))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    python = platform.python_version()
    yield Finding(True, f"Python {python}, {cores} cores, {memory:.0f} GiB of memory")
    gpus = [", ".join(each) for each in devices.query_gpus("name", "memory.total")]
    yield Finding(True if gpus else None, f"GPUs: {', '.join(gpus) or 'none visible here'}")
    yield Finding(None, f"NVIDIA driver: {devices.driver_version() or 'none loaded here'}")
    yield from _storage(run_dir)
    yield Finding(None, f"created base models: {base_model.cache()} ($ATROPOS_HPC_CACHE)")
    for module, purpose in OPTIONAL.items():
        if importlib.util.find_spec(module):
            yield Finding(True, f"{module}, for {purpose}")
        else:
            install = "pip install 'atropos-hpc[login]'"
            yield Finding(None, f"{module}, for {purpose}: missing", install)


def _storage(run_dir: Path) -> Iterator[Finding]:
    home = existing(run_dir)
    free, kind = shutil.disk_usage(home).free, cluster_check.filesystem_type(home) or "unknown"
    text = f"run directories in {home}: {kind} filesystem, {free / 2**30:.0f} GiB free"
    if (problem := unwritable("run_dir", home)) is not None:
        yield Finding(False, text, f"{problem.message}: set run_dir to another directory")
        return
    yield Finding(True, text)
    if free < ENOUGH_BYTES:
        fix = "policy.keep and trainer.keep_checkpoints determine how much a run keeps"
        yield Finding(False, f"little space in {home}", fix)


def _slurm(config: Config) -> Iterator[Finding]:
    broken = False if config.launch.allocation != "local" else None
    if not slurm.is_installed():
        fix = "run this on a login node of the cluster" if broken is False else ""
        yield Finding(broken, "no sbatch and srun here: only runs of this machine work", fix)
        return
    try:
        cluster = read_cluster()
    except slurm.SlurmError as error:
        reason = str(error).partition(": ")[2].partition("; ")[0]
        fix = "`sinfo` must work here first"
        yield Finding(broken, f"the controller does not answer: {reason}", fix)
        return
    yield Finding(True, f"the controller answers; scheduler {cluster.scheduler or 'unknown'}")
    if cluster.scheduler and cluster.scheduler != "sched/backfill":
        yield Finding(
            None,
            "only the backfill scheduler starts heterogeneous jobs",
            "use launch=single or launch=split here",
        )
    yield from map(_partition, cluster.partitions.values())
    if not config.cluster.shared:
        yield Finding(
            None,
            "cluster.shared is empty, so nothing checks that run directories are shared",
            "copy configs/cluster/generic_slurm.yaml to a file for your site, and fill it in",
        )


def _partition(partition: Partition) -> Finding:
    nodes = sum(group.count for group in partition.nodes)
    gpus = max((group.gpus() for group in partition.nodes), default=0)
    unlimited = partition.minutes == float("inf")
    limit = "no time limit" if unlimited else f"at most {partition.minutes / 60:.0f} h"
    default = " (default)" if partition.default else ""
    text = f"partition {partition.name}{default}: {nodes} nodes, {gpus} GPUs each, {limit}"
    return Finding(True, text) if partition.up else Finding(None, f"{text}, not up")


def _role(config: Config, role: str) -> Iterator[Finding]:
    if image := getattr(config.roles, role).container:
        yield Finding(None, f"in {image}, whose contents are not visible from here")
        return
    problems = role_environment.check_interpreter(config, role, imports=True)
    for problem in problems:
        fix = f"or set {problem.key} to the interpreter of an environment that has it"
        yield Finding(False, problem.message, fix)
    if not problems:
        modules = role_environment.needed_modules(config, role).items()
        versions = [f"{name} {pin}.*" if pin else name for name, (_, pin) in modules]
        python = trainer_python(config) if role == "trainer" else rollout_python(config)
        yield Finding(True, f"{python}: {', '.join(versions)}")
        yield from torch_findings(config, role)


def torch_findings(config: Config, role: str) -> Iterator[Finding]:
    """Tell which CUDA a role's torch is built for, and whether it sees the GPUs of this machine."""
    if (build := role_environment.torch_build(config, role)) is None:
        return
    built = f"CUDA {build.cuda}" if build.cuda else "the CPU"
    text = f"torch {build.torch}, built for {built}, sees {build.gpus} GPUs here"
    driver = devices.driver_version()
    if driver is None or build.gpus or not getattr(config.roles, role).gpus_per_node:
        yield Finding(True if build.gpus else None, text)
        return
    fix = f"install packages for a CUDA that this driver supports: {driver}"
    yield Finding(False, text, f"{fix} (make setup DEVICE=cuda)")

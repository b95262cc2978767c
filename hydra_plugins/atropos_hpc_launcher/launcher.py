"""Hydra's launchers for a multirun: submitit_slurm makes a Slurm job of every point, submitit_local a process on this machine. And the
sweeper that goes with them.

The launchers stand in for those of these names that hydra-submitit-launcher has, if that is installed. Hydra wants its plugins in this
package, and looks through it at every start: nothing heavy is imported before a launch. (Hydra runs this file before it is in
sys.modules, so the dataclasses need their annotations evaluated.)
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper, BasicSweeperConf
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import OverrideType
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from atropos_hpc.launch.plan import PointFailed

SWEEP_NAMES = {"dir": "${run_dir}", "subdir": "${hydra.job.num}"}  # as in configs/config.yaml


@dataclass
class SlurmConf:
    _target_: str = "hydra_plugins.atropos_hpc_launcher.launcher.SlurmLauncher"
    slots: int = 0


@dataclass
class LocalConf:
    _target_: str = "hydra_plugins.atropos_hpc_launcher.launcher.LocalLauncher"
    slots: int = 1


@dataclass
class GridConf(BasicSweeperConf):
    _target_: str = "hydra_plugins.atropos_hpc_launcher.launcher.GridSweeper"


class SlurmLauncher(Launcher):
    """One sbatch call per point. `slots`: how many of them run at once; 0: as many as Slurm lets."""

    def __init__(self, slots: int) -> None:
        self.slots = slots

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        from atropos_hpc.config import leaves

        self.hydra_context, self.config = hydra_context, config
        self.leaves = frozenset(leaves())
        self.shared: dict[tuple[str, ...], DictConfig] = {}

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        from atropos_hpc.launch import sweep

        sweep_dir = Path(str(self.config.hydra.sweep.dir)).absolute()
        return _returns(sweep.on_slurm(self._points(job_overrides, initial_job_idx), sweep_dir, self.slots))

    def _points(self, job_overrides: Sequence[Sequence[str]], first: int) -> "list[Any]":
        """Every point with its own config, composed here: what is changed in files after the submission changes nothing."""
        from atropos_hpc.launch.sweep import Point

        points = []
        for num, overrides in enumerate(job_overrides, first):
            cfg = self._composed(overrides)
            with open_dict(cfg):
                cfg.hydra.job.id = cfg.hydra.job.num = num
            run_dir = Path(str(cfg.hydra.sweep.dir), str(cfg.hydra.sweep.subdir)).absolute()
            HydraConfig.instance().set_config(cfg)  # for ${hydra:...} in values
            with read_write(cfg), open_dict(cfg):
                del cfg["hydra"]
                cfg.run_dir = str(run_dir)
            config: Any = OmegaConf.to_object(cfg)
            config.wandb.group = config.wandb.group or Path(str(self.config.hydra.sweep.dir)).name
            points.append(Point(num, list(overrides), config, run_dir))
        return points

    def _composed(self, overrides: Sequence[str]) -> DictConfig:
        """What Hydra composes, 0.15 s each. Most points of a sweep differ in plain values only: these are put into a copy of the point
        before that shares all the rest, as Hydra itself does it.
        """
        parsed = OverridesParser.create().parse_overrides(list(overrides))
        default_names = OmegaConf.to_container(self.config.hydra.sweep, resolve=False) == SWEEP_NAMES  # else a name may hold the overrides
        plain = [each for each in parsed if default_names and each.type is OverrideType.CHANGE and each.key_or_group in self.leaves]
        rest = tuple(str(each.input_line) for each in parsed if each not in plain)
        if rest not in self.shared:
            self.shared[rest] = self.hydra_context.config_loader.load_sweep_config(self.config, list(rest))
        cfg = copy.deepcopy(self.shared[rest])
        for each in plain:
            OmegaConf.update(cfg, each.key_or_group, each.value(), merge=True)
        return cfg


class GridSweeper(BasicSweeper):
    """Hydra's own, without its composing every point before a launch: the launchers compose all before they queue any."""

    def validate_batch_is_legal(self, batch: Sequence[Sequence[str]]) -> None:
        pass


class LocalLauncher(SlurmLauncher):
    """One process per point, `slots` of them at once."""

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        from atropos_hpc.launch import sweep

        sweep_dir = Path(str(self.config.hydra.sweep.dir)).absolute()
        return _returns(sweep.here(self._points(job_overrides, initial_job_idx), sweep_dir, max(1, self.slots)))


def _returns(outcomes: "list[Any]") -> "list[JobReturn]":
    """Hydra raises what a failed point holds. One that was not waited for counts as completed."""
    return [
        JobReturn(overrides=point.overrides, status=JobStatus.COMPLETED, _return_value=outcome)
        if outcome is None or outcome == "complete"
        else JobReturn(overrides=point.overrides, status=JobStatus.FAILED, _return_value=PointFailed(f"point {point.num}: {outcome}"))
        for point, outcome in outcomes
    ]


def register() -> None:
    """Make the launchers known under their names, in place of others. After Hydra's scan, which stores the others' configs."""
    plugins = Plugins.instance()
    known = ConfigStore.instance().repo.get("hydra", {}).get("launcher", {})
    for name, conf in (("submitit_slurm", SlurmConf), ("submitit_local", LocalConf)):
        known.pop(f"{name}.yaml", None)  # Hydra would hold our file against the other's schema, by its name
        ConfigStore.instance().store(group="hydra/launcher", name=f"base_{name}", node=conf, provider="atropos_hpc")
    ConfigStore.instance().store(group="hydra/sweeper", name="base_grid", node=GridConf, provider="atropos_hpc")
    for plugin in (SlurmLauncher, LocalLauncher, GridSweeper):  # the scan does not see into every kind of editable install
        plugins.register(plugin)

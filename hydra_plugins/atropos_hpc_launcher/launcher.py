"""Hydra's launchers for a multirun: submitit_slurm makes a Slurm job of every point, submitit_local a process on this machine.

They stand in for the launchers of these names that hydra-submitit-launcher has, if that is installed. Hydra wants its plugins in this
package, and looks through it at every start: nothing heavy is imported before a launch. (Hydra runs this file before it is in
sys.modules, so the dataclasses need their annotations evaluated.)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from atropos_hpc.launch.plan import PointFailed


@dataclass
class SlurmConf:
    _target_: str = "hydra_plugins.atropos_hpc_launcher.launcher.SlurmLauncher"
    slots: int = 0


@dataclass
class LocalConf:
    _target_: str = "hydra_plugins.atropos_hpc_launcher.launcher.LocalLauncher"
    slots: int = 1


class SlurmLauncher(Launcher):
    """One sbatch call per point. `slots`: how many of them run at once; 0: as many as Slurm lets."""

    def __init__(self, slots: int) -> None:
        self.slots = slots

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context, self.config = hydra_context, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        from atropos_hpc.launch import sweep

        sweep_dir = Path(str(self.config.hydra.sweep.dir)).absolute()
        return _returns(sweep.on_slurm(self._points(job_overrides, initial_job_idx), sweep_dir, self.slots))

    def _points(self, job_overrides: Sequence[Sequence[str]], first: int) -> "list[Any]":
        """Every point with its own config, composed here: what is changed in files after the submission changes nothing."""
        from atropos_hpc.launch.sweep import Point

        points = []
        for num, overrides in enumerate(job_overrides, first):
            cfg = self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))
            with open_dict(cfg):
                cfg.hydra.job.id = cfg.hydra.job.num = num
            run_dir = Path(str(cfg.hydra.sweep.dir), str(cfg.hydra.sweep.subdir)).absolute()
            HydraConfig.instance().set_config(cfg)  # for ${hydra:...} in values
            with read_write(cfg), open_dict(cfg):
                del cfg["hydra"]
                cfg.run_dir = str(run_dir)
            config: Any = OmegaConf.to_object(cfg)
            points.append(Point(num, list(overrides), config, run_dir))
        return points


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
    for launcher in (SlurmLauncher, LocalLauncher):  # the scan does not see into every kind of editable install
        plugins.register(launcher)

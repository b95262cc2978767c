"""Hydra's launchers for a multirun: submitit_slurm makes a Slurm job of every point, submitit_local a process on this machine. And the
sweeper that goes with them.

The launchers stand in for those of these names that hydra-submitit-launcher has, if that is installed. Hydra wants its plugins in this
package, and looks through it at every start: nothing heavy is imported before a launch. (Hydra runs this file before it is in
sys.modules, so the dataclasses need their annotations evaluated.)
"""

import functools
import pickle
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper, BasicSweeperConf
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from atropos_hpc.launch.restart_policy import PointFailed

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


class Shared:
    """What points of a sweep have in common: as a node, which knows the types of values and what refers to what, and as an object."""

    def __init__(self, node: DictConfig, leaves: Iterable[str]) -> None:
        self.node = node
        self.config = pickle.dumps(
            OmegaConf.to_object(node)
        )  # five times as fast to copy as the object
        raw = OmegaConf.to_container(node)
        self.referring = [key for key in leaves if _holds("${", _at(raw, key))]

    def with_values(self, values: "dict[str, Any]") -> Any:
        """A config of its own, with these values of leaves."""
        config = pickle.loads(self.config)
        for key, value in values.items():
            OmegaConf.update(self.node, key, value)
        for key in [*values, *self.referring]:
            value, (section, _, name) = OmegaConf.select(self.node, key), key.rpartition(".")
            value = (
                OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
            )
            setattr(attrgetter(section)(config) if section else config, name, value)
        return config


class SlurmLauncher(Launcher):
    """One sbatch call per point. `slots`: how many of them run at once; 0: as many as Slurm lets."""

    def __init__(self, slots: int) -> None:
        self.slots = slots

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        from atropos_hpc.config import leaves

        self.hydra_context, self.config = hydra_context, config
        self.leaves = frozenset(leaves())
        # with other names of the points' directories, these may hold the overrides, which only Hydra itself can tell
        self.numbered = OmegaConf.to_container(config.hydra.sweep, resolve=False) == SWEEP_NAMES
        self.shared: dict[tuple[str, ...], Shared] = {}

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        from atropos_hpc.launch import sweep

        return _returns(
            sweep.on_slurm(self._points(job_overrides, initial_job_idx), self.directory, self.slots)
        )

    @functools.cached_property
    def directory(self) -> Path:
        """The sweep's."""
        return Path(str(self.config.hydra.sweep.dir)).absolute()

    def _points(self, job_overrides: Sequence[Sequence[str]], first: int) -> "list[Any]":
        """Every point with its own config, composed here: what is changed in files after the submission changes nothing."""
        from atropos_hpc.launch.sweep import Point

        points = []
        common = frozenset.intersection(*map(frozenset, job_overrides))
        for num, overrides in enumerate(job_overrides, first):
            config = self._config(num, overrides, common)
            config.wandb.group = config.wandb.group or self.directory.name
            points.append(Point(num, list(overrides), config, Path(config.run_dir)))
        return points

    def _config(self, num: int, overrides: Sequence[str], common: frozenset[str]) -> Any:
        """What Hydra composes, 0.15 s each. Most points differ in plain values only: these are put into a copy of what the points share.

        `common`: the overrides that all points have.
        """
        if not self.numbered or any("${hydra:" in override for override in overrides):
            return OmegaConf.to_object(self._composed(num, overrides))
        parsed = {override: _parsed(override) for override in overrides if override not in common}
        plain = {
            each.key_or_group: each.value() for each in parsed.values() if self._is_plain(each)
        }
        rest = [
            override
            for override in overrides
            if override in common or not self._is_plain(parsed[override])
        ]
        alike = (*rest, *plain)
        if alike not in self.shared:
            self.shared[alike] = Shared(self._composed(num, rest), self.leaves)
        return self.shared[alike].with_values({**plain, "run_dir": str(self.directory / str(num))})

    def _is_plain(self, each: Override) -> bool:
        return (
            each.type is OverrideType.CHANGE
            and each.key_or_group in self.leaves
            and not isinstance(each.value(), (dict, list))
        )

    def _composed(self, num: int, overrides: Sequence[str]) -> DictConfig:
        """The config of a point as Hydra itself makes it, without Hydra's own section."""
        cfg = self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))
        with open_dict(cfg):
            cfg.hydra.job.id = cfg.hydra.job.num = num
        run_dir = Path(str(cfg.hydra.sweep.dir), str(cfg.hydra.sweep.subdir)).absolute()
        HydraConfig.instance().set_config(cfg)  # for ${hydra:...} in values
        with read_write(cfg), open_dict(cfg):
            del cfg["hydra"]
            cfg.run_dir = str(run_dir)
        return cfg


@functools.cache
def _parsed(override: str) -> Override:
    return _parser().parse_override(override)


_parser = functools.cache(OverridesParser.create)


def _at(values: Any, key: str) -> Any:
    return functools.reduce(lambda value, part: value[part], key.split("."), values)


def _holds(text: str, values: Any) -> bool:
    """Is `text` in one of the strings in there?"""
    if isinstance(values, (dict, list)):
        return any(
            _holds(text, each) for each in (values.values() if isinstance(values, dict) else values)
        )
    return isinstance(values, str) and text in values


class GridSweeper(BasicSweeper):
    """Hydra's own, without its composing every point before a launch: the launchers compose all before they queue any."""

    def validate_batch_is_legal(self, batch: Sequence[Sequence[str]]) -> None:
        pass


class LocalLauncher(SlurmLauncher):
    """One process per point, `slots` of them at once."""

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        from atropos_hpc.launch import sweep

        return _returns(
            sweep.here(
                self._points(job_overrides, initial_job_idx), self.directory, max(1, self.slots)
            )
        )


def _returns(outcomes: "list[Any]") -> "list[JobReturn]":
    """Hydra raises what a failed point holds. One that was not waited for counts as completed."""
    return [
        JobReturn(overrides=point.overrides, status=JobStatus.COMPLETED, _return_value=outcome)
        if outcome is None or outcome == "complete"
        else JobReturn(
            overrides=point.overrides,
            status=JobStatus.FAILED,
            _return_value=PointFailed(f"point {point.num}: {outcome}"),
        )
        for point, outcome in outcomes
    ]


def register() -> None:
    """Make the launchers known under their names, in place of others. After Hydra's scan, which stores the others' configs."""
    plugins = Plugins.instance()
    known = ConfigStore.instance().repo.get("hydra", {}).get("launcher", {})
    for name, conf in (("submitit_slurm", SlurmConf), ("submitit_local", LocalConf)):
        known.pop(
            f"{name}.yaml", None
        )  # Hydra would hold our file against the other's schema, by its name
        ConfigStore.instance().store(
            group="hydra/launcher", name=f"base_{name}", node=conf, provider="atropos_hpc"
        )
    ConfigStore.instance().store(
        group="hydra/sweeper", name="base_grid", node=GridConf, provider="atropos_hpc"
    )
    for plugin in (
        SlurmLauncher,
        LocalLauncher,
        GridSweeper,
    ):  # the scan does not see into every kind of editable install
        plugins.register(plugin)

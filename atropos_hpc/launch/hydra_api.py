"""Every use of Hydra's and OmegaConf's programming interfaces and internals.

Written for hydra-core 1.3 and omegaconf 2.3. `register` stores the schema, the sweeps and the
launchers with Hydra; `compose` and `to_config` return a typed Config; `problem` translates the
errors of both libraries. The launchers compose the points of a multirun for launch/sweep.py.
"""

import functools
import pickle
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from atropos_hpc import resources, schema
from atropos_hpc.config import Config
from atropos_hpc.contracts.answers import Problem
from atropos_hpc.launch import new_directory
from atropos_hpc.launch.hydra_errors import ERRORS as ERRORS
from atropos_hpc.launch.hydra_errors import is_composing_error as is_composing_error
from atropos_hpc.launch.hydra_errors import named_problems as named_problems
from atropos_hpc.launch.hydra_errors import problems as problems
from atropos_hpc.launch.slurm import sbatch
from atropos_hpc.runtime import shell
from atropos_hpc.validate import Refused

# Hydra's scan of plugins executes its core modules again: a class that is imported before the scan
# is not the one that Hydra uses.
Plugins.instance()
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper, BasicSweeperConf  # noqa: E402

CONFIGS = resources.data("configs")
DEMO = "experiment=arithmetic_cpu"
SLURM = "hydra/launcher=submitit_slurm"
# What a user gives to train something else than the demo.
CHOICES = {
    "experiment",
    "model",
    "model.path",
    "model.make",
    "environment",
    "environment.target",
    "more_environments",
}
SWEEP_NAMES = {"dir": "${run_dir}", "subdir": "${hydra.job.num}"}  # as in configs/config.yaml

# --- composing


def with_demo(arguments: Sequence[str]) -> list[str]:
    """Add the demo's experiment to a command line that chooses no model, environment or experiment.

    It is put beside the other overrides: Hydra's parser takes them only in one piece. Raises
    Refused for GROUP=null, on which Hydra 1.3 fails with a ValueError.
    """
    overrides = [each for each in arguments if "=" in each and not each.startswith("-")]
    for group in (path.name for path in CONFIGS.iterdir() if path.is_dir()):
        if f"{group}=null" in overrides:
            near = "experiment=none" if group == "experiment" else f"the name of a file of {group}/"
            raise Refused(Problem(group, f"null is not a choice; give {near}"))
    if any(re.split("[=@]", each)[0].lstrip("+~") in CHOICES for each in overrides):
        return list(arguments)
    at = arguments.index(overrides[0]) if overrides else len(arguments)
    return [*arguments[:at], DEMO, *arguments[at:]]


def compose(overrides: Sequence[str], config_dir: Path | None = None) -> Config:
    """Compose the config that `python -m atropos_hpc.train` has with these overrides.

    `config_dir`: a directory of further config files. Raises one of ERRORS.
    """
    register()
    search = []
    if config_dir:
        quoted = shell.override("", f"file://{config_dir.absolute()}")[1:]
        search = [f"hydra.searchpath=[{quoted}]"]
    run_dir = [] if any(each.startswith("run_dir=") for each in overrides) else ["run_dir=runs/new"]
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        cfg = hydra.compose("config", [*search, *run_dir, *with_demo(overrides)])
    config = to_config(cfg)
    if SLURM in overrides:
        sbatch.leave_this_machine(config)
    return config


def to_config(cfg: DictConfig) -> Config:
    """Convert a composed config, with absolute paths. Raises Refused for unknown keys, which `+`
    lets through."""
    given = OmegaConf.to_container(cfg)
    assert isinstance(given, dict)
    wrong = schema.unknown_keys(Config, {str(name): value for name, value in given.items()})
    if found := [Problem(name, f"there is no such key{near}") for name, near in wrong]:
        raise Refused(*found)
    config = OmegaConf.to_object(cfg)
    assert isinstance(config, Config)
    schema.make_paths_absolute(config)
    return config


def change(config: Config, overrides: Sequence[str]) -> Config:
    """Apply overrides of values, not of config groups, to a config. Raises one of ERRORS."""
    cfg = _with_open_maps(OmegaConf.structured(config))
    for each in OverridesParser.create().parse_overrides(list(overrides)):
        OmegaConf.update(cfg, each.key_or_group, each.value(), merge=True)
    return to_config(cfg)


# --- registration


@dataclass
class SlurmConf:
    _target_: str = "atropos_hpc.launch.hydra_api.SlurmLauncher"
    slots: int = 0


@dataclass
class LocalConf:
    _target_: str = "atropos_hpc.launch.hydra_api.LocalLauncher"
    slots: int = 1


@dataclass
class GridConf(BasicSweeperConf):
    _target_: str = "atropos_hpc.launch.hydra_api.GridSweeper"


@functools.cache
def register() -> None:
    """Store the schema (`base` in configs/config.yaml), sweeps/ as a group, and the launchers."""
    store, plugins = ConfigStore.instance(), Plugins.instance()
    # Hydra 1.3 deep-copies its search path, and with it every stored config, for each group that
    # `--help` lists: more than half of that command's time. Stored configs are not changed there
    # (`ConfigStore.load` returns copies), so the copy may be the store itself.
    ConfigStore.__deepcopy__ = lambda store, memo: store  # type: ignore[attr-defined]
    OmegaConf.register_new_resolver("new_directory", new_directory.claim, replace=True)
    store.store(name="base", node=_with_open_maps(OmegaConf.structured(Config)))
    for path in sorted(resources.data("sweeps").glob("*.yaml")):
        node = OmegaConf.load(path)
        store.store(
            group="sweep", name=path.stem, node=node, package="_global_", provider="sweeps/"
        )
    # hydra-submitit-launcher stores configs of the same names during Hydra's scan of plugins;
    # Hydra would check configs/hydra/launcher/*.yaml against its schemas.
    others = store.repo.get("hydra", {}).get("launcher", {})
    for group, name, conf in (
        ("hydra/launcher", "submitit_slurm", SlurmConf),
        ("hydra/launcher", "submitit_local", LocalConf),
        ("hydra/sweeper", "grid", GridConf),
    ):
        others.pop(f"{name}.yaml", None)
        store.store(group=group, name=f"base_{name}", node=conf, provider="atropos_hpc")
    # Hydra 1.3 instantiates plugins of the package hydra_plugins only, which it scans at every
    # start. Ours are registered here instead, which also works in every kind of editable install.
    allowed = Plugins.is_in_toplevel_plugins_module
    Plugins.is_in_toplevel_plugins_module = staticmethod(  # type: ignore[assignment,method-assign]
        lambda name: name.startswith("atropos_hpc.") or allowed(name)
    )
    for plugin in (SlurmLauncher, LocalLauncher, GridSweeper):
        plugins.register(plugin)


def _with_open_maps(node: Any) -> Any:
    """Let the command line add keys to maps without `+`. Hydra closes the root of a config only
    (`set_struct`), and the flag of a child, which merging keeps, takes precedence."""
    for name in schema.open_maps(Config):
        OmegaConf.set_struct(OmegaConf.select(node, name), False)
    return node


# --- launchers


class SlurmLauncher(Launcher):
    """Submit one job per point. `slots`: maximum number of concurrent points; 0: no maximum."""

    def __init__(self, slots: int) -> None:
        self.slots = slots

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        self.points = Points(hydra_context, config)

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        from atropos_hpc.launch import sweep

        composed = self.points.compose(job_overrides, initial_job_idx)
        return _returns(sweep.on_slurm(composed, self.points.directory, self.slots))


class LocalLauncher(SlurmLauncher):
    """Run one process per point, at most `slots` at a time."""

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        from atropos_hpc.launch import sweep

        composed = self.points.compose(job_overrides, initial_job_idx)
        return _returns(sweep.here(composed, self.points.directory, max(1, self.slots)))


class PointFailed(Exception):
    """A point of a multirun that was waited for did not complete."""


class GridSweeper(BasicSweeper):
    """Hydra's own sweeper. The launchers compose every point before they submit any, so composing
    each one here as well, which the base class does as a check, would only double the time."""

    def sweep(self, arguments: list[str]) -> Any:
        assert self.config is not None
        with new_directory.left_as_found(Path(str(self.config.hydra.sweep.dir))):
            return super().sweep(arguments)

    def validate_batch_is_legal(self, batch: Sequence[Sequence[str]]) -> None:
        pass


def _returns(outcomes: "list[Any]") -> "list[JobReturn]":
    """Translate the outcomes of a sweep. Hydra raises the return value of a failed point; a point
    that was not waited for counts as completed."""
    returns = []
    for point, outcome in outcomes:
        completed = outcome is None or outcome == "complete"
        failure = None if completed else PointFailed(f"point {point.num}: {outcome}")
        status = JobStatus.COMPLETED if completed else JobStatus.FAILED
        returns.append(
            JobReturn(overrides=point.overrides, status=status, _return_value=failure or outcome)
        )
    return returns


class Points:
    """Composes the points of a multirun. Later changes of files do not affect submitted points.

    Hydra needs 0.15 s to compose one. Most points differ in plain values only, so these are set in
    copies of one config (`Template`) that Hydra composed from everything else.
    """

    def __init__(self, context: HydraContext, config: DictConfig) -> None:
        self.context, self.config = context, config
        self.directory = Path(str(config.hydra.sweep.dir)).absolute()
        self.leaves = frozenset(schema.leaves(Config))
        # other names of the points' directories may contain the overrides, which only Hydra knows
        self.numbered = OmegaConf.to_container(config.hydra.sweep, resolve=False) == SWEEP_NAMES
        self.templates: dict[tuple[str, ...], Template] = {}

    def compose(self, job_overrides: Sequence[Sequence[str]], first: int) -> "list[Any]":
        """Return a `Point` for each list of overrides."""
        from atropos_hpc.launch.sweep_point import Point

        points = []
        common = frozenset.intersection(*map(frozenset, job_overrides))
        for num, overrides in enumerate(job_overrides, first):
            config = self._config(num, overrides, common)
            config.wandb.group = config.wandb.group or self.directory.name
            points.append(Point(num, list(overrides), config, Path(config.run_dir)))
        return points

    def _config(self, num: int, overrides: Sequence[str], common: frozenset[str]) -> Config:
        if not self.numbered or any("${hydra:" in override for override in overrides):
            return to_config(self._by_hydra(num, overrides))
        plain: dict[str, Any] = {}
        rest: list[str] = []
        for override in overrides:
            parsed = None if override in common else _parse(override)
            if parsed is not None and self._is_plain(parsed):
                plain[parsed.key_or_group] = parsed.value()
            else:
                rest.append(override)
        shape = (*rest, *plain)
        if shape not in self.templates:
            self.templates[shape] = Template(self._by_hydra(num, rest), self.leaves)
        return self.templates[shape].copy({**plain, "run_dir": str(self.directory / str(num))})

    def _is_plain(self, override: Override) -> bool:
        return (
            override.type is OverrideType.CHANGE
            and override.key_or_group in self.leaves
            and not isinstance(override.value(), (dict, list))
        )

    def _by_hydra(self, num: int, overrides: Sequence[str]) -> DictConfig:
        """Compose a point as Hydra's own launchers do, and remove Hydra's section."""
        cfg = self.context.config_loader.load_sweep_config(self.config, list(overrides))
        with open_dict(cfg):
            cfg.hydra.job.id = cfg.hydra.job.num = num
        run_dir = Path(str(cfg.hydra.sweep.dir), str(cfg.hydra.sweep.subdir)).absolute()
        HydraConfig.instance().set_config(cfg)  # for ${hydra:...} in values
        with read_write(cfg), open_dict(cfg):
            del cfg["hydra"]
            cfg.run_dir = str(run_dir)
        return cfg


class Template:
    """A composed config of which copies with other values of leaves are made."""

    def __init__(self, cfg: DictConfig, leaves: Iterable[str]) -> None:
        self.cfg = cfg  # knows the types of the values, and which refer to others
        self.pickled = pickle.dumps(to_config(cfg))  # copying a Config takes five times as long
        raw = OmegaConf.to_container(cfg)
        self.referring = [key for key in leaves if _refers(_at(raw, key))]

    def copy(self, values: dict[str, Any]) -> Config:
        config: Config = pickle.loads(self.pickled)
        for key, value in values.items():
            OmegaConf.update(self.cfg, key, value)
        for key in [*values, *self.referring]:
            value, (section, _, name) = OmegaConf.select(self.cfg, key), key.rpartition(".")
            if OmegaConf.is_config(value):
                value = OmegaConf.to_container(value, resolve=True)
            setattr(attrgetter(section)(config) if section else config, name, value)
        return config


_parser = functools.cache(OverridesParser.create)


@functools.cache
def _parse(override: str) -> Override:
    return _parser().parse_override(override)


def _at(values: Any, key: str) -> Any:
    return functools.reduce(lambda value, part: value[part], key.split("."), values)


def _refers(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_refers, value.values()))
    if isinstance(value, list):
        return any(map(_refers, value))
    return isinstance(value, str) and "${" in value

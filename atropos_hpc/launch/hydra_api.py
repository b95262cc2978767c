"""Every use of the internals of Hydra and OmegaConf (hydra-core 1.3, omegaconf 2.3)."""

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from atropos_hpc import resources
from atropos_hpc.config import Config


def register() -> None:
    """Store the schema in Hydra as `base` (named in configs/config.yaml) and sweeps/ as a group."""
    # Hydra 1.3 deep-copies its search path, and with it every stored config, for each group that
    # `--help` lists, which takes more than half of that command's time. Stored configs are not
    # changed there (`ConfigStore.load` copies what it returns), so the copy may be the store.
    ConfigStore.__deepcopy__ = lambda store, memo: store  # type: ignore[attr-defined]
    ConfigStore.instance().store(name="base", node=Config)
    for path in sorted(resources.data("sweeps").glob("*.yaml")):
        ConfigStore.instance().store(
            group="sweep",
            name=path.stem,
            node=OmegaConf.load(path),
            package="_global_",
            provider="sweeps/",
        )

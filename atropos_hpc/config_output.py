"""Declare the config keys of trackers and exports; a part of `atropos_hpc.config`."""

from dataclasses import dataclass
from typing import List, Optional

from atropos_hpc.schema import key

MOST_STEPS = 10_000_000


@dataclass
class WandbConf:
    """Weights & Biases."""

    mode: str = key("disabled", "whether to log", choices=("disabled", "offline", "online"))
    project: str = key("atropos_hpc", "project")
    entity: Optional[str] = key(None, "entity; null: the account's default")
    group: Optional[str] = key(
        None, "group; null: the name of the sweep, if the run is part of one"
    )
    tags: List[str] = key([], "tags")


@dataclass
class MlflowConf:
    """MLflow."""

    enabled: bool = key(False, "whether to log; needs `atropos-hpc[trackers]`")
    tracking_uri: Optional[str] = key(
        None, "address of an MLflow server or database; null: an SQLite file in RUN/mlflow"
    )
    experiment: str = key("atropos_hpc", "experiment")


@dataclass
class TrackioConf:
    """Trackio. Its SQLite file is in RUN/trackio, or in the directory $TRACKIO_DIR."""

    enabled: bool = key(False, "whether to log; needs `atropos-hpc[trackers]`")
    project: str = key("atropos_hpc", "project")


@dataclass
class ExportConf:
    """Exports during the run, as Hugging Face directories RUN/exports/step-N."""

    every: int = key(
        0,
        "steps between exports, a multiple of trainer.checkpoint_every, and at the end; 0: none",
        ge=0,
        le=MOST_STEPS,
    )
    keep: int = key(2, "number of newest exports to keep", ge=1, le=10_000)

"""Contents of run.json, what every process of a run reads first, and of a sweep's points.json.

Both are masked; private.json has the values.
"""

from __future__ import annotations

import msgspec

from atropos_hpc.config import Config


class RunInfo(msgspec.Struct, frozen=True):
    """One run: its identity, how it was started first, and its resolved config."""

    config: Config
    id: str = ""  # stays the same over resumes; also the id of the W&B run
    created: float = 0.0  # Unix time, seconds
    version: str = ""  # of atropos_hpc
    command: list[str] = []  # of the first start


class SecretValue(msgspec.Struct, frozen=True):
    """A value that is masked in run.json. `path`: its keys in the config, from the root."""

    path: list[str]
    value: str


class Private(msgspec.Struct, frozen=True):
    """Contents of private.json."""

    secrets: list[SecretValue] = []


class PointConfig(msgspec.Struct, frozen=True):
    """A submitted point of a sweep: what it is before its run has begun."""

    run_dir: str
    config: Config

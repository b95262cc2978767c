"""The JSON files of checkpoints; torch.distributed.checkpoint writes the tensors beside them."""

import msgspec


class CheckpointFile(msgspec.Struct, frozen=True):
    file: str
    bytes: int


class CheckpointManifest(msgspec.Struct, frozen=True):
    """checkpoints/step-<n>-<attempt>/manifest.json: the checkpoint after `step` optimizer steps.

    `ranks` is the number of learner ranks that wrote it.
    """

    step: int
    ranks: int
    files: tuple[CheckpointFile, ...]


class LatestCheckpoint(msgspec.Struct, frozen=True):
    """checkpoints/latest.json: the newest durable checkpoint."""

    step: int
    directory: str

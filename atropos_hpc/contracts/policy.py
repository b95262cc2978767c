"""Policy versions, and the files through which they travel from the learner to the vLLM servers.

A policy version is identified by `PolicyVersion` everywhere: in the optimizer's `TrainState`, in a
snapshot, in the policy store, in a node's cache, in the roster, and in the label that vLLM puts on
every token. The other types are the JSON files of the policy store.
"""

import re
from typing import Literal

import msgspec

ADAPTER_NAME = "policy"  # the name under which vLLM serves a LoRA adapter beside its base model
_NAME = re.compile(r"(\d+)-(\d+)")


class PolicyVersion(msgspec.Struct, frozen=True, order=True, kw_only=True):
    """The weights after `version` optimizer steps, as published by learner start `attempt`.

    Versions of a later attempt compare greater, also when that attempt resumed from an earlier
    step. The text form, "<version>-<attempt>", is the directory name and vLLM's weight version.
    """

    attempt: int
    version: int

    def __str__(self) -> str:
        return f"{self.version}-{self.attempt}"

    @classmethod
    def parse(cls, text: str) -> "PolicyVersion":
        """Read the text form. Raises ValueError for any other text."""
        if (match := _NAME.fullmatch(text)) is None:
            raise ValueError(f"{text!r} is not a policy version of the form <version>-<attempt>")
        return cls(version=int(match[1]), attempt=int(match[2]))


class LatestPolicy(msgspec.Struct, frozen=True):
    """policy/latest.json: the newest published version. `directory` is redundant, for checking."""

    version: int
    attempt: int
    directory: str


class FileEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A file of a version, with its size and its xxh3-64 in hex."""

    file: str
    bytes: int
    xxh3: str


class DeltaEntry(FileEntry, frozen=True, forbid_unknown_fields=True):
    """A delta file. Applied to the base version's file of that name, it gives file `target`."""

    target: str


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """policy/<version>-<attempt>/manifest.json: what a version consists of.

    `files` describe the full state. Of a "delta" version they are not stored; a reader makes them
    from version `base` and `deltas`. A "full" version may carry deltas too, for readers that hold
    `base`. `seal` is the hash of all other fields.
    """

    version: PolicyVersion
    kind: Literal["full", "delta", "adapter"]
    files: tuple[FileEntry, ...]
    base: PolicyVersion | None = None
    deltas: tuple[DeltaEntry, ...] = ()
    seal: str = ""

    @property
    def stored_files(self) -> tuple[FileEntry, ...]:
        return (() if self.kind == "delta" else self.files) + self.deltas


class ReaderLease(msgspec.Struct, frozen=True):
    """policy/readers/<reader>.json: the versions a reader needs. `renewals` counts heartbeats."""

    versions: tuple[PolicyVersion, ...]
    renewals: int

"""What `validate`, `doctor` and `export` print with --json; contracts/status.py has the others'."""

from msgspec import Struct


class Problem(Struct, frozen=True):
    """A reason to refuse a config: the key to change ("" if there is none), and what is wrong."""

    key: str
    message: str

    def __str__(self) -> str:
        return f"{self.key}: {self.message}" if self.key else self.message


class MemoryNeed(Struct, frozen=True):
    """What a part of a run is estimated to need at its peak, and what it may use, if that is known.

    The device and its processes need some more: leave a tenth free.
    """

    part: str
    needed_bytes: int
    available_bytes: int | None = None


class Validated(Struct, frozen=True):
    """The outcome of `validate`. No problems: the config can be started."""

    problems: list[Problem]
    memory: list[MemoryNeed]  # empty if the model's config is not at hand
    warnings: list[Problem] = []  # nothing is refused for these


class Finding(Struct, frozen=True):
    """One line of `doctor`. ok: True works, False is broken, None is for information."""

    ok: bool | None
    text: str
    fix: str = ""  # what to do about it
    area: str = ""


class Exported(Struct, frozen=True, omit_defaults=True):
    """The directory that `export` has written, the step of its weights, and where it was pushed."""

    directory: str
    step: int
    url: str | None = None

"""Describe config keys: each key's default, help text and allowed values in its dataclass field.

`key` declares a value and `section` a nested dataclass. The checks of single values, the page
docs/config.md and the comments in configs/ are all derived from these declarations.
"""

import dataclasses
import difflib
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

MISSING = "???"  # OmegaConf's marker of a mandatory value
METADATA = "key"


@dataclass(frozen=True)
class Key:
    """What is known of a config key beside its type and default.

    Bounds do not apply to null; those of a map apply to its values. `pattern` is a regular
    expression and what it means, for text. `path`: text that may be the path of a file or
    directory; of a "program", text without a slash is a name.
    """

    help: str
    ge: float | None = None  # at least
    gt: float | None = None  # greater than
    le: float | None = None  # at most
    choices: tuple[str, ...] = ()
    pattern: tuple[str, str] | None = None
    path: Literal["any", "program"] | None = None

    def error(self, value: Any) -> str | None:
        """Say why a value is not allowed; None if it is."""
        if value is None:
            return None
        if not _is_finite(value):
            return f"must be a finite number, not {value}"
        if self.choices and value not in self.choices:
            near = did_you_mean(str(value), self.choices)
            return f"{value!r} is not one of {', '.join(self.choices)}{near}"
        if self.pattern is not None and not re.fullmatch(self.pattern[0], value):
            return f"must be {self.pattern[1]}, not {value!r}"
        if isinstance(value, list) and not all(isinstance(each, str) for each in value):
            return f"must be a list of texts, not {value!r}"
        if isinstance(value, dict):
            if self.ge is None and self.le is None:
                return None
            found = ((name, self.error(entry)) for name, entry in value.items())
            return next((f"{name} {error}" for name, error in found if error), None)
        for bound, holds, words in (
            (self.ge, self.ge is None or value >= self.ge, "at least"),
            (self.gt, self.gt is None or value > self.gt, "greater than"),
            (self.le, self.le is None or value <= self.le, "at most"),
        ):
            if not holds:
                return f"must be {words} {bound:,}, not {value}"
        return None


def _is_finite(value: Any) -> bool:
    """Tell whether a value, or every number in a map or list, is finite."""
    if isinstance(value, dict):
        return all(map(_is_finite, value.values()))
    if isinstance(value, list | tuple):
        return all(map(_is_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


def key(default: Any, help: str, **allowed: Any) -> Any:
    """Declare a config key. `allowed`: fields of Key."""
    metadata = {METADATA: Key(help, **allowed)}
    if isinstance(default, list | dict):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def section(kind: type[Any]) -> Any:
    """Declare a nested section; its description is the docstring of its class."""
    return field(default_factory=kind)


def describe(declared: "dataclasses.Field[Any]") -> Key:
    """Return what `key` was given for a field."""
    return declared.metadata[METADATA]  # type: ignore[no-any-return]


def fields(kind: Any, prefix: str = "") -> Iterator[tuple[str, "dataclasses.Field[Any]"]]:
    """Yield (dotted key, field) of every key and every section of a config class, in order."""
    for declared in dataclasses.fields(kind):
        yield f"{prefix}{declared.name}", declared
        if is_dataclass(declared.type):
            yield from fields(declared.type, f"{prefix}{declared.name}.")


def leaves(kind: Any) -> Iterator[str]:
    """Yield the dotted key of every value of a config class."""
    return (name for name, declared in fields(kind) if not is_dataclass(declared.type))


def open_maps(kind: Any) -> Iterator[str]:
    """Yield the dotted keys below which keys may be added freely."""
    return (name for name, declared in fields(kind) if get_origin(declared.type) is dict)


def values(config: Any, prefix: str = "") -> Iterator[tuple[str, Key, Any]]:
    """Yield (dotted key, description, value) of a config object, also in maps of sections."""
    for declared in dataclasses.fields(config):
        name, value = f"{prefix}{declared.name}", getattr(config, declared.name)
        if is_dataclass(value):
            yield from values(value, f"{name}.")
            continue
        yield name, describe(declared), value
        if isinstance(value, dict):
            for entry, inner in value.items():
                if is_dataclass(inner):
                    yield from values(inner, f"{name}.{entry}.")


def make_paths_absolute(config: Any) -> None:
    """Make relative paths of what exists here absolute: a run is resumed from anywhere."""
    for declared in dataclasses.fields(config):
        value = getattr(config, declared.name)
        sections = value.values() if isinstance(value, dict) else [value]
        for section in filter(is_dataclass, sections):
            make_paths_absolute(section)
        if value and (kind := describe(declared).path if METADATA in declared.metadata else None):
            setattr(config, declared.name, _absolute(value, kind))


def _absolute(text: str, kind: str) -> str:
    """`text`: a path, also in path/to/file.py:Class, or a name, which stays as it is."""
    file, colon, name = text.rpartition(":")
    if not file.endswith(".py"):
        file, colon, name = text, "", ""
    if kind == "program" and "/" not in file:
        return text
    try:
        path = Path(file).expanduser()
        return f"{path.absolute()}{colon}{name}" if path.exists() else text
    except (OSError, RuntimeError):  # may not be read, or an unknown user's home
        return text


def unknown_keys(kind: Any, given: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield (dotted key, "; did you mean X?") of everything in `given` that the class lacks."""
    known = {declared.name: declared.type for declared in dataclasses.fields(kind)}
    for name, value in given.items():
        if name not in known:
            near = did_you_mean(f"{prefix}{name}", [f"{prefix}{each}" for each in known])
            yield f"{prefix}{name}", near
        elif is_dataclass(known[name]) and isinstance(value, dict):
            yield from unknown_keys(known[name], value, f"{prefix}{name}.")
        elif isinstance(value, dict) and is_dataclass(inner := get_args(known[name])[-1]):
            for entry, below in value.items():
                yield from unknown_keys(inner, below, f"{prefix}{name}.{entry}.")


def did_you_mean(wrong: str, known: Iterable[str]) -> str:
    """Return "; did you mean X?" with the nearest known word, or "" when none is near."""
    near = difflib.get_close_matches(wrong, list(known), 1, 0.5)
    return f"; did you mean {near[0]}?" if near else ""

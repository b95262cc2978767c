"""The result of a bench."""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Result:
    """Rows of a table, and bars. Values may be numpy scalars."""

    rows: list[dict[str, Any]]
    bars: dict[str, dict[str, Any]] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)

    def at_least(self, what: str, value: float, bar: float) -> None:
        self.bars[what] = {"value": float(value), "bar": bar, "ok": bool(value >= bar)}

    def at_most(self, what: str, value: float, bar: float) -> None:
        self.bars[what] = {"value": float(value), "bar": bar, "ok": bool(value <= bar)}

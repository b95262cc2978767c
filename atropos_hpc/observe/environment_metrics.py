"""What environments log for training, averaged over their workers, for the metrics of a step."""

import math
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import msgspec

from atropos_hpc.contracts.metrics import EnvironmentMetrics


class EnvironmentMetricsReader:
    """Reads the lines that have been appended to environments.jsonl since the last call."""

    def __init__(self, path: Path) -> None:
        """Start at the present end: the lines before it belong to steps that were written."""
        self._path = path
        self._offset = path.stat().st_size if path.exists() else 0

    def take(self) -> Mapping[str, float]:
        """Return the mean over the new lines of each metric, as env/<environment>/<key>."""
        values: defaultdict[str, list[float]] = defaultdict(list)
        for line in self._new_lines():
            for key, value in line.values.items():
                values[f"env/{line.environment}/{key}"].append(value)
        return {name: math.fsum(each) / len(each) for name, each in values.items()}

    def _new_lines(self) -> list[EnvironmentMetrics]:
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return []
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        found = []
        for line in whole.splitlines():
            try:
                found.append(msgspec.json.decode(line, type=EnvironmentMetrics))
            except msgspec.DecodeError:  # a crash of the trajectory server has cut it off
                continue
        return found

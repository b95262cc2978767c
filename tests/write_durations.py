"""Write the durations of the last test runs into docs/testing.md: `make docs-testing`.

    python tests/write_durations.py build/test-durations/*.json

Each file is what tests/conftest.py recorded of one tier ($TEST_DURATIONS).
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

PAGE = Path(__file__).resolve().parent.parent / "docs" / "testing.md"
BEGIN, END = "<!-- durations: written by `make docs-testing` -->", "<!-- end of durations -->"
SLOWEST = 25


def table(tiers: list[dict[str, Any]]) -> str:
    """Return a table of the tiers and one of the slowest tests."""
    date = time.strftime("%Y-%m-%d")
    lines = [f"Measured on {date}, with {tiers[0]['cores']} cores.", ""]
    lines += ["| tier | tests | wall time, s | CPU time, s | retried |", "|---|---|---|---|---|"]
    for tier in tiers:
        counts = (len(tier["tests"]), f"{tier['total_s']:.0f}", f"{tier['cpu_s']:.0f}")
        lines.append(f"| {tier['tier']} | {' | '.join(map(str, counts))} | {len(tier['rerun'])} |")
    slowest = {name: seconds for tier in tiers for name, seconds in tier["tests"].items()}
    ordered = sorted(slowest.items(), key=lambda item: -item[1][0])[:SLOWEST]
    lines += ["", f"The slowest {SLOWEST}:", "", "| test | wall, s | CPU, s |", "|---|---|---|"]
    for name, (wall_s, cpu_s) in ordered:
        shown = name.removeprefix("tests/").replace("|", "\\|")
        lines.append(f"| `{shown}` | {wall_s:.1f} | {cpu_s:.1f} |")
    return "\n".join(lines)


def main(paths: list[str]) -> int:
    tiers = [json.loads(Path(path).read_text()) for path in paths]
    text = PAGE.read_text()
    head, tail = text.partition(BEGIN)[0], text.partition(END)[2]
    PAGE.write_text(f"{head}{BEGIN}\n\n{table(tiers)}\n\n{END}{tail}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

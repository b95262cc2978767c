"""Run the benchmarks: `python -m bench` for all, `python -m bench NAME` for one (also `make bench NAME=...`).

Each bench is a module of this package with `main() -> Result`. Its table is printed, and written with its bars to
bench/results/NAME.json. Figures are ratios within one run: machines differ, and are shared.
"""

import importlib
import json
import pkgutil
import sys
import time
import traceback
from pathlib import Path

from rich.console import Console
from rich.table import Table

import bench
from bench.result import Result

RESULTS = Path(__file__).parent / "results"


def show(name: str, result: Result) -> None:
    """Print the rows, then each bar with what was reached."""
    console = Console()
    if result.rows:
        table = Table(title=name)
        for column in result.rows[0]:
            table.add_column(column)
        for row in result.rows:
            table.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()))
        console.print(table)
    for what, bar in result.bars.items():
        console.print(f"{'reached' if bar['ok'] else 'MISSED'}  {what}: {bar['value']:.4g} (bar {bar['bar']:.4g})")


def main(names: list[str]) -> int:
    """0 if every bar of every named bench was reached. A bench that fails is told of, and the others run all the same."""
    known = [module.name for module in pkgutil.iter_modules(bench.__path__) if module.name not in ("__main__", "result")]
    if unknown := set(names) - set(known):
        print(f"no bench named {', '.join(sorted(unknown))}; there are {', '.join(known)}", file=sys.stderr)
        return 2
    reached = True
    for name in names or known:
        start = time.monotonic()
        try:
            result: Result = importlib.import_module(f"bench.{name}").main()
        except Exception:
            traceback.print_exc()
            print(f"FAILED  {name}, after {time.monotonic() - start:.0f} s", file=sys.stderr)
            reached = False
            continue
        result.details["wall_s"] = round(time.monotonic() - start, 1)
        show(name, result)
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{name}.json").write_text(json.dumps({"bars": result.bars, "rows": result.rows, **result.details}, indent=1) + "\n")
        reached = reached and all(bar["ok"] for bar in result.bars.values())
    return 0 if reached else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

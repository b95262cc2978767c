"""Run the benchmarks: `python -m bench [NAME]`, or `make bench [NAME=...]`.

Each bench is a module of this package with `main() -> Result`; packages hold what benches share.
The table of a bench is printed and written, with its bars, to bench/results/NAME.json. Bars are
ratios within one run where possible, because machines differ and are shared."""

import importlib
import json
import pkgutil
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

import bench
from bench.result import Result

RESULTS = Path(__file__).parent / "results"


def show(name: str, result: Result) -> None:
    """Print the rows, then each bar with the value."""
    console = Console()
    if result.rows:
        table = Table(title=name)
        for column in result.rows[0]:
            table.add_column(column)
        for row in result.rows:
            table.add_row(
                *(
                    f"{value:.4g}" if isinstance(value, float) else str(value)
                    for value in row.values()
                )
            )
        console.print(table)
    for what, bar in result.bars.items():
        verdict = "reached" if bar["ok"] else "MISSED"
        console.print(f"{verdict}  {what}: {bar['value']:.4g} (bar {bar['bar']:.4g})")


def run(name: str) -> bool:
    """Run a bench in this process and write its result. Returns whether every bar was reached."""
    start = time.monotonic()
    result: Result = importlib.import_module(f"bench.{name}").main()
    result.details["wall_s"] = round(time.monotonic() - start, 1)
    show(name, result)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(
        json.dumps({"bars": result.bars, "rows": result.rows, **result.details}, indent=1) + "\n"
    )
    return all(bar["ok"] for bar in result.bars.values())


def main(names: list[str]) -> int:
    """Return 0 if every bar of every named bench was reached.

    Several benches run in a process each, so that one failure does not affect the others.
    """
    known = [
        module.name
        for module in pkgutil.iter_modules(bench.__path__)
        if not module.ispkg and module.name not in ("__main__", "result")
    ]
    if unknown := set(names) - set(known):
        print(
            f"no bench named {', '.join(sorted(unknown))}; there are {', '.join(known)}",
            file=sys.stderr,
        )
        return 2
    if len(names) == 1:
        return 0 if run(names[0]) else 1
    codes = {
        name: subprocess.run([sys.executable, "-m", "bench", name], check=False).returncode
        for name in names or known
    }
    for name, code in codes.items():
        print(f"{'reached' if code == 0 else 'MISSED or failed'}  {name}")
    return max(codes.values(), key=abs)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

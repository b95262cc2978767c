"""Command line of the GPU check; see the package."""

import argparse
import json
import sys
from pathlib import Path

from bench.__main__ import RESULTS
from bench.gpu import PARTS, Setting, main

parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=main.__doc__)
parser.add_argument("--model", type=Path, help="directory of a real model; tiny made ones without")
parser.add_argument("--data", type=Path, help="directory with GSM8K's train.jsonl and test.jsonl")
parser.add_argument("--rollout-python", required=True, help="the rollout role's interpreter")
parser.add_argument("--parts", default=",".join(PARTS))
parser.add_argument("--logs", type=Path, default=Path("runs/gpu-check"))
parser.add_argument("--out", type=Path, default=RESULTS / "gpu.json")
options = parser.parse_args()
setting = Setting(
    options.model, options.data, sys.executable, options.rollout_python, options.logs.absolute()
)
result = main(tuple(options.parts.split(",")), setting)
options.out.parent.mkdir(parents=True, exist_ok=True)
options.out.write_text(
    json.dumps({"bars": result.bars, "rows": result.rows, **result.details}, indent=1) + "\n"
)
for part in options.parts.split(","):
    rows = [row for row in result.rows if row["part"] == part]
    for row in rows:
        print(
            "  ".join(
                f"{k}={v:.5g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()
            )
        )
sys.exit(0 if all(bar["ok"] for bar in result.bars.values()) else 1)

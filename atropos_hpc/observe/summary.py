"""summary.json: what came of a run, from its metrics, evaluations and attempts."""

from typing import Any

from atropos_hpc.runtime.run_dir import RunDir, read_json, read_lines


def summarize(run: RunDir) -> dict[str, Any]:
    """Accuracies before and after, work done, time and where it went. Missing figures are None."""
    steps = read_lines(run.metrics)
    evaluations = [line for line in read_lines(run.evaluations) if line.get("accuracy") is not None]
    last = max((line["step"] for line in steps), default=0)
    attempts = [
        read_json(path) for path in sorted((run.path / "logs").glob("attempt-*/attempt.json"))
    ]

    def total(key: str) -> float:
        return sum(line.get(key, 0) for line in steps)

    return {
        "outcome": attempts[-1]["outcome"] if attempts else None,
        "accuracy_before": next((e["accuracy"] for e in evaluations if e["version"] == 0), None),
        "accuracy_after": next(
            (e["accuracy"] for e in reversed(evaluations) if e["version"] == last), None
        ),
        "evaluations": [
            {key: e[key] for key in ("version", "accuracy", "sequences")} for e in evaluations
        ],
        "steps": last,
        "sequences": int(total("sequences")),
        "tokens": int(total("tokens")),
        "trained_tokens": int(total("trained_tokens")),
        "stale_sequences": int(total("stale_sequences")),
        "dropped_as_stale": int(steps[-1].get("dropped_as_stale", 0)) if steps else 0,
        "reward_first": steps[0].get("reward") if steps else None,
        "reward_last": steps[-1].get("reward") if steps else None,
        "wall_s": round(sum(a["ended"] - a["started"] for a in attempts if a), 1),
        "attempts": len(list((run.path / "logs").glob("attempt-*"))),
        "restarts": sum(len(a["events"]) for a in attempts if a),
        "phases": _phases(steps),
    }


def _phases(steps: list[dict[str, Any]]) -> dict[str, Any]:
    """Seconds of the learner's time per phase, and each phase's share of all its steps' time."""
    names = sorted(
        {key for line in steps for key in line if key.startswith("time/")} - {"time/step"}
    )
    whole = sum(line.get("time/step", 0) for line in steps) or 1.0
    seconds = {
        name.removeprefix("time/"): sum(line.get(name, 0) for line in steps) for name in names
    }
    return {
        name: {"s": round(value, 2), "share": round(value / whole, 4)}
        for name, value in seconds.items()
    }

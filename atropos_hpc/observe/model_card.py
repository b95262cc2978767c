"""The model card of an exported checkpoint: what it was made from, how, and how it did. Hugging Face's format: front matter, then text."""

import json
from typing import Any

import atropos_hpc
from atropos_hpc.observe.summary import summarize
from atropos_hpc.runtime.run_dir import RunDir, read_json, read_lines


def card(run: RunDir, step: int) -> str:
    """README.md of the directory that holds the weights after that step."""
    about = read_json(run.run_json)
    config, summary = about["config"], summarize(run)
    model, algorithm, trainer, environment = (
        config[name] for name in ("model", "algorithm", "trainer", "environment")
    )
    made = model["make"] is not None
    base = "a model made from scratch by " + f"`{model['make']}`" if made else f"`{model['path']}`"
    evaluations = [
        line
        for line in read_lines(run.evaluations)
        if line.get("accuracy") is not None and line["version"] <= step
    ]
    front: dict[str, Any] = {
        "library_name": "transformers",
        "tags": ["grpo", "reinforcement-learning", "atropos"],
    }
    if not made and not model["path"].startswith(("/", ".", "~")):
        front["base_model"] = model["path"]
    lora = (
        f", a LoRA adapter of rank {model['lora']['rank']}, merged" if model["lora"]["rank"] else ""
    )
    rows = [("policy version", "held-out accuracy", "problems"), ("---", "---", "---"),
            *((line["version"], f"{line['accuracy']:.3f}", line["sequences"]) for line in evaluations)]  # fmt: skip
    table = "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows)
    results = (
        f"{table}\n\nMetric: `{environment['metric']}` of the environment's own evaluation."
        if evaluations
        else "No held-out evaluation."
    )
    kl = f"{algorithm['kl_coef']} ({algorithm['kl_estimator']}, in the {algorithm['kl_in']})"
    return f"""---
{_yaml(front)}---

# {run.path.name}, after step {step}

Trained from {base}{lora}, by {algorithm["advantage"]} with the {algorithm["loss"]} loss on `{environment["target"]}`,
{trainer["steps"]} steps of {algorithm["batch_size"]} sequences in groups of {environment["group_size"]}.

## Results

{results}

## Training

| | |
|---|---|
| learning rate | {trainer["learning_rate"]}, {trainer["schedule"]} |
| KL to the reference | {kl} |
| staleness | at most {config["staleness"]["max"]} versions |
| longest sequence | {model["max_length"]} tokens |
| sequences, tokens trained on | {summary["sequences"]:,}, {summary["trained_tokens"]:,} |
| run | {about["id"]}, atropos_hpc {atropos_hpc.__version__} |

<details><summary>Config</summary>

```json
{json.dumps(config, indent=1)}
```

</details>
"""


def _yaml(front: dict[str, Any]) -> str:
    """Front matter; JSON is YAML."""
    return "".join(f"{key}: {json.dumps(value)}\n" for key, value in front.items())

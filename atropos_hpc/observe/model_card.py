"""The model card of an exported checkpoint, in Hugging Face's format: front matter, then text."""

import json

import msgspec

import atropos_hpc
from atropos_hpc.config import Config, ModelConf
from atropos_hpc.contracts.metrics import StepMetrics
from atropos_hpc.observe.summary import evaluation_summaries, summarize
from atropos_hpc.runtime.run_dir import RunDir, read_records

# The sections that say how the model was made.
CONFIG_PARTS = (
    *("seed", "model", "environment", "more_environments", "algorithm", "trainer", "staleness"),
    *("evaluation", "policy"),
)


def model_card(run: RunDir, step: int) -> str:
    """Return README.md for the weights after a step."""
    info = run.info()
    lines = read_records(run.metrics, StepMetrics)
    summary = summarize(run, [line for line in lines if line.step <= step])
    assert info is not None, "a run with a checkpoint has a run.json"
    config = info.config
    model, algorithm, trainer = config.model, config.algorithm, config.trainer
    return f"""---
{_front_matter(model)}---

# {run.path.name}, after step {step}

Trained from {_base(model)}, by {algorithm.advantage} with the {algorithm.loss} loss on
`{config.environment.target}`, {step} steps of {algorithm.batch_size} sequences in groups
of {config.environment.group_size}.

## Results

{_results(run, step, config.environment.metric)}

## Training

| | |
|---|---|
| learning rate | {trainer.learning_rate}, {trainer.schedule} |
| KL to the reference | {algorithm.kl_coef} ({algorithm.kl_estimator}, in the {algorithm.kl_in}) |
| staleness | at most {config.staleness.max} versions |
| longest sequence | {model.max_length} tokens |
| sequences, tokens trained | {summary.sequences:,}, {summary.trained_tokens:,} |
| run | {info.id}, atropos_hpc {atropos_hpc.__version__} |

<details><summary>Config, without what is of one site</summary>

```json
{_config(config)}
```

</details>
"""


def _config(config: Config) -> str:
    """Return the config as JSON, without paths of this machine and accounts."""
    parts = {name: getattr(config, name) for name in CONFIG_PARTS}
    return msgspec.json.format(msgspec.json.encode(parts), indent=1).decode()


def _front_matter(model: ModelConf) -> str:
    """Return YAML; JSON is a subset of it."""
    front: dict[str, object] = {
        "library_name": "transformers",
        "tags": ["grpo", "reinforcement-learning", "atropos"],
    }
    if model.make is None and not str(model.path).startswith(("/", ".", "~")):  # on the hub
        front["base_model"] = model.path
    return "".join(f"{key}: {json.dumps(value)}\n" for key, value in front.items())


def _base(model: ModelConf) -> str:
    base = f"`{model.path}`"
    if model.make is not None:
        base = f"a model made from scratch by `{model.make}`"
    adapter = f", a LoRA adapter of rank {model.lora.rank}, merged" if model.lora.rank else ""
    return base + adapter


def _results(run: RunDir, step: int, metric: str) -> str:
    evaluations = evaluation_summaries(run, step)
    if not evaluations:
        return "No held-out evaluation."
    lines = ["| policy version | held-out accuracy | problems |", "|---|---|---|"]
    lines += [f"| {e.version} | {e.accuracy:.3f} | {e.sequences} |" for e in evaluations]
    lines += ["", f"Metric: `{metric}` of the environment's own evaluation."]
    return "\n".join(lines)

"""Declare the keys of what makes the data: environments, vLLM servers, trajectories, evaluation."""

from dataclasses import dataclass
from typing import Any, Dict, List, Optional

from atropos_hpc.schema import MISSING, key

WEEK_S = 7 * 24 * 3600

OWN_ENVIRONMENTS = "atropos_hpc.environments."  # how their targets begin
# Fields of Atropos' own environment config that the run sets, and the key to change instead;
# {} is the environment's key.
SET_BY_RUN = {
    "group_size": "{}.group_size",
    "max_num_workers": "{}.concurrency",
    "inference_weight": "{}.weight",
    "min_batch_allocation": "{}.min_batch_allocation",
    "max_token_length": "model.max_length",
    "tokenizer_name": "model.path",
    "max_batches_offpolicy": "staleness.max",
    "steps_per_eval": "evaluation.every",
    "total_steps": "trainer.steps",
    "batch_size": "algorithm.batch_size",
    "use_wandb": "wandb.mode",
    "rollout_server_url": "trajectories.server",
}


@dataclass
class EnvironmentConf:
    """Any Atropos environment class, unmodified, or any environment of the verifiers library."""

    target: str = key(
        MISSING,
        "environment class: package.module:Class or path/to/file.py:Class; a name without a colon "
        "is a taskset package of the verifiers library",
        path="any",
    )
    python: Optional[str] = key(
        None,
        "interpreter of this environment's workers, where its packages exclude those of vLLM; "
        "null: that of the rollout role",
        path="program",
    )
    config: Dict[str, Any] = key(
        {}, "fields of the environment's own config class; fields that other keys set are refused"
    )
    group_size: int = key(8, "sequences per prompt", ge=2, le=65536)
    workers: int = key(1, "worker processes per rollout node", ge=1, le=1024)
    concurrency: int = key(32, "groups in flight per worker", ge=1, le=100_000)
    request_timeout_s: Optional[float] = key(
        None,
        "timeout of a generation request, seconds; null: 0.1 per token of max_length, at least 600",
        gt=0,
        le=WEEK_S,
    )
    trial_timeout_s: float = key(
        60.0,
        "`validate` and submission import the class, draw one prompt and roll out one group "
        "against a stub of the servers, each within this many seconds, and look whether evaluate() "
        "reports `metric`; 0: they only import it",
        ge=0,
        le=WEEK_S,
    )
    metric: str = key(
        "eval/percent_correct",
        "the environment's evaluation metric that is reported as the run's accuracy",
    )
    weight: float = key(
        1.0, "fraction of the generated groups, relative to the other environments", gt=0, le=1e9
    )
    min_batch_allocation: float = key(
        0.0,
        "minimum fraction of every batch; a batch waits for it as long as the environment delivers",
        ge=0,
        le=1,
    )


@dataclass
class RolloutConf:
    """vLLM servers on a rollout node."""

    servers: int = key(1, "vLLM servers per node", ge=1, le=256)
    tensor_parallel: int = key(1, "devices per server", ge=1, le=64)
    memory_utilization: float = key(
        0.9, "fraction of each device's memory that a server may use", gt=0, le=1
    )
    kv_cache_bytes: Optional[int] = key(
        None,
        "size of the KV cache, bytes; null: derived from memory_utilization",
        ge=1 << 20,
        le=1 << 50,
    )
    max_sequences: int = key(
        256, "maximum number of concurrent sequences per server", ge=1, le=1 << 20
    )
    enforce_eager: bool = key(False, "disable graph capture")
    max_support: int = key(
        1024,
        "token ids that top_p, top_k, min_p or a grammar may leave at a position of a training "
        "answer; a group in which more are left is refused",
        ge=1,
        le=1 << 20,
    )
    allow_biased_sampling: bool = key(
        False,
        "train on groups whose sampling distribution the learner cannot replay (penalties, "
        "logit_bias, greedy decoding, too large a support), as if they were sampled without",
    )
    give_up_after_groups: Optional[int] = key(
        16,
        "an environment worker that gets this many groups in a row that cannot be trained on "
        "(rollouts that fail, return nothing or are refused; equal scores do not count) ends the "
        "run with its last error; null: never",
        ge=1,
        le=10**9,
    )
    give_up_after_s: float = key(
        300.0, "but not before they have failed for this long, seconds", ge=0, le=WEEK_S
    )
    tool_parser: Optional[str] = key(
        None,
        "vLLM's parser for the tool calls of this model (hermes, llama3_json, ...), with which "
        "chat_completion returns tool_calls; null: they stay in the text",
    )
    arguments: List[str] = key([], "further command-line arguments of vLLM's server")
    variables: Dict[str, str] = key({}, "further environment variables of the servers")


@dataclass
class TrajectoriesConf:
    """Transport of scored groups from the environments to the learner."""

    server: str = key(
        "durable",
        "durable: the journalled trajectory server; atropos: the in-memory run-api of Atropos, "
        "for one trainer rank",
        choices=("durable", "atropos"),
    )
    max_body_bytes: int = key(
        64 << 20,
        "maximum size of a request body, bytes; twice that when decompressed",
        ge=1 << 16,
        le=1 << 34,
    )
    segment_bytes: int = key(
        256 << 20,
        "size of a journal segment, bytes; a full segment is deleted once its groups are durable "
        "in checkpoints",
        ge=1 << 20,
        le=1 << 40,
    )
    rollouts_max_bytes: int = key(
        4 << 30,
        "maximum size of the trained sequences that are kept in rollouts/, bytes; the oldest are "
        "removed first; 0: none are kept",
        ge=0,
        le=1 << 50,
    )


@dataclass
class EvaluationConf:
    """Held-out evaluation, on the same servers, by the environment's own evaluate()."""

    every: int = key(
        0, "policy versions between evaluations during training; 0: none", ge=0, le=10_000_000
    )
    before: bool = key(True, "evaluate the initial policy before training starts")
    after: bool = key(True, "evaluate the final policy")
    timeout_s: float = key(
        1800.0, "timeout of the evaluations before and after training, seconds", gt=0, le=WEEK_S
    )
    samples: int = key(
        1,
        "answers to each held-out problem for eval/<environment>/pass@k, sampled as in training, "
        "besides the one for the accuracy; 1: no pass@k. For environments whose config has "
        "eval_samples: those of this package, and of verifiers",
        ge=1,
        le=10_000,
    )

"""The typed config of a run, and the checks that span several keys.

Every value's default and meaning stands here and in configs/; Hydra merges files and command line into these classes, so that an
unknown key or a wrong type is refused while composing. What a type cannot say, `problems` does.
"""

import difflib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, List, Optional

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING


@dataclass
class ModelConf:
    path: Optional[str] = None
    make: Optional[str] = None
    make_options: Dict[str, Any] = field(default_factory=dict)
    max_length: int = 2048
    dtype: str = "bfloat16"
    attention: str = "sdpa"
    trust_remote_code: bool = False


@dataclass
class EnvironmentConf:
    target: str = MISSING
    config: Dict[str, Any] = field(default_factory=dict)
    group_size: int = 8
    workers: int = 1
    concurrency: int = 32
    request_timeout_s: float = 600.0
    metric: str = "eval/percent_correct"


@dataclass
class AlgorithmConf:
    advantage: str = "grpo"
    normalize_by_std: bool = True
    loss: str = "vanilla"
    clip_low: float = 0.2
    clip_high: float = 0.2
    clip_dual: float = 3.0
    aggregation: str = "token-mean"
    kl_coef: float = 0.001
    kl_estimator: str = "k3"
    entropy_coef: float = 0.0
    old_log_probs: str = "behaviour"
    batch_size: int = 256


@dataclass
class TrainerConf:
    backend: str = "verl"
    steps: int = 100
    learning_rate: float = 1e-6
    warmup_steps: int = 0
    schedule: str = "constant"
    weight_decay: float = 0.01
    grad_clip: float = 1.0
    tokens_per_micro_batch: int = 16384
    gradient_checkpointing: bool = True
    offload: bool = False
    checkpoint_every: int = 20
    keep_checkpoints: int = 2
    threads: Optional[int] = None


@dataclass
class RolloutConf:
    servers: int = 1
    tensor_parallel: int = 1
    memory_utilization: float = 0.9
    kv_cache_bytes: Optional[int] = None
    max_sequences: int = 256
    enforce_eager: bool = False
    arguments: List[str] = field(default_factory=list)
    variables: Dict[str, str] = field(default_factory=dict)


@dataclass
class StalenessConf:
    max: int = 1


@dataclass
class PolicyConf:
    keep: int = 2
    update_mode: str = "keep"
    poll_s: float = 0.5


@dataclass
class TrajectoriesConf:
    server: str = "durable"
    max_body_bytes: int = 64 << 20


@dataclass
class EvaluationConf:
    every: int = 0
    before: bool = True
    after: bool = True
    timeout_s: float = 1800.0


@dataclass
class WandbConf:
    mode: str = "disabled"
    project: str = "atropos_hpc"
    entity: Optional[str] = None
    group: Optional[str] = None
    tags: List[str] = field(default_factory=list)


@dataclass
class ClusterConf:
    name: str = "local"
    host: str = "127.0.0.1"


@dataclass
class LaunchConf:
    allocation: str = "local"
    restarts: int = 5
    backoff_s: float = 1.0
    start_timeout_s: float = 900.0
    step_timeout_s: float = 1800.0
    save_timeout_s: float = 120.0
    grace_s: float = 10.0


@dataclass
class RoleConf:
    nodes: int = 1
    ranks_per_node: int = 1
    python: Optional[str] = None


@dataclass
class RolesConf:
    trainer: RoleConf = field(default_factory=RoleConf)
    rollout: RoleConf = field(default_factory=RoleConf)


@dataclass
class Config:
    run_dir: str = MISSING
    seed: int = 0
    model: ModelConf = field(default_factory=ModelConf)
    environment: EnvironmentConf = field(default_factory=EnvironmentConf)
    algorithm: AlgorithmConf = field(default_factory=AlgorithmConf)
    trainer: TrainerConf = field(default_factory=TrainerConf)
    rollout: RolloutConf = field(default_factory=RolloutConf)
    staleness: StalenessConf = field(default_factory=StalenessConf)
    policy: PolicyConf = field(default_factory=PolicyConf)
    trajectories: TrajectoriesConf = field(default_factory=TrajectoriesConf)
    evaluation: EvaluationConf = field(default_factory=EvaluationConf)
    wandb: WandbConf = field(default_factory=WandbConf)
    cluster: ClusterConf = field(default_factory=ClusterConf)
    launch: LaunchConf = field(default_factory=LaunchConf)
    roles: RolesConf = field(default_factory=RolesConf)

"""The typed config of a run.

Every value's default and meaning stands here and in configs/; Hydra merges files and command line into these classes, so that an
unknown key or a wrong type is refused while composing. What a type cannot say, atropos_hpc.validate does.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional, get_origin

MISSING = "???"  # OmegaConf's marker of a value that has to be given


@dataclass
class LoraConf:
    rank: int = 0
    alpha: int = 16
    targets: List[str] = field(default_factory=list)


@dataclass
class ModelConf:
    path: Optional[str] = None
    make: Optional[str] = None
    make_options: Dict[str, Any] = field(default_factory=dict)
    max_length: int = 2048
    dtype: str = "bfloat16"
    attention: str = "sdpa"
    trust_remote_code: bool = False
    lora: LoraConf = field(default_factory=LoraConf)


@dataclass
class EnvironmentConf:
    target: str = MISSING
    config: Dict[str, Any] = field(default_factory=dict)
    group_size: int = 8
    workers: int = 1
    concurrency: int = 32
    request_timeout_s: float = 600.0
    metric: str = "eval/percent_correct"
    weight: float = 1.0
    min_batch_allocation: float = 0.0


@dataclass
class CorrectionConf:
    weights: str = "none"
    threshold: str = "2.0"
    rejection: str = "none"
    rejection_threshold: str = "none"


@dataclass
class AlgorithmConf:
    advantage: str = "grpo"
    normalize_by_std: bool = True
    loss: str = "vanilla"
    loss_options: Dict[str, float] = field(default_factory=dict)
    clip_low: float = 0.2
    clip_high: float = 0.2
    clip_dual: float = 3.0
    aggregation: str = "token-mean"
    kl_coef: float = 0.001
    kl_estimator: str = "k3"
    kl_in: str = "loss"
    kl_target: Optional[float] = None
    kl_horizon: int = 10000
    entropy_coef: float = 0.0
    old_log_probs: str = "behaviour"
    correction: CorrectionConf = field(default_factory=CorrectionConf)
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
    keep_checkpoints_every: int = 0
    threads: Optional[int] = None
    fsdp_config: Dict[str, Any] = field(default_factory=dict)
    optim: Dict[str, Any] = field(default_factory=dict)
    deepspeed: Dict[str, Any] = field(default_factory=dict)


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
    sync: str = "full"
    anchor_every: int = 16
    keep: int = 2
    max_bytes: Optional[int] = None
    update_mode: str = "keep"
    poll_s: float = 0.5
    cache: str = "/dev/shm"


@dataclass
class TrajectoriesConf:
    server: str = "durable"
    max_body_bytes: int = 64 << 20
    segment_bytes: int = 256 << 20


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
    host: Optional[str] = None
    partition: Optional[str] = None
    account: Optional[str] = None
    qos: Optional[str] = None
    gpus: str = "--gpus-per-node={n}"
    container: str = "pyxis"
    setup: List[str] = field(default_factory=list)
    sbatch: Dict[str, Any] = field(default_factory=dict)
    shared: List[str] = field(default_factory=list)


@dataclass
class LaunchConf:
    allocation: str = "local"
    job_name: str = "atropos"
    minutes: int = 60
    signal_s: int = 180
    requeues: int = 3
    submit_rollout: bool = True
    wait: bool = False
    dry_run: bool = False
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
    cpus_per_task: int = 1
    gpus_per_node: int = 0
    gres: Optional[str] = None
    mem: Optional[str] = None
    partition: Optional[str] = None
    account: Optional[str] = None
    qos: Optional[str] = None
    constraint: Optional[str] = None
    sbatch: Dict[str, Any] = field(default_factory=dict)
    srun: List[str] = field(default_factory=list)
    python: Optional[str] = None
    container: Optional[str] = None
    setup: List[str] = field(default_factory=list)


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
    more_environments: Dict[str, EnvironmentConf] = field(default_factory=dict)
    algorithm: AlgorithmConf = field(default_factory=AlgorithmConf)
    trainer: TrainerConf = field(default_factory=TrainerConf)
    rollout: RolloutConf = field(default_factory=RolloutConf)
    staleness: StalenessConf = field(default_factory=StalenessConf)
    policy: PolicyConf = field(default_factory=PolicyConf)
    trajectories: TrajectoriesConf = field(default_factory=TrajectoriesConf)
    evaluation: EvaluationConf = field(default_factory=EvaluationConf)
    wandb: WandbConf = field(default_factory=WandbConf)
    tensorboard: bool = False
    cluster: ClusterConf = field(default_factory=ClusterConf)
    launch: LaunchConf = field(default_factory=LaunchConf)
    roles: RolesConf = field(default_factory=RolesConf)


def lookup(config: Any, key: str) -> Any:
    """The value of a dotted key."""
    for part in key.split("."):
        config = config[part] if isinstance(config, dict) else getattr(config, part)
    return config


def environments(config: Config) -> dict[str, EnvironmentConf]:
    """Map the dotted key of each environment of a run to its section; the main environment first."""
    more = config.more_environments
    return {
        "environment": config.environment,
        **{f"more_environments.{name}": more[name] for name in sorted(more)},
    }


def environment_name(key: str) -> str:
    """What the environment at that key is called in figures: the last part of its key."""
    return key.rpartition(".")[2]


def keys(config: Any = Config, prefix: str = "") -> Iterator[str]:
    """Every dotted key of the config, groups included."""
    for name, declared in config.__dataclass_fields__.items():
        yield f"{prefix}{name}"
        if hasattr(declared.type, "__dataclass_fields__"):
            yield from keys(declared.type, f"{prefix}{name}.")


def keys_beside(key: str) -> Iterator[str]:
    """All that a mistaken key may have meant: every dotted key, and those of the section that it was to be in, where a map holds it."""
    yield from keys()
    if key.startswith("more_environments."):
        yield from keys(EnvironmentConf, f"{key.rpartition('.')[0]}.")


def leaves(config: Any = Config, prefix: str = "") -> Iterator[str]:
    """Every dotted key that holds a value and not a group."""
    for name, declared in config.__dataclass_fields__.items():
        if hasattr(declared.type, "__dataclass_fields__"):
            yield from leaves(declared.type, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def open_sections(config: Any = Config, prefix: str = "") -> Iterator[str]:
    """The dotted keys below which any key may be added."""
    for name, declared in config.__dataclass_fields__.items():
        if get_origin(declared.type) is dict:
            yield f"{prefix}{name}"
        if hasattr(declared.type, "__dataclass_fields__"):
            yield from open_sections(declared.type, f"{prefix}{name}.")

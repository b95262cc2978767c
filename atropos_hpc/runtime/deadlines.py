"""Deadlines that grow with the work: tokens to generate, bytes to write.

The keys of the config say how long a wait may take for a small model and short answers. What a
large model or long answers take beyond that is added here, at rates that a loaded cluster reaches:
cluster.storage_gb_per_s, and ten tokens per second and request. A step of a server's engine, for
whose end every request to the engine waits, takes milliseconds on a GPU and up to minutes on a CPU.
"""

from atropos_hpc.config import Config, EnvironmentConf
from atropos_hpc.runtime.model_sizes import parameters_of
from atropos_hpc.runtime.sizing import stored_bytes

SHORT_ANSWER_S = 600.0  # that the config's timeouts allow for
SLOWEST_TOKEN_S = 0.1  # a busy server makes ten tokens per second and request or more
STEP_TOKENS = 2048  # that vLLM's engine computes at once on a CPU, per worker
SLOWEST_CPU = 10e9  # FLOP/s; 40e9 with two busy cores that have no bfloat16 instructions, measured
LOAD_SHARE = 0.4  # of the rate of writes: a server that reads while its node's cache is full
HINT = "if the filesystem is only slow, lower cluster.storage_gb_per_s"


def request_timeout_s(conf: EnvironmentConf, max_length: int) -> float:
    """Return the deadline of a generation: a fixed one would cut long answers off.

    >>> [request_timeout_s(EnvironmentConf(), length) for length in (2048, 32768)]
    [600.0, 3276.8]
    """
    if conf.request_timeout_s is not None:
        return conf.request_timeout_s
    return max(SHORT_ANSWER_S, SLOWEST_TOKEN_S * max_length)


def engine_step_s(config: Config) -> float:
    """Return how long one step of a server's engine may take on a CPU; 0 on a GPU."""
    if config.roles.rollout.gpus_per_node:
        return 0.0
    tokens = STEP_TOKENS * config.rollout.tensor_parallel
    return 2 * parameters_of(config) * tokens / SLOWEST_CPU


def batch_timeout_s(config: Config, base_s: float) -> float:
    """Return how long the learner waits for a batch, of which each answer may be long."""
    return base_s + max(0.0, SLOWEST_TOKEN_S * config.model.max_length - SHORT_ANSWER_S)


def write_timeout_s(config: Config, base_s: float) -> float:
    """Return how long a policy version or a checkpoint may take to write."""
    return base_s + max(stored_bytes(config)) / storage_rate(config)


def save_timeout_s(config: Config) -> float:
    """Return how long a learner that is asked to stop may take.

    A version and a checkpoint may be under way; then the last of each are written.
    """
    return config.launch.save_timeout_s + 2 * sum(stored_bytes(config)) / storage_rate(config)


def signal_s(config: Config) -> int:
    """Return how long before the time limit Slurm has to send its signal."""
    longer_s = save_timeout_s(config) - config.launch.save_timeout_s
    return config.launch.signal_s + round(longer_s)


def load_rate(config: Config) -> float:
    """Return the bytes/s at which the slowest server reads a version."""
    return LOAD_SHARE * storage_rate(config)


def storage_rate(config: Config) -> float:
    """Return the bytes/s at which all ranks together write at least."""
    return config.cluster.storage_gb_per_s * 1e9

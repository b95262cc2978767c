"""Deadlines that grow with the work: tokens to generate, bytes to write.

The keys of the config say how long a wait may take for a small model and short answers. What a
large model or long answers take beyond that is added here, at rates that a loaded cluster reaches.
"""

from atropos_hpc.config import Config, EnvironmentConf
from atropos_hpc.runtime.model_sizes import sizes_of
from atropos_hpc.runtime.sizing import stored_bytes

SHORT_ANSWER_S = 600.0  # that the config's timeouts allow for
SLOWEST_TOKEN_S = 0.1  # a busy server makes ten tokens per second and request or more
SLOWEST_WRITE = 0.25e9  # bytes/s of all ranks together, of a busy shared filesystem
SLOWEST_LOAD = 0.1e9  # bytes/s of a server that reads a version while its node's cache is full


def request_timeout_s(conf: EnvironmentConf, max_length: int) -> float:
    """Return the deadline of a generation: a fixed one would cut long answers off.

    >>> [request_timeout_s(EnvironmentConf(), length) for length in (2048, 32768)]
    [600.0, 3276.8]
    """
    if conf.request_timeout_s is not None:
        return conf.request_timeout_s
    return max(SHORT_ANSWER_S, SLOWEST_TOKEN_S * max_length)


def batch_timeout_s(config: Config, base_s: float) -> float:
    """Return how long the learner waits for a batch, of which each answer may be long."""
    return base_s + max(0.0, SLOWEST_TOKEN_S * config.model.max_length - SHORT_ANSWER_S)


def write_timeout_s(config: Config, base_s: float) -> float:
    """Return how long a policy version or a checkpoint may take to write."""
    return base_s + max(_stored(config)) / SLOWEST_WRITE


def save_timeout_s(config: Config) -> float:
    """Return how long a learner that is asked to stop may take.

    A version and a checkpoint may be under way; then the last of each are written.
    """
    return config.launch.save_timeout_s + 2 * sum(_stored(config)) / SLOWEST_WRITE


def signal_s(config: Config) -> int:
    """Return how long before the time limit Slurm has to send its signal."""
    longer_s = save_timeout_s(config) - config.launch.save_timeout_s
    return config.launch.signal_s + round(longer_s)


def load_timeout_s(bytes_: int, base_s: float) -> float:
    """Return how long a server may take to read a version of that size."""
    return base_s + bytes_ / SLOWEST_LOAD


def _stored(config: Config) -> tuple[int, int]:
    """Return the bytes of a version and of a checkpoint; 0 for a model that is not known."""
    model = sizes_of(config)
    return stored_bytes(config, model) if model is not None else (0, 0)

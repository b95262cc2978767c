"""The state of training that a checkpoint restores besides weights and optimizer."""

import json
import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

StateDict = dict[str, Any]  # nested, of tensors, as torch.distributed.checkpoint takes it


@dataclass
class TrainState:
    """`version` counts the optimizer steps behind the weights: it is their policy version.

    `kl_coef` is the present KL coefficient. The third part is this process's random number
    generators, which are read and set in place.
    """

    version: int = 0
    kl_coef: float = 0.0

    def state_dict(self) -> StateDict:
        """Return the state as tensors, for torch.distributed.checkpoint."""
        return {
            "version": torch.tensor(self.version),
            "kl_coef": torch.tensor(self.kl_coef, dtype=torch.float64),
            "rng": {str(dist.get_rank()): _rng_state()},
        }

    def load_state_dict(self, state: StateDict) -> None:
        """Restore the state. Without "rng" (another number of ranks) generators are seeded anew."""
        self.version = int(state["version"])
        self.kl_coef = float(state["kl_coef"])
        if "rng" in state:
            _set_rng_state(state["rng"][str(dist.get_rank())])
        else:
            seed_generators(self.version, dist.get_rank(), dist.get_world_size())


def seed_generators(*entropy: int) -> None:
    """Seed the generators of Python, numpy and torch."""
    seed = int(np.random.SeedSequence(entropy).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _rng_state() -> torch.Tensor:
    """Return the generators' state as JSON in a uint8 tensor, which is safe to read."""
    kind, keys, position, has_gauss, cached = np.random.get_state()
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    state = {
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
        "cuda": None if cuda is None else cuda.numpy().tobytes().hex(),
        "python": random.getstate(),
        "numpy": [kind, np.asarray(keys).tolist(), position, has_gauss, cached],
    }
    return torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)


def _set_rng_state(stored: torch.Tensor) -> None:
    def tensor(text: str) -> torch.Tensor:
        return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)

    state = json.loads(stored.numpy().tobytes())
    torch.set_rng_state(tensor(state["torch"]))
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensor(state["cuda"]))
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    np.random.set_state(tuple(state["numpy"]))

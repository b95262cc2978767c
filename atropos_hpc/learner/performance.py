"""How well a step uses its devices: throughput, model FLOPs utilization and peak memory."""

import math
import re
import resource
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from atropos_hpc.observe.metrics import StepTimes
from atropos_hpc.runtime.model_sizes import EXPERTS

# Dense bfloat16 FLOP/s by the vendors' data sheets, by the device's name as torch reports it. Not
# listed: MIG instances, and devices whose data sheets state no dense rate.
PEAK_FLOPS = {
    r"NVIDIA A100[- ].*|NVIDIA A800[- ].*": 312e12,
    r"NVIDIA H100 80GB HBM3|NVIDIA H800": 989e12,
    r"NVIDIA H100 PCIe": 756e12,
    r"NVIDIA H200|NVIDIA GH200 .*": 989e12,
    r"NVIDIA B200": 2250e12,
    r"NVIDIA L40S": 362e12,
    r"NVIDIA A40": 149.7e12,
    r"AMD Instinct MI300X.*": 1307e12,
}


@dataclass(frozen=True)
class FlopRates:
    """FLOPs of the forward and backward passes of a dense decoder, without recomputation.

    A multiplication by a weight matrix of n numbers costs 2 n forward, 2 n for the gradient of its
    input and, unless the weights are frozen, 2 n for their own.
    """

    token: float  # per computed token: the matrices of all layers
    pair: float  # per query and key that attend to one another
    output: float  # per trained token: the output layer

    def of(self, computed: "Computed") -> float:
        tokens, pairs, trained = computed.tokens, computed.pairs, computed.trained
        return self.token * tokens + self.pair * pairs + self.output * trained


@dataclass(frozen=True)
class Computed:
    """What an update computed, over all ranks. Tokens of a shared prefix count once."""

    tokens: float = 0.0
    pairs: float = 0.0  # of a query and a key
    trained: float = 0.0


def flop_rates(module: Any, config: Any) -> FlopRates | None:
    """Count the matrices of a transformers model; None for a mixture of experts."""
    if any(getattr(config, name, None) for name in EXPERTS):
        return None
    output = module.get_output_embeddings()
    costs = {
        layer: layer.in_features * layer.out_features * (6 if layer.weight.requires_grad else 4)
        for layer in module.modules()
        if isinstance(layer, torch.nn.Linear)
    }
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    head = float(costs.pop(output, 0))
    return FlopRates(float(sum(costs.values())), 12.0 * config.num_hidden_layers * width, head)


def peak_flops(device: str, dtype: str) -> float | None:
    """Return the FLOP/s of a device, of a name as torch reports it; None if they are not known.

    >>> peak_flops("NVIDIA H100 80GB HBM3", "bfloat16")
    989000000000000.0
    >>> peak_flops("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "bfloat16")
    """
    if dtype != "bfloat16" or " MIG " in device:
        return None
    return next((rate for name, rate in PEAK_FLOPS.items() if re.fullmatch(name, device)), None)


def device_name() -> str | None:
    """Return this rank's device; None for the CPU."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def peak_memory() -> float:
    """Return the largest peak of all ranks since they started, bytes; host memory on a CPU.

    Collective; the default process group must accept host tensors.
    """
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    largest = torch.tensor(peak, dtype=torch.float64)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return float(largest)


@dataclass(frozen=True)
class Devices:
    """The trainer's devices: their number, their name (None: CPUs), and the computing dtype."""

    count: int
    name: str | None
    dtype: str

    def metrics(
        self, tokens: float, computed: Computed, rates: FlopRates | None, times: StepTimes
    ) -> Mapping[str, float]:
        """Return the perf/ metrics of a step of `tokens` tokens; NaN where one is not known.

        The throughput is that of the whole step. The MFU is that of the update: the FLOPs of its
        passes, divided by what the devices could have done in that time. A CPU has none.
        """
        throughput = tokens / times.step_s
        metrics = {
            "perf/throughput": throughput,
            "perf/throughput_per_gpu": throughput / self.count,
            "perf/computed_tokens": computed.tokens,
        }
        if self.name is not None:
            peak = peak_flops(self.name, self.dtype)
            known = peak is not None and rates is not None
            available = (peak or math.nan) * self.count * times.phases["update"]
            metrics["perf/mfu"] = rates.of(computed) / available if known and rates else math.nan
        return metrics

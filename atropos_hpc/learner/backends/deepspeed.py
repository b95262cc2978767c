"""The other backend: DeepSpeed's ZeRO 1, 2 and 3 under verl's forward pass and losses.

verl's engine prepares micro-batches, runs the model and puts the loss together, exactly as for FSDP; here DeepSpeed shards the model in
its place, reduces the gradients and steps. The frozen reference is verl's FSDP2 engine, as in the other backend.

State leaves and enters as with the other backend: under the parameters' names, sharded along the first dimension over all ranks. So a
checkpoint does not depend on the ZeRO stage nor on the number of ranks, and either backend reads the other's. (DeepSpeed's own
checkpoints need a conversion between ranks' files to that end, its "universal" form.)

ZeRO's full tensors are put together on every rank one parameter at a time, and only the rank's own shard of each is kept.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from atropos_hpc.config import ModelConf, TrainerConf
from atropos_hpc.learner.backends import cpu_platform
from atropos_hpc.learner.backends.engine import Engine
from atropos_hpc.learner.backends.verl import VerlBackend

# isort: split
import deepspeed
import deepspeed.ops
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)
from verl.utils.device import get_device_id

log = logging.getLogger(__name__)

MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's, by torch's names


class DeepSpeedBackend(VerlBackend):
    """See `Backend`. `trainer.deepspeed` is DeepSpeed's JSON; what the run itself decides comes on top of it."""

    def _build_policy(self, model: ModelConf, trainer: TrainerConf) -> Any:
        os.environ.setdefault(
            "LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")
        )  # DeepSpeed insists
        _without_shared_memory_kernel()
        engine = _Engine(**self._engine_options(model, trainer, trainable=True))
        engine.json = described(model, trainer)
        engine.initialize()
        self._mesh = init_device_mesh("cpu" if cpu_platform.ON_CPU else "cuda", (self.world,))
        return engine

    @property
    def module(self) -> torch.nn.Module:
        module: torch.nn.Module = self._policy.module.module
        return module

    def weights(self) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        for name, parameter in self._trained() if self._lora else self.module.named_parameters():
            found[name] = _sharded(_full(parameter, self._policy.stage), self._mesh)
        return found | dict(_persistent_buffers(self.module))

    def state_dict(self) -> dict[str, Any]:
        step = torch.tensor(float(self._adam_step()))
        weights: dict[str, Any] = {}
        moments: dict[str, Any] = {}
        for name, parameter in self._trained():
            weights[name] = _sharded(_master(parameter), self._mesh)
            moments[name] = {
                key: _sharded(safe_get_full_optimizer_state(parameter, key), self._mesh)
                for key in MOMENTS
            } | {"step": step}
        return {"model": weights, "optimizer": moments}

    def load_state_dict(self, state: dict[str, Any], step: int) -> None:
        taken = 0.0
        for name, parameter in self._trained():
            value = state["model"][name].full_tensor()
            safe_set_full_fp32_param(parameter, value)
            for key in MOMENTS:
                safe_set_full_optimizer_state(
                    parameter, state["optimizer"][name][key].full_tensor(), key
                )
            with (
                deepspeed.zero.GatheredParameters(
                    [parameter], modifier_rank=0, enabled=self._policy.stage == 3
                ),
                torch.no_grad(),
            ):
                parameter.data.copy_(value)
            taken = float(state["optimizer"][name]["step"])
        for moments in self._policy.optimizer.state.values():
            moments["step"].fill_(taken)
        self._set_schedule(step)

    def _trained(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        return (
            (name, parameter)
            for name, parameter in self.module.named_parameters()
            if parameter.requires_grad
        )

    def _adam_step(self) -> float:
        return float(next(iter(self._policy.optimizer.state.values()))["step"])


class _Engine(Engine):
    """verl's engine, with DeepSpeed's in place of FSDP. `json` must be set before `initialize`."""

    json: dict[str, Any]

    @property
    def stage(self) -> int:
        return int(self.json["zero_optimization"]["stage"])

    def _build_fsdp_module(self, module: torch.nn.Module) -> torch.nn.Module:
        self._install_loss_head(module)
        self._autocast_dtype = torch.bfloat16 if self.json["bf16"]["enabled"] else torch.float32
        # verl reads the weights on rank 0 alone, and leaves the others to FSDP
        module = (
            module.to_empty(device=get_device_id())
            if any(p.is_meta for p in module.parameters())
            else module.to(get_device_id())
        )
        for tensor in (*module.parameters(), *module.buffers()):
            dist.broadcast(tensor.data, src=0)
        return module

    def _build_optimizer(self, module: torch.nn.Module) -> Any:
        own = super()._build_optimizer(_Trained(module))
        self._zero, self._zero_optimizer, _, _ = deepspeed.initialize(
            model=module, optimizer=own, config=self.json, dist_init_required=False
        )
        # Adam's state, which ZeRO makes at the first step, is made now: a checkpoint may want to be loaded into it, or be made of it.
        partitions = (
            "fp32_partitioned_groups_flat" if self.stage == 3 else "single_partition_of_fp32_groups"
        )
        for partition in getattr(self._zero_optimizer, partitions):
            own.state[partition] = {
                "step": torch.zeros(()),
                **{key: torch.zeros_like(partition) for key in MOMENTS},
            }
        if self.stage < 3:
            self._zero_optimizer._lazy_init_hp_params_optimizer_state()
        return own

    def _build_model_optimizer(self) -> None:
        super()._build_model_optimizer()
        self.module = self._zero

    @contextmanager
    def _gradient_sync_context(self, *, is_last_micro_batch: bool) -> Iterator[None]:
        self._zero.set_gradient_accumulation_boundary(is_last_micro_batch)
        yield

    def forward_step(self, micro_batch: Any, loss_function: Any, forward_only: bool) -> Any:
        loss, details = super().forward_step(micro_batch, loss_function, forward_only)
        return (loss if forward_only else _ThroughZero(self._zero, loss)), details

    def optimizer_zero_grad(self) -> None:
        self._zero_optimizer.zero_grad()

    def optimizer_step(self) -> float:
        self._zero.step()
        norm = float(self._zero.get_global_grad_norm())
        if not norm < float("inf"):  # ZeRO has no look before it steps
            raise RuntimeError(
                f"the gradient norm is {norm}, and the weights are spoilt: to be continued from the last checkpoint"
            )
        return norm


class _ThroughZero:
    """A loss whose backward pass is DeepSpeed's, which scales nothing: verl has divided by the whole batch already."""

    def __init__(self, zero: Any, loss: torch.Tensor) -> None:
        self._zero, self._loss = zero, loss

    def backward(self) -> None:
        self._zero.backward(self._loss, scale_wrt_gas=False)


class _Trained:
    """A module's parameters without the frozen ones: ZeRO partitions what the optimizer has."""

    def __init__(self, module: torch.nn.Module) -> None:
        self._module = module

    def parameters(self) -> list[torch.nn.Parameter]:
        return [parameter for parameter in self._module.parameters() if parameter.requires_grad]


def described(model: ModelConf, trainer: TrainerConf) -> dict[str, Any]:
    """DeepSpeed's config: trainer.deepspeed, and what follows from the rest of the config."""
    zero = {
        "stage": 2,
        "overlap_comm": not cpu_platform.ON_CPU,
        **trainer.deepspeed.get("zero_optimization", {}),
    }
    if trainer.offload:
        host = {"device": "cpu", "pin_memory": not cpu_platform.ON_CPU}
        zero |= {
            "offload_optimizer": host,
            **({"offload_param": host} if zero["stage"] == 3 else {}),
        }
    return {
        **trainer.deepspeed,
        "zero_optimization": zero,
        "train_micro_batch_size_per_gpu": 1,  # of no account: micro-batches are cut by tokens, and their boundary is set by hand
        "gradient_accumulation_steps": 1,
        "gradient_clipping": trainer.grad_clip,
        "bf16": {"enabled": model.dtype == "bfloat16"},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's AdamW, whose state both backends know
        "steps_per_print": 2**31,
    }


def _without_shared_memory_kernel() -> None:
    """Keep DeepSpeed from compiling its CPU communication kernel at start: gloo does, and a build that is cut short leaves a lock."""
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _full(parameter: torch.nn.Parameter, stage: int) -> torch.Tensor:
    """The whole parameter, as computed with."""
    if stage < 3:
        return parameter.data
    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.data.clone()


def _master(parameter: torch.nn.Parameter) -> torch.Tensor:
    """The whole parameter, as the optimizer has it."""
    value: torch.Tensor = safe_get_full_fp32_param(parameter)
    return value


def _sharded(value: torch.Tensor, mesh: DeviceMesh) -> DTensor:
    """This rank's share of a tensor that every rank has whole: the rows that FSDP2 would give it."""
    pieces = value.detach().chunk(mesh.size(), dim=0)
    own = (
        pieces[mesh.get_local_rank()].clone()
        if mesh.get_local_rank() < len(pieces)
        else value.detach()[:0].clone()
    )
    return DTensor.from_local(
        own, mesh, [Shard(0)], run_check=False, shape=value.shape, stride=value.stride()
    )


def _persistent_buffers(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    return (
        (name, tensor) for name, tensor in module.state_dict().items() if name not in parameters
    )

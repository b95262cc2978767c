"""The other backend: DeepSpeed's ZeRO 1, 2 and 3 under verl's forward pass and losses.

verl's engine prepares micro-batches, runs the model and computes the loss exactly as for FSDP.
DeepSpeed replaces FSDP: it shards the model, reduces the gradients and steps. The frozen reference
is verl's FSDP2 engine, as in the other backend.

State dicts have the same form as the other backend's: under the parameters' names, sharded along
the first dimension over all ranks. So a checkpoint depends neither on the ZeRO stage nor on the
number of ranks, and each backend reads the other's. (DeepSpeed's own checkpoints would need a
conversion to its "universal" form.) ZeRO's full tensors are gathered on every rank one parameter at
a time, and only the rank's own shard of each is kept.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import deepspeed
import deepspeed.ops
import torch
import torch.distributed as dist
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from atropos_hpc.config import ModelConf, TrainerConf
from atropos_hpc.learner.backends.engine import Engine
from atropos_hpc.learner.backends.verl import VerlBackend, engine_options
from atropos_hpc.learner.backends.verl_api import ON_CPU, get_device_id
from atropos_hpc.learner.state import StateDict

Json = dict[str, Any]  # DeepSpeed's config

MOMENTS = ("exp_avg", "exp_avg_sq")  # torch's names of AdamW's state


class DeepSpeedBackend(VerlBackend):
    """See `Backend`. `trainer.deepspeed` is DeepSpeed's JSON."""

    def _build_policy(self, model: ModelConf, trainer: TrainerConf) -> Any:
        # DeepSpeed's device: the one that this process already uses, of those that it sees.
        os.environ["LOCAL_RANK"] = "0" if ON_CPU else str(get_device_id())
        # DeepSpeed would compile its CPU communication kernel at start-up, and an interrupted build
        # leaves a lock behind. gloo does the same work.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        engine = _Engine(**engine_options(model, trainer, trainable=True))
        engine.json = deepspeed_config(model, trainer)
        engine.initialize()
        self._mesh = init_device_mesh("cpu" if ON_CPU else "cuda", (self.world,))
        return engine

    @property
    def module(self) -> torch.nn.Module:
        module: torch.nn.Module = self._policy.module.module
        return module

    def weights(self) -> dict[str, torch.Tensor]:
        parameters = self._trained() if self._lora else self.module.named_parameters()
        weights: dict[str, torch.Tensor] = {
            name: _sharded(_full(parameter, self._policy.stage), self._mesh)
            for name, parameter in parameters
        }
        return weights | dict(_persistent_buffers(self.module))

    def state_dict(self) -> StateDict:
        step = torch.tensor(float(next(iter(self._policy.optimizer.state.values()))["step"]))
        weights: dict[str, DTensor] = {}
        moments: dict[str, dict[str, torch.Tensor]] = {}
        for name, parameter in self._trained():
            weights[name] = _sharded(safe_get_full_fp32_param(parameter), self._mesh)
            moments[name] = {
                key: _sharded(safe_get_full_optimizer_state(parameter, key), self._mesh)
                for key in MOMENTS
            }
            moments[name]["step"] = step
        return {"model": weights, "optimizer": moments}

    def load_state_dict(self, state: StateDict) -> None:
        steps = 0.0
        for name, parameter in self._trained():
            value, moments = state["model"][name].full_tensor(), state["optimizer"][name]
            safe_set_full_fp32_param(parameter, value)
            for key in MOMENTS:
                safe_set_full_optimizer_state(parameter, moments[key].full_tensor(), key)
            gathered = deepspeed.zero.GatheredParameters(
                [parameter], modifier_rank=0, enabled=self._policy.stage == 3
            )
            with gathered, torch.no_grad():
                parameter.data.copy_(value)
            steps = float(moments["step"])
        for partition in self._policy.optimizer.state.values():
            partition["step"].fill_(steps)

    def _trained(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        return ((n, p) for n, p in self.module.named_parameters() if p.requires_grad)


class _Engine(Engine):
    """verl's engine on DeepSpeed instead of FSDP. Set `json` before `initialize`."""

    json: Json

    @property
    def stage(self) -> int:
        return int(self.json["zero_optimization"]["stage"])

    def _build_fsdp_module(self, module: torch.nn.Module) -> torch.nn.Module:
        self._install_loss_head(module)
        self._autocast_dtype = torch.bfloat16 if self.json["bf16"]["enabled"] else torch.float32
        device, sharding = get_device_id(), None
        if self.stage == 3:  # parameter by parameter: the whole model may not fit on a device
            sharding = deepspeed.zero.Init(
                module=torch.nn.Module(), config_dict_or_path=self.json, dtype=self._autocast_dtype
            )
        for part in module.modules():
            own = list(part.parameters(recurse=False))
            if any(parameter.is_meta for parameter in own):
                # verl loads the weights on rank 0 only, and leaves the others to FSDP.
                part.to_empty(device=device, recurse=False)
                own = list(part.parameters(recurse=False))
            for parameter in own:
                parameter.data = parameter.data.to(device, self._autocast_dtype)
            if sharding is not None:
                sharding._convert_to_zero_parameters(own)  # broadcasts, too
        module = module.to(device)
        for tensor in (*(module.parameters() if sharding is None else ()), *module.buffers()):
            dist.broadcast(tensor.data, src=0)
        return module

    def _build_optimizer(self, module: torch.nn.Module) -> Any:
        optimizer = super()._build_optimizer(_Trained(module))
        self._zero, self._zero_optimizer, _, _ = deepspeed.initialize(
            model=module, optimizer=optimizer, config=self.json, dist_init_required=False
        )
        # ZeRO creates Adam's state in the first step. It is created here, because a checkpoint may
        # be loaded into it or made of it before.
        name = "single_partition_of_fp32_groups"
        if self.stage == 3:
            name = "fp32_partitioned_groups_flat"
        for partition in getattr(self._zero_optimizer, name):
            moments = {key: torch.zeros_like(partition) for key in MOMENTS}
            optimizer.state[partition] = {"step": torch.zeros(()), **moments}
        if self.stage < 3:
            self._zero_optimizer._lazy_init_hp_params_optimizer_state()
        return optimizer

    def _build_model_optimizer(self) -> None:
        super()._build_model_optimizer()
        self.module = self._zero

    @contextmanager
    def _gradient_sync_context(self, *, is_last_micro_batch: bool) -> Iterator[None]:
        self._zero.set_gradient_accumulation_boundary(is_last_micro_batch)
        yield

    def forward_step(self, micro_batch: Any, loss_function: Any, forward_only: bool) -> Any:
        loss, details = super().forward_step(micro_batch, loss_function, forward_only)
        return (loss if forward_only else _ZeroLoss(self._zero, loss)), details

    def optimizer_zero_grad(self) -> None:
        self._zero_optimizer.zero_grad()

    def optimizer_step(self) -> float:
        self._zero.step()  # skips the update, and reports infinity, if the norm is not finite
        return float(self._zero.get_global_grad_norm())


class _ZeroLoss:
    """A loss whose backward pass is DeepSpeed's, unscaled: verl divides by the whole batch."""

    def __init__(self, zero: Any, loss: torch.Tensor) -> None:
        self._zero, self._loss = zero, loss

    def backward(self) -> None:
        self._zero.backward(self._loss, scale_wrt_gas=False)


class _Trained:
    """A module without its frozen parameters: ZeRO partitions all that the optimizer has."""

    def __init__(self, module: torch.nn.Module) -> None:
        self._module = module

    def parameters(self) -> list[torch.nn.Parameter]:
        return [parameter for parameter in self._module.parameters() if parameter.requires_grad]


def deepspeed_config(model: ModelConf, trainer: TrainerConf) -> Json:
    """Return DeepSpeed's config: trainer.deepspeed, and what the rest of the config determines."""
    given = trainer.deepspeed.get("zero_optimization", {})
    zero = {"stage": 2, "overlap_comm": not ON_CPU, **given}
    if trainer.offload:
        host = {"device": "cpu", "pin_memory": not ON_CPU}
        zero["offload_optimizer"] = host
        if zero["stage"] == 3:
            zero["offload_param"] = host
    return {
        **trainer.deepspeed,
        "zero_optimization": zero,
        # Without effect: micro-batches are cut by tokens, and their boundaries are set explicitly.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": trainer.grad_clip,
        "bf16": {"enabled": model.dtype == "bfloat16"},
        "zero_allow_untested_optimizer": True,
        # torch's AdamW instead of DeepSpeed's: both backends know its state.
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
    }


def _full(parameter: torch.nn.Parameter, stage: int) -> torch.Tensor:
    """Return the whole parameter in the dtype of computation."""
    if stage < 3:
        return parameter.data
    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.data.clone()


def _sharded(value: torch.Tensor, mesh: DeviceMesh) -> DTensor:
    """Return this rank's shard of a tensor that every rank has: the rows as FSDP2 splits them."""
    shards, rank = value.detach().chunk(mesh.size(), dim=0), mesh.get_local_rank()
    own = shards[rank] if rank < len(shards) else value.detach()[:0]
    return DTensor.from_local(
        own.clone(), mesh, [Shard(0)], run_check=False, shape=value.shape, stride=value.stride()
    )


def _persistent_buffers(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    return ((name, t) for name, t in module.state_dict().items() if name not in parameters)

"""The default backend: verl's FSDP2 engine, driven as one process per device, without Ray.

Order of a step: log_probs if needed, reference_log_probs, update. The policy and the frozen
reference are two engines of the same model that compute in `model.dtype`, so the KL of the first
step is exactly zero. With a LoRA adapter, the reference is the same engine with the adapter
switched off, and only the adapter is saved.
"""

import logging
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from transformers.utils import logging as transformers_logging

from atropos_hpc.config import AlgorithmConf, ModelConf, TrainerConf
from atropos_hpc.learner import split_adamw
from atropos_hpc.learner.backends import packed_attention, verl_api
from atropos_hpc.learner.backends.engine import Engine
from atropos_hpc.learner.backends.loss_metrics import LossMetrics
from atropos_hpc.learner.backends.micro_batches import response_rows
from atropos_hpc.learner.backends.verl_api import ppo_loss, tensordict_utils
from atropos_hpc.learner.batch import Batch, from_jagged
from atropos_hpc.learner.objective import objective
from atropos_hpc.learner.performance import Computed, flop_rates
from atropos_hpc.learner.state import StateDict, seed_generators
from atropos_hpc.policy.snapshot import tied_names

log = logging.getLogger(__name__)

DTYPES = {"float32": "fp32", "bfloat16": "bf16"}
SPLIT_ADAMW = {
    "optimizer_impl": split_adamw.__name__,
    "optimizer": split_adamw.SplitAdamW.__name__,
}


class VerlBackend:
    """See `Backend`. Builds a second model as `reference`, unless an adapter is trained.

    Raises ValueError for a value of `model` or `algorithm` that verl would only refuse later.
    """

    def __init__(
        self,
        model: ModelConf,
        trainer: TrainerConf,
        algorithm: AlgorithmConf,
        seed: int,
        reference: bool = True,
    ) -> None:
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self._algorithm, self._max_length = algorithm, model.max_length
        seed_generators(seed, self.rank)
        verl_api.patch_log_probs()
        transformers_logging.disable_progress_bar()  # it only fills log files
        self._policy = self._build_policy(model, trainer)
        verl_api.report_gradient_norm_on_all_ranks(self._policy)
        self.data_rank = self._policy.get_data_parallel_rank()
        self.data_world = self._policy.get_data_parallel_size()
        self._policy.differentiate_entropy(algorithm.entropy_coef != 0)
        self._lora = model.lora.rank > 0
        self._reference = None
        if reference:
            self._reference = self._policy if self._lora else _engine(model, trainer, False)
        hf_config = self._policy.model_config.hf_config.get_text_config()
        self.vocab_size: int = hf_config.vocab_size
        self.flop_rates, self.computed = flop_rates(self.module, hf_config), Computed()
        self.ratio_counts: list[float] = []
        self._saved = StateDictOptions(ignore_frozen_params=self._lora, strict=not self._lora)

    @property
    def module(self) -> torch.nn.Module:
        module: torch.nn.Module = self._policy.module
        return module

    def weights(self) -> dict[str, torch.Tensor]:
        # state_dict's hook shards again what a forward without a backward pass left unsharded.
        weights: dict[str, torch.Tensor] = self.module.state_dict()
        return weights

    def on_micro_batch(self, call: Callable[[], None]) -> None:
        for engine in (self._policy, self._reference):
            if engine is not None:
                engine.on_micro_batch = call

    def log_probs(self, batch: Batch) -> torch.Tensor:
        return _log_probs(self._policy, batch)

    def reference_log_probs(self, batch: Batch) -> torch.Tensor | None:
        if self._reference is None:
            return None
        with self._policy.disable_adapter() if self._lora else nullcontext():
            return _log_probs(self._reference, batch)

    def update(self, batch: Batch, version: int, kl_coef: float | None = None) -> dict[str, float]:
        if batch.trained_sequences == 0:
            raise ValueError(
                "no sequence of this batch has a token to train: every label in the groups' masks"
                " is -100"
            )
        if batch.needs_log_probs:
            raise ValueError(
                "the batch lacks old log-probs: call log_probs and Batch.set_old_log_probs on"
                " every rank first"
            )
        tensordict_utils.assign_non_tensor(batch.tensors, calculate_entropy=True)
        # ppo_loss writes into its config, so every step gets its own.
        config = objective(self._algorithm, self._max_length, kl_coef)
        metrics = LossMetrics(partial(ppo_loss, config=config))
        lr = self._set_learning_rate(version)
        with self._policy.train_mode():
            output = self._policy.train_batch(batch.tensors, loss_function=metrics)
        grad_norm = float(output["metrics"]["grad_norm"])
        if not np.isfinite(grad_norm):
            log.error(
                "step %d: the gradient norm is %s; the weights are unchanged", version, grad_norm
            )
        found = metrics.over_ranks(self.world // self.data_world)
        self.computed, self.ratio_counts = metrics.computed, metrics.ratio_counts
        return {**found, "grad_norm": grad_norm, "lr": lr}

    def state_dict(self) -> StateDict:
        optimizer = self._policy.optimizer
        fresh = not optimizer.state
        weights, moments = get_state_dict(self.module, optimizer, options=self._saved)
        if fresh:  # get_state_dict took an empty step to create the state, and counted it
            for state in optimizer.state.values():
                if "step" in state:
                    state["step"].zero_()
        tied = tied_names(self.module)
        weights = {name: weight for name, weight in weights.items() if name not in tied}
        return {"model": weights, "optimizer": moments["state"]}

    def load_state_dict(self, state: StateDict) -> None:
        # Learning rate, weight decay and betas are the config's, which may have changed.
        optimizer, weights = self._policy.optimizer, state["model"]
        _, present = get_state_dict(self.module, optimizer, options=self._saved)
        tied = {
            name: weights[first]
            for name, first in tied_names(self.module).items()
            if first in weights  # not frozen
        }
        set_state_dict(
            self.module,
            optimizer,
            model_state_dict=weights | tied,
            optim_state_dict={
                "state": state["optimizer"],
                "param_groups": present["param_groups"],
            },
            options=self._saved,
        )

    def close(self) -> None:
        del self._policy, self._reference

    def _build_policy(self, model: ModelConf, trainer: TrainerConf) -> Any:
        return _engine(model, trainer, trainable=True)

    def _set_learning_rate(self, version: int) -> float:
        """Set the scheduled learning rate of the step from `version`, and return it.

        The scheduler's own counter is not used: the version decides.
        """
        scheduler, groups = self._policy.lr_scheduler, self._policy.optimizer.param_groups
        for group, base, factor in zip(
            groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True
        ):
            group["lr"] = base * factor(version)
        return float(groups[0]["lr"])


def engine_options(model: ModelConf, trainer: TrainerConf, trainable: bool) -> dict[str, Any]:
    """Translate the config into verl's configs of an engine.

    trainer.fsdp_config and trainer.optim are added on top; validate.py refuses conflicting keys.
    """
    compact = trainer.optimizer_state == "bfloat16"
    precision = {"param_dtype": DTYPES[model.dtype], "reduce_dtype": "fp32", "buffer_dtype": "fp32"}
    if compact and dist.get_world_size() == 1:  # nothing is summed over ranks
        precision["reduce_dtype"] = "bf16"
    engine = {
        "use_torch_compile": False,
        "entropy_from_logits_with_chunking": True,
        # verl's default keeps whole float32 gradients on every rank between micro-batches: 28 GiB
        # for 7B.
        "use_no_sync_for_gradient_accumulation": False,
        **trainer.fsdp_config,
    }
    engine["mixed_precision"] = precision | dict(engine.get("mixed_precision") or {})
    attention = packed_attention.register() if model.attention == "sdpa" else model.attention
    return dict(
        parameter_dtype=getattr(torch, model.dtype) if compact or not trainable else torch.float32,
        share_prefixes=trainer.share_prefixes,
        model_config=verl_api.HFModelConfig(
            path=str(model.path),
            load_tokenizer=False,
            trust_remote_code=model.trust_remote_code,
            use_remove_padding=True,
            enable_gradient_checkpointing=trainer.gradient_checkpointing is not False and trainable,
            override_config={"attn_implementation": attention},
            lora_rank=model.lora.rank if trainable else 0,
            lora_alpha=model.lora.alpha,
            target_modules=list(model.lora.targets) or "all-linear",
        ),
        engine_config=verl_api.FSDPEngineConfig(
            strategy="fsdp2",
            forward_only=not trainable,
            offload_policy=trainer.offload,
            use_remove_padding=True,
            model_dtype="fp32",
            **engine,
        ),
        optimizer_config=verl_api.FSDPOptimizerConfig(
            lr=trainer.learning_rate,
            weight_decay=trainer.weight_decay,
            clip_grad=trainer.grad_clip,
            lr_scheduler_type=trainer.schedule,
            lr_warmup_steps=trainer.warmup_steps,
            total_training_steps=trainer.steps,
            **(SPLIT_ADAMW if compact else {}),
            **trainer.optim,
        ),
        checkpoint_config=verl_api.CheckpointConfig(),
    )


def _engine(model: ModelConf, trainer: TrainerConf, trainable: bool) -> Any:
    engine = Engine(**engine_options(model, trainer, trainable))
    engine.initialize()
    return engine


def _log_probs(engine: Any, batch: Batch) -> torch.Tensor:
    tensordict_utils.assign_non_tensor(batch.tensors, calculate_entropy=False)
    with engine.eval_mode():
        output = engine.infer_batch(batch.tensors)
    log_probs = output["model_output"]["log_probs"]
    return from_jagged(
        log_probs.values()[response_rows(batch.tensors)].cpu(),
        batch.tensors["response_mask"].offsets(),
    )

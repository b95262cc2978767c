"""The default backend: verl's FSDP2 engine, driven as one process per device, without Ray.

Order of a step: (log_probs) -> reference_log_probs -> update. The policy and the frozen reference are two engines of the same model,
both with float32 weights, which are cast to `model.dtype` for computing; so the KL divergence of the first step is exactly zero. With a
LoRA adapter the reference is the same engine with the adapter switched off, and only the adapter is saved.
verl's engine interface may change between its versions: everything that touches it stands in this file and cpu_platform.py.
"""

import logging
import math
import random
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from atropos_hpc.config import AlgorithmConf, ModelConf, TrainerConf
from atropos_hpc.learner.backends import (  # before anything else of verl
    cpu_platform,
    packed_attention,
)
from atropos_hpc.learner.backends.engine import Engine
from atropos_hpc.learner.batch import Batch
from atropos_hpc.learner.objective import objective

# isort: split
from tensordict import TensorDict
from transformers.utils import logging as transformers_logging
from verl.trainer.config import CheckpointConfig
from verl.trainer.ppo.core_algos import kl_penalty
from verl.utils import tensordict_utils, torch_functional
from verl.utils.device import get_device_name
from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig
from verl.workers.engine.fsdp import transformer_impl
from verl.workers.utils.losses import ppo_loss
from verl.workers.utils.padding import response_from_nested

log = logging.getLogger(__name__)

DTYPES = {"float32": "fp32", "bfloat16": "bf16"}
LARGEST_LOG_RATIO = 20.0  # to which verl, too, limits ratios before it takes their exponential
ATTENTIONS = ("sdpa", "flash_attention_2", "eager")


class VerlBackend:
    """See `Backend`. Building it loads the model from `model.path`, twice with `reference` and without LoRA.

    Raises ValueError for a value of `model` or `algorithm` that verl would choke on later.
    """

    def __init__(
        self,
        model: ModelConf,
        trainer: TrainerConf,
        algorithm: AlgorithmConf,
        seed: int,
        reference: bool = True,
    ) -> None:
        for key, value, known in (
            ("dtype", model.dtype, DTYPES),
            ("attention", model.attention, ATTENTIONS),
        ):
            if value not in known:
                raise ValueError(f"model.{key}={value}: use one of {', '.join(known)}")
        if algorithm.kl_coef and not reference:
            raise ValueError(f"algorithm.kl_coef={algorithm.kl_coef} needs the frozen reference")
        objective(algorithm, model.max_length)  # raises now, not at the first step
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self._algorithm, self._max_length = algorithm, model.max_length
        mixed = int(np.random.SeedSequence([seed, self.rank]).generate_state(1)[0])
        random.seed(mixed)
        np.random.seed(mixed)
        torch.manual_seed(mixed)
        if not torch_functional.FLAH_ATTN_CROSS_ENTROPY_LOSS_AVAILABLE:
            vars(transformer_impl)["logprobs_from_logits"] = _log_probs_from_logits
        transformers_logging.disable_progress_bar()  # a log file is no terminal
        self._policy = self._build_policy(model, trainer)
        self._policy.is_mp_src_rank_with_outputs = lambda: (
            True
        )  # the gradient norm, too, on ranks that share sequences
        self.data_rank, self.data_world = (
            self._policy.get_data_parallel_rank(),
            self._policy.get_data_parallel_size(),
        )
        self._policy.differentiate_entropy(algorithm.entropy_coef != 0)
        self._lora = model.lora.rank > 0
        self._reference = None
        if reference:
            self._reference = (
                self._policy if self._lora else self._engine(model, trainer, trainable=False)
            )
        self.vocab_size: int = self._policy.model_config.hf_config.get_text_config().vocab_size

        self._saved = StateDictOptions(ignore_frozen_params=self._lora, strict=not self._lora)

    @property
    def step_count(self) -> int:
        return int(self._policy.lr_scheduler.last_epoch)

    @property
    def module(self) -> torch.nn.Module:
        module: torch.nn.Module = self._policy.module
        return module

    def weights(self) -> dict[str, torch.Tensor]:
        # state_dict's hook shards again what a forward without backward has left whole
        found: dict[str, torch.Tensor] = self.module.state_dict()
        return found

    def log_probs(self, batch: Batch) -> torch.Tensor:
        return _log_probs(self._policy, batch)

    def reference_log_probs(self, batch: Batch) -> torch.Tensor | None:
        if self._reference is None:
            return None
        with self._policy.disable_adapter() if self._lora else nullcontext():
            return _log_probs(self._reference, batch)

    def update(self, batch: Batch, kl_coef: float | None = None) -> dict[str, float]:
        if batch.trained_sequences == 0:
            raise ValueError(
                "no sequence of this batch has a token to train: every label in the groups' masks is -100"
            )
        if batch.needs_log_probs:
            raise ValueError(
                "the batch lacks old log-probs: call log_probs and Batch.set_old_log_probs on every rank first"
            )
        tensordict_utils.assign_non_tensor(batch.tensors, calculate_entropy=True)
        sums = _Sums()
        engine, lr = self._policy, self._policy.optimizer.param_groups[0]["lr"]
        config = objective(self._algorithm, self._max_length, kl_coef)  # ppo_loss writes into it
        with engine.train_mode():
            output = engine.train_batch(
                batch.tensors,
                loss_function=partial(_measured, partial(ppo_loss, config=config), sums),
            )
            engine.lr_scheduler_step()
        grad_norm = float(output["metrics"]["grad_norm"])
        if not np.isfinite(grad_norm):
            log.error(
                "step %d: the gradient norm is %s, so the weights were left as they were",
                self.step_count,
                grad_norm,
            )
        return {**sums.over_ranks(self.world), "grad_norm": grad_norm, "lr": lr}

    def state_dict(self) -> dict[str, Any]:
        optimizer = self._policy.optimizer
        fresh = not optimizer.state
        weights, moments = get_state_dict(self.module, optimizer, options=self._saved)
        if fresh:  # an empty step was taken to invent the optimizer's state, and left its mark in the live optimizer
            for state in optimizer.state.values():
                if "step" in state:
                    state["step"].zero_()
        return {"model": weights, "optimizer": moments["state"]}

    def load_state_dict(self, state: dict[str, Any], step: int) -> None:
        # Learning rate, weight decay and betas are the config's, not the checkpoint's: who changes them means it.
        _, present = get_state_dict(self.module, self._policy.optimizer, options=self._saved)
        moments = {"state": state["optimizer"], "param_groups": present["param_groups"]}
        optimizer = self._policy.optimizer
        set_state_dict(
            self.module,
            optimizer,
            model_state_dict=state["model"],
            optim_state_dict=moments,
            options=self._saved,
        )
        self._set_schedule(step)

    def _set_schedule(self, step: int) -> None:
        """Have the learning rate's schedule go on behind `step`."""
        scheduler = self._policy.lr_scheduler
        scheduler.last_epoch, scheduler._step_count = step, step + 1
        rates = [
            base * factor(step)
            for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
        ]
        for group, rate in zip(self._policy.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        scheduler._last_lr = rates

    def close(self) -> None:
        del self._policy, self._reference

    def _build_policy(self, model: ModelConf, trainer: TrainerConf) -> Any:
        return self._engine(model, trainer, trainable=True)

    def _engine(self, model: ModelConf, trainer: TrainerConf, trainable: bool) -> Any:
        engine = Engine(**self._engine_options(model, trainer, trainable))
        engine.initialize()
        return engine

    @staticmethod
    def _engine_options(model: ModelConf, trainer: TrainerConf, trainable: bool) -> dict[str, Any]:
        return _options(model, trainer, trainable)


def _options(model: ModelConf, trainer: TrainerConf, trainable: bool) -> dict[str, Any]:
    """verl's configs of an engine. trainer.fsdp_config and trainer.optim come on top, less what checks.py refuses there."""
    precision = {"param_dtype": DTYPES[model.dtype], "reduce_dtype": "fp32", "buffer_dtype": "fp32"}
    engine = {
        "use_torch_compile": False,
        "entropy_from_logits_with_chunking": True,
        # verl's default keeps whole float32 gradients on every rank between micro-batches: 28 GiB for 7B
        "use_no_sync_for_gradient_accumulation": False,
        **trainer.fsdp_config,
    }
    return dict(
        reference_dtype=getattr(torch, model.dtype),
        model_config=HFModelConfig(
            path=str(model.path),
            load_tokenizer=False,
            trust_remote_code=model.trust_remote_code,
            use_remove_padding=True,
            enable_gradient_checkpointing=trainer.gradient_checkpointing and trainable,
            override_config={
                "attn_implementation": packed_attention.register()
                if model.attention == "sdpa"
                else model.attention
            },
            lora_rank=model.lora.rank if trainable else 0,
            lora_alpha=model.lora.alpha,
            target_modules=list(model.lora.targets) or "all-linear",
        ),
        engine_config=FSDPEngineConfig(
            strategy="fsdp2",
            forward_only=not trainable,
            offload_policy=trainer.offload,
            use_remove_padding=True,
            model_dtype="fp32",
            **{**engine, "mixed_precision": precision | dict(engine.get("mixed_precision") or {})},
        ),
        optimizer_config=FSDPOptimizerConfig(
            lr=trainer.learning_rate,
            weight_decay=trainer.weight_decay,
            clip_grad=trainer.grad_clip,
            lr_scheduler_type=trainer.schedule,
            lr_warmup_steps=trainer.warmup_steps,
            total_training_steps=trainer.steps,
            **trainer.optim,
        ),
        checkpoint_config=CheckpointConfig(),
    )


def _log_probs(engine: Any, batch: Batch) -> torch.Tensor:
    tensordict_utils.assign_non_tensor(batch.tensors, calculate_entropy=False)
    with engine.eval_mode():
        output = engine.infer_batch(batch.tensors)
    return response_from_nested(
        output["model_output"]["log_probs"], batch.tensors["response_mask"]
    ).cpu()


def _log_probs_from_logits(
    logits: torch.Tensor, labels: torch.Tensor, inplace_backward: bool = True
) -> torch.Tensor:
    """What verl computes without flash-attention, for all tokens at once rather than token by token, and in float32 for bfloat16 too.

    logits [T, vocabulary], labels [T] -> float32 [T]. bfloat16 has 8 bits for a log-prob, and ratios are differences of those.
    """
    logits = logits.float()
    return logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)


class _Sums:
    """Sums of the step's metrics over this rank's micro-batches, to be divided once all ranks' are added."""

    def __init__(self) -> None:
        self.tokens = 0.0  # trained
        self.known = 0.0  # of them with a behaviour log-prob
        self.over_tokens: dict[str, float] = {}  # becomes a mean over trained tokens
        self.of_loss: dict[
            str, float
        ] = {}  # terms that verl has already divided by the global totals, times the number of ranks
        self.mismatch = [
            0.0,
            0.0,
            0.0,
        ]  # sums of |d|, d and exp(-2 d), where d = behaviour - own log-prob
        self.greatest = [0.0, -math.inf]  # of |d| and -d

    def add_over_tokens(self, name: str, value: float) -> None:
        self.over_tokens[name] = self.over_tokens.get(name, 0.0) + value

    def add_of_loss(self, name: str, value: float) -> None:
        self.of_loss[name] = self.of_loss.get(name, 0.0) + value

    def over_ranks(self, world: int) -> dict[str, float]:
        sums = [
            self.tokens,
            self.known,
            *self.mismatch,
            *self.over_tokens.values(),
            *self.of_loss.values(),
        ]
        total = torch.tensor(sums, dtype=torch.float64)
        greatest = torch.tensor(self.greatest, dtype=torch.float64)
        dist.all_reduce(total)
        dist.all_reduce(greatest, op=dist.ReduceOp.MAX)
        tokens, known, absolute, kl, squares, *rest = total.tolist()
        means = {
            name: value / tokens
            for name, value in zip(self.over_tokens, rest[: len(self.over_tokens)], strict=True)
        }
        losses = {
            name: value / world
            for name, value in zip(self.of_loss, rest[len(means) :], strict=True)
        }
        if not known:
            return {**losses, **means}
        compared = {
            "mismatch_mean": absolute / known,
            "mismatch_max": float(greatest[0]),
            "mismatch_kl": kl / known,
            "mismatch_chi2": squares / known - 1,
            "mismatch_ratio_max": math.exp(min(float(greatest[1]), LARGEST_LOG_RATIO)),
        }
        return {**losses, **means, **compared}


def _measured(
    loss_function: Callable[..., Any],
    sums: _Sums,
    model_output: dict[str, torch.Tensor],
    data: TensorDict,
    dp_group: Any = None,
) -> tuple[torch.Tensor, dict[str, Any]]:
    """`ppo_loss` of one micro-batch, whose metrics go to `sums`: verl's are means over micro-batches of unequal size."""
    loss, metrics = loss_function(model_output=model_output, data=data, dp_group=dp_group)
    with torch.no_grad():
        mask = data["response_mask"].values().bool()
        tokens = int(mask.sum())
        own = (
            response_from_nested(model_output["log_probs"], data["response_mask"])
            .values()[mask]
            .float()
        )
        entropy = response_from_nested(model_output["entropy"], data["response_mask"]).values()[
            mask
        ]
        sums.tokens += tokens
        sums.add_of_loss("loss", loss.item())
        sums.add_of_loss("pg_loss", metrics["actor/pg_loss"].aggregate())
        sums.add_of_loss("kl_loss", metrics["kl_loss"].aggregate() if "kl_loss" in metrics else 0.0)
        sums.add_over_tokens("entropy", entropy.sum().item())
        for name, theirs in (("clip_fraction", "actor/pg_clipfrac"), ("ppo_kl", "actor/ppo_kl")):
            if theirs in metrics:  # not every policy loss has them
                sums.add_over_tokens(name, metrics[theirs].aggregate() * tokens)
        if "ref_log_prob" in data:
            kl: torch.Tensor = kl_penalty(own, data["ref_log_prob"].values()[mask], "k3")  # type: ignore[arg-type]
            sums.add_over_tokens("kl_reference", kl.sum().item())
        difference = data["behaviour_log_probs"].values()[mask] - own
        difference = difference[difference.isfinite()].double()
        if len(difference):
            squares = (-2 * difference).clamp(max=2 * LARGEST_LOG_RATIO).exp()
            of_batch = [float(values.sum()) for values in (difference.abs(), difference, squares)]
            sums.known += len(difference)
            sums.mismatch = [
                one + other for one, other in zip(sums.mismatch, of_batch, strict=True)
            ]
            sums.greatest = [
                max(sums.greatest[0], float(difference.abs().max())),
                max(sums.greatest[1], float(-difference.min())),
            ]
    return loss, {}


if cpu_platform.ON_CPU and get_device_name() != "cpu":
    raise ImportError(
        "something imported verl before atropos_hpc.learner.backends.cpu_platform, and verl has settled on another device"
    )

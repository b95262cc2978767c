"""verl's FSDP2 engine with another loss head, reference dtype and offload policy.

- The output layer computes log-probs and entropies in chunks (`loss_head`) for the tokens that the
  loss needs; verl's own path holds float32 logits of every token of a micro-batch.
- A frozen reference, and a policy whose optimizer completes its weights (`split_adamw`), keep them
  in the computing dtype. Only parameters are cast: verl would cast buffers too, and rotary
  frequencies in bfloat16 are wrong by whole positions in long sequences.
- Sequences that begin alike are computed with that beginning once (`learner.prefixes`).
- Host memory is pinned only where there is an accelerator, and a frozen model stays on the device.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

from atropos_hpc.learner.backends import packed_attention
from atropos_hpc.learner.backends.micro_batches import (
    SHARE,
    Pack,
    collect_outputs,
    pack,
    padded_responses,
    prepare_micro_batches,
    response_rows,
)
from atropos_hpc.learner.backends.verl_api import (
    ON_CPU,
    FSDPEngineWithLMHead,
    TensorDict,
    offload_policy,
    patch_batches,
    tensordict_utils,
    ulysses_pad_and_slice_inputs,
)
from atropos_hpc.learner.batch import PREFIXES
from atropos_hpc.learner.loss_head import LossHead, Supports, Targets, transforms_logits

log = logging.getLogger(__name__)


class Engine(FSDPEngineWithLMHead):
    """A causal language model under FSDP2, whose weights have `parameter_dtype`.

    With `share_prefixes`, prefixes are shared as far as the model and its attention allow.
    """

    def __init__(
        self, *, parameter_dtype: torch.dtype, share_prefixes: bool, **options: Any
    ) -> None:
        super().__init__(**options)
        patch_batches(prepare_micro_batches, collect_outputs, padded_responses)
        self._parameter_dtype = parameter_dtype
        self._wants_shared_prefixes, self._share_prefixes = share_prefixes, False
        self._loss_head: LossHead | None = None
        self.on_micro_batch: Callable[[], None] = lambda: None

    def _build_module(self) -> torch.nn.Module:
        module: torch.nn.Module = super()._build_module()
        for parameter in module.parameters():
            parameter.data = parameter.data.to(self._parameter_dtype)
        return module

    def differentiate_entropy(self, wanted: bool) -> None:
        """Set whether the loss has an entropy term; else the entropy is a mere metric."""
        if self._loss_head is not None:
            self._loss_head.differentiable_entropy = wanted
        elif not wanted:  # do not keep its graph, which is as large as the logits
            whole: Any = self.compute_entropy_from_logits  # type: ignore[has-type]
            self.compute_entropy_from_logits = torch.no_grad()(whole)

    def _install_loss_head(self, module: torch.nn.Module) -> None:
        config = self.model_config.hf_config.get_text_config()
        if (name := transforms_logits(config)) is not None:
            log.warning(
                "this model transforms its logits (%s in its config), which the chunked loss head"
                " does not support: logits of whole micro-batches will be held in memory",
                name,
            )
            return
        model: Any = module
        self._loss_head = LossHead(model.get_output_embeddings(), config.vocab_size)
        supported = packed_attention.supports_prefixes(module) and not self.use_ulysses_sp
        self._share_prefixes = self._wants_shared_prefixes and supported

    def _build_fsdp_module(self, module: torch.nn.Module) -> torch.nn.Module:
        self._install_loss_head(module)

        def policy(original: Any) -> Any:
            if ON_CPU:
                return original(pin_memory=False)
            # verl would copy all weights of a frozen model to the device for each micro-batch:
            # half of the time of a reference pass.
            return original() if self.engine_config.offload_policy else None

        with offload_policy(policy):
            sharded: torch.nn.Module = super()._build_fsdp_module(module)
            return sharded

    def forward_backward_batch(
        self, data: TensorDict, loss_function: Any, forward_only: bool = False
    ) -> list[TensorDict]:
        packed = tensordict_utils.get_non_tensor_data(data, "use_remove_padding", default=True)
        tensordict_utils.assign_non_tensor(data, **{SHARE: self._share_prefixes and packed})
        found: list[TensorDict] = super().forward_backward_batch(data, loss_function, forward_only)
        return found

    def prepare_model_inputs(
        self, micro_batch: TensorDict
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        self.on_micro_batch()
        inputs, arguments = super().prepare_model_inputs(micro_batch)
        packed = tensordict_utils.get_non_tensor_data(
            micro_batch, "use_remove_padding", default=True
        )
        if "support_counts" in micro_batch and (self._loss_head is None or not packed):
            raise ValueError(
                "a group was sampled with top_p, top_k, min_p or a grammar, which only the chunked"
                " loss head can replay: this model or trainer.fsdp_config.use_remove_padding=false"
                " excludes it; sample from the whole vocabulary"
            )
        if self._loss_head is None:
            return inputs, arguments
        shared = None
        if packed and self._share_prefixes and bool(micro_batch[PREFIXES].any()):
            shared = pack(micro_batch)
            for name in ("input_ids", "position_ids"):
                inputs[name] = inputs[name][:, shared.computed]
        self._loss_head.targets = self._targets(micro_batch, arguments, shared) if packed else None
        return inputs, arguments

    def _targets(
        self, micro_batch: TensorDict, arguments: dict[str, Any], shared: Pack | None
    ) -> Targets:
        """The rows of this rank's part of the pack whose next token is a trained one."""
        trained = micro_batch["response_mask"].values().bool()
        rows = response_rows(micro_batch)[trained]
        # of each row, 1 + the index of its response token; 0: not wanted
        tokens = int(micro_batch["input_ids"].values().shape[0])
        wanted = rows.new_zeros(tokens + self._get_packed_pad_size(tokens))
        wanted[rows] = 1 + trained.nonzero()[:, 0]
        if self.use_ulysses_sp:
            wanted = ulysses_pad_and_slice_inputs(
                wanted[None], sp_size=self.ulysses_sequence_parallel_size
            )[0][0]
        rows = wanted.nonzero()[:, 0]
        labels, temperatures = (
            arguments[k] for k in ("input_ids_rmpad_rolled", "temperature_rmpad")
        )
        supports = (
            _supports(micro_batch, wanted[rows] - 1) if "support_counts" in micro_batch else None
        )
        return Targets(
            tokens=len(labels),  # padding included, which verl strips
            places=rows,
            rows=rows if shared is None else shared.rows[rows],
            labels=labels[rows],
            temperatures=temperatures[rows].float(),
            supports=supports,
        )

    def prepare_model_outputs(
        self,
        output: Any,
        output_args: dict[str, Any],
        micro_batch: TensorDict,
        logits_processor_func: Any,
    ) -> dict[str, torch.Tensor]:
        head = self._loss_head
        if head is None or head.targets is None:
            found: dict[str, torch.Tensor] = super().prepare_model_outputs(
                output, output_args, micro_batch, logits_processor_func
            )
            return found
        head.targets = None
        every = output.logits[0]
        offsets = micro_batch["input_ids"].offsets()
        columns = (
            self._gather_and_unpad_packed(column, output_args["pad_size"])
            for column in every.unbind(-1)
        )
        log_probs, entropy = (torch.nested.nested_tensor_from_jagged(c, offsets) for c in columns)
        return {"log_probs": log_probs, "entropy": entropy}


def _supports(micro_batch: TensorDict, response_tokens: torch.Tensor) -> Supports:
    """Return the supports of these response tokens, given as indices into flat responses."""
    counts, ids = micro_batch["support_counts"], micro_batch["support_ids"]
    flat = counts.values()
    # each sequence's ids have an entry in front
    sequence = torch.repeat_interleave(counts.offsets().diff())
    starts = flat.cumsum(0) - flat + sequence + 1
    return Supports(starts[response_tokens], flat[response_tokens], ids.values())

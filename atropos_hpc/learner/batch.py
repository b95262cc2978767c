"""Make the batch that the backend trains on from the groups that this rank has leased.

1. `sequences.flatten` (numpy): all sequences of the groups, flat, with loss mask, advantages,
   behaviour and reference log-probs.
2. `statistics`: numbers for the metrics and for the other ranks, combined by two small all-reduces.
   There is no other communication, except for advantage estimators that scale over the batch.
3. `jagged`: verl's tensors, flat, without padding to a maximum.

The response of a sequence is the span from its first to its last trained token. What is not trained
inside the span (other turns, tool output) is a zero in `response_mask`. Entry j of a
response-shaped tensor belongs to token start + j of the sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from atropos_hpc.config import AlgorithmConf
from atropos_hpc.contracts.group import Group
from atropos_hpc.contracts.support import Support
from atropos_hpc.learner.backends.verl_api import TensorDict, tensordict_utils
from atropos_hpc.learner.sequences import Flags, Sequences, flatten
from atropos_hpc.learner.statistics import Statistics, local_statistics, over_ranks
from atropos_hpc.observe.rollouts import Advantages

PREFIXES = "prefixes"  # of the sequences, [B] int64, see `learner.prefixes`
FILLER_TOKENS = 2  # length of a filler: the shortest sequence that has a response

from_jagged = torch.nested.nested_tensor_from_jagged


@dataclass(frozen=True)
class BatchSettings:
    """What `make_batch` needs to know besides the groups.

    `max_length` is model.max_length: sequences of that length count as truncated. `replicas` is the
    number of ranks that hold each group (more than one where ranks share sequences). `environments`
    names those whose rewards are reported separately.
    """

    algorithm: AlgorithmConf
    tokens_per_micro_batch: int
    max_length: int
    replicas: int = 1
    environments: tuple[str, ...] = ()


@dataclass
class Batch:
    """The input of a backend. Every rank has the same number of sequences, B.

    If `needs_log_probs` is set, some rank lacks old log-probs, and all ranks must call the
    backend's `log_probs` and `set_old_log_probs`; likewise for `needs_reference`.
    """

    tensors: TensorDict  # jagged, see `jagged`
    trained_sequences: int  # over all ranks, without fillers
    needs_log_probs: bool
    needs_reference: bool
    statistics: Statistics = field(repr=False)  # over all ranks
    given_reference: torch.Tensor = field(repr=False)  # jagged [B, response], NaN where not given
    included: Flags = field(repr=False)  # which of this rank's sequences are in the batch
    replicas: int = 1

    def set_old_log_probs(self, own: torch.Tensor) -> None:
        """Set the learner's own log-probs, jagged [B, response], where old ones are not known."""
        old = self.tensors["old_log_probs"]
        self.tensors["old_log_probs"] = _fill_unknown(old, own)
        self.needs_log_probs = False

    def set_reference_log_probs(self, reference: torch.Tensor | None) -> None:
        """Set the frozen model's log-probs, jagged [B, response], where none were given.

        None means that this run has no reference; the batch is then trained without one.
        """
        if reference is not None:
            self.tensors["ref_log_prob"] = _fill_unknown(self.given_reference, reference)


def make_batch(groups: Sequence[Group], settings: BatchSettings, version: int) -> Batch:
    """Make the batch of this rank's groups, of which there may be none. Collective.

    `version` is the learner's policy version. Raises ValueError, on all ranks, if any rank has a
    sequence longer than `tokens_per_micro_batch`, because it could never be trained.
    """
    replicas = settings.replicas
    sequences = flatten(groups, settings.algorithm, replicas=replicas)
    totals = over_ranks(
        local_statistics(groups, sequences, settings.max_length, version, settings.environments),
        replicas,
    )
    longest = int(totals.maxima["longest_trained"])
    if longest > settings.tokens_per_micro_batch:
        raise ValueError(
            f"a sequence of {longest} tokens does not fit into trainer.tokens_per_micro_batch="
            f"{settings.tokens_per_micro_batch}: raise it to at least model.max_length"
            f" ({settings.max_length})"
        )
    recompute = settings.algorithm.old_log_probs == "recompute"
    trained = int(totals.sums["trained_sequences"])
    fillers = max(1, int(totals.maxima["trained_sequences"])) - len(sequences.lengths)
    tensors = jagged(sequences, fillers, trained, settings.tokens_per_micro_batch, recompute)
    versions = [known for group in groups for known in group.policy_versions]
    same = np.array([known == (version, version) for known in versions], bool)
    same_version = np.append(same[sequences.included], np.zeros(fillers, bool))
    tensors["same_version"] = torch.from_numpy(same_version)
    given_reference = _response(sequences.reference, tensors["response_mask"].offsets())
    needs_reference = totals.sums["without_reference"] > 0
    if not needs_reference:
        tensors["ref_log_prob"] = given_reference
    return Batch(
        tensors=tensors,
        trained_sequences=trained,
        needs_log_probs=recompute or totals.sums["without_log_probs"] > 0,
        needs_reference=needs_reference,
        statistics=totals,
        given_reference=given_reference,
        included=sequences.included,
        replicas=replicas,
    )


def advantages_of(batch: Batch) -> Advantages:
    """Return the advantages that the batch is trained with, without those of fillers."""
    own, mask = (batch.tensors[name].cpu() for name in ("advantages", "response_mask"))
    lengths = own.offsets().diff().numpy()[: int(batch.included.sum())]
    tokens = int(lengths.sum())
    values, trained = own.values()[:tokens].numpy(), mask.values()[:tokens].bool().numpy()
    return Advantages(values, trained, lengths, batch.included)


def jagged(
    sequences: Sequences,
    fillers: int,
    trained_sequences: int,
    tokens_per_micro_batch: int,
    recompute: bool = False,
) -> TensorDict:
    """Return verl's batch of B = S + `fillers` sequences.

    verl needs equally many micro-batches on all ranks, none of them empty, and raises where a rank
    has fewer sequences than that. No rank needs more micro-batches than it has sequences, so it is
    enough that all have equally many sequences. A filler is two tokens with nothing to train.

    `trained_sequences` is the number over all ranks, by which sequence means divide. old_log_probs
    are the behaviour policy's, or with `recompute` NaN, to be filled in; behaviour_log_probs are
    kept for the metrics.
    """
    lengths = np.append(sequences.lengths, np.full(fillers, FILLER_TOKENS))
    starts = np.append(sequences.starts, np.full(fillers, FILLER_TOKENS - 1))
    filler_tokens = np.zeros(fillers * FILLER_TOKENS, np.int64)
    tokens = torch.from_numpy(np.append(sequences.tokens, filler_tokens))
    begins = np.cumsum(lengths) - lengths
    position = torch.from_numpy(np.arange(len(tokens)) - np.repeat(begins, lengths))
    # Tensors of the same shape have the same offsets: see `micro_batches.select`.
    whole, responses = _offsets(lengths), _offsets(lengths - starts)
    behaviour = _response(sequences.behaviour, responses)
    unknown = _response(np.full_like(sequences.behaviour, np.nan), responses)
    mask = _response(sequences.mask.astype(np.float32), responses)
    tensors: dict[str, torch.Tensor] = {
        "input_ids": from_jagged(tokens, whole),
        "position_ids": from_jagged(position, whole),
        "response_mask": mask,
        "loss_mask": mask,  # which verl sums, to count the trained tokens of all ranks
        "advantages": _response(sequences.advantages, responses),
        "old_log_probs": unknown if recompute else behaviour,
        "behaviour_log_probs": behaviour,
        PREFIXES: torch.from_numpy(np.append(sequences.prefixes, np.zeros(fillers, np.int64))),
    }
    options: dict[str, bool | int | float] = {
        "use_dynamic_bsz": True,
        "max_token_len_per_gpu": tokens_per_micro_batch,
        "use_remove_padding": True,
        "global_batch_size": trained_sequences,
        "pad_token_id": 0,
    }
    if (support := sequences.support) is not None:
        tensors |= _support_tensors(support, responses, fillers)
    if (sequences.temperatures == 1).all():
        options["temperature"] = 1.0  # spares verl a copy of the logits
    else:
        temperatures = np.append(sequences.temperatures, np.ones(fillers, np.float32))
        tensors["temperature"] = torch.from_numpy(temperatures)
    return tensordict_utils.get_tensordict(tensors, non_tensor_dict=options)


def _support_tensors(
    support: Support, responses: torch.Tensor, fillers: int
) -> dict[str, torch.Tensor]:
    """Return the support of B = S + `fillers` sequences, see `loss_head.Supports`.

    support_counts is response-shaped; support_ids, jagged [B, 1 + ids of the sequence], begins with
    a 0 in each sequence, because verl's indexing does not take empty rows.
    """
    counts = np.append(support.counts, np.zeros(fillers, np.int64))
    ids_of_rows = np.add.reduceat(counts, responses[:-1].numpy())  # no response is empty
    ids = np.insert(support.ids, np.cumsum(ids_of_rows) - ids_of_rows, 0)
    return {
        "support_counts": from_jagged(torch.from_numpy(counts), responses),
        "support_ids": from_jagged(torch.from_numpy(ids), _offsets(ids_of_rows + 1)),
    }


def _response(values: NDArray[Any], offsets: torch.Tensor) -> torch.Tensor:
    """Return [R] values as a jagged tensor, with a zero for the response token of each filler."""
    fillers = int(offsets[-1]) - len(values)
    filled = np.append(values, np.zeros(fillers, values.dtype))
    return from_jagged(torch.from_numpy(filled), offsets)


def _fill_unknown(known: Any, values: Any) -> torch.Tensor:
    """Return jagged `known`, with `values` in place of NaN."""
    flat = known.values()
    return from_jagged(torch.where(flat.isnan(), values.values().to(flat), flat), known.offsets())


def _offsets(lengths: NDArray[np.int64]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]))

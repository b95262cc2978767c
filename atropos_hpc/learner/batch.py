"""From this rank's leased groups to the batch that the backend trains on.

  1. `flatten` (numpy): all sequences of the groups behind one another, with loss mask, advantages, behaviour and reference log-probs.
  2. `statistics` (pure): what the metrics and the other ranks need to know about them, as numbers that add up over ranks.
  3. `over_ranks`: two small all-reduces, the only communication but for estimators that scale advantages over the batch.
  4. `jagged` (pure): verl's tensors, flat, without padding to a maximum.
`make_batch` does the four in order.

The loss mask is exactly Atropos': every token whose label is not -100 and no other. One exception is forced: no logit predicts the
first token of a sequence, so it is never trained; how many were meant to be is counted in `first_tokens`. A sequence is cut behind its
last trained token, since what follows cannot reach the loss of a causal model. Sequences without any trained token are left out; they
have still shaped the baseline of their group.

verl compares response-shaped tensors and reads only the lengths of `prompts` and `responses`. So here the response of a sequence
is the span from its first to its last trained token, and what is not trained inside the span (other turns, tool output) is a zero in
`response_mask`. Entry j of a response-shaped tensor belongs to the sequence's token start + j.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from atropos_hpc.config import AlgorithmConf
from atropos_hpc.learner.advantages import relative
from atropos_hpc.learner.backends import cpu_platform  # noqa: F401  before anything else of verl

# isort: split
from tensordict import TensorDict
from verl.utils import tensordict_utils

if TYPE_CHECKING:
    from atropos_hpc.contracts.group import Group

FILLER_TOKENS = 2  # the shortest sequence that has a response


@dataclass(frozen=True)
class Sequences:
    """S sequences with something to train, T tokens up to the last trained one of each, R of them from the first trained one on."""

    lengths: NDArray[np.int64]  # [S], adds up to T
    starts: NDArray[np.int64]  # [S], index of the first trained token, >= 1
    temperatures: NDArray[np.float32]  # [S], at which the sequence was sampled
    tokens: NDArray[np.int64]  # [T]
    mask: NDArray[np.bool_]  # [R], what is trained
    advantages: NDArray[np.float32]  # [R], zero where not trained
    behaviour: NDArray[
        np.float32
    ]  # [R], log-probs of the policy that sampled, nats; zero where not trained, NaN in unknown sequences
    reference: NDArray[
        np.float32
    ]  # [R], log-probs of a reference that the environment gave, likewise
    kept: NDArray[np.bool_]  # of all the groups' sequences, which these are
    first_tokens: int = 0  # that Atropos' mask trains, but nothing predicts
    still_groups: int = 0  # whose advantages are all zero


@dataclass(frozen=True)
class Statistics:
    """Numbers about a batch: `sums` add up over ranks, `maxima` are the greatest of any rank."""

    sums: dict[str, float]
    maxima: dict[str, float]

    def metrics(self) -> dict[str, float]:
        """For a person: means where `sums` has sums, without those of nothing. Lengths and staleness are of all sequences."""
        sums, sequences = self.sums, self.sums["sequences"] or math.nan
        mean = sums["reward"] / sequences
        metrics = {
            "groups": sums["groups"],
            "sequences": sums["sequences"],
            "trained_sequences": sums["trained_sequences"],
            "tokens": sums["tokens"],
            "trained_tokens": sums["trained_tokens"],
            "first_tokens": sums["first_tokens"],
            "reward_mean": mean,
            "reward_std": math.sqrt(max(0.0, sums["reward_squared"] / sequences - mean * mean)),
            "length_mean": sums["tokens"] / sequences,
            "length_max": self.maxima["length"],
            "response_length_mean": sums["trained_tokens"]
            / (sums["trained_sequences"] or math.nan),
            "truncated_fraction": sums["truncated"] / sequences,
            "zero_advantage_groups": sums["zero_advantage_groups"],
            "without_log_probs": sums["without_log_probs"],
            "staleness_mean": sums["staleness"] / (sums["versions_known"] or math.nan),
            "staleness_max": self.maxima["staleness"],
            "stale_sequences": sums["stale_sequences"],
        }
        for name in (key.removeprefix("reward/") for key in sums if key.startswith("reward/")):
            metrics[f"sequences/{name}"] = sums[f"sequences/{name}"]
            metrics[f"reward/{name}"] = sums[f"reward/{name}"] / (
                sums[f"sequences/{name}"] or math.nan
            )
        return {name: value for name, value in metrics.items() if not math.isnan(value)}


@dataclass
class Batch:
    """What a backend takes. The same number of sequences on every rank."""

    tensors: TensorDict  # jagged, see `jagged`
    trained_sequences: int  # over all ranks, fillers not counted
    needs_log_probs: bool  # some rank lacks old log-probs: all ranks must call the backend's log_probs and `set_old_log_probs`
    needs_reference: bool  # some sequence came without reference log-probs: likewise
    statistics: Statistics = field(repr=False)  # over all ranks
    given_reference: torch.Tensor = field(
        repr=False
    )  # jagged [B, response], NaN in sequences without
    kept: NDArray[np.bool_] = field(
        repr=False
    )  # of this rank's sequences, which have something to train
    copies: int = 1  # ranks that have the same sequences as this one, itself included

    def set_old_log_probs(self, own: torch.Tensor) -> None:
        """Take the learner's own log-probs, jagged [B, response], for the sequences that have no old ones yet."""
        old = self.tensors["old_log_probs"]
        values = torch.where(old.values().isnan(), own.values().to(old.values()), old.values())
        self.tensors["old_log_probs"] = torch.nested.nested_tensor_from_jagged(
            values, old.offsets()
        )
        self.needs_log_probs = False

    def set_reference_log_probs(self, reference: torch.Tensor | None) -> None:
        """Take the frozen model's log-probs, jagged [B, response], for the sequences that came without any.

        None: this run has no reference, and a batch that needs one goes without.
        """
        if reference is not None:
            given = self.given_reference
            values = torch.where(
                given.values().isnan(), reference.values().to(given.values()), given.values()
            )
            self.tensors["ref_log_prob"] = torch.nested.nested_tensor_from_jagged(
                values,
                given.offsets(),  # type: ignore[attr-defined]
            )


def make_batch(
    groups: Sequence[Group], algorithm: AlgorithmConf, tokens_per_micro_batch: int, max_length: int, version: int, copies: int = 1,
    environments: Sequence[str] = (),
) -> Batch:  # fmt: skip
    """The batch of this rank's groups (there may be none). Every rank must call it at the same step.

    `version` is the learner's policy version, for the staleness; `max_length` is model.max_length, which counts as truncated; `copies`:
    how many ranks have each group (more than one, where ranks share sequences); `environments`: names of which to tell apart the rewards.
    Raises ValueError, on all ranks, if any has a sequence longer than `tokens_per_micro_batch`, which could never be trained.
    """
    sequences = flatten(groups, algorithm, copies=copies)
    totals = over_ranks(statistics(groups, sequences, max_length, version, environments), copies)
    longest = int(totals.maxima["longest_trained"])
    if longest > tokens_per_micro_batch:
        raise ValueError(
            f"a sequence of {longest} tokens does not fit into trainer.tokens_per_micro_batch={tokens_per_micro_batch}: "
            f"raise it to at least model.max_length ({max_length})"
        )
    recompute = algorithm.old_log_probs == "recompute"
    fillers = max(1, int(totals.maxima["trained_sequences"])) - len(sequences.lengths)
    tensors = jagged(
        sequences, fillers, int(totals.sums["trained_sequences"]), tokens_per_micro_batch, recompute
    )
    of_response = _offsets(
        np.append(sequences.lengths - sequences.starts, np.ones(fillers, np.int64))
    )
    batch = Batch(
        tensors=tensors,
        trained_sequences=int(totals.sums["trained_sequences"]),
        needs_log_probs=recompute or totals.sums["without_log_probs"] > 0,
        needs_reference=totals.sums["without_reference"] > 0,
        statistics=totals,
        given_reference=_response(sequences.reference, fillers, of_response),
        kept=sequences.kept,
        copies=copies,
    )
    if not batch.needs_reference:
        batch.tensors["ref_log_prob"] = batch.given_reference
    return batch


def flatten(
    groups: Sequence[Group],
    algorithm: AlgorithmConf,
    penalties: NDArray[np.float64] | None = None,
    copies: int = 1,
) -> Sequences:
    """The groups' trained sequences, in order. Collective for some of `algorithm.advantage` (see `advantage.relative`).

    A group's own token-level advantages take the place of those from its scores. `set_advantage_to_zero`, of a sequence or of the
    group, silences the sequence in either case, and leaves the baseline as it was. `penalties`, one per sequence of the groups, are
    taken off the scores.
    """
    if not groups:
        _advantages(groups, algorithm, np.zeros(0), [], copies)
        whole, real, flags = np.zeros(0, np.int64), np.zeros(0, np.float32), np.zeros(0, bool)
        return Sequences(whole, whole, real, whole, flags, real, real, real, flags)
    lengths = np.concatenate([group.lengths for group in groups]).astype(np.int64)
    ends = np.cumsum(lengths)
    begins = ends - lengths
    trained = np.concatenate([group.trained for group in groups])
    first_tokens = int(trained[begins].sum())
    trained[begins] = False
    position = np.arange(ends[-1]) - np.repeat(begins, lengths)
    first = np.minimum.reduceat(np.where(trained, position, np.iinfo(np.int64).max), begins)
    stop = (
        np.maximum.reduceat(np.where(trained, position, -1), begins) + 1
    )  # 0 where nothing is trained
    kept = stop > 0
    in_sequence = position < np.repeat(stop, lengths)
    in_response = in_sequence & (position >= np.repeat(first, lengths))

    of_group = np.cumsum([len(group.lengths) for group in groups])[:-1]
    counts = np.split(np.add.reduceat(trained, begins, dtype=np.int64), of_group)
    advantages, still = _advantages(
        groups,
        algorithm,
        np.zeros(len(lengths)) if penalties is None else penalties,
        counts,
        copies,
    )

    def log_probs(name: str) -> NDArray[np.floating]:
        unknown = np.float32(np.nan)
        arrays = [(group, getattr(group, name)) for group in groups]
        values = np.concatenate(
            [
                np.full(len(group.tokens), unknown) if array is None else array
                for group, array in arrays
            ]
        )
        valid = np.isfinite(values) & (values <= 0)  # placeholders are positive
        known = np.logical_and.reduceat(valid | ~trained, begins)
        return np.where(np.repeat(known, lengths), np.where(trained, values, 0), np.nan)[
            in_response
        ]

    return Sequences(
        lengths=stop[kept],
        starts=first[kept],
        temperatures=_f32(np.concatenate([_temperatures(group) for group in groups])[kept]),
        tokens=np.concatenate([group.tokens for group in groups])[in_sequence].astype(np.int64),
        mask=trained[in_response],
        advantages=_f32(np.where(trained, advantages, 0)[in_response]),
        behaviour=_f32(log_probs("inference_logprobs")),
        reference=_f32(log_probs("ref_logprobs")),
        kept=kept,
        first_tokens=first_tokens,
        still_groups=still,
    )


def statistics(
    groups: Sequence[Group],
    sequences: Sequences,
    max_length: int,
    version: int,
    environments: Sequence[str] = (),
) -> Statistics:
    """Of this rank. `version` is the learner's; staleness is it minus the oldest version behind a sequence, where that is known."""
    lengths = (
        np.concatenate([group.lengths for group in groups]) if groups else np.zeros(0, np.uint32)
    )
    scores = np.concatenate([group.scores for group in groups]) if groups else np.zeros(0)
    staleness = np.array(
        [max(0, version - known[0]) for group in groups for known in group.policy_versions if known]
    )
    responses = np.cumsum(sequences.lengths - sequences.starts)
    ends = responses - 1  # the last token of a response is trained
    sums = {
        "groups": len(groups),
        "sequences": lengths.size,
        "trained_sequences": sequences.lengths.size,
        "tokens": lengths.sum(),
        "trained_tokens": sequences.mask.sum(),
        "first_tokens": sequences.first_tokens,
        "reward": scores.sum(),
        "reward_squared": np.square(scores).sum(),
        "truncated": (lengths >= max_length).sum(),
        "zero_advantage_groups": sequences.still_groups,
        "without_log_probs": np.isnan(sequences.behaviour[ends]).sum(),
        "without_reference": np.isnan(sequences.reference[ends]).sum(),
        "versions_known": staleness.size,
        "staleness": staleness.sum(),
        "stale_sequences": (staleness > 0).sum(),
    }
    for name in environments:  # the same on every rank, whatever groups it has
        own = [
            group.scores
            for group in groups
            if (group.generation_params or {}).get("environment") == name
        ]
        sums |= {
            f"sequences/{name}": sum(map(len, own)),
            f"reward/{name}": sum(float(scores.sum()) for scores in own),
        }
    maxima = {
        "length": lengths.max(initial=0),
        "longest_trained": sequences.lengths.max(initial=0),
        "trained_sequences": sequences.lengths.size,
        "staleness": staleness.max(initial=0),
    }
    return Statistics(
        {name: float(value) for name, value in sums.items()},
        {name: float(value) for name, value in maxima.items()},
    )


def over_ranks(local: Statistics, copies: int = 1) -> Statistics:
    """The same numbers over all ranks of the default process group, which must take host tensors (gloo, alone or beside nccl).

    `copies`: how many ranks have each group, and count it.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return local
    sums = torch.tensor(list(local.sums.values()), dtype=torch.float64)
    maxima = torch.tensor(list(local.maxima.values()), dtype=torch.float64)
    dist.all_reduce(sums)
    dist.all_reduce(maxima, op=dist.ReduceOp.MAX)
    sums /= copies
    return Statistics(
        dict(zip(local.sums, sums.tolist(), strict=True)),
        dict(zip(local.maxima, maxima.tolist(), strict=True)),
    )


def jagged(
    sequences: Sequences,
    fillers: int,
    trained_sequences: int,
    tokens_per_micro_batch: int,
    recompute: bool = False,
) -> TensorDict:
    """verl's batch of B = S + `fillers` sequences.

    verl wants equally many micro-batches on all ranks, none of them empty, and raises where a rank has fewer sequences than that. No
    rank ever needs more micro-batches than it has sequences, so it is enough that all have equally many: a filler is two tokens with
    nothing to train. `trained_sequences` is the number over all ranks, by which sequence means divide.

    old_log_probs are the behaviour policy's, or with `recompute` NaN, to be filled in; behaviour_log_probs are kept for the metrics.
    """
    lengths = np.append(sequences.lengths, np.full(fillers, FILLER_TOKENS))
    starts = np.append(sequences.starts, np.full(fillers, FILLER_TOKENS - 1))
    tokens = torch.from_numpy(
        np.append(sequences.tokens, np.zeros(fillers * FILLER_TOKENS, np.int64))
    )
    begins = np.cumsum(lengths) - lengths
    position = torch.from_numpy(np.arange(len(tokens)) - np.repeat(begins, lengths))
    in_prompt = position < torch.from_numpy(np.repeat(starts, lengths))
    of_sequence, of_prompt, of_response = (
        _offsets(lengths),
        _offsets(starts),
        _offsets(lengths - starts),
    )

    def response(values: NDArray[Any]) -> torch.Tensor:
        return _response(values, fillers, of_response)

    behaviour, unknown = (
        response(sequences.behaviour),
        response(np.full_like(sequences.behaviour, np.nan)),
    )
    tensors: dict[str, Any] = {
        "input_ids": torch.nested.nested_tensor_from_jagged(tokens, of_sequence),
        "position_ids": torch.nested.nested_tensor_from_jagged(position, of_sequence),
        "prompts": torch.nested.nested_tensor_from_jagged(tokens[in_prompt], of_prompt),
        "responses": torch.nested.nested_tensor_from_jagged(tokens[~in_prompt], of_response),
        "response_mask": response(_f32(sequences.mask)),
        "loss_mask": response(
            _f32(sequences.mask)
        ),  # verl only adds it up, to count the trained tokens of all ranks
        "advantages": response(sequences.advantages),
        "old_log_probs": unknown if recompute else behaviour,
        "behaviour_log_probs": behaviour,
    }
    options: dict[str, Any] = {
        "use_dynamic_bsz": True,
        "max_token_len_per_gpu": tokens_per_micro_batch,
        "use_remove_padding": True,
        "global_batch_size": trained_sequences,
        "pad_token_id": 0,
    }
    if (sequences.temperatures == 1).all():
        options["temperature"] = 1.0  # spares verl a copy of the logits
    else:
        tensors["temperature"] = torch.from_numpy(
            np.append(sequences.temperatures, np.ones(fillers, np.float32))
        )
    return tensordict_utils.get_tensordict(tensors, non_tensor_dict=options)


def _response(values: NDArray[Any], fillers: int, of_response: torch.Tensor) -> torch.Tensor:
    """[R] as a jagged tensor, with a zero for the one response token of each filler."""
    filled = np.append(values, np.zeros(fillers, values.dtype))
    return torch.nested.nested_tensor_from_jagged(torch.from_numpy(filled), of_response)


def _advantages(
    groups: Sequence[Group],
    algorithm: AlgorithmConf,
    penalties: NDArray[np.float64],
    trained: Sequence[NDArray[np.int64]],
    copies: int,
) -> tuple[NDArray[np.float64], int]:
    """Of every token, and the number of groups that have none but zeros. `trained`: tokens of each sequence of each group."""
    of_group = np.cumsum([len(group.scores) for group in groups])[:-1]
    rewards = [
        group.scores - penalty
        for group, penalty in zip(groups, np.split(penalties, of_group), strict=False)
    ]
    scored = [i for i, group in enumerate(groups) if group.advantages is None]
    scores, tokens = [rewards[i] for i in scored], [trained[i] for i in scored]
    estimated = relative(scores, tokens, algorithm.advantage, algorithm.normalize_by_std, copies)
    of_scores = dict(zip(scored, estimated, strict=True))
    rows, still = [np.zeros(0)], 0
    for i, group in enumerate(groups):
        row = (
            group.advantages.astype(np.float64)
            if group.advantages is not None
            else np.repeat(of_scores[i], group.lengths)
        )
        common = group.group_overrides or {}
        overrides = [
            {**common, **override} for override in group.overrides or [{}] * len(group.lengths)
        ]
        silent = [bool(override.get("set_advantage_to_zero")) for override in overrides]
        if any(silent):
            row = np.where(np.repeat(silent, group.lengths), 0, row)
        still += not row[group.trained].any()
        rows.append(row)
    return np.concatenate(rows), still


def _temperatures(group: Group) -> NDArray[np.float64]:
    """[G], by Atropos' order of precedence: the sequence's override, the group's, what it was generated with, 1.

    Greedy decoding (0) has no distribution to train; its sequences are treated as samples at 1.
    """
    common = {**(group.generation_params or {}), **(group.group_overrides or {})}.get("temperature")
    given = [
        override.get("temperature", common)
        for override in group.overrides or [{}] * len(group.lengths)
    ]
    return np.array(
        [float(value) if isinstance(value, (int, float)) and value > 0 else 1.0 for value in given]
    )


def _offsets(lengths: NDArray[np.int64]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]))


def _f32(values: NDArray[Any]) -> NDArray[np.float32]:
    return values.astype(np.float32)

"""Flatten groups into arrays of tokens without padding.

The loss mask is exactly Atropos': a token is trained if and only if its label is not -100. One
exception is forced: no logit predicts the first token of a sequence, so it is never trained.
`first_tokens` counts those that Atropos' mask would train.

A sequence is cut behind its last trained token, because later tokens cannot influence the loss of a
causal model. Sequences without a trained token are left out; they still count for the baseline of
their group.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from atropos_hpc.config import AlgorithmConf
from atropos_hpc.contracts.group import Group
from atropos_hpc.contracts.support import Support
from atropos_hpc.learner.advantages import batch_advantages
from atropos_hpc.learner.prefixes import shared_prefixes

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class Sequences:
    """S sequences with trained tokens.

    T counts their tokens up to the last trained one. R counts their response tokens: those from the
    first trained one on. Log-probs are in nats, zero where a token is not trained, and NaN in a
    sequence for which they are not known.
    """

    lengths: Ints  # [S], sums to T
    starts: Ints  # [S], index of the first trained token, >= 1
    prefixes: Ints  # [S], tokens shared with an earlier sequence of the group, see `prefixes`
    temperatures: Floats  # [S], at which the sequence was sampled
    tokens: Ints  # [T]
    mask: Flags  # [R], whether the token is trained
    advantages: Floats  # [R], zero where not trained
    behaviour: Floats  # [R], log-probs of the policy that sampled
    reference: Floats  # [R], log-probs of a reference that the environment gave
    included: Flags  # [all sequences of the groups], whether the sequence is one of the S
    support: Support | None = None  # of the R tokens; None: all were sampled from the vocabulary
    first_tokens: int = 0
    zero_advantage_groups: int = 0


def flatten(
    groups: Sequence[Group],
    algorithm: AlgorithmConf,
    penalties: NDArray[np.float64] | None = None,
    replicas: int = 1,
) -> Sequences:
    """Return the groups' trained sequences, in order.

    A group's own token-level advantages replace those from its scores. `set_advantage_to_zero`, of
    a sequence or of the group, sets a sequence's advantages to zero in either case and leaves the
    baseline unchanged. `penalties`, one per sequence of the groups, are subtracted from the scores.
    `replicas` is the number of ranks that hold each group.

    Collective for some of `algorithm.advantage`, see `advantages.relative`.
    """
    if not groups:
        _group_advantages([], algorithm, np.zeros(0), [], replicas)
        return _empty()
    lengths = np.concatenate([group.lengths for group in groups]).astype(np.int64)
    ends = np.cumsum(lengths)
    begins = ends - lengths
    trained = np.concatenate([group.trained for group in groups])
    first_tokens = int(trained[begins].sum())
    trained[begins] = False
    position = np.arange(ends[-1]) - np.repeat(begins, lengths)
    first = np.minimum.reduceat(np.where(trained, position, np.iinfo(np.int64).max), begins)
    # `stop` is 0 where nothing is trained.
    stop = np.maximum.reduceat(np.where(trained, position, -1), begins) + 1
    included = stop > 0
    in_sequence = position < np.repeat(stop, lengths)
    in_response = in_sequence & (position >= np.repeat(first, lengths))

    sizes = [len(group.lengths) for group in groups]
    counts = np.split(np.add.reduceat(trained, begins, dtype=np.int64), np.cumsum(sizes)[:-1])
    penalties = np.zeros(len(lengths)) if penalties is None else penalties
    advantages, zero_groups = _group_advantages(groups, algorithm, penalties, counts, replicas)

    def log_probs(name: str) -> Floats:
        return _f32(_known(_log_probs(groups, name), trained, begins, lengths)[in_response])

    tokens = np.concatenate([group.tokens for group in groups])[in_sequence].astype(np.int64)
    return Sequences(
        lengths=stop[included],
        starts=first[included],
        prefixes=shared_prefixes(
            tokens, stop[included], np.repeat(np.arange(len(groups)), sizes)[included]
        ),
        temperatures=_f32(np.concatenate([_temperatures(group) for group in groups])[included]),
        tokens=tokens,
        mask=trained[in_response],
        advantages=_f32(np.where(trained, advantages, 0)[in_response]),
        behaviour=log_probs("inference_logprobs"),
        reference=log_probs("ref_logprobs"),
        included=included,
        support=_support(groups, trained, in_response),
        first_tokens=first_tokens,
        zero_advantage_groups=zero_groups,
    )


def _empty() -> Sequences:
    ints, floats, flags = np.zeros(0, np.int64), np.zeros(0, np.float32), np.zeros(0, bool)
    return Sequences(ints, ints, ints, floats, ints, flags, floats, floats, floats, flags)


def _known(
    values: NDArray[np.floating], trained: Flags, begins: Ints, lengths: Ints
) -> NDArray[np.floating]:
    """Return log-probs with 0 where not trained, and NaN in sequences that lack any."""
    valid = np.isfinite(values) & (values <= 0)  # placeholders are positive
    known = np.logical_and.reduceat(valid | ~trained, begins)
    return np.where(np.repeat(known, lengths), np.where(trained, values, 0), np.nan)


def _log_probs(groups: Sequence[Group], name: str) -> NDArray[np.floating]:
    """Concatenate a field of all groups; NaN for groups without it."""
    arrays = [(group, getattr(group, name)) for group in groups]
    return np.concatenate(
        [
            np.full(len(group.tokens), np.float32(np.nan)) if array is None else array
            for group, array in arrays
        ]
    )


def _support(groups: Sequence[Group], trained: Flags, in_response: Flags) -> Support | None:
    """Return the support of the response tokens, unrestricted where a token is not trained."""
    if all(group.support is None for group in groups):
        return None
    whole = Support.concatenate(
        [group.support or Support.unrestricted(len(group.tokens)) for group in groups]
    )
    kept = np.repeat(trained, whole.counts)
    return Support(np.where(trained, whole.counts, 0), whole.ids[kept]).select(in_response)


def _group_advantages(
    groups: Sequence[Group],
    algorithm: AlgorithmConf,
    penalties: NDArray[np.float64],
    trained: Sequence[Ints],
    replicas: int,
) -> tuple[NDArray[np.float64], int]:
    """Return the advantage of every token, and the number of groups that have only zeros.

    `trained` counts the trained tokens of each sequence, per group.
    """
    group_ends = np.cumsum([len(group.scores) for group in groups])[:-1]
    rewards = [
        group.scores - penalty
        for group, penalty in zip(groups, np.split(penalties, group_ends), strict=False)
    ]
    scored = [i for i, group in enumerate(groups) if group.advantages is None]
    estimates = batch_advantages(
        [rewards[i] for i in scored],
        [trained[i] for i in scored],
        algorithm.advantage,
        algorithm.normalize_by_std,
        replicas,
    )
    from_scores = dict(zip(scored, estimates, strict=True))
    rows, zero_groups = [np.zeros(0)], 0
    for i, group in enumerate(groups):
        if group.advantages is not None:
            row = group.advantages.astype(np.float64)
        else:
            row = np.repeat(from_scores[i], group.lengths)
        silent = [bool(value) for value in _overridden(group, "set_advantage_to_zero")]
        if any(silent):
            row = np.where(np.repeat(silent, group.lengths), 0, row)
        zero_groups += not row[group.trained].any()
        rows.append(row)
    return np.concatenate(rows), zero_groups


def _overridden(group: Group, key: str, default: object = None) -> list[object]:
    """Return an override for each sequence: its own, else the group's, else the default."""
    common = (group.group_overrides or {}).get(key, default)
    return [override.get(key, common) for override in group.overrides or [{}] * len(group.lengths)]


def _temperatures(group: Group) -> NDArray[np.float64]:
    """Return the sampling temperature of each sequence, [G].

    Atropos' order of precedence: the sequence's override, the group's, the generation parameters,
    1. Greedy decoding (0) has no distribution to train; its sequences count as samples at 1.
    """
    generated = (group.generation_params or {}).get("temperature")
    values = _overridden(group, "temperature", generated)
    return np.array(
        [float(value) if isinstance(value, int | float) and value > 0 else 1.0 for value in values]
    )


def _f32(values: NDArray[np.floating]) -> Floats:
    return values.astype(np.float32)

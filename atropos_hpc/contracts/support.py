"""The support of sampled tokens: the token ids that truncated sampling left to choose from.

top_p, top_k, min_p and grammars set the probability of every other id to zero before a token is
sampled. The learner restricts its softmax to the same ids, so both policies are over one support.

Encoding of the support of N tokens, as LEB128 variable-length integers:

    the number of ids of each token, 0 for one that was sampled from the whole vocabulary | of each
    token's ids, ascending: the first, then the differences to the one before

That is 2 bytes per id with top_k=20 and a vocabulary of 49,152.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

_LONGEST = 5  # bytes of an integer below 2**32


@dataclass(frozen=True)
class Support:
    """The kept ids of N tokens, one token after the other. An id occurs once per token."""

    counts: Ints  # [N], 0: unrestricted
    ids: Ints  # [sum of counts], ascending within a token

    @classmethod
    def of_lists(cls, kept: Sequence[Iterable[int]]) -> "Support":
        """Make it of each token's ids, in any order."""
        rows = [np.unique(np.fromiter(ids, np.int64)) for ids in kept]
        return cls(np.array([row.size for row in rows], np.int64), _joined(rows))

    @classmethod
    def unrestricted(cls, tokens: int) -> "Support":
        """Make that of tokens sampled from the whole vocabulary."""
        return cls(np.zeros(tokens, np.int64), np.zeros(0, np.int64))

    @classmethod
    def concatenate(cls, parts: Sequence["Support"]) -> "Support":
        """Join the supports of successive tokens."""
        return cls(_joined([part.counts for part in parts]), _joined([part.ids for part in parts]))

    def select(self, tokens: NDArray[np.bool_]) -> "Support":
        return Support(self.counts[tokens], self.ids[np.repeat(tokens, self.counts)])

    def contains(self, tokens: NDArray[np.integer]) -> NDArray[np.bool_]:
        """Return, for each of the N tokens, whether its own id is in its support."""
        owners = np.repeat(np.arange(self.counts.size), self.counts)
        hits = np.bincount(owners[self.ids == tokens[owners]], minlength=self.counts.size)
        found: NDArray[np.bool_] = (self.counts == 0) | (hits == 1)
        return found

    def encode(self) -> bytes:
        """Encode, see the module's docstring."""
        deltas = np.diff(self.ids, prepend=0)
        begins = (np.cumsum(self.counts) - self.counts)[self.counts > 0]
        deltas[begins] = self.ids[begins]
        return _to_varints(np.concatenate([self.counts, deltas]))

    @classmethod
    def decode(cls, data: bytes, tokens: int) -> "Support":
        """Decode that of `tokens` tokens. Raises ValueError for anything that `encode` cannot make.

        It needs no more memory than a constant times the size of `data`.
        """
        numbers = _from_varints(data)
        counts, ids = numbers[:tokens], numbers[tokens:].copy()
        if counts.size != tokens or int(counts.sum()) != ids.size:
            raise ValueError(f"not the support of {tokens} tokens")
        begins = (np.cumsum(counts) - counts)[counts > 0]
        first = np.zeros(ids.size, bool)
        first[begins] = True
        if (ids[~first] == 0).any():
            raise ValueError("an id occurs twice in the support of a token")
        sums = np.cumsum(ids)
        ids = sums - np.repeat(sums[begins] - ids[begins], counts[counts > 0])
        return cls(counts, ids)


def _joined(parts: Sequence[Ints]) -> Ints:
    return np.concatenate([np.zeros(0, np.int64), *parts])


def _to_varints(numbers: Ints) -> bytes:
    """Encode integers in [0, 2**32) with 7 bits per byte, low bits first."""
    shifts = 7 * np.arange(_LONGEST)
    sevens = numbers[:, None] >> shifts
    used = (sevens > 0) | (shifts == 0)
    more = np.zeros_like(used)
    more[:, :-1] = used[:, 1:]
    return ((sevens & 127) | (more << 7)).astype(np.uint8)[used].tobytes()


def _from_varints(data: bytes) -> Ints:
    """Decode what `_to_varints` made. Raises ValueError."""
    octets = np.frombuffer(data, np.uint8)
    if not octets.size:
        return np.zeros(0, np.int64)
    ends = np.flatnonzero(octets < 128)
    begins = np.append(0, ends[:-1] + 1)
    if not ends.size or ends[-1] != octets.size - 1 or (ends - begins >= _LONGEST).any():
        raise ValueError("not a sequence of variable-length integers")
    position = np.arange(octets.size) - np.repeat(begins, ends - begins + 1)
    values: Ints = np.add.reduceat((octets & 127).astype(np.int64) << (7 * position), begins)
    return values

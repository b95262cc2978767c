"""Which server generated a sequence, and so holds its keys and values in its prefix cache."""

from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence

import xxhash

BLOCK = 16  # tokens; vLLM caches whole blocks of 16
CAPACITY = 1 << 16  # sequences


class PrefixHomes:
    """A bounded map from token sequences to servers, searched by prefix.

    A sequence is stored as one hash, that of its whole blocks. A conversation's next prompt begins
    with those blocks.
    """

    def __init__(self) -> None:
        self._homes: OrderedDict[int, str] = OrderedDict()

    def remember(self, tokens: Sequence[int], server: str) -> None:
        """Store where a sequence was generated."""
        *_, last = 0, *_block_hashes(tokens)
        self._homes[last] = server
        self._homes.move_to_end(last)
        if len(self._homes) > CAPACITY:
            self._homes.popitem(last=False)

    def find(self, tokens: Sequence[int]) -> str | None:
        """Return the server of the longest stored sequence that these tokens begin with."""
        found = None
        if self._homes:
            for digest in _block_hashes(tokens):
                found = self._homes.get(digest, found)
        return found


def _block_hashes(tokens: Sequence[int]) -> Iterator[int]:
    """Yield the hash of the first block, of the first two, and so on."""
    data = memoryview(array("i", tokens)).cast("B")
    size, hasher = BLOCK * data.nbytes // max(1, len(tokens)), xxhash.xxh3_64()
    for start in range(0, len(tokens) // BLOCK * size, size):
        hasher.update(data[start : start + size])
        yield hasher.intdigest()

"""Deltas are exact for any bytes, and small for what training changes."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from atropos_hpc.policy import delta
from atropos_hpc.policy.delta import BadDelta, Region, apply, changed_fraction, encode

WIDTHS = st.sampled_from([1, 2, 4, 8])


@st.composite
def steps(draw: st.DrawFn) -> tuple[NDArray[np.uint8], NDArray[np.uint8], list[Region]]:
    """Draw (old, new, regions).

    Regions have any width, may be empty and unaligned. Few, many, all or no elements change.
    """
    regions, at = [], draw(st.integers(0, 9))
    start = at
    for width, count in draw(st.lists(st.tuples(WIDTHS, st.integers(0, 3000)), max_size=5)):
        regions.append(Region(at, width * count, width))
        at += width * count
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    old = rng.integers(0, 256, at, dtype=np.uint8)
    new = old.copy()
    for run in regions:
        numbers = new[run.start : run.start + run.bytes].view(f"u{run.width}")
        changed = rng.random(len(numbers)) < draw(st.sampled_from([0, 0.001, 0.02, 0.3, 1]))
        if draw(st.booleans()):
            numbers[changed] += np.array(draw(st.sampled_from([1, 2**8 - 1])), numbers.dtype)
        else:
            numbers[changed] = rng.integers(0, 256, changed.sum() * run.width, dtype=np.uint8).view(
                numbers.dtype
            )
    return old, new, [Region(0, start, 1), *regions]


@settings(max_examples=150, deadline=None)
@given(step=steps())
def test_any_bytes_come_back(
    step: tuple[NDArray[np.uint8], NDArray[np.uint8], list[Region]],
) -> None:
    old, new, regions = step
    coded, target = encode(old, new, regions), old.copy()
    apply(coded, target)
    assert np.array_equal(target, new)
    assert 0 <= changed_fraction(old, new, regions) <= 1


BITS = {
    "bfloat16": (
        np.uint16,
        [0x0000, 0x8000, 0x7F80, 0xFF80, 0x7FC1, 0xFFFF, 0x0001, 0x7F7F],
    ),  # 0, -0, inf, -inf, NaN payloads, denormal
    "float32": (np.uint32, [0, 0x80000000, 0x7F800000, 0xFF800000, 0x7FC00001, 0xFFFFFFFF, 1]),
    "float64": (np.uint64, [0, 1 << 63, 0x7FF0 << 48, 0x7FF8000000000001, 2**64 - 1]),
    "uint8": (np.uint8, [0, 1, 127, 128, 255]),
}


@pytest.mark.parametrize("kind", BITS)
def test_every_special_value_becomes_every_other(kind: str) -> None:
    dtype, values = BITS[kind]
    numbers: NDArray[Any] = np.array(values, dtype)
    old, new = (
        np.repeat(numbers, len(numbers)).view(np.uint8),
        np.tile(numbers, len(numbers)).view(np.uint8),
    )
    target = old.copy()
    apply(encode(old, new, [Region(0, len(old), numbers.itemsize)]), target)
    assert np.array_equal(target, new)


@pytest.mark.parametrize(
    "gap", [0, 1, 253, 254, 255, 256, 509, 510, 511, delta.CHUNK - 1, delta.CHUNK, 3 * delta.CHUNK]
)
def test_any_gap_also_over_whole_chunks(gap: int) -> None:
    old = np.zeros(2 * (gap + 3), np.uint8)
    new = old.copy()
    new.view(np.uint16)[[gap, gap + 2]] = 7, 9
    coded = encode(old, new, [Region(0, len(old), 2)])
    apply(coded, old)
    assert np.array_equal(old, new)
    assert len(coded) < 400


def test_nothing_changed_is_next_to_nothing() -> None:
    same = np.arange(1 << 20, dtype=np.uint32).view(np.uint8)
    assert len(encode(same, same, [Region(0, len(same), 2)])) < 100
    empty = np.empty(0, np.uint8)
    apply(encode(empty, empty, []), empty)


def test_a_step_of_neighbouring_numbers_costs_half_of_their_share() -> None:
    """2.4 % of the 16-bit elements move by one: 7 bits per position, one or two per move."""
    rng = np.random.default_rng(0)
    old = rng.integers(0, 1 << 16, 1 << 21, dtype=np.uint16)
    new = old.copy()
    new[rng.random(len(old)) < 0.024] += np.uint16(1)
    coded = encode(old.view(np.uint8), new.view(np.uint8), [Region(0, 2 * len(old), 2)])
    assert len(coded) < 0.013 * 2 * len(old)
    assert changed_fraction(
        old.view(np.uint8), new.view(np.uint8), [Region(0, 2 * len(old), 2)]
    ) == pytest.approx(0.024, abs=0.003)


@settings(max_examples=150, deadline=None)
@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), cut=st.booleans())
def test_damage_is_refused_or_leaves_other_bytes_never_an_error_of_another_kind(
    where: float, bit: int, cut: bool
) -> None:
    """Not every flipped bit is noticed by the decoder; the hash of the result notices it."""
    rng = np.random.default_rng(1)
    old = rng.integers(0, 256, 40_000, dtype=np.uint8)
    new = old.copy()
    new[::37] += np.uint8(3)
    coded = bytearray(encode(old, new, [Region(0, 20_000, 2), Region(20_000, 20_000, 4)]))
    at = int(where * len(coded))
    if cut:
        del coded[at:]
    else:
        coded[at] ^= 1 << bit
    guard = np.full(50_000, 170, np.uint8)
    target = guard[5_000:45_000]
    target[:] = old
    try:
        apply(coded, target)
    except BadDelta:
        pass
    else:
        assert not cut
    assert (guard[:5_000] == 170).all() and (guard[45_000:] == 170).all()


def test_a_delta_of_something_else_is_refused() -> None:
    old = np.zeros(64, np.uint8)
    coded = encode(old, old, [Region(0, 64, 2)])
    with pytest.raises(BadDelta, match="delta for 64 bytes where a .* delta for 32"):
        apply(coded, np.zeros(32, np.uint8))
    with pytest.raises(ValueError, match="not a whole number of elements"):
        encode(old, old, [Region(0, 63, 2)])

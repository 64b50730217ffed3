"""Permutation: keyed permutations of any length, computed element by element."""

from __future__ import annotations

import numpy as np

ROUNDS = 8
"""Rounds of the Feistel network: enough for an even spread on the smallest blocks too."""
_CHUNK = 1 << 15
"""Elements that go through the tables at once, a power of two: they stay in a core's cache."""


def key(seed: int, epoch: int, part: np.ndarray | int) -> np.ndarray:
    """Key of one permutation, uint64 of the shape of `part`."""
    mixed = _mix(np.array([seed % (1 << 64)], dtype=np.uint64))
    mixed = _mix(mixed ^ np.array([epoch], dtype=np.uint64))
    return _mix(mixed ^ np.atleast_1d(np.asarray(part)).astype(np.uint64))


def permute(index: np.ndarray, size: np.ndarray | int, keys: np.ndarray) -> np.ndarray:
    """Where `index` goes in the keyed permutation of range(size), int64; element-wise over arrays.

    A Feistel network on the smallest square domain that holds `size`, walked until the value lies inside, so a
    permutation of any length costs no memory.
    """
    index, size, keys = np.broadcast_arrays(
        np.asarray(index).astype(np.uint64), np.asarray(size).astype(np.uint64), keys
    )
    half = _half_bits(size)
    value = _feistel(index, half, keys)
    while (outside := value >= size).any():
        value[outside] = _feistel(value[outside], half[outside], keys[outside])
    return value.astype(np.int64)


def permute_all(size: int, keys: np.ndarray) -> np.ndarray:
    """`permute(np.arange(size), size, keys)` for one key, int32 where it fits, several times faster.

    A round sees one half of the value only, so a table of the square root of the domain holds all it can answer. The
    whole domain is gone through once, 4 to 16 bytes an element of the permutation, and then walked by looking up.
    """
    half = int(_half_bits(np.array([size], np.uint64))[0])
    halves = np.arange(1 << half, dtype=np.uint64)
    mask = np.uint64((1 << half) - 1)
    tables = [(_mix(halves ^ _mix(keys + np.uint64(number))) & mask).astype(np.intp) for number in range(ROUNDS)]
    once = np.empty((1 << half, 1 << half), np.int32 if half < 16 else np.int64)
    rows = min(1 << half, max(1, _CHUNK >> half))
    scratch = np.empty((3, rows, 1 << half), np.intp)
    for first in range(0, 1 << half, rows):
        once[first : first + rows] = _by_tables(first, half, tables, scratch)
    permuted = once.reshape(-1)[:size].copy()
    outside = np.flatnonzero(permuted >= size)
    while len(outside):
        walked = once.take(permuted[outside])
        permuted[outside] = walked
        outside = outside[walked >= size]
    return permuted


def _half_bits(size: np.ndarray) -> np.ndarray:
    """Bits of one half of the smallest square domain that holds `size`, uint64."""
    bits = np.frexp((size - np.uint64(1)).astype(np.float64))[1]
    return np.maximum((bits + 1) // 2, 1).astype(np.uint64)


def _feistel(value: np.ndarray, half: np.ndarray, keys: np.ndarray) -> np.ndarray:
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = value >> half, value & mask
    for number in range(ROUNDS):
        left, right = right, left ^ (_mix(right ^ _mix(keys + np.uint64(number))) & mask)
    return (left << half) | right


def _by_tables(first: int, half: int, tables: list[np.ndarray], scratch: np.ndarray) -> np.ndarray:
    """`_feistel` of the values whose left half is `first` or one of those behind it, its rounds looked up.

    `scratch`, intp [3, rows, 2^half], is worked in, which saves taking memory anew; the answer [rows, 2^half] is in it.
    """
    left, right, drawn = scratch
    # The first round of a whole row of right halves is its table, read in order.
    np.bitwise_xor(np.arange(first, first + len(right))[:, None], tables[0], out=right)
    left[:] = np.arange(1 << half)
    for table in tables[1:]:
        table.take(right, out=drawn, mode="clip")  # raising would copy through a buffer
        left ^= drawn
        left, right = right, left
    left <<= half
    left |= right
    return left


def _mix(value: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele, Lea, Flood 2014): a bijection of 64 bits that spreads every bit."""
    value = value + np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))

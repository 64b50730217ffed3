"""Permutation: keyed permutations of any length, computed element by element."""

from __future__ import annotations

import numpy as np

ROUNDS = 8
"""Rounds of the Feistel network: enough for an even spread on the smallest blocks too."""


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
    bits = np.frexp((size - np.uint64(1)).astype(np.float64))[1]
    half = np.maximum((bits + 1) // 2, 1).astype(np.uint64)
    value = _feistel(index, half, keys)
    while (outside := value >= size).any():
        value[outside] = _feistel(value[outside], half[outside], keys[outside])
    return value.astype(np.int64)


def _feistel(value: np.ndarray, half: np.ndarray, keys: np.ndarray) -> np.ndarray:
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = value >> half, value & mask
    for number in range(ROUNDS):
        left, right = right, left ^ (_mix(right ^ _mix(keys + np.uint64(number))) & mask)
    return (left << half) | right


def _mix(value: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele, Lea, Flood 2014): a bijection of 64 bits that spreads every bit."""
    value = value + np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))

"""Numbers: sizes of memory as people write and read them, and what divides a batch."""

from __future__ import annotations

import math
import re

from mf_scale.errors import UserError

GIB = 2**30
_UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def parse_size(text: str, *, where: str) -> int:
    """Bytes of `141GiB`, `80GB` or `24576MiB`; UserError for anything else."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([A-Za-z]+)", text.strip())
    if found is None or found[2] not in _UNITS or not float(found[1]):
        raise UserError(
            f"{text!r} is no size of a memory",
            where=where,
            remedy=f"Write a number above 0 and a unit, as 141GiB, 80GB or 24576MiB ({', '.join(_UNITS)}).",
        )
    return round(float(found[1]) * _UNITS[found[2]])


def shown(size: int) -> str:
    """In GiB, small ones in MiB."""
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:.1f} MiB"


def divisors(number: int) -> list[int]:
    """All of them, ascending."""
    low = [size for size in range(1, math.isqrt(number) + 1) if number % size == 0]
    return sorted({*low, *(number // size for size in low)})

"""Numbers of very different sizes in few signs: bytes, seconds, shares."""

from __future__ import annotations

_SIZES = (("PiB", 2**50), ("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))
_TIMES = (("days", 86_400.0, 172_800.0), ("h", 3600.0, 7200.0), ("min", 60.0, 120.0), ("s", 1.0, 1.0))


def size(value: float) -> str:
    """Bytes in the largest unit that leaves one or more."""
    unit, of = next(((unit, of) for unit, of in _SIZES if value >= of), ("B", 1))
    return f"{number(value / of)} {unit}"


def seconds(value: float) -> str:
    """A time in the largest unit of which there are two."""
    if value == float("inf"):
        return "ever"
    unit, of = next(((unit, of) for unit, of, least in _TIMES if value >= least), ("ms", 0.001))
    return f"{number(value / of)} {unit}"


def share(value: float) -> str:
    """Of one, in percent."""
    return f"{number(100 * value)}%"


def number(value: float) -> str:
    """Three digits at least, whole numbers whole."""
    if value == int(value) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"

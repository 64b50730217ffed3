"""Problems: findings gathered by kind and told at once, with counts and a few names."""

from __future__ import annotations

from collections import defaultdict

from mf_scale.errors import UserError

NAMED = 3
"""Names given of each kind."""


class Problems:
    """Findings by kind."""

    def __init__(self) -> None:
        self.found: dict[str, list[str]] = defaultdict(list)

    def add(self, kind: str, name: str) -> None:
        self.found[kind].append(name)

    def __len__(self) -> int:
        return sum(map(len, self.found.values()))

    def lines(self) -> list[str]:
        """One line a kind: the kind, how often, the first names."""
        return [
            f"{kind}: {len(names)} ({', '.join(names[:NAMED])}{', …' if len(names) > NAMED else ''})"
            for kind, names in self.found.items()
        ]

    def refuse(self, what: str, *, where: str, remedy: str) -> None:
        """Raise UserError with all findings, if there are any."""
        if self.found:
            raise UserError(f"{what}: {'; '.join(self.lines())}", where=where, remedy=remedy)

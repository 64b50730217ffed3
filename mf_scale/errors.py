"""The exits of the program: a user's mistake, a guard, a stop on request."""

from __future__ import annotations

from typing import Any

EXIT_USER = 2
"""A user's mistake: one paragraph, never requeued."""
EXIT_GUARD = 3
"""A guard stopped the run (dead steps, bad data): never requeued."""
EXIT_FAULT = 75
"""A fault of the surroundings (network, storage): the launcher starts the run again from its last commit."""
EXIT_STOPPED = 85
"""Stopped on request with its state committed: the launcher starts it again."""


class UserError(Exception):
    """A mistake of the user: what is wrong, where, and what to do, in one paragraph. Exit code 2."""

    exit_code = EXIT_USER

    def __init__(self, what: str, *, where: str = "", remedy: str = "") -> None:
        self.what, self.where, self.remedy = what, where, remedy
        self.said_by_first_rank = False
        """True on the ranks that only heard of the mistake: rank 0 prints it, once."""
        super().__init__(what, where, remedy)

    def __reduce__(self) -> tuple[Any, ...]:
        """Travels between processes as it is: `where` and `remedy` are keywords, which pickling would pass by place."""
        return _remake, (type(self), self.what, self.where, self.remedy)

    def __str__(self) -> str:
        where = f" ({self.where})" if self.where else ""
        remedy = f" {self.remedy}" if self.remedy else ""
        return f"{self.what}{where}.{remedy}"


def _remake(kind: type[UserError], what: str, where: str, remedy: str) -> UserError:
    return kind(what, where=where, remedy=remedy)


class GuardError(UserError):
    """A guard ended the run because going on would spoil it (dead steps, too much bad data). Exit code 3."""

    exit_code = EXIT_GUARD


class FaultError(UserError):
    """The surroundings failed (network, storage), nobody's mistake: trying again may help. Exit code 75."""

    exit_code = EXIT_FAULT


PARAGRAPHS = (UserError, GuardError, FaultError)
"""Errors that are said in one paragraph, without a traceback."""


class StoppedOnRequest(Exception):  # noqa: N818 - it is an event, not an error
    """The run was asked to stop and its state is committed. Exit code 85."""

    exit_code = EXIT_STOPPED

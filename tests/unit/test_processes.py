"""How many ranks one machine is asked to start, and a stop that comes before they are there."""

from __future__ import annotations

import os

import pytest

from mf_scale.commands.arguments import RANKS_PER_CORE, wanted_ranks
from mf_scale.distributed.launch import launch
from mf_scale.errors import EXIT_STOPPED, UserError


def test_more_processes_than_a_machine_can_serve_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """99,999 were once begun, one by one, until the machine had no memory left."""
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert wanted_ranks(2 * RANKS_PER_CORE) == 2 * RANKS_PER_CORE
    with pytest.raises(UserError, match=r"99,999 processes are more.*2 cores and 0 GPUs") as raised:
        wanted_ranks(99_999)
    assert "at most 32" in raised.value.remedy
    assert wanted_ranks(None) >= 1


def test_a_stop_before_all_ranks_are_there_ends_it() -> None:
    assert launch(["--help"], 2, ["SIGTERM"]) == EXIT_STOPPED

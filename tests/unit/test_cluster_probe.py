"""One look at every node: what is refused before the ranks start, and how it is said."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import pytest

from mf_scale.cluster.probe import judge, node_report
from mf_scale.errors import FaultError, UserError
from mf_scale.fingerprint import code_digest

NODES = ("a1", "a2", "a3")


def answers(**changes: dict[str, Any] | None) -> list[str]:
    """Lines of sound nodes, with `changes` by node; None: it does not answer."""
    lines = ["slurmstepd: a line of somebody else"]
    for node in NODES:
        change = changes.get(node, {})
        place = {"node": node, "where": "/p", "sees": True, "python": platform.python_version()}
        sound = {**place, "time": 100.5, "code": "abc"}
        if change is not None:
            lines.append(json.dumps(change if "missing" in change or "failed" in change else {**sound, **change}))
    return lines


def verdict(lines: list[str], nodes: tuple[str, ...] = NODES, *, comes_back: bool = False) -> None:
    facts = {"began": 100.0, "ended": 101.0, "run": Path("/run"), "code": "abc", "python": "/p/python"}
    judge(lines, nodes, comes_back=comes_back, **facts)  # type: ignore[arg-type]


def test_sound_nodes_start() -> None:
    verdict(answers())
    verdict(answers(a2={"time": 105.9}, a3={"time": 95.1}))  # within the five seconds that clocks may differ


@pytest.mark.parametrize(
    ("changes", "kind", "said"),
    [
        ({"a2": {"node": "a2", "missing": True}}, UserError, "a2 cannot start /p/python: the virtual environment"),
        ({"a2": {"node": "a2", "failed": 1}}, FaultError, r"a2 cannot run the program with /p/python \(exit code 1\)"),
        ({"a2": None}, FaultError, "a2 did not answer"),
        ({"a1": None, "a3": None}, FaultError, "a1, a3 did not answer"),
        ({"a3": {"sees": False}}, UserError, "a3 does not see what the head node wrote into the run directory"),
        ({"a2": {"time": 107.0}}, UserError, "the clock of a2 is 6 s ahead of that of the head node"),
        ({"a2": {"time": 40.0}}, UserError, "the clock of a2 is 60 s behind that of the head node"),
        ({"a2": {"code": "other"}}, UserError, r"a2 has another version of the program .*\(other instead of abc\)"),
        ({"a2": {"python": "3.9"}}, UserError, r"a2 has another version of Python .*\(3.9 instead of"),
    ],
)
def test_what_is_wrong_with_a_node_is_said(changes: dict[str, Any], kind: type[Exception], said: str) -> None:
    with pytest.raises(kind, match=said):
        verdict(answers(**changes))


@pytest.mark.parametrize("change", [{"node": "a2", "missing": True}, {"sees": False}])
def test_what_a_start_saw_before_may_come_back(change: dict[str, Any]) -> None:
    """A node that has just booted may not have mounted everything yet: no mistake of the user's."""
    with pytest.raises(UserError) as first:
        verdict(answers(a2=change))
    assert first.value.exit_code == 2
    with pytest.raises(FaultError):
        verdict(answers(a2=change), comes_back=True)


def test_an_srun_that_refuses_says_so() -> None:
    with pytest.raises(FaultError, match="srun could not ask the nodes"):
        verdict(["srun: fatal: something"])


def test_many_nodes_are_not_all_named() -> None:
    nodes = tuple(f"n{number:02}" for number in range(9))
    lines = [json.dumps({"node": node, "missing": True}) for node in nodes]
    with pytest.raises(UserError, match="n00, n01, n02, n03 and 5 more nodes cannot start"):
        verdict(lines, nodes)


def test_hosts_with_other_names_are_counted() -> None:
    """Where hosts bear other names than SLURM's nodes only their number tells that one is missing."""
    lines = answers(a1={"node": "x1"}, a2={"node": "x2"}, a3=None)
    with pytest.raises(FaultError, match="1 of 3 nodes did not answer"):
        verdict(lines)


def test_a_node_tells_of_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURMD_NODENAME", "a7")
    (tmp_path / "seen").touch()
    report = node_report(tmp_path / "seen")
    assert (report["node"], report["sees"], report["code"]) == ("a7", True, code_digest())
    monkeypatch.setattr("mf_scale.cluster.probe._SHARED_SECONDS", 0.0)
    assert node_report(tmp_path / "not")["sees"] is False

"""What the doctor makes of GPUs: torch's and nvidia-smi's words, as facts."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from mf_scale.doctor.finding import OK, PROBLEM, WARNING, Finding
from mf_scale.doctor.gpus import driver_of, judge_gpus, parse_table, smi_facts

GIB = 2**30
SMI = """#!{python}
import sys
asked = sys.argv[1]
if "remapped" in asked and {old}:
    print('Field "remapped_rows.failure" is not a valid field to query.')
    sys.exit(2)
if asked.startswith("--query-gpu"):
    print("GPU-aaaa, NVIDIA H100 80GB HBM3, 575.57.08, 81559, 1200, 0" + ("" if {old} else ", No, Not Active"))
    more = "" if {old} else ", {remapped}, {heat}"
    print("GPU-bbbb, NVIDIA H100 80GB HBM3, 575.57.08, 81559, 30000, {errors}" + more)
else:
    print("GPU-bbbb, 4711, python, 29000")
"""


def fake_smi(folder: Path, monkeypatch: pytest.MonkeyPatch, **values: Any) -> None:
    program = folder / "nvidia-smi"
    given = {"old": False, "errors": "0", "remapped": "No", "heat": "Not Active", **values}
    program.write_text(SMI.format(python=sys.executable, **given))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def rank(number: int, uuid: str, *, host: str = "n1", smi: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    gpu = {"name": "H100", "uuid": uuid, "total": 80 * GIB, "free": 79 * GIB, "bf16": True, "product_seconds": 0.002}
    return {"rank": number, "host": host, "pid": number, "gpu": {**gpu, **more}, "gpu_files": 2, "smi": smi or {}}


def only(findings: list[Finding], level: str, said: str) -> Finding:
    assert [f.level for f in findings] == [level] and said in findings[0].text, findings
    return findings[0]


def test_what_nvidia_smi_tells_is_read_also_from_an_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_smi(tmp_path, monkeypatch, errors="3", remapped="Yes", heat="Active")
    facts = smi_facts()
    assert driver_of([{"smi": facts}]) == "575.57.08"
    found = judge_gpus([rank(0, "aaaa", smi=facts), rank(1, "bbbb")])
    assert [(f.level, f.fault) for f in found] == [(WARNING, False), (PROBLEM, True), (WARNING, False)]
    assert "had 3 memory errors" in found[0].text and "could not replace" in found[1].text and "slowed" in found[2].text
    only(judge_gpus([rank(0, "aaaa", smi=facts)]), OK, "1 x H100 (80 GiB)")  # the other one is not of this job
    fake_smi(tmp_path, monkeypatch, old=True, errors="[N/A]")
    old = smi_facts()
    assert old["gpus"][1]["ecc.errors.uncorrected.volatile.total"] is None
    only(judge_gpus([rank(0, "aaaa", smi=old), rank(1, "bbbb")]), OK, "2 x H100")


def test_a_tool_that_fails_or_is_missing_is_no_problem_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "nvidia-smi").write_text(f"#!{sys.executable}\nimport sys\nsys.exit('driver mismatch')\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    facts = smi_facts()
    assert facts == {"error": "driver mismatch"}
    only(judge_gpus([rank(0, "aaaa", smi=facts)]), WARNING, "nvidia-smi fails on n1: driver mismatch")
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    assert smi_facts() == {}
    assert parse_table("a, b\nwrong\n", ("uuid", "name")) == [{"uuid": "a", "name": "b"}]


def test_gpus_that_torch_cannot_use_are_a_problem_of_the_node_where_others_can() -> None:
    blind = {"rank": 1, "host": "n2", "gpu": {}, "gpu_files": 8, "cuda_error": "driver too old", "smi": {}}
    found = only(judge_gpus([blind]), PROBLEM, "n2 has GPUs that torch cannot use: driver too old")
    assert not found.fault
    assert judge_gpus([rank(0, "aaaa"), blind])[0].fault
    only(judge_gpus([{"rank": 0, "host": "n1", "gpu": {}, "gpu_files": 0, "smi": {}}]), OK, "CPUs")


def test_shared_busy_slow_and_unlike_gpus_are_named() -> None:
    only(judge_gpus([rank(0, "aaaa"), rank(1, "aaaa")]), PROBLEM, "ranks 0, 1 on n1 share one GPU")
    only(judge_gpus([rank(0, "aaaa"), rank(1, "aaaa", host="n2")]), OK, "2 x H100")
    smi = {"gpus": [], "processes": [{"uuid": "bbbb", "pid": "4711", "name": "python", "memory": "29000"}]}
    busy = judge_gpus([rank(0, "aaaa", smi=smi), rank(1, "bbbb", free=50 * GIB)])
    only(busy, WARNING, "rank 1 on n1 shares its GPU: 29 GiB are in use by pid 4711 python")
    slow = judge_gpus([rank(n, f"u{n}", product_seconds=0.002 if n != 2 else 0.005) for n in range(4)])
    only(slow, WARNING, "rank 2 on n1 multiplies 2.5 times slower")
    only(judge_gpus([rank(0, "a"), rank(1, "b", name="A100")]), WARNING, "the GPUs differ: 1 x H100 and 1 x A100")
    only(judge_gpus([rank(0, "a", bf16=False)], precision="bf16"), WARNING, "bf16")

"""Versions: what runs here, and whether it is the same on all ranks."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from mf_scale.doctor.finding import OK, PROBLEM, Finding, some
from mf_scale.errors import UserError
from mf_scale.fingerprint import code_digest, library_versions

CHECK = "versions"


def version_facts() -> dict[str, str]:
    """Versions of the program, its libraries, CUDA and NCCL as torch was built with them; "" where there is none."""
    import torch

    try:
        libraries = library_versions()
    except PackageNotFoundError as error:
        raise UserError(f"{error.name} is not installed", where=CHECK, remedy="Run `make setup`.") from error
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() else ""
    return {
        **libraries,
        "code": code_digest(),
        "torch": torch.__version__,
        "CUDA": torch.version.cuda or "",
        "NCCL": nccl,
    }


def optional_versions() -> dict[str, str]:
    """Versions of libraries that a run can do without; "" where one is not installed."""
    found = {}
    for name in ("xformers", "triton", "wandb"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = ""
    return found


def judge_versions(reports: Sequence[Mapping[str, Any]], driver: str = "") -> list[Finding]:
    """One line; a problem where ranks differ, which training would refuse. reports: {rank, host, versions}."""
    mine = reports[0]["versions"]
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for report in reports:
        kinds.setdefault(json.dumps(report["versions"], sort_keys=True), []).append(report)
    if len(kinds) > 1:
        common = max(kinds.values(), key=len)[0]["versions"]
        other = next(of for of in kinds.values() if of[0]["versions"] != common)
        differs = [name for name in common if other[0]["versions"].get(name) != common[name]]
        told = [
            f"{name} {other[0]['versions'].get(name) or 'none'} instead of {common[name] or 'none'}" for name in differs
        ]
        hosts = list(dict.fromkeys(str(report["host"]) for report in other))
        return [
            Finding(
                CHECK,
                PROBLEM,
                f"{some(hosts)} runs something else than the others: {some(told)}",
                "Start all ranks from one folder on a file system that all nodes see, with one virtual environment.",
                details={"differs": differs, "hosts": hosts},
            )
        ]
    shown = {
        "mf_scale": mine["mf_scale"],
        "python": mine["python"],
        "torch": mine["torch"],
        "deepspeed": mine["deepspeed"],
    }
    shown |= {"CUDA": mine["CUDA"] or "none", "driver": driver, "NCCL": mine["NCCL"]}
    text = " · ".join(f"{name} {number}" for name, number in shown.items() if number)
    return [Finding(CHECK, OK, text, details={**mine, **optional_versions(), "driver": driver})]

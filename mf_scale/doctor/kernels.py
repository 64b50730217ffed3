"""Kernels: what would serve attention, matching and mask loss here, by the functions that training asks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mf_scale.config.schema import Config
from mf_scale.doctor.finding import OK, WARNING, Finding, refused, some
from mf_scale.errors import UserError

if TYPE_CHECKING:
    import torch

CHECK = "kernels"


def kernel_facts(config: Config, device: torch.device) -> dict[str, Any]:
    """What one node would take: {"attention", "loss"} with the reason in brackets where the fast ones cannot run.

    Raises UserError for kernels that the configuration asks for and that cannot run. Compiles what is not in the cache.
    """
    import torch

    from mf_scale.kernels.choose import choose_kernels, fallback_reason
    from mf_scale.models.attention import resolve_kernel
    from mf_scale.models.build import serving_kernel
    from mf_scale.training.precision import autocast

    with autocast(device, config.train.precision):
        attention = serving_kernel(config.model.attention, device)
        dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else torch.float32
    facts = {"attention": attention, "attention_reason": "", "loss": "", "loss_reason": ""}
    if device.type == "cuda" and config.model.attention == "auto" and attention == "sdpa":
        facts["attention_reason"] = (
            "train.deterministic"
            if config.train.deterministic
            else _why(lambda: resolve_kernel("xformers", "cuda", dtype))
        )
    if config.model.kind == "mask_classification":
        asked = config.loss.kernels, device.type, torch.float32
        facts["loss"], facts["loss_reason"] = choose_kernels(*asked), fallback_reason(*asked) or ""
    return facts


def judge_kernels(reports: Sequence[Mapping[str, Any]]) -> list[Finding]:
    """reports: {host, kernels: kernel_facts or {"error": [what, where, remedy]}} of one rank a host."""
    looked = [report for report in reports if report.get("kernels")]
    failed = [report for report in looked if "error" in report["kernels"]]
    if failed:
        what, where, remedy = failed[0]["kernels"]["error"]
        hosts = some([report["host"] for report in failed])
        return [refused(CHECK, UserError(f"{what} [{hosts}]" if len(looked) > 1 else what, where=where, remedy=remedy))]
    if not looked:
        return []
    found = []
    for part, said in (("attention", "attention"), ("loss", "matching and mask loss")):
        by_name: dict[str, list[str]] = {}
        for report in looked:
            by_name.setdefault(str(report["kernels"][part]), []).append(str(report["host"]))
        if len(by_name) > 1:
            rare = min(by_name, key=lambda name: len(by_name[name]))
            why = next(r["kernels"][f"{part}_reason"] for r in looked if r["kernels"][part] == rare)
            what = f"{said}: {rare} on {some(by_name[rare])}, {some(sorted(set(by_name) - {rare}))} elsewhere"
            found.append(
                Finding(
                    CHECK,
                    WARNING,
                    what + (f" ({why})" if why else ""),
                    "Ranks with slower kernels hold the others up, and numbers differ in the last bits: the same "
                    "compiler and driver on all nodes.",
                )
            )
    slow = looked[0]["kernels"]["loss_reason"]
    if not found and slow:
        found.append(Finding(CHECK, WARNING, f"matching and mask loss: eager, which is slower: {slow}", _remedy(slow)))
    if found:
        return found
    facts = looked[0]["kernels"]
    parts = [f"attention {facts['attention']}" + _brackets(facts["attention_reason"])]
    parts += [f"matching and mask loss {facts['loss']}"] if facts["loss"] else []
    return [Finding(CHECK, OK, " · ".join(parts), details=dict(facts))]


def _why(ask: Any) -> str:
    try:
        ask()
    except UserError as error:
        return error.what
    return ""


def _brackets(reason: str) -> str:
    return f" ({reason})" if reason else ""


def _remedy(reason: str) -> str:
    if "native" in reason:
        return "Install a C++ compiler (g++) on the nodes; what it makes is kept in the user's cache."
    return "Install triton for this torch, or go on without."

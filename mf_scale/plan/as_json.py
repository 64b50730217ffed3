"""Plans as JSON: every number, and beside those that are not computed where they come from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from mf_scale.plan.planning import Plan

_SAID = "computed, unless `source` beside a number says that it was measured or given"


def as_json(plans: Sequence[Plan]) -> str:
    """All numbers of the plans, a list in their order."""
    return json.dumps([_as_dict(plan) for plan in plans], indent=1)


def _as_dict(plan: Plan) -> dict[str, Any]:
    config = plan.config
    return {
        "config": plan.file,
        "figures": _SAID,
        "kind": config.model.kind,
        "backbone": config.model.pixel_level.builder or config.model.backbone.name,
        "num_classes": config.model.num_classes,
        "image": list(config.data.crop),
        "parts": [asdict(part) for part in plan.parts],
        "parameters": plan.total.parameters,
        "trainable": plan.total.trainable,
        "flops": plan.total.flops,
        "ranks": plan.ranks,
        "nodes": plan.wanted.nodes,
        "batches": [asdict(batch) for batch in plan.batches],
        "refusal": plan.refusal,
        "zero_stage": config.zero.stage,
        "memory_bytes": {**asdict(plan.states.gpu), "total": plan.states.gpu.total},
        "host_bytes": {**asdict(plan.states.host), "total": plan.states.host.total},
        "stages": [
            {
                "stage": need.states.layout.stage,
                "offload_optimizer": need.states.layout.offload_optimizer,
                "offload_parameters": need.states.layout.offload_parameters,
                "gpu": asdict(need.states.gpu),
                "host": asdict(need.states.host),
                "update": need.states.update,
                "activations": asdict(need.activations),
                "total": need.total,
                "largest_micro_batch": need.largest,
            }
            for need in plan.needs
        ],
        "segments": plan.segments,
        "activations_measured": _measured(plan),
        "fit": _fit(plan),
        "steps": plan.duration.steps,
        "images": plan.duration.images,
        "dataset": {"images": plan.dataset.images, "source": plan.dataset.note},
        "duration": asdict(plan.duration),
        "data_path": asdict(plan.cores),
        "checkpoint": asdict(plan.checkpoints),
        "scale": {
            "figures": {f.name: {"value": f.value, "formula": f.symbols, "is": f.numbers} for f in plan.scale.figures},
            "checkpoint_files": [asdict(written) for written in plan.scale.written],
            "from": {name: asdict(known) for name, known in plan.scale.known.items()},
        },
        "recompute_stages": list(config.model.backbone.recompute_stages),
        "compile": config.model.compile,
    }


def _measured(plan: Plan) -> dict[str, Any] | None:
    if plan.measured is None:
        return None
    return {"peak": plan.measured.peak, "micro_batch": plan.measured.micro_batch, "source": plan.measured_on}


def _fit(plan: Plan) -> dict[str, Any] | None:
    found = plan.fit
    if found is None:
        return None
    chosen = found.choice
    return {
        "memory": found.memory,
        "usable": found.usable,
        "stage": chosen.states.layout.stage if chosen else None,
        "offload_optimizer": chosen.states.layout.offload_optimizer if chosen else None,
        "offload_parameters": chosen.states.layout.offload_parameters if chosen else None,
        "micro_batch": found.micro_batch,
        "accumulation": found.accumulation,
        "advice": list(found.advice),
    }

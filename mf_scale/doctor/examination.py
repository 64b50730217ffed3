"""All checks of the doctor: each rank looks around, all measure together, rank 0 judges and prints."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mf_scale.config.schema import TrackingConfig
from mf_scale.distributed import comm
from mf_scale.distributed.env import World
from mf_scale.doctor import page
from mf_scale.doctor.batch import judge_batch
from mf_scale.doctor.checkpoint import held_by, judge_checkpoint
from mf_scale.doctor.clocks import judge_clocks
from mf_scale.doctor.collectives import CHECK as COLLECTIVES
from mf_scale.doctor.collectives import judge_collectives, measure
from mf_scale.doctor.finding import OK, PROBLEM, WARNING, Finding, exit_code, looked, refused, size
from mf_scale.doctor.gpus import device_facts, driver_of, judge_gpus
from mf_scale.doctor.host import judge_hosts, needs_of
from mf_scale.doctor.kernels import judge_kernels
from mf_scale.doctor.labels import judge_labels, judge_vocabularies
from mf_scale.doctor.node import Node, host_name, look_around
from mf_scale.doctor.run_directory import judge_file_clock, judge_room, judge_writes
from mf_scale.doctor.service import judge_service
from mf_scale.doctor.shards import judge_shards
from mf_scale.doctor.sizes import ModelSize, model_size
from mf_scale.doctor.versions import judge_versions
from mf_scale.doctor.wanted import Wanted
from mf_scale.doctor.watch import Watch
from mf_scale.errors import UserError
from mf_scale.models.class_embeddings import class_rows
from mf_scale.rundir import RunDir

CONFIGURATION, MODEL, DOCTOR = "configuration", "model", "doctor"
ORDER = (
    CONFIGURATION, "versions", "gpus", "kernels", "open files", "shared memory", "host memory", "shards", "labels",
    "batch", MODEL, "checkpoint", "start", "run directory", "room", "file clock", COLLECTIVES, "clocks", "W&B", DOCTOR,
)  # fmt: skip
"""The lines of the page."""
_COLLECTIVE_SECONDS = 3.0
_PATIENCE = 0.8
"""Share of the time left for which the ranks wait for each other to come."""


def examine(wanted: Wanted, world: World) -> int:
    """Examine, all ranks together, and print on rank 0; the exit code (0 on the others). Ends the process where time
    runs out."""
    findings: list[Finding] = [refused(CONFIGURATION, wanted.broken)] if wanted.broken is not None else []
    node = Node()

    def overdue(stage: str) -> None:
        if world.first:
            told = [*findings, *_of_part(wanted, dict(node.facts)), _overdue(stage, wanted)]
            code = _tell(wanted, world, told, [host_name()], wanted.seconds)
        else:
            said = f"rank {world.rank} on {os.uname().nodename} was still at {stage} after {wanted.seconds:g} s"
            print(f"mf-scale doctor: {said}", file=sys.stderr, flush=True)
            code = 0
        os._exit(code)

    watch = Watch(wanted.seconds, overdue, began=wanted.began)
    look_around(node, wanted.config, world, watch)
    if world.first:
        _alone(wanted, world, node, watch, findings)
    reports, failure = _together(wanted, world, node, watch)
    watch.end()
    if not world.first:
        return 0
    findings += [failure] if failure is not None else []
    findings += _of_reports(wanted, reports)
    hosts = list(dict.fromkeys(str(report["host"]) for report in reports))
    return _tell(wanted, world, findings, hosts, watch.seconds)


def _alone(wanted: Wanted, world: World, node: Node, watch: Watch, found: list[Finding]) -> None:
    """Add what rank 0 can say without the others to `found`, check by check: it is said even if they never meet."""
    config = wanted.config
    with watch.at("W&B"):
        found += looked("W&B", lambda: judge_service(config.tracking if config else TrackingConfig()))
    if config is None:
        return
    training, validation, run = node.sources.training, node.sources.validation, RunDir(Path(config.run_dir))
    ranks = wanted.ranks or world.size
    with watch.at("the labels"):
        if training:
            found += looked("labels", lambda: judge_labels(config, training, validation))
        found += looked("batch", lambda: judge_batch(config, ranks, training))
    with watch.at("the model"):
        model, about = _model(wanted, node)
        found += about
    checkpoint = model.checkpoint(config) if model else 0
    node.facts["checkpoint"] = checkpoint
    with watch.at("the checkpoints"):
        found += looked("checkpoint", lambda: judge_checkpoint(config, run, ranks, training, model))
        held = held_by(run)
        node.facts["goes_on"] = held.checkpoints > 0
        facts = node.facts["directory"]
        found += looked("room", lambda: judge_room(facts, checkpoint, held.bytes, config, goes_on=held.checkpoints > 0))
    node.facts["trainable"] = model.trainable if model else 0


def _model(wanted: Wanted, node: Node) -> tuple[ModelSize | None, list[Finding]]:
    config = wanted.config
    assert config is not None
    known = node.sources.training or tuple(node.sources.opened)
    one = known[0].vocabulary if len({index.vocabulary.digest for index in known}) == 1 else None
    classes = config.model.num_classes if one is None else len(one)
    if classes is None:  # no source opens, or nobody says what their classes are together
        return None, []
    built: list[ModelSize] = []

    def build() -> list[Finding]:
        if one is not None:
            class_rows(config.model.class_embeddings, one)
        model = model_size(config, classes, Path(wanted.file), wanted.overrides)
        built.append(model)
        model.refuse_crop(config)
        total = sum(value.numel() for value in model.tensors.values())
        text = f"{total / 1e6:,.1f} M values, {model.trainable / 1e6:,.1f} M trained, {classes:,} classes; "
        text += f"a checkpoint has {size(model.checkpoint(config))}"
        return [Finding(MODEL, OK, text, details={"checkpoint_bytes": model.checkpoint(config)})]

    found = looked(MODEL, build)
    return (built[0] if built else None), found


def _together(wanted: Wanted, world: World, node: Node, watch: Watch) -> tuple[list[dict[str, Any]], Finding | None]:
    """Everybody's facts, on rank 0, and why the ranks could not speak with each other."""
    meeting = Path(wanted.config.run_dir if wanted.config else ".").absolute()
    with watch.at("meeting the other ranks" if world.size > 1 else "the GPU"):
        try:
            # Half of the time-out is what ranks wait for each other at most; later the watch ends what hangs.
            with comm.process_group(world, timeout=max(2.0, 2 * _PATIENCE * watch.left), meeting=meeting) as device:
                return _measured(world, device, node.facts, watch)
        except UserError as error:
            found = refused(COLLECTIVES if world.size > 1 else "gpus", error)
            if wanted.in_job and found.fault:
                # No proof: imports from a cold file system take their time, and the job's ranks wait longer for each
                # other than there is time for here. If they are truly away, it is they who end the job.
                found = replace(found, level=WARNING, text=f"{found.text}; the job's own ranks wait longer")
            return [node.facts], found


def _measured(
    world: World, device: torch.device, facts: dict[str, Any], watch: Watch
) -> tuple[list[dict[str, Any]], Finding | None]:
    try:
        facts["gpu"] = device_facts(device)
        if world.size > 1:
            with watch.at(COLLECTIVES):
                facts[COLLECTIVES] = measure(world, device, seconds=_COLLECTIVE_SECONDS)
        return comm.gather_objects(facts) or [facts], None
    except RuntimeError as error:  # torch's own, of network and device
        told = " ".join(str(error).split())[:300]
        remedy = "Look at the lines above, the network between the nodes, and `sinfo -R`."
        return [facts], Finding(COLLECTIVES, PROBLEM, f"the ranks lost each other: {told}", remedy, fault=True)


def _of_part(wanted: Wanted, facts: dict[str, Any]) -> list[Finding]:
    """The same of what rank 0 found out until the time was over: what was not reached is neither well nor a problem."""
    if "versions" not in facts:
        return []
    if "gpu" in facts:
        return _of_reports(wanted, [facts])
    if "cuda_error" not in facts:
        facts = {**facts, "gpu_files": 0}  # nobody has asked the GPU yet, so it is not said to be out of use
    told = _of_reports(wanted, [facts])
    return [finding for finding in told if finding.check != "gpus" or finding.level != OK]


def _of_reports(wanted: Wanted, reports: Sequence[dict[str, Any]]) -> list[Finding]:
    """What rank 0 makes of everybody's facts."""
    config, mine = wanted.config, reports[0]
    found = looked("versions", lambda: judge_versions(reports, driver_of(reports)))
    found += looked("gpus", lambda: judge_gpus(reports, precision=config.train.precision if config else "fp32"))
    found += looked("kernels", lambda: judge_kernels(reports))
    needs = None
    if config is not None:
        checkpoint = int(mine.get("checkpoint", 0))
        batch = config.train.global_batch // (wanted.ranks or len(reports))
        needs = needs_of(config, batch, checkpoint, int(mine.get("trainable", 0)))
        found += looked("shards", lambda: judge_shards(reports, goes_on=bool(mine.get("goes_on"))))
        found += looked("labels", lambda: judge_vocabularies(reports))
        found += looked("run directory", lambda: judge_writes(reports, checkpoint, config))
        found += looked("file clock", lambda: judge_file_clock(reports))
    found += looked("host memory", lambda: judge_hosts(reports, needs))
    found += looked(COLLECTIVES, lambda: judge_collectives(reports))
    return found + looked("clocks", lambda: judge_clocks(reports))


def _overdue(stage: str, wanted: Wanted) -> Finding:
    """What did not come to an end: of ranks that do not come together a fault, else no proof of anything.

    A job is not held up for that; who asks for an examination must not take half of one for a clean one.
    """
    told = f"{stage} did not come to an end within {wanted.seconds:g} s"
    if stage in (COLLECTIVES, "meeting the other ranks"):
        remedy = "Look at the network between the nodes; NCCL_DEBUG=INFO and NCCL_SOCKET_IFNAME tell more."
        return Finding(COLLECTIVES, PROBLEM, told, remedy, fault=True)
    told += "; what has no line here was not looked at"
    level = WARNING if wanted.in_job else PROBLEM
    return Finding(DOCTOR, level, told, "Give it more time with --seconds (MF_DOCTOR_SECONDS in a job).")


def _tell(wanted: Wanted, world: World, findings: list[Finding], hosts: Sequence[str], seconds: float) -> int:
    findings = sorted(findings, key=lambda finding: ORDER.index(finding.check))
    heading = page.Heading(wanted.file, world.size, tuple(hosts), round(seconds, 1))
    if wanted.as_json:
        text = page.as_json(heading, findings, in_job=wanted.in_job)
    elif wanted.in_job:
        text = page.job_page(heading, findings, verbose=wanted.verbose)
    else:
        text = page.page(heading, findings, verbose=wanted.verbose)
    print(text, flush=True)
    return exit_code(findings, in_job=wanted.in_job)

"""Ranks of test_curves.py: train a small MaskFormer on real images in many layouts, and write its losses down."""

from __future__ import annotations

import json
import os
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mf_scale.config.load import load_config
from mf_scale.config.validate import plan_batch
from mf_scale.data.batch import NO_LABEL, NONE, Batch
from mf_scale.data.index import Index
from mf_scale.data.loader import train_steps
from mf_scale.data.sources import continue_order
from mf_scale.distributed import comm
from mf_scale.distributed.engine import Engine
from mf_scale.distributed.env import World, world_from_environment
from mf_scale.losses.choose import choose_criterion
from mf_scale.models.build import build_model
from mf_scale.training.optimizer import build_optimizer
from mf_scale.training.phases import Phases
from mf_scale.training.statistics import MovingStatistics
from mf_scale.training.step import agree, train_step
from mf_scale.training.transfer import Transfer

STEPS = 5


def main() -> None:
    source, folder, scenarios = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
    world = world_from_environment()
    with comm.process_group(world, timeout=300) as device:
        for name, options in scenarios.items():
            result = scenario(source, options, world, device)
            if world.first:
                with (folder / f"curves-{world.size}.jsonl").open("a") as results:
                    results.write(json.dumps([name, result]) + "\n")


def scenario(source: str, options: dict, world: World, device: torch.device) -> dict:
    """Losses and gradient norms of the first steps."""
    config = load_config(None, options["overrides"])
    index = Index.open(source)
    plan = plan_batch(config, world.size)
    torch.manual_seed(0)
    model = build_model(config.model, len(index.vocabulary), seed=0)
    model.register_parameter("used_by_nothing", nn.Parameter(torch.ones(3)))
    engine = Engine(model.to(device), build_optimizer(model, config.optimizer), config, plan, world)
    criterion = choose_criterion(config, len(index.vocabulary))
    config.data.train = index.source
    state, _ = continue_order(config, [index], None, 0)
    stream = train_steps([index], state, config.data, rank=world.rank, world=world.size, step=0)
    losses, norms = [], []
    with closing(stream):
        for step in range(STEPS):
            batch = without_segments(next(stream)[1], options.get("empty"), world)
            told: dict[str, Any] = {
                "stop": False,
                "save": False,
                "written": False,
                "failed": False,
                "loss": float("nan"),
            }
            agreement = agree(batch, criterion, **told, world=world)
            values = train_step(
                engine,
                criterion,
                batch,
                agreement,
                transfer=Transfer(device),
                statistics=MovingStatistics(engine.module),
                phases=Phases(device, gathers=config.zero.stage == 3),
                plan=plan,
                world=world,
                seed=0,
                step=step,
                lr_factor=lambda: 1.0,
            ).read()
            assert values.applied
            share = agree(None, criterion, **{**told, "loss": values.loss}, world=world)
            losses.append(share.loss)
            norms.append(values.group_norms)
    engine.close()
    return {"loss": losses, "norms": norms, "groups": list(engine.group_names)}


def without_segments(batch: Batch, empty: str | None, world: World) -> Batch:
    """The batch with no segment in the images of every odd lane ("odd": all of rank 1 of 2), or of any ("all")."""
    if empty is not None:
        for place in range(len(batch)):
            lane = world.rank + world.size * place
            if empty == "all" or lane % 2:
                batch.labels[place] = NO_LABEL
                batch.segment_map[place] = NONE
    return batch


main()
# As the program itself ends: once in dozens of exits a native thread of the libraries aborts after all is done.
os._exit(0)

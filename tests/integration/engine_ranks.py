"""Ranks of test_engine.py: train a small model under ZeRO, save, load into another layout, say what came out."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import torch
from torch import nn

from mf_scale.config.load import load_config
from mf_scale.config.validate import plan_batch
from mf_scale.distributed import comm
from mf_scale.distributed.engine import Engine
from mf_scale.distributed.env import World, world_from_environment
from mf_scale.training.moments import moments_file, read_moments, write_moments
from mf_scale.training.optimizer import build_optimizer


class Net(nn.Module):
    """A model with a frozen parameter, an embedding, norms and a backbone."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 7, 3), nn.BatchNorm2d(7), nn.ReLU())
        self.queries = nn.Embedding(5, 7)
        self.norm = nn.LayerNorm(7)
        self.head = nn.Linear(7, 3)
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.backbone(images).mean((2, 3))
        return self.head(self.norm(features[:, None] + self.queries.weight)) * self.frozen


def main() -> None:
    folder, scenarios = Path(sys.argv[1]), json.loads(sys.argv[2])
    world = world_from_environment()
    with comm.process_group(world, timeout=60) as device:
        for name, options in scenarios.items():
            result = scenario(folder, options, world, device)
            if world.first:
                print("RESULT" + json.dumps({name: result}), flush=True)


def scenario(folder: Path, options: dict, world: World, device: torch.device) -> dict:
    """Train `steps` of a model, from the saved state `load` if named, and leave it as `save` if named."""
    fixed = ["train.global_batch=8", "optimizer.lr=0.01", "optimizer.clip_norm=0.5"]
    layout = {"zero.stage": options["stage"], "train.micro_batch": options["micro"]}
    precision = options.get("precision", "fp32")
    config = load_config(None, [*fixed, f"train.precision={precision}", *(f"{k}={v}" for k, v in layout.items())])
    torch.manual_seed(0)
    model = Net().train()
    # Batch statistics depend on how the batch is cut: frozen, so that every layout computes the same.
    model.backbone[1].eval()
    saved = folder / str(options.get("load"))
    if "load" in options:
        model.load_state_dict(torch.load(saved / "weights.pt", weights_only=True))
    plan = plan_batch(config, world.size)
    engine = Engine(model.to(device), build_optimizer(model, config.optimizer), config, plan, world)
    if "load" in options:
        engine.prepare_moments(options["steps"][0])
        read_moments(engine.needed_fragments(), saved)
    outcomes = [_step(engine, plan, world, step, options) for step in range(*options["steps"])]
    if "save" in options:
        target = folder / options["save"]
        target.mkdir(exist_ok=True)
        write_moments(engine.owned_fragments(), target / moments_file(world.rank, world.size))
        if world.first:
            torch.save(engine.module.state_dict(), target / "weights.pt")
        comm.barrier()
    weights = torch.cat([p.detach().flatten() for p in engine.module.parameters()])
    return {
        "digest": hashlib.sha256(weights.numpy().tobytes()).hexdigest(),
        "weights": weights.tolist(),
        "applied": [outcome.applied for outcome in outcomes],
    }


def _step(engine: Engine, plan, world, step: int, options: dict):
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(8, 3, 6, 6, generator=generator)
    target = torch.randn(8, 5, 3, generator=generator)
    lanes = torch.arange(world.rank, 8, world.size)
    for number in range(plan.accumulation):
        lane = lanes[number * plan.micro_batch : (number + 1) * plan.micro_batch]
        output = engine.forward(images[lane])
        loss = ((output.float() - target[lane]) ** 2).sum() / 8 * world.size * plan.accumulation
        if step == options.get("poison") and world.rank == world.size - 1:
            loss = loss * float("nan")
        engine.backward(loss)
        if number + 1 < plan.accumulation:
            engine.end_micro_batch()
    return engine.step(lambda group: group["base_lr"])


main()

"""Ranks of test_engine.py: train a small model under ZeRO, save, load into another layout, say what came out."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from mf_scale.config.load import load_config
from mf_scale.config.validate import plan_batch
from mf_scale.distributed import comm
from mf_scale.distributed.engine import Engine
from mf_scale.distributed.env import World, world_from_environment
from mf_scale.fragments import checkpoint_weights, read_fragments
from mf_scale.training.contents import contents
from mf_scale.training.ema import Ema
from mf_scale.training.optimizer import build_optimizer
from mf_scale.training.precision import set_numerics


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
    with comm.process_group(world, timeout=300) as device:
        for name, options in scenarios.items():
            result = scenario(folder, name, options, world, device)
            if world.first:
                with (folder / f"results-{world.size}.jsonl").open("a") as results:
                    results.write(json.dumps([name, result]) + "\n")


def scenario(folder: Path, name: str, options: dict, world: World, device: torch.device) -> dict:
    """Train `steps` of a model, from the saved state `load` if named, and leave it as `save` if named."""
    fixed = ["train.global_batch=8", "optimizer.lr=0.01", "optimizer.clip_norm=0.5"]
    layout = {"zero.stage": options["stage"], "train.micro_batch": options["micro"]}
    layout |= {f"zero.offload_{what}": "true" for what in options.get("offload", ())}
    layout |= {"train.tf32": "false", "train.deterministic": str(device.type == "cuda").lower()}
    precision = options.get("precision", "fp32")
    config = load_config(None, [*fixed, f"train.precision={precision}", *(f"{k}={v}" for k, v in layout.items())])
    set_numerics(config, device)
    torch.manual_seed(0)
    model = Net().train()
    # Batch statistics depend on how the batch is cut: frozen, so that every layout computes the same.
    model.backbone[1].eval()
    saved = folder / str(options.get("load"))
    if "load" in options:
        model.load_state_dict(checkpoint_weights(saved, "raw"))
    plan = plan_batch(config, world.size)
    engine = Engine(model.to(device), build_optimizer(model, config.optimizer), config, plan, world)
    engine.loss_scale.load([options.get("scale", 1024.0), 0.0])  # fits from the first step on, in every layout
    ema = Ema(engine, 0.9)
    if "load" in options:
        engine.prepare_moments(options["steps"][0])
        engine.loss_scale.load(json.loads((saved / "scale.json").read_text()))
        read_fragments(engine.needed_fragments(), saved)
        read_fragments(ema.fragments(), saved)
        write(folder / f"again-{world.size}-{name}", engine, ema, world)
        again = moments_digest(folder / f"again-{world.size}-{name}")
    outcomes = []
    for step in range(*options["steps"]):
        outcomes.append(_step(engine, plan, world, step, options, device))
        if outcomes[-1].applied:
            ema.update(step + 1)
    target = folder / options.get("save", f"end-{world.size}-{name}")
    write(target, engine, ema, world)
    with ema.in_place():
        averaged = engine.forward(torch.ones(2, 3, 6, 6, device=device)).sum().item()
    raw, average = (flat(checkpoint_weights(target, which)) for which in ("raw", "ema"))
    engine.close()
    return {
        "digest": hashlib.sha256(torch.cat([raw, average]).numpy().tobytes()).hexdigest(),
        "weights": raw.tolist(),
        "average": average.tolist(),
        "moments": moments_digest(target),
        "loaded_moments": again if "load" in options else None,
        "averaged": averaged,
        "applied": [bool(outcome.applied) for outcome in outcomes],
        "norms": [outcome.group_norms.tolist() for outcome in outcomes],
    }


def write(target: Path, engine: Engine, ema: Ema, world: World) -> None:
    """A checkpoint's tensors, without the rest of it."""
    target.mkdir(exist_ok=True)
    for file in contents(engine, ema, world):
        save_file(
            {n: t.detach().contiguous().clone() for n, t in file.tensors.items()}, target / file.name, file.metadata
        )
    if world.first:
        (target / "scale.json").write_text(json.dumps(engine.loss_scale.to_list()))
    comm.barrier()


def moments_digest(folder: Path) -> str:
    """Of Adam's moments, whole and in the order of their names, whichever ranks wrote them in whichever pieces."""
    pieces: dict[tuple[str, str], dict[int, torch.Tensor]] = {}
    for file in folder.glob("partition-*.safetensors"):
        for key, values in load_file(file).items():
            kind, start, name = key.split("/", 2)
            if kind.startswith("exp_avg"):
                pieces.setdefault((kind, name), {})[int(start)] = values
    ordered = [pieces[place][start] for place in sorted(pieces) for start in sorted(pieces[place])]
    return hashlib.sha256(torch.cat(ordered).numpy().tobytes()).hexdigest()


def flat(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensors[name].flatten().float() for name in sorted(tensors)])


def _step(engine: Engine, plan, world, step: int, options: dict, device: torch.device):
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(8, 3, 6, 6, generator=generator).to(device)
    target = torch.randn(8, 5, 3, generator=generator).to(device)
    lanes = torch.arange(world.rank, 8, world.size)
    for number in range(plan.accumulation):
        lane = lanes[number * plan.micro_batch : (number + 1) * plan.micro_batch]
        output = engine.forward(images[lane])
        loss = ((output.float() - target[lane]) ** 2).sum() / 8
        if step == options.get("poison") and world.rank == world.size - 1:
            loss = loss * float("nan")
        engine.backward(loss)
        if number + 1 < plan.accumulation:
            engine.end_micro_batch()
    return engine.step(1.0)


main()
# As the program itself ends: once in dozens of exits a native thread of the libraries aborts after all is done.
os._exit(0)

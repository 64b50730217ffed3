"""Ranks of test_plan_memory.py: a model under DeepSpeed, its tensors counted by what they are, and the plan's."""

from __future__ import annotations

import gc
import json
import os
import shutil
import sys
import warnings
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mf_scale.config.load import load_config
from mf_scale.config.validate import plan_batch
from mf_scale.distributed import comm
from mf_scale.distributed.engine import Engine
from mf_scale.distributed.env import World, world_from_environment
from mf_scale.models.build import build_model
from mf_scale.plan.fit import layout_of
from mf_scale.plan.parts import list_tensors, saved_model
from mf_scale.plan.states import count_states
from mf_scale.plan.written import count_written
from mf_scale.training.contents import contents
from mf_scale.training.ema import Ema
from mf_scale.training.optimizer import build_optimizer
from mf_scale.training.snapshot import FileContents
from mf_scale.training.tensor_file import write_tensors

DEMO = Path(__file__).parents[2] / "configs/demo.yaml"
MODEL = ["model.backbone.weights=none", "data.crop=[64,64]", "model.decoder.layers=1", "model.num_classes=21"]


def main() -> None:
    world = world_from_environment()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with comm.process_group(world, timeout=300):
        for stage, offload, accumulation, *more in json.loads(sys.argv[2]):
            found = scenario(stage, offload, accumulation, more, world)
            with (Path(sys.argv[1]) / f"{world.size}-{world.rank}.jsonl").open("a") as results:
                results.write(json.dumps([[stage, offload, accumulation, *more], found]) + "\n")


def scenario(stage: int, offload: list[str], accumulation: int, more: list[str], world: World) -> dict[str, Any]:
    """Two steps; what was held at the loss of the second, in its last backward pass, and between steps."""
    batch = [f"train.global_batch={world.size * accumulation}", "train.micro_batch=1", f"zero.stage={stage}"]
    away = [f"zero.offload_{what}=true" for what in offload]
    config = load_config(DEMO, [*MODEL, *batch, "zero.bucket_mib=2", *away, *more])
    plan = plan_batch(config, world.size)
    gc.collect()  # what an engine before left behind would be freed later, and its places be taken again
    before = set(_live())
    model = build_model(config.model, 21, seed=0).train()
    backbone: Any = model.backbone
    backbone.frozen = nn.Parameter(torch.zeros(1001), requires_grad=False)
    tensors, saved = list_tensors(model, config), saved_model(model, config)
    layout = layout_of(config, plan, stage, "optimizer" in offload, "parameters" in offload)
    states = count_states(tensors, layout)
    engine = Engine(model, build_optimizer(model, config.optimizer), config, plan, world)
    ema = Ema(engine, 0.9) if layout.ema else None
    engine.prepare_moments(0)
    gc.collect()
    found: dict[str, Any] = {"quiet": sum(size for at, size in _live().items() if at not in before)}
    first = next(p for p in model.parameters() if p.requires_grad)
    for step in range(2):
        for number in range(accumulation):
            out = engine.forward(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
            loss = out.class_logits.sum() + out.mask_embeddings.sum() + out.pixel_embeddings.sum()
            last = step == 1 and number + 1 == accumulation
            if last:
                whole = [p.data for p in model.parameters()]
                found["gathered"] = _bytes(whole) if stage == 3 and world.size > 1 else 0
                hook = first.register_post_accumulate_grad_hook(lambda _: found.update(_named(engine, model)))
            engine.backward(loss)
            if number + 1 < accumulation:
                engine.end_micro_batch()
        if step == 1:
            hook.remove()
            found["after"] = _gradients(engine, model)
        engine.step(1.0)
    found["average"] = _bytes(ema._average.values()) if ema else 0
    written = asdict(count_written(saved, stage, world.size, ema=ema is not None))
    files = _write(contents(engine, ema, world), Path(sys.argv[1]) / f"files-{world.rank}")
    engine.close()
    return {
        "found": found, "gpu": asdict(states.gpu), "host": asdict(states.host), "written": written, "files": files
    }  # fmt: skip


def _write(files: list[FileContents], folder: Path) -> int:
    """Bytes of the files of a checkpoint that this rank wrote, on the disk."""
    folder.mkdir()
    for file in files:
        write_tensors(folder / file.name, file.tensors, file.metadata)
    size = sum(path.stat().st_size for path in folder.iterdir())
    shutil.rmtree(folder)
    return size


def _named(engine: Engine, model: nn.Module) -> dict[str, int]:
    wrapped, adam = engine._engine.optimizer, engine._torch_optimizer
    shards = [getattr(p, "ds_tensor", p.data) for p in model.parameters()]
    memory = engine._partition.memory()
    return {
        "weights": _bytes([*shards, *model.buffers()]),
        "master": _bytes(memory) if engine.stage else 0,
        "moments": _bytes([adam.state[m][kind] for m in memory for kind in ("exp_avg", "exp_avg_sq")]),
        "gradients": _gradients(engine, model),
        "buckets": _bytes([*_buckets(wrapped), *_on_their_way(wrapped)]),
    }


def _gradients(engine: Engine, model: nn.Module) -> int:
    wrapped = engine._engine.optimizer
    held = [p.grad for p in model.parameters()] if engine.stage < 3 else []
    for name in ("averaged_gradients", "all_grad_tensors"):  # of the step, and the sum over its micro-batches so far
        by_group = getattr(wrapped, name, None) or {}
        held += [gradient for group in by_group.values() for gradient in group or ()]
    held += [getattr(wrapped, name, None) for name in ("grads_in_partition", "grad_partitions_flat_buffer")]
    held += getattr(wrapped, "accumulated_grads_in_cpu", {}).values()
    held += [m.grad for m in engine._partition.memory()] if engine.stage else []
    return _bytes(held, besides=_buckets(wrapped))


def _buckets(wrapped: Any) -> list[Tensor]:
    buffers = [bucket.buffer for bucket in getattr(wrapped, "ipg_buckets", {}).values()]
    return [t for buffer in buffers for t in (buffer if isinstance(buffer, list) else [buffer]) if t is not None]


def _on_their_way(wrapped: Any) -> list[Tensor]:
    names = ("temp_grad_buffer_for_gpu_offload", "temp_grad_buffer_for_cpu_offload")
    found = [getattr(wrapped, name) for name in names if hasattr(wrapped, name)]
    return [*found, *getattr(wrapped, "param_buffer_of_bit16_for_cpu_offload_groups", ())]


def _bytes(tensors: Iterable[Tensor | None], besides: Iterable[Tensor] = ()) -> int:
    """Of the memory behind the tensors, each once."""
    other = {t.untyped_storage().data_ptr() for t in besides}
    return sum({s.data_ptr(): s.nbytes() for t in tensors if t is not None and (s := t.untyped_storage())
                and s.data_ptr() not in other}.values())  # fmt: skip


def _live() -> dict[int, int]:
    found = {}
    for thing in gc.get_objects():
        if type(thing) in (Tensor, nn.Parameter):
            for tensor in (thing, thing.grad if thing.is_leaf else None):
                if tensor is not None and (storage := tensor.untyped_storage()).data_ptr():
                    found[storage.data_ptr()] = storage.nbytes()
    return found


main()
# As the program itself ends: once in dozens of exits a native thread of the libraries aborts after all is done.
os._exit(0)

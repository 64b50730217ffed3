"""The one place that imports DeepSpeed: a model under ZeRO, one step, and what a checkpoint holds of it by name.

Weights stay fp32 in every precision (bf16 and fp16 are autocast), so a model's own state_dict is the master copy up to
stage 2, and at stage 3 its stretches are. Everything partitioned is read and written as named fragments (parameter,
start, values), which is what makes a checkpoint independent of the ZeRO stage and of the number of ranks.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mf_scale.config.schema import Config
from mf_scale.config.validate import BatchPlan
from mf_scale.distributed import comm
from mf_scale.distributed.deepspeed_config import deepspeed_dictionary
from mf_scale.distributed.env import World
from mf_scale.distributed.gradients import LossScale, StepOutcome, clip_divisor, norms_by_group
from mf_scale.distributed.partitions import MOMENTS, Flat, Partition, Replicated, Sharded
from mf_scale.errors import UserError
from mf_scale.fragments import Fragment


class Engine:
    """A model under DeepSpeed ZeRO."""

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.AdamW, config: Config, plan: BatchPlan, world: World
    ) -> None:
        """Wrap `model`, which is on its device; `optimizer` is torch's fused AdamW over its trainable parameters."""
        _refuse_shared_parameters(model)
        deepspeed = _import_deepspeed()
        self.stage: int = config.zero.stage
        self._world, self._clip_norm = world, config.optimizer.clip_norm
        self._offload = config.zero.offload_optimizer
        self._device = next(model.parameters()).device
        self._torch_optimizer = optimizer
        trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        meant = _group_facts(optimizer)
        _set_environment(world)
        self._engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            config=deepspeed_dictionary(config, plan, cuda=self._device.type == "cuda"),
            dist_init_required=False,
        )
        self._take_over_loss_scaling()
        if world.size == 1 and self.stage == 0:
            _replace(self._engine, "enable_backward_allreduce", False)  # it would copy every gradient twice
        self._partition = self._make_partition(trainable)
        self._check_groups(meant)
        self.group_names: tuple[str, ...] = tuple(group["name"] for group in self._groups)
        self.loss_scale = LossScale(self._device, dynamic=config.train.precision == "fp16")

    @property
    def module(self) -> nn.Module:
        """The bare model."""
        return self._engine.module

    def train(self, mode: bool) -> None:
        """Training or evaluation mode of the model."""
        self._engine.train(mode)

    def share_buffers(self) -> None:
        """Rank 0's batch-norm statistics on every rank; between these calls each rank keeps its own."""
        comm.broadcast_tensors([b for b in self.module.buffers() if b.is_floating_point()])

    def forward(self, images: Tensor) -> Any:
        """The model's answer, with the hooks that ZeRO needs."""
        return self._engine(images)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of this rank's share of the step's loss: the step's is the sum over micro-batches and ranks.

        A loss that is not finite makes every gradient NaN, so that no update follows whatever its own gradient was.
        """
        sound = loss.detach() * 0 + 1  # 1, or NaN
        self._engine.backward(loss * (self.loss_scale.value * sound), scale_wrt_gas=False)

    def end_micro_batch(self) -> None:
        """Count a micro-batch that is not the step's last."""
        self._engine.step()

    def step(self, lr_factor: float) -> StepOutcome:
        """Apply the step's gradients, each parameter group's at its `base_lr` times `lr_factor`.

        Nothing is applied, on any rank, where a gradient is not finite. Does not wait for the device at stages 0 to 2
        without offload; DeepSpeed does at stage 3.
        """
        for group in self._groups:
            group["lr"] = group["base_lr"] * lr_factor
        loss_scale = self.loss_scale.value.clone()
        # DeepSpeed averages over the ranks. Undone here and not in the loss, which half precision would overflow.
        scale = loss_scale / self._world.size
        norms = norms_by_group(self._partition.gradients(), self._device, partitioned=self.stage > 0) / scale
        norm = norms.square().sum().sqrt()
        finite = norm.isfinite()
        # On the host for offloaded states: the fused kernel's own copy there would not wait for the device.
        home = torch.device("cpu") if self._offload else self._device
        self._torch_optimizer.grad_scale = (scale * clip_divisor(norm, self._clip_norm)).to(home)  # type: ignore[attr-defined]
        self._torch_optimizer.found_inf = (~finite).float().to(home)  # type: ignore[attr-defined]
        self._engine.step()
        if self.stage and self._engine.optimizer.overflow:  # DeepSpeed's own look at stage 3 and with offload
            finite = torch.zeros_like(finite)
        self.loss_scale.update(finite)
        return StepOutcome(finite, norms, loss_scale)

    def replicated(self) -> dict[str, Tensor]:
        """What every rank has whole, by its name in the state_dict: all of it up to stage 2, the buffers at stage 3."""
        state: dict[str, Tensor] = self.module.state_dict()
        if self.stage < 3:
            return state
        partitioned = {name for name, _ in self.module.named_parameters()}
        return {name: value for name, value in state.items() if name not in partitioned}

    def shapes(self) -> dict[str, list[int]]:
        """Whole shapes of the parameters that only stretches exist of (stage 3)."""
        if self.stage < 3:
            return {}
        return {name: list(p.ds_shape) for name, p in self.module.named_parameters()}  # type: ignore[attr-defined]

    def weights(self) -> dict[str, Tensor]:
        """Memory of the trained weights that the forward pass reads: whole, at stage 3 this rank's flat stretch."""
        return self._partition.weights()

    def weight_starts(self) -> dict[str, int]:
        """First element of each of this rank's stretches of the weights; empty where they are whole."""
        return {fragment.name: fragment.start for fragment in self._partition.masters()}

    def weights_replaced(self) -> None:
        """To be called after writing into `weights()`: what stage 3 keeps gathered is gathered anew."""
        if self.stage == 3:
            optimizer = self._engine.optimizer
            optimizer._partition_all_parameters()
            if optimizer.persistent_parameters:
                optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)

    def owned_fragments(self) -> Iterator[Fragment]:
        """What this rank alone writes into a checkpoint: over all ranks every element of the moments once, at stage 3
        the weights too."""
        share = self._world.size if self.stage == 0 else 1
        for number, fragment in enumerate(self._partition.moments()):
            if number % share == self._world.rank % share:
                yield fragment
        yield from self._partition.masters()

    def needed_fragments(self) -> Iterator[Fragment]:
        """The moments this rank works with, to be overwritten in place after `prepare_moments`."""
        return self._partition.moments()

    def prepare_moments(self, updates: int) -> None:
        """Make room for the moments after `updates` updates, all zero; `needed_fragments` then gives them.

        Before the first update too: memory that does not suffice shows at the start, and every save has the same shape.
        """
        for values in self._partition.memory():
            self._torch_optimizer.state[values] = {
                "step": torch.tensor(float(updates), dtype=torch.float32, device=values.device),
                **{moment: torch.zeros_like(values, requires_grad=False) for moment in MOMENTS},
            }

    def close(self) -> None:
        """Let go of what DeepSpeed hangs on parameters and modules, so that the memory can be freed."""
        self._engine.destroy()

    @property
    def learning_rates(self) -> dict[str, float]:
        """Parameter group -> its learning rate in the last step."""
        return {group["name"]: float(group["lr"]) for group in self._groups}

    @property
    def _groups(self) -> list[dict[str, Any]]:
        groups: list[dict[str, Any]] = self._engine.optimizer.param_groups
        return groups

    def _make_partition(self, trainable: dict[str, nn.Parameter]) -> Partition:
        wrapped = self._engine.optimizer
        if self.stage == 0:
            return Replicated(trainable, self._torch_optimizer)
        if self.stage == 3:
            return Sharded(self.module, wrapped, self._offload, self._world.rank)
        return Flat(trainable, wrapped, self._offload)

    def _take_over_loss_scaling(self) -> None:
        """DeepSpeed brings a scaler for fp16 autocast that asks the host after every step; ours does not."""
        _replace(self._engine, "torch_autocast_z0_gradscaler", None)
        if self.stage:
            _replace(self._engine.optimizer, "torch_autocast_gradscaler", None)

    def _check_groups(self, meant: list[tuple[Any, ...]]) -> None:
        """Parameter groups must survive the wrapping: a merged group trains with another's rate and decay."""
        kept = [(g["name"], g["weight_decay"], g["base_lr"]) for g in self._groups]
        if kept != [facts[:3] for facts in meant]:
            raise RuntimeError(f"DeepSpeed changed the parameter groups: {meant} became {kept}")
        if self.stage in (1, 2):
            counts = [sum(p.numel() for p in group) for group in self._engine.optimizer.bit16_groups]
        elif self.stage == 3:
            counts = [0] * len(meant)
            for number, part in enumerate(self._engine.optimizer.fp16_groups):
                counts[self._engine.optimizer.sub_group_to_group_id[number]] += sum(p.ds_numel for p in part)
        else:
            counts = [sum(p.numel() for p in group["params"]) for group in self._groups]
        if counts != [facts[3] for facts in meant]:
            raise RuntimeError(f"DeepSpeed moved parameters between groups: {meant} became {counts} elements")


def _refuse_shared_parameters(model: nn.Module) -> None:
    """Two names for one parameter would be saved as two, which part as soon as one of them is averaged or cut."""
    first: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if first.setdefault(id(parameter), name) != name:
            raise UserError(
                f"the model has one parameter under two names, {first[id(parameter)]} and {name}",
                where="model.pixel_level.builder",
                remedy="Give each its own copy: ZeRO and checkpoints keep parameters by name.",
            )


def _group_facts(optimizer: torch.optim.Optimizer) -> list[tuple[Any, ...]]:
    return [
        (g["name"], g["weight_decay"], g["base_lr"], sum(p.numel() for p in g["params"]))
        for g in optimizer.param_groups
    ]


def _set_environment(world: World) -> None:
    # DeepSpeed looks for MPI where one of these is missing ("No module named 'mpi4py'").
    os.environ.setdefault("RANK", str(world.rank))
    os.environ.setdefault("WORLD_SIZE", str(world.size))
    # It also takes LOCAL_RANK for the device's number, which is 0 where each rank sees its own GPU only.
    os.environ["LOCAL_RANK"] = str(torch.cuda.current_device() if torch.cuda.is_available() else world.local_rank)


def _replace(owner: Any, name: str, value: Any) -> None:
    """Set an attribute that is no promise of DeepSpeed's: under another name it would be set in vain, unnoticed."""
    if not hasattr(owner, name):
        raise RuntimeError(f"this version of DeepSpeed has no {name} in {owner}: install the one of constraints.txt")
    setattr(owner, name, value)


def _import_deepspeed() -> Any:
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("DS_LOG_LEVEL", "ERROR")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    import deepspeed
    from deepspeed.ops import __compatible_ops__
    from deepspeed.runtime import compiler

    # Its shared-memory collective is compiled at first use (27 s, and fatal without ninja or a compiler).
    __compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.logger.setLevel(logging.ERROR)
    # It would load inductor to decorate an optimizer that is not used here: 1.2 s of every start.
    _replace(compiler, "compile", lambda *_, **__: compiler.dummy_decorator)
    return deepspeed

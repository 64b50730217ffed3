"""The one place that knows DeepSpeed: our configuration -> its dictionary, one step, Adam's moments by name.

Weights stay fp32 in every precision (bf16 is autocast), so a model's own state_dict is the master copy, and only
Adam's moments are partitioned. They are read and written as named fragments (parameter, start, values), which is what
makes a checkpoint independent of the ZeRO stage and of the number of ranks.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mf_scale.config.schema import Config
from mf_scale.config.validate import BatchPlan
from mf_scale.distributed import comm
from mf_scale.distributed.env import World

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Fragment:
    """This rank's share of one parameter's moments."""

    name: str
    """The parameter's name."""
    start: int
    """First element of the flattened parameter."""
    moments: dict[str, Tensor]
    """Moment name -> values, 1-D views into the optimizer's own memory."""


@dataclass(frozen=True)
class StepOutcome:
    """What one optimizer step did."""

    applied: bool
    """False where the gradients were not finite: nothing was changed, on any rank."""
    grad_norm: float | None
    """Global L2 norm before clipping; None where the engine did not compute it."""


class Engine:
    """A model under DeepSpeed ZeRO."""

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, config: Config, plan: BatchPlan, world: World
    ):
        deepspeed = _import_deepspeed()
        self._names = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._client_optimizer = optimizer
        self._set_environment(world)
        self._engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            config=deepspeed_config(config, plan),
            dist_init_required=False,
        )
        self._stage = config.zero.stage
        self._check_groups(optimizer)

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
        """Accumulate the gradients of one micro-batch; DeepSpeed divides by accumulation and averages over ranks."""
        self._engine.backward(loss)

    def end_micro_batch(self) -> None:
        """Count a micro-batch that is not the step's last."""
        self._engine.step()

    def step(self, factors: Callable[[dict[str, Any]], float]) -> StepOutcome:
        """Apply the step's gradients with each parameter group's learning rate `factors(group)`."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = factors(group)
        skipped = self._skipped()
        self._engine.step()
        norm = self._engine.get_global_grad_norm()
        norm = float(norm) if norm is not None else None
        return StepOutcome(applied=self._skipped() == skipped, grad_norm=norm)

    def owned_fragments(self) -> Iterator[Fragment]:
        """The moments this rank writes into a checkpoint; over all ranks every element once. Empty before an update."""
        if self._stage == 0:
            world, rank = self._engine.dp_world_size, self._engine.global_rank
            for number, fragment in enumerate(self._whole_parameters()):
                if number % world == rank:
                    yield fragment
        else:
            yield from self._partitions()

    def needed_fragments(self) -> Iterator[Fragment]:
        """The moments this rank works with, to be overwritten in place after `prepare_moments`."""
        yield from self._whole_parameters() if self._stage == 0 else self._partitions()

    def prepare_moments(self, updates: int) -> None:
        """Make room for the moments after `updates` updates, all zero; `needed_fragments` then gives them."""
        if updates == 0:
            return
        for values in self._optimizer_memory():
            self._torch_optimizer().state[values] = {
                "step": torch.tensor(float(updates), dtype=torch.float32, device=values.device),
                **{moment: torch.zeros_like(values) for moment in MOMENTS},
            }

    def _optimizer_memory(self) -> list[Tensor]:
        """The tensors the torch optimizer works on: parameters at stage 0, this rank's flat partitions above."""
        if self._stage == 0:
            return list(self._names.values())
        return list(self._engine.optimizer.single_partition_of_fp32_groups)

    def _torch_optimizer(self) -> torch.optim.Optimizer:
        return self._client_optimizer if self._stage == 0 else self._engine.optimizer.optimizer

    def _whole_parameters(self) -> Iterator[Fragment]:
        for name, parameter in self._names.items():
            state = self._client_optimizer.state.get(parameter)
            if state:
                yield Fragment(name, 0, {moment: state[moment].view(-1) for moment in MOMENTS})

    def _partitions(self) -> Iterator[Fragment]:
        optimizer = self._engine.optimizer
        for name, parameter in self._names.items():
            mapping = parameter._hp_mapping  # type: ignore[attr-defined]  # set by DeepSpeed; None: not in this rank's part
            if mapping is None:
                continue
            flat = optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
            state = optimizer.optimizer.state.get(flat)
            if state:
                at = mapping.hp_fragment_address
                moments = {moment: state[moment].narrow(0, at.start, at.numel) for moment in MOMENTS}
                yield Fragment(name, mapping.lp_fragment_address.start, moments)

    def _skipped(self) -> int:
        if self._stage == 0:
            return int(getattr(self._client_optimizer, "skipped_steps", 0))
        return int(self._engine.skipped_steps)

    def _check_groups(self, optimizer: torch.optim.Optimizer) -> None:
        """Parameter groups must survive the wrapping: a merged group trains with another's rate and decay."""
        kept = [(g["name"], g["weight_decay"]) for g in self._engine.optimizer.param_groups]
        meant = [(g["name"], g["weight_decay"]) for g in optimizer.param_groups]
        if kept != meant:
            raise RuntimeError(f"DeepSpeed changed the parameter groups: {meant} became {kept}")

    @staticmethod
    def _set_environment(world: World) -> None:
        # DeepSpeed looks for MPI where one of these is missing ("No module named 'mpi4py'").
        os.environ.setdefault("RANK", str(world.rank))
        os.environ.setdefault("WORLD_SIZE", str(world.size))
        # It also takes LOCAL_RANK for the device's number, which is 0 where each rank sees its own GPU only.
        os.environ["LOCAL_RANK"] = str(torch.cuda.current_device() if torch.cuda.is_available() else world.local_rank)


def deepspeed_config(config: Config, plan: BatchPlan) -> dict[str, Any]:
    """DeepSpeed's dictionary for our configuration. Batch sizes are all given, so that it derives none."""
    bucket = config.zero.bucket_mib * 2**20 // 4
    settings: dict[str, Any] = {
        "train_batch_size": plan.global_batch,
        "train_micro_batch_size_per_gpu": plan.micro_batch,
        "gradient_accumulation_steps": plan.accumulation,
        "zero_optimization": {
            "stage": config.zero.stage,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
        },
        "gradient_clipping": config.optimizer.clip_norm,
        # Our AdamW is a subclass of torch's, which DeepSpeed's list of tested optimizers does not know.
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**62,
        "wall_clock_breakdown": False,
    }
    if config.train.precision == "bf16":
        # No "safe modules": gradients are reduced in fp32, only the computation is bf16.
        settings["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    return settings


def _import_deepspeed() -> Any:
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("DS_LOG_LEVEL", "ERROR")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    import deepspeed
    from deepspeed.ops import __compatible_ops__

    # Its shared-memory collective is compiled at first use (27 s, and fatal without ninja or a compiler).
    __compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.logger.setLevel(logging.ERROR)
    return deepspeed

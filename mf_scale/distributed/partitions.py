"""Which part of gradients, moments and weights a rank holds, by ZeRO stage: named views into DeepSpeed's own memory.

Stage 0 holds everything; stages 1 and 2 a stretch of each parameter group's flat memory; stage 3 a stretch of every
parameter. Each class answers the same five questions; nothing else knows DeepSpeed's attributes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from mf_scale.fragments import Fragment

MOMENTS = ("exp_avg", "exp_avg_sq")


class Partition(Protocol):
    """What one rank holds."""

    def gradients(self) -> list[list[Tensor]]:
        """This rank's averaged gradients, by parameter group, between the last backward pass and the step."""

    def memory(self) -> list[Tensor]:
        """The tensors that torch's optimizer works on, which are the keys of its state."""

    def moments(self) -> Iterator[Fragment]:
        """Views into the optimizer's moments."""

    def weights(self) -> dict[str, Tensor]:
        """Memory of the weights that the forward pass reads, by parameter: whole, at stage 3 this rank's stretch."""

    def masters(self) -> Iterator[Fragment]:
        """Weights in this rank's hands alone (stage 3), of kind `weight`, those that are not trained included."""


class Place(NamedTuple):
    """Where a stretch of a parameter lies in a flat tensor."""

    flat: Tensor
    offset: int
    start: int
    """First element of the flattened parameter."""
    length: int


class Replicated:
    """ZeRO 0: torch's optimizer on the model's own parameters."""

    def __init__(self, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
        self._parameters, self._optimizer = parameters, optimizer

    def gradients(self) -> list[list[Tensor]]:
        return [[p.grad for p in group["params"] if p.grad is not None] for group in self._optimizer.param_groups]

    def memory(self) -> list[Tensor]:
        return list(self._parameters.values())

    def moments(self) -> Iterator[Fragment]:
        for name, parameter in self._parameters.items():
            state = self._optimizer.state.get(parameter)
            if state:
                yield Fragment(name, 0, {moment: state[moment].view(-1) for moment in MOMENTS})

    def weights(self) -> dict[str, Tensor]:
        return {name: parameter.data for name, parameter in self._parameters.items()}

    def masters(self) -> Iterator[Fragment]:
        return iter(())


class Flat:
    """ZeRO 1 and 2: a stretch of each group's flat fp32 memory, offloaded or not."""

    def __init__(self, parameters: dict[str, nn.Parameter], wrapped: Any, offload: bool) -> None:
        self._parameters, self._wrapped, self._offload = parameters, wrapped, offload

    def gradients(self) -> list[list[Tensor]]:
        if self._offload:
            self._wrapped._wait_for_offload_copies()
            return [[flat.grad] for flat in self.memory()]  # type: ignore[list-item]  # allocated at initialisation
        return [self._wrapped.averaged_gradients[number] for number in range(len(self.memory()))]

    def memory(self) -> list[Tensor]:
        return list(self._wrapped.single_partition_of_fp32_groups)

    def moments(self) -> Iterator[Fragment]:
        return _moments(self._places(), self._wrapped.optimizer)

    def weights(self) -> dict[str, Tensor]:
        return {name: parameter.data for name, parameter in self._parameters.items()}

    def masters(self) -> Iterator[Fragment]:
        return iter(())

    def _places(self) -> Iterator[tuple[str, Place]]:
        for name, parameter in self._parameters.items():
            mapping = parameter._hp_mapping  # type: ignore[attr-defined]  # set by DeepSpeed; None: not in this rank's part
            if mapping is not None:
                flat = self._wrapped.single_partition_of_fp32_groups[mapping.param_group_index]
                at = mapping.hp_fragment_address
                yield name, Place(flat, at.start, mapping.lp_fragment_address.start, at.numel)


class Sharded:
    """ZeRO 3: a stretch of every parameter, of equal length on all ranks, the last one padded."""

    def __init__(self, model: nn.Module, wrapped: Any, offload: bool, rank: int) -> None:
        self._all = dict(model.named_parameters())
        self._wrapped, self._offload, self._rank = wrapped, offload, rank

    def gradients(self) -> list[list[Tensor]]:
        groups: list[list[Tensor]] = [[] for _ in self._wrapped.param_groups]
        for number, flat in enumerate(self.memory()):
            group = groups[self._wrapped.sub_group_to_group_id[number]]
            group += [flat.grad] if self._offload else self._wrapped.averaged_gradients[number]
        return groups

    def memory(self) -> list[Tensor]:
        return list(self._wrapped.fp32_partitioned_groups_flat)

    def moments(self) -> Iterator[Fragment]:
        return _moments(self._places(), self._wrapped.optimizer)

    def weights(self) -> dict[str, Tensor]:
        own = {name: self._own(parameter) for name, parameter in self._all.items() if parameter.requires_grad}
        return {name: values for name, (_, values) in own.items() if values.numel()}

    def masters(self) -> Iterator[Fragment]:
        trained = {name: place.flat.narrow(0, place.offset, place.length) for name, place in self._places()}
        for name, parameter in self._all.items():
            start, values = self._own(parameter)
            if values.numel():
                yield Fragment(name, start, {"weight": trained.get(name, values).detach()})

    def _own(self, parameter: Any) -> tuple[int, Tensor]:
        """First element and values of this rank's stretch, without the padding."""
        start = self._rank * parameter.partition_numel()
        count = max(0, min(parameter.partition_numel(), parameter.ds_numel - start))
        return start, parameter.ds_tensor.data.view(-1)[:count]

    def _places(self) -> Iterator[tuple[str, Place]]:
        for name, parameter in self._all.items():
            if parameter.requires_grad:
                start, values = self._own(parameter)
                if values.numel():
                    group, offset, _ = self._wrapped.grad_position[self._wrapped.get_param_id(parameter)]
                    yield name, Place(self.memory()[group], offset, start, values.numel())


def _moments(places: Iterator[tuple[str, Place]], optimizer: torch.optim.Optimizer) -> Iterator[Fragment]:
    for name, place in places:
        state = optimizer.state.get(place.flat)
        if state:
            views = {moment: state[moment].narrow(0, place.offset, place.length) for moment in MOMENTS}
            yield Fragment(name, place.start, views)

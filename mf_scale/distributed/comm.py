"""The few collectives the program needs. Without a process group every one of them is the identity."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from mf_scale.distributed.env import RENDEZVOUS, World
from mf_scale.distributed.failures import tell_failure
from mf_scale.distributed.invitation import invitation_name
from mf_scale.distributed.meeting import meet
from mf_scale.errors import PARAGRAPHS, UserError

T = TypeVar("T")
PIECE = 1 << 24
"""Bytes of each rank that are gathered at once."""
_waits = {"seconds": 0.0}


def seconds_waited() -> float:
    """Seconds this process has spent in the collectives of this file so far: mostly waiting for other ranks."""
    return _waits["seconds"]


@contextmanager
def _waiting() -> Iterator[None]:
    began = time.perf_counter()
    try:
        yield
    finally:
        _waits["seconds"] += time.perf_counter() - began


@contextmanager
def process_group(world: World, *, timeout: float, meeting: Path | None = None) -> Iterator[torch.device]:
    """Join the ranks, give this rank's device, leave at the end. `timeout` in seconds for every collective.

    Under srun the ranks meet in the folder `meeting`, which all of them see. Raises FaultError where some do not come.
    """
    device = _device(world)
    store, method = _meeting_point(world, device, timeout, meeting)  # rank 0's store must live as long as the group
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend,
        init_method=method,
        store=store,
        rank=world.rank,
        world_size=world.size,
        timeout=timedelta(seconds=timeout),
    )
    try:
        yield device
    except BaseException as error:
        tell_failure(error, world, meeting)  # before the peers find the connection broken
        raise
    finally:
        dist.destroy_process_group()


def _meeting_point(
    world: World, device: torch.device, timeout: float, meeting: Path | None
) -> tuple[dist.Store | None, str | None]:
    """A store, or how torch is to find one."""
    if world.size == 1:
        return dist.HashStore(), None
    if RENDEZVOUS in os.environ:
        return None, f"file://{os.environ[RENDEZVOUS]}"
    if "MASTER_ADDR" in os.environ and "MASTER_PORT" in os.environ:
        return None, "env://"
    name = invitation_name()
    if name is not None and meeting is not None:
        return meet(world, meeting / name, device=device.type, timeout=timeout), None
    raise UserError(
        f"{world.size} ranks have no meeting point: this is no SLURM step, and MASTER_ADDR and MASTER_PORT are not set",
        where=f"rank {world.rank}",
        remedy="Start through launch/multinode.sh, torchrun, or mf-scale train --processes N.",
    )


def _device(world: World) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    count = torch.cuda.device_count()
    # Under srun with one GPU bound to a task each rank sees just its own.
    index = 0 if count == 1 else world.local_rank
    if index >= count:
        raise UserError(
            f"local rank {world.local_rank} has no GPU: this node shows {count}",
            where=f"rank {world.rank}",
            remedy="Start at most as many ranks a node as it has GPUs.",
        )
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    return device


def sum_array(values: np.ndarray) -> np.ndarray:
    """Sum over ranks, on all ranks; float64 or int64, exact for int64. Goes over the CPU group."""
    if not _several():
        return values
    tensor = torch.from_numpy(np.ascontiguousarray(values)).clone()
    with _waiting():
        dist.all_reduce(tensor)
    return tensor.numpy()


def sum_in_place(tensor: torch.Tensor) -> torch.Tensor:
    """Sum over ranks of a tensor of the same shape on all, on whichever device it lies; the tensor itself."""
    if _several():
        dist.all_reduce(tensor)
    return tensor


def gather_objects(value: Any) -> list[Any] | None:
    """Every rank's JSON value on rank 0 (None on the others). JSON, since a peer's bytes are never unpickled."""
    if not _several():
        return [value]
    parts = _all_gather_bytes(json.dumps(value).encode())
    return [json.loads(part) for part in parts] if dist.get_rank() == 0 else None


def gather_bytes(data: bytes, owner: int) -> list[bytes]:
    """Every rank's bytes on rank `owner`, in order of the ranks ([] on the others); in pieces, over the CPU."""
    if not _several():
        return [data]
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, torch.tensor([len(data)]))
    mine = dist.get_rank() == owner
    parts = [bytearray() for _ in sizes] if mine else []
    longest = max(int(size) for size in sizes)
    for start in range(0, longest, PIECE):
        width = min(PIECE, longest - start)
        piece = torch.zeros(width, dtype=torch.uint8)
        own = data[start : start + width]
        if own:
            piece[: len(own)] = torch.frombuffer(bytearray(own), dtype=torch.uint8)
        received = [torch.zeros(width, dtype=torch.uint8) for _ in sizes] if mine else None
        dist.gather(piece, received, dst=owner)
        if received is not None:
            for part, size, values in zip(parts, sizes, received, strict=True):
                part.extend(values[: max(0, int(size) - start)].numpy().tobytes())
    return [bytes(part) for part in parts]


def place() -> tuple[int, int]:
    """This rank and the number of ranks of the process group; (0, 1) without one."""
    return (dist.get_rank(), dist.get_world_size()) if _several() else (0, 1)


def broadcast_object(value: Any) -> Any:
    """Rank 0's JSON value on every rank."""
    if not _several():
        return value
    return json.loads(_all_gather_bytes(json.dumps(value).encode() if dist.get_rank() == 0 else b"")[0])


def on_first_rank(action: Callable[[], Any]) -> Any:
    """Run `action` on rank 0 only; its JSON result, or its UserError, on every rank."""
    if not _several():
        return action()
    answer: dict[str, Any] = {}
    failure: UserError | None = None
    if dist.get_rank() == 0:
        try:
            answer["result"] = action()
        except UserError as error:
            failure = error
            answer["error"] = _told(error)
    answer = broadcast_object(answer)
    if failure is not None:
        raise failure
    if "error" in answer:
        raise agreed(_heard(answer["error"]))
    return answer["result"]


def together(action: Callable[[], T]) -> T:
    """Run `action` on every rank; where it is a UserError on some, all raise the lowest rank's and rank 0 says it."""
    failure: UserError | None = None
    try:
        result = action()
    except UserError as error:
        if not _several():
            raise
        failure = error
    if not _several():
        return result
    parts = gather_objects(None if failure is None else _told(failure))
    first = broadcast_object(next((part for part in parts if part), None) if parts is not None else None)
    if first is not None:
        raise agreed(_heard(first)) from failure
    return result


def _told(error: UserError) -> list[Any]:
    return [error.exit_code, error.what, error.where, error.remedy]


def _heard(told: list[Any]) -> UserError:
    code, what, where, remedy = told
    kind = next(kind for kind in PARAGRAPHS if kind.exit_code == code)
    return kind(what, where=where, remedy=remedy)


def agreed(error: UserError) -> UserError:
    """An error that every rank raises at the same place: only rank 0 says it."""
    error.said_by_first_rank = _several() and dist.get_rank() != 0
    return error


def barrier() -> None:
    """Wait for every rank."""
    if _several():
        with _waiting():
            dist.all_reduce(torch.zeros(1))


def broadcast_tensors(tensors: list[torch.Tensor]) -> None:
    """Rank 0's values into these tensors of every rank, in place."""
    if not _several():
        return
    by_dtype: dict[torch.dtype, list[torch.Tensor]] = {}
    for tensor in tensors:
        by_dtype.setdefault(tensor.dtype, []).append(tensor)
    for group in by_dtype.values():
        # In one piece: a hundred small broadcasts took 0.15 s of every save.
        flat = torch.cat([tensor.detach().reshape(-1) for tensor in group])
        dist.broadcast(flat, src=0)
        for tensor, part in zip(group, flat.split([tensor.numel() for tensor in group]), strict=True):
            tensor.copy_(part.view_as(tensor))


def _several() -> bool:
    return dist.is_initialized() and dist.get_world_size() > 1


def _all_gather_bytes(data: bytes) -> list[bytes]:
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size())]
    with _waiting():
        dist.all_gather(sizes, torch.tensor([len(data)]))
    longest = max(1, *(int(size) for size in sizes))
    mine = torch.zeros(longest, dtype=torch.uint8)
    mine[: len(data)] = torch.frombuffer(bytearray(data or b"\0"), dtype=torch.uint8)[: len(data)]
    parts = [torch.zeros(longest, dtype=torch.uint8) for _ in sizes]
    with _waiting():
        dist.all_gather(parts, mine)
    return [part[: int(size)].numpy().tobytes() for part, size in zip(parts, sizes, strict=True)]

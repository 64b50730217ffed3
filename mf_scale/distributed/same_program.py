"""All ranks run the same program on the same settings, or none does: a mixture trains something that nobody meant."""

from __future__ import annotations

import hashlib
import json
import socket
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from mf_scale.distributed import comm
from mf_scale.distributed.env import World
from mf_scale.errors import UserError
from mf_scale.fingerprint import code_files, library_versions

_SHOWN = 4
"""Differences that are told; ranks of one kind that are named."""


def refuse_mixture(world: World, settings: Mapping[str, Any]) -> None:
    """UserError, on all ranks, where they differ in the program's code, in a library or in `settings` (JSON values).

    Costs one small collective where all is the same.
    """
    if world.size == 1:
        return
    facts = _facts(settings)
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    digests = comm.gather_objects(digest)
    if not comm.broadcast_object(digests is not None and len(set(digests)) > 1):
        return
    told = comm.gather_objects([socket.gethostname(), facts])
    what = comm.broadcast_object(told and _sentence([host for host, _ in told], [facts for _, facts in told]))
    raise comm.agreed(
        UserError(
            what,
            remedy="Start all ranks from one folder on a file system that all nodes see, with one virtual environment "
            "and one command, and change no file of it while they start.",
        )
    )


def _facts(settings: Mapping[str, Any]) -> dict[str, str]:
    """What must be the same, by names that can be told, in the order in which they are."""
    versions = library_versions() | {"torch": torch.__version__}  # with its build
    return {
        **{f"version of {name}": number for name, number in versions.items()},
        **{f"code of mf_scale/{name}": digest for name, digest in code_files().items()},
        **{name: json.dumps(value) for name, value in _flat(settings)},
    }


def _flat(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for name, value in settings.items():
        inner = isinstance(value, Mapping)
        pairs += _flat(value, f"{prefix}{name}.") if inner else [(f"{prefix}{name}", value)]
    return pairs


def _sentence(hosts: Sequence[str], facts: Sequence[Mapping[str, str]]) -> str:
    """What differs, and which ranks on which hosts have which."""
    names = dict.fromkeys(name for one in facts for name in one)
    differing = [name for name in names if len({one.get(name) for one in facts}) > 1]
    parts = []
    for name in differing[:_SHOWN]:
        ranks_by_value: dict[str, list[int]] = {}
        for rank, one in enumerate(facts):
            ranks_by_value.setdefault(one.get(name, "nothing"), []).append(rank)
        kinds = [f"{value} on {_places(ranks, hosts)}" for value, ranks in ranks_by_value.items()]
        parts.append(f"{name} ({'; '.join(kinds[:_SHOWN])})")
    more = f"; and {len(differing) - _SHOWN} more" if len(differing) > _SHOWN else ""
    return f"the ranks do not run the same program: they differ in {', '.join(parts)}{more}"


def _places(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    """`rank 0, 1, 2, 3, ... (8 ranks) of node1, node2`."""
    named = ", ".join(map(str, ranks[:_SHOWN])) + (f", ... ({len(ranks)} ranks)" if len(ranks) > _SHOWN else "")
    where = list(dict.fromkeys(hosts[rank] for rank in ranks))
    shown = ", ".join(where[:_SHOWN]) + (f" and {len(where) - _SHOWN} more" if len(where) > _SHOWN else "")
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {named} ({shown})"

"""How much memory this process may take, by the machine and by the cgroup that a job is held in. Linux."""

from __future__ import annotations

from pathlib import Path

_UNLIMITED = 2**60
"""cgroup v1 says a number near 2**63 where there is no limit."""


def memory_facts(root: Path = Path("/")) -> dict[str, int]:
    """{"total", "free"} in bytes: the smaller of what the machine has and what the job's cgroups allow.

    Free includes what the kernel would give back (caches). {} where the system does not tell.
    """
    try:
        lines = (root / "proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return {}
    values = {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines)}
    if not {"MemTotal", "MemAvailable"} <= values.keys():
        return {}
    total, free = values["MemTotal"], values["MemAvailable"]
    for limit, used in _limits(root):
        total, free = min(total, limit), min(free, max(0, limit - used))
    return {"total": total, "free": free}


def _limits(root: Path) -> list[tuple[int, int]]:
    """(limit, used without caches) of every cgroup above this process that has a limit."""
    found = []
    try:
        groups = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    for line in groups:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, limit, used, cache = root / "sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            base, limit, used = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            cache = "total_inactive_file"
        else:
            continue
        place = base / path.lstrip("/")
        for folder in (place, *place.parents):
            if base not in (folder, *folder.parents):
                break
            most = _number(folder / limit)
            if most is not None and most < _UNLIMITED:
                found.append((most, max(0, (_number(folder / used) or 0) - _statistic(folder / "memory.stat", cache))))
    return found


def _number(file: Path) -> int | None:
    try:
        text = file.read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None


def _statistic(file: Path, name: str) -> int:
    try:
        lines = file.read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{name} ")), 0)

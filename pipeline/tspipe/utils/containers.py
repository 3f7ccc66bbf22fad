"""What a container may use: the limits of this process's control groups (Linux cgroups, version 1 and 2)."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class Limits(NamedTuple):
    """The smallest limits of a process's control groups; infinite where there are none."""

    memory: float = math.inf  # bytes
    cores: float = math.inf


def limits(root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> Limits:
    """Return what this process may use. A group is limited by each group above it, so the smallest limit counts."""
    memory, cores = [math.inf], [math.inf]
    for group in _groups(root, membership):
        memory += _numbers(group / "memory.max") + _numbers(group / "memory.limit_in_bytes")
        quota_and_period = _numbers(group / "cpu.max") or (
            _numbers(group / "cpu.cfs_quota_us") + _numbers(group / "cpu.cfs_period_us")
        )
        match quota_and_period:
            case [quota, period] if period > 0:
                cores.append(quota / period)
    return Limits(min(memory), min(cores))


def _groups(root: Path, membership: Path) -> Iterator[Path]:
    """Yield the folders of a process's control groups and of all groups above them; some may not exist.

    A container may see its own group as the root, while `membership` names the path outside the container.
    """
    try:
        lines = membership.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        for top in {root / controllers, *(root / controller for controller in controllers.split(","))}:
            group = top.joinpath(*(part for part in path.split("/") if part != ".."))
            yield from (folder for folder in (group, *group.parents) if folder.is_relative_to(top))


def _numbers(file: Path) -> list[float]:
    """Return the numbers in a file, infinite where it says that there is no limit; none if it cannot be read."""
    try:
        return [math.inf if word in ("max", "-1") else float(word) for word in file.read_text("ascii").split()]
    except (OSError, ValueError):
        return []

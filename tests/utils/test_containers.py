"""The limits of control groups, from made-up trees of both versions."""

import math
from pathlib import Path

import pytest
import torch

from tspipe.utils import containers, memory, threads
from tspipe.utils.containers import Limits, limits
from tspipe.utils.device import pick_device

GIB = 2**30
UNLIMITED_V1 = "9223372036854771712\n"  # what the kernel writes


def tree(root: Path, membership: str, files: dict[str, str]) -> Limits:
    """Return the limits of a process with this /proc/self/cgroup and these files in /sys/fs/cgroup."""
    (root / "self").write_text(membership)
    for name, text in files.items():
        (root / "cgroup" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "cgroup" / name).write_text(text)
    return limits(root / "cgroup", root / "self")


def test_no_limits(tmp_path: Path) -> None:
    assert limits(tmp_path / "cgroup", tmp_path / "self") == Limits(math.inf, math.inf)
    assert tree(tmp_path, "0::/a\n", {"a/memory.max": "max\n", "a/cpu.max": "max 100000\n"}) == Limits()


def test_version_2_inside_a_container(tmp_path: Path) -> None:
    files = {"memory.max": f"{2 * GIB}\n", "cpu.max": "150000 100000\n"}
    assert tree(tmp_path, "0::/\n", files) == Limits(2 * GIB, 1.5)


@pytest.mark.parametrize("limited", ["", "user.slice/", "user.slice/job/", "user.slice/job/step/"])
def test_the_smallest_limit_of_all_groups_above_counts(limited: str, tmp_path: Path) -> None:
    files = {"memory.max": f"{9 * GIB}\n", "user.slice/job/step/memory.max": f"{8 * GIB}\n"}
    files |= {"user.slice/job/cpu.max": "800000 100000\n", "other/memory.max": "1\n", "other/cpu.max": "1 100000\n"}
    files |= {f"{limited}memory.max": f"{2 * GIB}\n", f"{limited}cpu.max": "200000 100000\n"}
    assert tree(tmp_path, "0::/user.slice/job/step\n", files) == Limits(2 * GIB, 2)


@pytest.mark.parametrize("folder", ["cpu,cpuacct", "cpu"])
@pytest.mark.parametrize("group", ["docker/1f/", "docker/", ""])
def test_version_1(folder: str, group: str, tmp_path: Path) -> None:
    """Also inside a container, which sees its group as the root of each tree but the path outside of it."""
    membership = "9:memory:/docker/1f\n5:cpu,cpuacct:/docker/1f\n1:name=systemd:/docker/1f\n0::/docker/1f\n"
    files = {"memory/memory.limit_in_bytes": UNLIMITED_V1, f"{folder}/cpu.cfs_quota_us": "-1\n"}
    files |= {f"{folder}/cpu.cfs_period_us": "100000\n", f"{folder}/{group}cpu.cfs_period_us": "50000\n"}
    files |= {f"memory/{group}memory.limit_in_bytes": f"{GIB}\n", f"{folder}/{group}cpu.cfs_quota_us": "150000\n"}
    assert tree(tmp_path, membership, files) == Limits(GIB, 3)


def test_a_path_outside_the_namespace_and_damaged_files(tmp_path: Path) -> None:
    files = {"a/memory.max": f"{GIB}\n", "memory.max": "much\n", "cpu.max": "1 0\n", "a/cpu.max": "1\n"}
    assert tree(tmp_path, "0::/../../a\n", files) == Limits(GIB, math.inf)


def test_memory_and_threads_obey(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    monkeypatch.setattr(memory, "limits", lambda: Limits(2 * GIB, 2.5))
    monkeypatch.setattr(threads, "limits", lambda: Limits(2 * GIB, 2.5))
    assert memory.memory_limit(torch.device("cpu")) == GIB
    assert threads.available_cores() == 3
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert threads.available_cores() == 1
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    selected: list[int] = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    monkeypatch.setattr(torch, "set_num_threads", selected.append)
    pick_device("cpu")
    assert selected == [3]
    monkeypatch.setattr(threads, "limits", containers.Limits)
    assert threads.available_cores() == 64

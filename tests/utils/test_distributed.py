"""A process's place among others: groups of real processes, devices, cores."""

from pathlib import Path

import pytest
import torch

from conftest import Zygote
from tspipe.errors import RecipeError
from tspipe.utils import distributed, heartbeat
from tspipe.utils.device import pick_device
from tspipe.utils.distributed import ALONE, group
from tspipe.utils.threads import available_cores
from zygote import rank_environments

PROGRAM = """
import functools, os, pathlib, sys, time
from tspipe.utils import heartbeat
from tspipe.utils.distributed import group
from tspipe.errors import OtherProcessFailed

heartbeat.BEAT_SECONDS, heartbeat.LOST_AFTER_SECONDS = 0.1, 2
print = functools.partial(print, flush=True)
os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # for PyTorch's own warnings
with group() as ranks:
    print(ranks)
    print(ranks.broadcast({"from": ranks.rank}), ranks.gather(f"of {ranks.rank}"))
    with ranks.rank_zero_first():
        with open(sys.argv[1], "a") as file:
            file.write(f"{ranks.rank}")
    ranks.barrier()
    print(pathlib.Path(sys.argv[1]).read_text())
    if ranks.rank == 0:
        time.sleep(3)  # a live rank may work longer than a dead one is waited for
    ranks.barrier()
    if ranks.rank == int(sys.argv[2]):
        os._exit(3)
    try:
        ranks.barrier()
    except OtherProcessFailed as error:
        print(error)
        os._exit(0)
"""


@pytest.mark.parametrize("killed", [0, 1])
def test_a_group_of_two(killed: int, zygote: Zygote, tmp_path: Path) -> None:
    run = zygote.run(tmp_path / "order", killed, program=PROGRAM, ranks=2)
    both = "{'from': 0} ['of 0', 'of 1']"
    lost = f"Rank {1 - killed} stops: another process has failed, or cannot be reached."
    expected = [[f"Group(rank={rank}, size=2)", both, "01"] for rank in range(2)]
    expected[1 - killed].append(lost)
    assert run.lines == [*expected[0], *expected[1]]
    assert (run.killed, run.codes) == (False, [3, 0] if killed == 0 else [0, 3])


def test_a_collective_inside_rank_zero_first_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="Move it out of the block"), ALONE.rank_zero_first():
        ALONE.barrier()
    ALONE.barrier()


def test_a_collective_call_times_out_within_minutes() -> None:
    assert distributed._COLLECTIVE_TIMEOUT.total_seconds() <= 600
    assert heartbeat.LOST_AFTER_SECONDS <= 300


def test_a_process_alone() -> None:
    with group() as process_group:
        assert process_group is ALONE
        assert (process_group.broadcast("x"), process_group.gather("x")) == ("x", ["x"])
        process_group.barrier()
        with process_group.rank_zero_first():
            pass


def test_a_size_without_an_address_is_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with group() as process_group:
        assert process_group is ALONE


def test_torchruns_job_of_one_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in rank_environments(1)[0].items():
        monkeypatch.setenv(name, value)
    with group() as process_group:
        assert process_group is ALONE


@pytest.mark.parametrize("device_name", ["auto", "cuda"])
def test_each_process_of_a_machine_has_a_gpu_of_its_own(device_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    current: list[int] = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert pick_device(device_name) == torch.device("cuda")
    assert current == [], "a process alone may have chosen it"
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert pick_device(device_name) == torch.device("cuda:1")
    assert current == [1]
    assert pick_device("cpu") == torch.device("cpu")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(RecipeError) as refused:
        pick_device(device_name)
    assert str(refused.value) == ("This machine has 2 GPUs, one a process: start torchrun with --nproc-per-node 2")


def test_processes_of_a_machine_share_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed.os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert available_cores() == 8
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert available_cores() == 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")
    assert available_cores() == 1

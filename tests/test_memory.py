"""What the C library does with freed memory."""

import platform
import subprocess
import sys

import pytest

_FAULTS = """
import resource, sys, torch
from tspipe.memory import keep_freed
if sys.argv[1] == "kept":
    keep_freed()
for _ in range(8):  # some rounds until the heap has grown
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    one, two = (torch.ones(2**24) for _ in range(2))  # 64 MiB each
    del one, two
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc")
def test_large_tensors_come_from_memory_that_is_there() -> None:
    faults = {how: _faults(how) for how in ("kept", "given back")}
    # Two tensors of 64 MiB are 32,768 pages, or 64 where the system makes them huge.
    assert faults["given back"] >= 60, "or the next line would show nothing"
    assert faults["kept"] < faults["given back"] / 4


def _faults(how: str) -> int:
    done = subprocess.run([sys.executable, "-c", _FAULTS, how], capture_output=True, text=True, check=True)
    return int(done.stdout)

"""What the C library does with freed memory."""

import platform
import subprocess
import sys

import pytest

_PROGRAM = """
import resource, torch
from tspipe.memory import keep_freed

def faults():
    for _ in range(8):  # some rounds until the heap has grown
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        one, two = (torch.ones(2**24) for _ in range(2))  # 64 MiB each
        del one, two
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(faults())
keep_freed()
print(faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc")
def test_large_tensors_come_from_memory_that_is_there() -> None:
    """In a process of its own, since the setting stays."""
    done = subprocess.run([sys.executable, "-c", _PROGRAM], capture_output=True, text=True, check=True)
    given_back, kept = map(int, done.stdout.split())
    # Two tensors of 64 MiB are 32,768 pages, or 64 where the system makes them huge.
    assert given_back >= 60, "or the next line would show nothing"
    assert kept < given_back / 4

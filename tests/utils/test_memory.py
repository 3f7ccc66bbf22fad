"""What the C library does with freed memory."""

import platform

import pytest

from conftest import Zygote

_PROGRAM = """
import resource, torch
from tspipe.utils.memory import keep_freed_memory

def faults():  # the fewest of some rounds: small things may take a part of what was freed
    torch.ones(20 * 2**20)  # so that the heap, where it keeps what is freed, has more than room enough
    counts = []
    for _ in range(8):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(10 * 2**20)  # 40 MiB
        counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return min(counts)

print(faults())
keep_freed_memory()
print(faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc")
def test_large_tensors_come_from_memory_that_is_there(zygote: Zygote) -> None:
    """In a process of its own, since the setting stays."""
    run = zygote.run(program=_PROGRAM)
    given_back, kept = map(int, run.lines)
    # A tensor of 40 MiB is 10,240 pages, or 20 where the system makes them huge.
    assert given_back >= 18, "or the next line would show nothing"
    assert kept < given_back / 4

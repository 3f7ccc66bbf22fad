"""Where a process computes, and with what memory."""

import platform
import subprocess
import sys

import pytest
import torch

from tspipe.distributed import pick_device
from tspipe.errors import RecipeError


FAULTS = """
import resource

import torch

from tspipe.distributed import pick_device

pick_device("cpu")
for _ in range(2):  # the first may take new memory
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(2**28, dtype=torch.uint8).fill_(1)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults)
"""


def test_a_device_that_is_not_there() -> None:
    missing = next((name for name in ("cuda", "mps") if not getattr(torch, name).is_available()), None)
    assert missing, "no machine has both"
    with pytest.raises(RecipeError, match=f"^This machine has no device '{missing}'; it has "):
        pick_device(missing)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no mallopt")
def test_on_the_cpu_a_large_tensor_takes_the_last_ones_memory() -> None:
    # In a process of its own: the main thread's memory is what is kept, and tests may run in another.
    found = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    assert int(found.stdout) < 1000  # mapped anew, it has 65,536

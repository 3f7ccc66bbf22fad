"""The memory that a classifier takes at inference, each measured in a process of its own.

`python -m tspipe.deploy.memory JSON` is such a process.
"""

import gc
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from tspipe.deploy.latency import BATCH_SIZES, random_pixels
from tspipe.deploy.student import NetworkFiles
from tspipe.models import networks
from tspipe.utils.memory import release_freed_memory
from tspipe.utils.progress import progress, warn
from tspipe.utils.threads import available_cores, prefetch_map

CLEAR_REFS = Path("/proc/self/clear_refs")  # of Linux; writing 5 resets the peak
Peaks = dict[int, int]  # bytes by batch size


def measure(sources: Sequence[tuple[Path, NetworkFiles]]) -> list[Peaks]:
    """Return by how much the resident memory of a new process peaks while it classifies a batch, for each batch size.

    The peak counts the weights and what inference allocates, with one thread. It leaves out Python, the runtime's
    libraries, and what loading alone takes. It is empty where the system does not tell it; Linux does.

    Args:
        sources: the files of students, exports or caches, and of their networks where these are a user's.
    """
    with progress("measuring memory", len(sources), "processes") as advance:
        peaks: list[Peaks] = []
        for one in prefetch_map(_measure, sources, available_cores()):
            peaks.append(one)
            advance(1, "measuring memory")
    return peaks


def _measure(source: tuple[Path, NetworkFiles]) -> Peaks:
    if not CLEAR_REFS.exists():
        return {}
    command = [sys.executable, "-m", __name__, json.dumps([str(source[0]), source[1], networks.trusts_remote_code()])]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or [f"exit code {result.returncode}"])[-1]
        warn(f"The memory of {source[0]} cannot be measured: {reason}")
        return {}
    return {int(size): peak for size, peak in json.loads(result.stdout.splitlines()[-1]).items()}


def _worker(path: Path, network: NetworkFiles, *, trusted: bool) -> Peaks:
    """Return the peaks of this process."""
    from tspipe.deploy.evaluate import open_subject  # imported here since it imports this module

    if trusted:
        networks.trust_remote_code()
    torch.set_num_threads(1)
    subject = open_subject(path, network)
    subject.load(1)(random_pixels(subject.input_shape, 1))  # loads and initialises the libraries that inference uses
    del subject
    gc.collect()
    release_freed_memory()
    before = _status("VmRSS")
    subject = open_subject(path, network)
    run, peaks = subject.load(1), Peaks()
    for batch_size in BATCH_SIZES:
        pixels = random_pixels(subject.input_shape, batch_size)
        release_freed_memory()
        CLEAR_REFS.write_text("5", encoding="ascii")
        run(pixels)
        peaks[batch_size] = max(0, _status("VmHWM") - before)
    return peaks


def _status(field: str) -> int:
    """Return a size from Linux's status of this process, in bytes."""
    text = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(text.partition(f"{field}:")[2].split()[0])


if __name__ == "__main__":
    file, network_file, trusted_code = json.loads(sys.argv[1])
    print(json.dumps(_worker(Path(file), network_file, trusted=trusted_code)))

"""Mutated caches: whatever the bytes, only CacheError comes out, soon, and without taking memory.

The cases run in a process of their own, since HDF5 may end it. A case follows from its number alone:
`TSPIPE_FUZZ=100000 pytest tests/cache/test_fuzz.py -s` runs as many and prints what came of them;
`python tests/cache/test_fuzz.py FOLDER NUMBER 1` runs one of them again.
"""

import contextlib
import hashlib
import io
import json
import os
import random
import resource
import struct
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest
import safetensors.torch
import torch

if __name__ == "__main__":  # in pytest its configuration does this
    sys.path.insert(0, str(Path(__file__).parents[1]))

from forging import DATASPACE, DATATYPE, LAYOUT, message
from pets import plan, write
from tspipe.cache import Cache, open_cache
from tspipe.cache.checksums import checksum_names, identify
from tspipe.cli.render import show_cache
from tspipe.errors import CacheError, NetworkError
from tspipe.models import weights

CASES = int(os.environ.get("TSPIPE_FUZZ", "200"))
MEMORY = 256 * 2**20  # bytes that all cases together may take
SECONDS = 2.0
NUMBERS = [0, 1, 2, 3, 4, 7, 8, 16, 24, 64, 96, 127, 128, 255, 2**15, 2**16 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63]

NUMBERED = (DATASPACE, DATATYPE, LAYOUT)


class Base:
    """A file to mutate: its bytes, and where its metadata and its datasets lie."""

    def __init__(self, path: Path):
        self.data = path.read_bytes()
        with h5py.File(path, "r") as file:
            self.offsets = {
                name: (file[name].id.get_offset(), file[name].id.get_storage_size())
                for name in (
                    "manifest",
                    "id",
                    "train_checksums",
                    "test_checksums",
                    "random_checksums",
                    "teacher_weights",
                )
                if name in file
            }
            self.objects = [h5py.h5o.get_info(file[name].id).addr for name in self.offsets]
            messages = [message(path, name, number) for name in self.offsets for number in NUMBERED]
        self.manifest = json.loads(self.part(self.data, "manifest").rstrip(b"\0"))
        start, size = self.offsets["manifest"][0], len(self.part(self.data, "manifest").rstrip(b"\0"))
        structure = range(len(self.data[:start].rstrip(b"\0")) + 16)
        self.zones = [
            range(96),
            structure,
            [i for i in structure if self.data[i]],
            [at + i for at in messages for i in range(-8, 24)],
            range(start, start + size),
        ]
        self.messages = [*messages, *(self.data.index(name) - 8 for name in (b"format\0", b"version\0"))]
        self.addresses = [i for i in structure if self.data[i : i + 4] in (b"TREE", b"HEAP", b"SNOD")]

    def part(self, data: bytes | bytearray, name: str) -> bytes:
        offset, size = self.offsets[name]
        return bytes(data[offset : offset + size])

    def put(self, data: bytearray, name: str, part: bytes) -> None:
        offset, size = self.offsets[name]
        data[offset : offset + size] = part[:size]

    def identify(self, data: bytearray) -> None:
        """Make the id fit what the manifest and the checksums have become."""
        checksums = [self.part(data, name) for name in checksum_names(self.offsets)]
        self.put(data, "id", identify(self.part(data, "manifest"), checksums))


def bases(folder: Path) -> list[Base]:
    """Sound caches, also with a teacher or a random pool, one HDF5 has edited, and one with what the format has not."""
    tensors = safetensors.torch.save({"a": torch.ones(2, 3), "b": torch.arange(4)})
    manifest = plan({"train": 10, "test": 3}, dtype="<f4")
    manifest["teacher"]["weights_sha256"] = hashlib.sha256(tensors).hexdigest()
    write(folder / "plain.h5", plan({"train": 10, "test": 3}))
    write(folder / "pool.h5", plan({"train": 10, "test": 3}, pool=6))
    for name in ("teacher", "edited", "foreign"):
        write(folder / f"{name}.h5", manifest, tensors)
    with h5py.File(folder / "edited.h5", "r+") as file:  # an object header in two parts
        file["train_labels"].attrs["x"] = np.zeros(500)
        del file["train_labels"].attrs["x"]
    with h5py.File(folder / "foreign.h5", "r+") as file:
        file.create_group("group").create_dataset("x", data=np.zeros((40, 4)), chunks=(1, 1), compression="gzip")
        file["soft"] = h5py.SoftLink("/group/x")
        file["named"] = np.dtype([("a", "<f4"), ("b", h5py.string_dtype())])
        file["classes"].attrs["x"] = ["a", "variable"]
        file.create_dataset("chunked", data=np.zeros((40, 4)), chunks=(1, 1), shuffle=True, fletcher32=True)
        file.create_dataset("outside", shape=(4,), dtype="u1", external=[("none", 0, 4)])
    return [Base(folder / f"{name}.h5") for name in ("plain", "pool", "teacher", "edited", "foreign")]


def mutate(draw: random.Random, base: Base) -> tuple[bytearray, int, int]:
    """A mutated file, how many mutations it has, and how many of them are in metadata."""
    data, count, metadata = bytearray(base.data), draw.choice([1, 1, 2, 3, 6]), 0
    for _ in range(count):
        if draw.random() < 0.2:
            edit_manifest(draw, base, data)
            metadata += 1
            continue
        inside = draw.random() < 0.8
        mutate_bytes(draw, base, data, draw.choice(draw.choice(base.zones)) if inside else draw.randrange(len(data)))
        metadata += inside
    if draw.random() < 0.1:
        size = draw.choice([draw.randrange(len(data)), len(data) - 1, len(data) + draw.randrange(1, 5000)])
        data = data[:size].ljust(size, b"\0")
    if draw.random() < 0.6:
        base.identify(data)
    if draw.random() < 0.6:
        data[40:48] = struct.pack("<Q", len(data))
    return data, count, metadata


def mutate_bytes(draw: random.Random, base: Base, data: bytearray, at: int) -> None:
    match draw.randrange(7):
        case 0:
            data[at] ^= 1 << draw.randrange(8)
        case 1:
            data[at] = draw.choice([0, 1, 2, 3, 127, 128, 255, draw.randrange(256)])
        case 2 | 3:  # an address, a length or a count
            size = draw.choice([2, 4, 8, 8])
            number = draw.choice([*NUMBERS, *base.addresses, at, len(data), len(data) - 8, draw.randrange(len(data))])
            start = at - at % draw.choice([1, size])
            data[start : start + size] = ((number - draw.choice([0, 0, 0, 1])) % 2 ** (8 * size)).to_bytes(
                size, "little"
            )
        case 4:
            source, size = draw.choice(draw.choice(base.zones)), draw.choice([8, 16, 40, 128, 328])
            data[at : at + size] = base.data[source : source + size]
        case 5:
            size = draw.choice([1, 4, 8, 64])
            data[at : at + size] = bytes(size)
        case 6:
            share(draw, base, data)


def share(draw: random.Random, base: Base, data: bytearray) -> None:
    """Make a message one that lies in another object, perhaps in its own."""
    at, version = draw.choice(base.messages), draw.choice([1, 2, 3])
    data[at - 4] |= draw.choice([1, 2, 3])
    where = struct.pack("<Q", draw.choice([*base.objects, *base.objects, 96, draw.choice(NUMBERS)]))
    body = bytes([version, draw.choice([0, 1, 2, 3])]) + (bytes(6) if version == 1 else b"") + where
    data[at : at + len(body)] = body


def edit_manifest(draw: random.Random, base: Base, data: bytearray) -> None:
    """Change, add or remove a field, or the teacher's weights and their SHA-256; the id is made to fit."""
    manifest = json.loads(json.dumps(base.manifest))
    if "teacher_weights" in base.offsets and draw.random() < 0.4:
        offset, size = base.offsets["teacher_weights"]
        mutate_bytes(draw, base, data, offset + draw.randrange(size))
        manifest["teacher"]["weights_sha256"] = hashlib.sha256(data[offset : offset + size]).hexdigest()
    else:
        edit_field(draw, manifest)
    text = json.dumps(manifest, sort_keys=True, separators=(",", ":")).encode()
    base.put(data, "manifest", text.ljust(65536, b"\0"))
    base.identify(data)


def edit_field(draw: random.Random, section: dict) -> None:
    while isinstance(section[key := draw.choice(sorted(section))], dict) and section[key] and draw.random() < 0.9:
        section = section[key]
    texts = ["", "..", "../x", "x.py", "torchvision:resnet18", "[red]", "\x1b[2J\u202e", "\ud800", "x" * 2000]
    nested = [
        None,
        True,
        [],
        {},
        [None],
        {"a": {"b": []}},
        [[1]] * 20,
        {"count": 2, "flip": True, "seed": 0, "shift": 1},
    ]
    value = draw.choice([*NUMBERS, -1, 0.5, -0.0, 1e300, float("nan"), float("inf"), *texts, *nested])
    match draw.randrange(8):
        case 0:
            del section[key]
        case 1:
            section[draw.choice(["more", "\x1b", "x" * 200])] = value
        case _:
            section[key] = value


def exercise(cache: Cache) -> None:
    """Everything that people do with a cache, short of training."""
    for split in (cache.train, cache.test):
        for column in (split.features, split.logits, split.keys, split.digests, split.checksums):
            column.load()
            column.take(np.array([0, len(column) - 1]))
    with contextlib.redirect_stdout(io.StringIO()) as out:
        show_cache(cache)
    assert all(line.isprintable() for line in out.getvalue().splitlines())
    if cache.has_teacher:
        weights.parse(cache.teacher_weights(), "x")


def run(folder: Path, first: int, count: int) -> Iterator[tuple[str, float, int, int]]:
    """The cases' outcomes, seconds, mutations and mutations in metadata; `number` holds the case under way."""
    files, path, note = bases(folder), folder / "case.h5", (folder / "number").open("wb", buffering=0)
    for number in range(first, first + count):
        os.pwrite(note.fileno(), b"%12d" % number, 0)
        draw = random.Random(number)
        data, mutations, metadata = mutate(draw, draw.choice(files))
        path.write_bytes(data)
        start = time.process_time()
        outcome = "read"
        try:
            exercise(open_cache(path))
        except (CacheError, NetworkError) as problem:
            outcome = type(problem).__name__
            assert str(problem).isprintable() or outcome == "NetworkError", repr(problem)
        yield outcome, time.process_time() - start, mutations, metadata


def peak_memory() -> int:
    """Bytes; not `getrusage`, which counts what was there before this program began."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def main(folder: Path, first: int, count: int) -> None:
    list(run(folder, 0, 20))  # what is loaded on first use is no case's doing
    before = peak_memory()
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + 2 * MEMORY, size + 2 * MEMORY))
    results = list(run(folder, first, count))
    print(
        json.dumps(
            {
                "cases": len(results),
                "outcomes": Counter(outcome for outcome, *_ in results),
                "mutations": sum(mutations for *_, mutations, _ in results),
                "in metadata": sum(metadata for *_, metadata in results),
                "worst seconds": max(seconds for _, seconds, *_ in results),
                "peak bytes": peak_memory(),
                "bytes taken": peak_memory() - before,
            }
        )
    )


@pytest.mark.skipif(sys.platform != "linux", reason="memory is measured in /proc")
def test_only_cache_errors_come_out(tmp_path: Path) -> None:
    command = [sys.executable, __file__, str(tmp_path), "0", str(CASES)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60 + CASES / 10)
        ended = f"exit code {done.returncode}: {done.stderr[-3000:]}"
    except subprocess.TimeoutExpired:
        done, ended = None, "no end"
    assert done and done.returncode == 0, f"case {(tmp_path / 'number').read_text().strip()}: {ended}"
    results = json.loads(done.stdout)
    print(results)
    assert results["cases"] == CASES
    assert {"read", "NotACache"} <= results["outcomes"].keys()
    assert results["in metadata"] >= results["mutations"] / 2
    assert results["worst seconds"] < SECONDS
    assert results["bytes taken"] < MEMORY


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))

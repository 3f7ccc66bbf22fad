"""The skeleton of a new cache: an HDF5 file with every dataset allocated and empty."""

import errno
import os

import h5py
import numpy as np

from tspipe.cache.layout import FORMAT, VERSION, Dimensions


def write_skeleton(descriptor: int, dimensions: Dimensions, manifest: bytes, *, sparse: bool) -> None:
    """Turn an empty file into a version-1 file with all its space and this manifest.

    Space is reserved first, so that a full disk is detected before the teacher runs. A sparse file gets only its size
    and space for HDF5's own data.
    """
    size = sum(dtype.itemsize * int(np.prod(shape)) for dtype, shape in dimensions.datasets().values())
    _reserve(descriptor, size + 2**20, sparse=sparse)  # h5py crashes if a write fails
    try:
        offset = _create_datasets(f"/dev/fd/{descriptor}", dimensions)
    except (OSError, RuntimeError, ValueError, KeyError) as problem:  # h5py's exceptions for an error of the disk
        number = getattr(problem, "errno", None) or errno.EIO
        raise OSError(number, os.strerror(number)) from problem
    _reserve(descriptor, os.fstat(descriptor).st_size, sparse=sparse)
    os.pwrite(descriptor, manifest, offset)


def _create_datasets(path: str, dimensions: Dimensions) -> int:
    """Create the HDF5 structure; return the offset of the manifest."""
    # Datasets begin on page boundaries. No times are recorded, so the bytes are reproducible.
    with h5py.File(
        path, "w", locking=False, alignment_threshold=4096, alignment_interval=4096, meta_block_size=131072
    ) as file:
        file.attrs.create("format", np.bytes_(FORMAT))
        file.attrs.create("version", np.int64(VERSION), dtype="<i8")
        for name, (dtype, shape) in dimensions.datasets().items():
            properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
            properties.set_layout(h5py.h5d.CONTIGUOUS)
            properties.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
            properties.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
            properties.set_obj_track_times(False)
            h5py.h5d.create(
                file.id, name.encode("ascii"), h5py.h5t.py_create(dtype), h5py.h5s.create_simple(shape), properties
            )
        return int(file["manifest"].id.get_offset())


def _reserve(descriptor: int, size: int, *, sparse: bool) -> None:
    """Allocate a file's bytes on the disk now."""
    if sparse:
        os.ftruncate(descriptor, size)
        size = min(size, 2**20)
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
    else:  # macOS: rewrite existing bytes, and zeros beyond
        for start in range(0, size, 2**24):
            length = min(2**24, size - start)
            os.pwrite(descriptor, os.pread(descriptor, length, start).ljust(length, b"\0"), start)

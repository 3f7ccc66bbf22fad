"""What a hostile file may hold: each is refused, by name, before a row is read or another file is opened."""

import os
import struct
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from h5py import h5d, h5p, h5s, h5t

from forging import DATASPACE, DATATYPE, Change, message, move, overwrite, poke, refusal, stretch
from pets import plan, write
from tspipe.errors import CacheDamaged

CONTIGUOUS = "only contiguous datasets are allowed."
TYPE = "'train_features' has a type that the format does not allow."
BEYOND = "'train_labels' is damaged, or extends beyond the end of the file."
NOT_PLAIN = "its HDF5 structure uses features that the format does not allow."


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A sound cache to spoil."""
    path = tmp_path / "pets.h5"
    write(path, plan({"train": 10, "test": 3}), b"weights")
    return path


def edited(change: Callable[[h5py.File], object]) -> Change:
    """An attack that HDF5 itself can make."""

    def attack(path: Path) -> None:
        with h5py.File(path, "r+") as file:
            change(file)

    attack.__name__ = change.__name__
    return attack


def again(name: str = "train_features", **options: object) -> Change:
    """An attack that stores a dataset in another form."""

    def attack(path: Path) -> None:
        with h5py.File(path, "r+") as file:
            data = file[name][()]
            del file[name]
            shape, dtype = options.get("shape", data.shape), options.get("dtype", data.dtype)
            file.create_dataset(
                name, **{**options, "data": data.ravel()[: np.prod(shape)].reshape(shape), "dtype": dtype}
            )

    return attack


def typed(kind: h5t.TypeID, name: str = "train_features") -> Change:
    """An attack that gives a dataset another type; its bytes are allocated and zero."""

    def attack(path: Path) -> None:
        with h5py.File(path, "r+") as file:
            shape = file[name].shape
            del file[name]
            properties = h5p.create(h5p.DATASET_CREATE)
            properties.set_alloc_time(h5d.ALLOC_TIME_EARLY)
            h5d.create(file.id, name.encode(), kind, h5s.create_simple(shape), properties)

    return attack


def reduced(kind: h5t.TypeID, bits: int) -> h5t.TypeID:
    """A number of which some bits are padding."""
    kind = kind.copy()
    if kind.get_class() == h5t.FLOAT:
        kind.set_fields(bits - 1, bits - 6, 5, 0, bits - 6)
    kind.set_precision(bits)
    return kind


def padded(padding: int) -> h5t.TypeID:
    kind = h5t.C_S1.copy()
    kind.set_size(6)
    kind.set_strpad(padding)
    return kind


def of(dtype: object) -> h5t.TypeID:
    return h5t.py_create(np.dtype(dtype), logical=True)


# Other files. In these tests they are pipes: whoever opened one would wait for ever.


def external_storage(file: h5py.File) -> None:
    del file["id"]
    file.create_dataset("id", shape=(64,), dtype="u1", external=[(str(pipe(file)), 0, 64)])


def external_link(file: h5py.File) -> None:
    del file["train_features"]
    file["train_features"] = h5py.ExternalLink(pipe(file), "/features")


def external_link_in_a_group(file: h5py.File) -> None:
    del file["train_features"]
    file.create_group("train_features")["inner"] = h5py.ExternalLink(pipe(file), "/features")


def soft_link_through_an_external_one(file: h5py.File) -> None:
    file.create_group("outside")["x"] = h5py.ExternalLink(pipe(file), "/")
    del file["train_features"]
    file["train_features"] = h5py.SoftLink("/outside/x/features")


def virtual(file: h5py.File) -> None:
    layout = h5py.VirtualLayout((10, 5), "<f2")
    layout[:] = h5py.VirtualSource(pipe(file), "features", (10, 5))
    del file["train_features"]
    file.create_virtual_dataset("train_features", layout)


def unlimited_virtual(file: h5py.File) -> None:
    layout = h5py.VirtualLayout((10, 5), "<f2", maxshape=(None, 5))
    source = h5py.VirtualSource(pipe(file), "features", (10, 5), maxshape=(None, 5))
    layout[: h5s.UNLIMITED, :] = source[: h5s.UNLIMITED, :]
    del file["train_features"]
    file.create_virtual_dataset("train_features", layout)


def pipe(file: h5py.File) -> Path:
    path = Path(file.filename).with_name("pipe.h5")
    if not path.exists():
        os.mkfifo(path)
    return path


# Links


def soft_link(file: h5py.File) -> None:
    file["more"] = h5py.SoftLink("/train_features")


def soft_links_in_a_circle(file: h5py.File) -> None:
    file["a"], file["b"] = h5py.SoftLink("/b"), h5py.SoftLink("/a")


def second_name(file: h5py.File) -> None:
    file["more"] = file["train_features"]


def root_in_itself(file: h5py.File) -> None:
    file["more"] = file["/"]


def group(file: h5py.File) -> None:
    del file["train_features"]
    file.create_group("train_features")


def named_type(file: h5py.File) -> None:
    file["more"] = np.dtype("<f2")


def unknown(file: h5py.File) -> None:
    file.create_dataset("notes", data=np.zeros(3, "u1"))


def unprintable(file: h5py.File) -> None:
    file.create_dataset(b"\x1b[2J\xff", data=np.zeros(3, "u1"))


def missing(file: h5py.File) -> None:
    del file["test_keys"]


def many(file: h5py.File) -> None:
    for i in range(60):
        file[f"more{i}"] = h5py.SoftLink("/id")


def too_many_for_a_node(file: h5py.File) -> None:
    for i in range(300):
        file[f"more{i}"] = h5py.SoftLink("/id")


def one_name_twice(path: Path) -> None:
    names = path.read_bytes()
    poke(path, names.index(b"train_labels\0"), b"train_logits")


# Storage


def user_block(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(bytes(512) + data)


def user_block_that_begins_as_hdf5(path: Path) -> None:
    poke(path, 24, struct.pack("<Q", 512))


def instead(**options: object) -> Change:
    """An attack that puts another dataset in the place of the features."""

    def attack(path: Path) -> None:
        with h5py.File(path, "r+") as file:
            del file["train_features"]
            file.create_dataset("train_features", **options)

    return attack


def attribute(file: h5py.File) -> None:
    file["train_features"].attrs["units"] = "m"


def dimension_scale(file: h5py.File) -> None:
    file["train_labels"].make_scale("images")


def root_attribute(file: h5py.File) -> None:
    file.attrs["more"] = 1


def newer(file: h5py.File) -> None:
    file.attrs.modify("version", np.int64(2))


def stretched(rows: int) -> Change:
    return lambda path: stretch(path, "train_features", rows, 10)


def moved(address: int) -> Change:
    return lambda path: move(path, "train_labels", address)


def beyond_the_end(path: Path) -> None:
    move(path, "train_labels", path.stat().st_size - 8)


def tree_that_contains_itself(path: Path) -> None:
    """HDF5 2.0 dies of it: a stack overflow."""
    root = path.read_bytes().index(b"TREE")
    poke(path, root + 5, b"\1")
    poke(path, root + 32, struct.pack("<Q", root))


def group_whose_tree_contains_itself(path: Path) -> None:
    """HDF5 2.0 dies of it when asked for the group's kind."""
    with h5py.File(path, "r+") as file:
        file.create_group("more").create_group("inner")
    root = path.read_bytes().rindex(b"TREE", 0, path.read_bytes().rindex(b"TREE"))
    poke(path, root + 5, b"\1")
    poke(path, root + 32, struct.pack("<Q", root))


def message_that_lies_in_itself(path: Path, number: int = DATATYPE) -> None:
    """HDF5 2.0 dies of it."""
    with h5py.File(path, "r") as file:
        address = h5py.h5o.get_info(file["train_labels"].id).addr
    at = message(path, "train_labels", number)
    poke(path, at - 4, b"\2")
    poke(path, at, struct.pack("<BBQ", 3, 2, address))


def shape_that_lies_in_itself(path: Path) -> None:
    message_that_lies_in_itself(path, DATASPACE)


def attribute_of_a_shared_type(path: Path) -> None:
    poke(path, path.read_bytes().index(b"format\0") - 8, b"\3\1")


def header_that_continues_itself(path: Path) -> None:
    poke(path, 120, struct.pack("<QQ", 112, 24))  # its first message says that it goes on


def header_without_an_end(path: Path) -> None:
    poke(path, 96 + 8, struct.pack("<I", 2**31))


def header_beyond_the_end(path: Path) -> None:
    poke(path, 64, struct.pack("<Q", path.stat().st_size))


def newer_object(file: h5py.File) -> None:
    file.create_group("more", track_order=True)


ATTACKS: list[tuple[Change, str]] = [
    (edited(external_storage), "'id' stores its bytes in another file, which is not allowed."),
    (edited(external_link), "its root group is of a kind that can link to other files, which is not allowed."),
    (edited(external_link_in_a_group), "'train_features' is not a dataset."),
    (edited(soft_link_through_an_external_one), "'outside' is not a dataset."),
    (edited(soft_link), "'more' is a soft or external link; only hard links are allowed."),
    (edited(soft_links_in_a_circle), "'a' is a soft or external link; only hard links are allowed."),
    (edited(virtual), f"'train_features' is virtual; {CONTIGUOUS}"),
    (edited(unlimited_virtual), f"'train_features' is virtual; {CONTIGUOUS}"),
    (again(chunks=(5, 5)), f"'train_features' is chunked; {CONTIGUOUS}"),
    (again(maxshape=(None, 5)), f"'train_features' is chunked; {CONTIGUOUS}"),
    *(
        (again(**options), "'train_features' is filtered (compressed), which is not allowed.")
        for options in ({"compression": "gzip"}, {"compression": "lzf"}, {"shuffle": True}, {"fletcher32": True})
    ),
    (
        again("train_labels", scaleoffset=0),
        "'train_labels' is filtered (compressed), which is not allowed.",
    ),
    (user_block, "it begins with an HDF5 user block, which is not allowed."),
    (user_block_that_begins_as_hdf5, "its HDF5 superblock is not of version 0, the only one allowed."),
    (again(dtype="<f4"), "'train_features' is <f4 (10, 5); its manifest says <f2 (10, 5)."),
    (again("train_labels", dtype="<f4"), "'train_labels' is <f4 (10,); its manifest says <i8 (10,)."),
    *((typed(of(dtype)), TYPE) for dtype in (">f2", "<f8", "<i4", "<u2", "i1", "?", "c8", [("a", "<f2")], "V2")),
    (typed(of(">i8"), "train_labels"), "'train_labels' has a type that the format does not allow."),
    (typed(reduced(h5t.IEEE_F16LE, 12)), TYPE),
    (typed(reduced(h5t.IEEE_F32LE, 24)), TYPE),
    (typed(reduced(h5t.STD_I64LE, 40)), TYPE),
    (typed(h5t.vlen_create(h5t.IEEE_F16LE)), TYPE),
    (typed(h5t.array_create(h5t.IEEE_F16LE, (5,))), TYPE),
    (typed(h5t.STD_REF_OBJ), TYPE),
    (typed(h5t.STD_REF_DSETREG), TYPE),
    (typed(of(h5py.enum_dtype({"a": 1}, "<i2"))), TYPE),
    (typed(of(h5py.string_dtype())), TYPE),
    (typed(of(h5py.string_dtype("utf-8", 6))), TYPE),
    (typed(padded(h5t.STR_NULLTERM)), TYPE),
    (typed(padded(h5t.STR_SPACEPAD)), TYPE),
    (typed(of("S4097")), "'train_features' has names of up to 4,097 bytes; the format allows 4,096."),
    (stretched(2**40), "'train_features' is damaged, or extends beyond the end of the file."),
    (stretched(2**62), "'train_features' is damaged, or extends beyond the end of the file."),
    (again(shape=(5, 5)), "'train_features' is <f2 (5, 5); its manifest says <f2 (10, 5)."),
    (again(shape=(5, 10)), "'train_features' is <f2 (5, 10); its manifest says <f2 (10, 5)."),
    (instead(data=h5py.Empty("<f2")), "'train_features' has no fixed shape."),
    (instead(data=np.float16(1)), "'train_features' has no fixed shape."),
    (stretched(12), "'train_logits' overlaps 'train_features'."),
    (moved(8), "'train_labels' overlaps the HDF5 superblock."),
    (beyond_the_end, BEYOND),
    (moved(2**63), BEYOND),
    (moved(2**64 - 1), "'train_labels' has storage of the wrong size."),
    (instead(shape=(10, 5), dtype="<f2"), "'train_features' has storage of the wrong size."),
    (instead(shape=(0, 5), dtype="<f2"), "'train_features' has storage of the wrong size."),
    (edited(group), "'train_features' is not a dataset."),
    (edited(root_in_itself), "'more' is not a dataset."),
    (edited(named_type), "'more' is not a dataset."),
    (edited(unknown), "it holds 'notes', which is not in the format."),
    (edited(unprintable), "it holds '\\x1b[2J\\\\xff', which is not in the format."),
    (edited(second_name), "'train_features' overlaps 'more'."),
    (one_name_twice, "it holds 'train_logits' twice."),
    (edited(missing), "the dataset 'test_keys' is missing."),
    (edited(many), "it has more datasets than the format allows."),
    (edited(too_many_for_a_node), "it has more datasets than the format allows."),
    (again("train_labels", shape=(9,)), "'train_labels' is <i8 (9,); its manifest says <i8 (10,)."),
    (again("train_keys", shape=(9,)), "'train_keys' is |S6 (9,); its manifest says |S6 (10,)."),
    (again("test_digests", shape=(2, 8)), "'test_digests' is |u1 (2, 8); its manifest says |u1 (3, 8)."),
    (again("classes", shape=(1,)), "'classes' is |S4 (1,); its manifest says |S4 (2,)."),
    (
        again("train_checksums", shape=(2, 5, 32)),
        "'train_checksums' is |u1 (2, 5, 32); its manifest says |u1 (3, 5, 32).",
    ),
    (edited(attribute), "'train_features' has attributes, which are not allowed."),
    (edited(dimension_scale), "'train_labels' has attributes, which are not allowed."),
    (
        edited(root_attribute),
        "it is an HDF5 file, but not a tspipe cache (root attributes `format` and `version`).",
    ),
    (
        edited(newer),
        "it has format version 2; this tspipe reads version 1. A newer tspipe may read it: "
        "pip install --upgrade tspipe",
    ),
    (tree_that_contains_itself, "it has more datasets than the format allows."),
    (group_whose_tree_contains_itself, "'more' is not a dataset."),
    (message_that_lies_in_itself, NOT_PLAIN),
    (shape_that_lies_in_itself, NOT_PLAIN),
    (attribute_of_a_shared_type, NOT_PLAIN),
    (edited(newer_object), NOT_PLAIN),
    (header_that_continues_itself, NOT_PLAIN),
    (header_without_an_end, NOT_PLAIN),
    (header_beyond_the_end, "its HDF5 structure is damaged. Get the file again from its source."),
]


@pytest.mark.parametrize(("attack", "message"), ATTACKS)
def test_refused(cache: Path, attack: Change, message: str) -> None:
    attack(cache)
    assert refusal(cache) == message


def test_labels_outside_the_classes(cache: Path) -> None:
    for label in (2, -1, 2**62):
        overwrite(cache, "test_labels", struct.pack("<q", label), at=16)
        assert refusal(cache, CacheDamaged) == "test_labels has labels outside its 2 classes."

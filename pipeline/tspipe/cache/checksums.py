"""What identifies the content of a cache: checksums of blocks, the id, the dataset's fingerprint."""

import hashlib
from collections.abc import Iterable, Mapping

from tspipe.cache.column import Column
from tspipe.cache.layout import SPLITS, UNLABELLED, Dimensions


def checksum_names(names: Iterable[str]) -> list[str]:
    """Return those of `names` that are checksum datasets, in file order."""
    names = set(names)
    return [name for name in (f"{split}_checksums" for split in (*SPLITS, UNLABELLED, "random")) if name in names]


def identify(manifest: bytes, checksums: Iterable[bytes]) -> bytes:
    """Return a cache's id, 64 hex digits: SHA-256 over the manifest's 65,536 bytes and all checksums in file order."""
    digest = hashlib.sha256(manifest)
    for part in checksums:
        digest.update(part)
    return digest.hexdigest().encode("ascii")


def sha256_of(column: Column, rows: slice = slice(None)) -> bytes:
    """Return the SHA-256 of these rows of a column, as stored."""
    digest = hashlib.sha256()
    for _, piece in column.pieces(rows.start or 0, rows.stop):
        digest.update(piece.data)
    return digest.digest()


def block_checksums(columns: Mapping[str, Column], dimensions: Dimensions, split: str, block: int) -> bytes:
    """Return the SHA-256 of each column of a block, as stored, in the order of `dimensions.columns`."""
    images = dimensions.block(split, block)
    return b"".join(
        sha256_of(columns[f"{split}_{name}"], dimensions.column_rows(split, name, images))
        for name in dimensions.columns(split)
    )


def fingerprint(classes: bytes, columns: Mapping[str, Column]) -> str:
    """Return a dataset's identity: hex SHA-256 over classes, then labels ‖ keys ‖ digests of train, then of test."""
    digest = hashlib.sha256(classes)
    for name in (f"{split}_{column}" for split in SPLITS for column in ("labels", "keys", "digests")):
        for _, piece in columns[name].pieces():
            digest.update(piece.data)
    return digest.hexdigest()


def count_correct(columns: Mapping[str, Column], dimensions: Dimensions, split: str) -> int:
    """Return the teacher's number of correct predictions on a split, on the first, plain view of each image."""
    labels, views = columns[f"{split}_labels"].load(), dimensions.views_of(split)
    return sum(
        int((logits.argmax(axis=1) == labels[row // views :][: len(logits)]).sum())
        for row, logits in columns[f"{split}_logits"].pieces(step=views)
    )

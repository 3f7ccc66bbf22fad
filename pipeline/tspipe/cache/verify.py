"""Compares every byte of a cache with its checksums, and locates damage."""

import hashlib
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tspipe.cache.checksums import checksum_names, count_correct, fingerprint, identify, sha256_of
from tspipe.cache.inspect import Structure, inspect
from tspipe.cache.layout import CHECKSUM_BYTES, SPLITS
from tspipe.errors import CacheIncomplete
from tspipe.utils.threads import available_cores

_WINDOW = 64  # blocks per batch of threads
_MAX_ID_DIGITS = 8  # of 64: an id that differs in so few is itself damaged; another file's differs in about 60
_MAX_COMBINED = 8  # differing checksums of which every combination is tried
_MAX_LISTED = 8  # locations in a message
DAMAGED = "damaged"
AMBIGUOUS = "these rows or their checksums are damaged"
Advance = Callable[[int], object]
Checksums = dict[str, NDArray[np.uint8]]  # (blocks, columns, 32) by dataset


@dataclass(frozen=True)
class Damage:
    """Damaged rows of a dataset; `data` has the original bytes if they are known."""

    dataset: str
    rows: range
    reason: str = DAMAGED
    data: bytes | None = None

    @property
    def repairable(self) -> bool:
        """Whether the original bytes can be recovered; those of a manifest cannot."""
        return self.reason == DAMAGED

    @property
    def where(self) -> str:
        """The location as text: `train_features, rows 256 to 511`."""
        first, last = self.rows.start, self.rows.stop - 1
        return f"{self.dataset}, {f'row {first:,}' if first == last else f'rows {first:,} to {last:,}'}"


def find_damage(path: Path, advance: Advance = lambda count: None) -> list[Damage]:
    """Compare all rows with their checksums, the checksums with the id, and the rest with the manifest.

    Args:
        advance: called with the number of bytes read since the last call.

    Raises NotACache or CacheIncomplete, as opening does, if the structure or the manifest is invalid.
    """
    return _Verification(path, advance).damage()


def explain(path: Path, damage: list[Damage]) -> str:
    """Return a message that describes the damage and the remedy."""
    places = [part.where if part.repairable else f"{part.where} ({part.reason})" for part in damage]
    more = f"; and {len(places) - _MAX_LISTED} more" if len(places) > _MAX_LISTED else ""
    where = f"{path} is damaged: {'; '.join(places[:_MAX_LISTED])}{more}."
    if any(not part.repairable for part in damage):
        return f"{where} Get the file again from its source, or make it again: tspipe cache --force"
    return f"{where} Get the file again, or repair it: tspipe verify --repair {path}"


class _Verification:
    def __init__(self, path: Path, advance: Advance):
        structure = _structure(path)
        self.manifest, self.sizes, self.advance = structure.manifest, structure.dimensions, advance
        self.columns = structure.columns

    def damage(self) -> list[Damage]:
        names = checksum_names(self.columns)
        stored = {name: self.columns[name].load() for name in names}
        computed = {name: np.empty_like(checksums) for name, checksums in stored.items()}
        non_finite = [part for name in names for part in self._read(name.removesuffix("_checksums"), computed[name])]
        manifest, identity = (self.columns[name].load().tobytes() for name in ("manifest", "id"))
        original, expected = self._original_checksums(manifest, identity, stored, computed)
        digits = _count_differences(identity, expected)
        found_original = digits <= _MAX_ID_DIGITS
        problems = [part for name in names for part in self._damaged_rows(name, original, computed, found_original)]
        for name in names:
            for blocks in _runs((stored[name] != original[name]).any(axis=(1, 2))):
                data = original[name][blocks.start : blocks.stop].tobytes()
                problems.append(Damage(name, blocks, data=data))
        damaged = {part.dataset for part in problems}
        problems += [part for part in non_finite if part.dataset not in damaged]
        if found_original:
            problems += [Damage("id", range(len(identity)), data=expected)] if digits else []
        elif re.fullmatch(rb"[0-9a-f]{64}", identity) is None:
            problems.append(Damage("id", range(len(identity)), "not a SHA-256"))
        elif not problems:  # nothing else can be compared with it
            return [Damage("manifest", range(len(manifest)), "does not match the id")]
        return [*problems, *self._damage_without_checksums({part.dataset for part in problems})]

    def _original_checksums(
        self, manifest: bytes, identity: bytes, stored: Checksums, computed: Checksums
    ) -> tuple[Checksums, bytes]:
        """Return the combination of stored and computed checksums whose id is nearest to the file's, and that id."""
        differing = [(name, *at) for name in stored for at in np.argwhere((stored[name] != computed[name]).any(axis=2))]
        masks = range(2 ** len(differing)) if len(differing) <= _MAX_COMBINED else (0, -1)  # -1: all bits set
        best: tuple[int, Checksums, bytes] | None = None
        for mask in masks:
            mixed = {name: checksums.copy() for name, checksums in stored.items()}
            for bit, (name, block, column) in enumerate(differing):
                if mask >> bit & 1:
                    mixed[name][block, column] = computed[name][block, column]
            expected = identify(manifest, [checksums.tobytes() for checksums in mixed.values()])
            digits = _count_differences(identity, expected)
            if best is None or digits < min(best[0], _MAX_ID_DIGITS + 1):
                best = digits, mixed, expected
            if not digits:
                break
        assert best is not None
        return best[1:]

    def _read(self, split: str, checksums: NDArray[np.uint8]) -> Iterator[Damage]:
        """Read a split, fill in its checksums, and yield non-finite values."""
        blocks = range(self.sizes.blocks(split))
        with ThreadPoolExecutor(available_cores()) as pool:  # hashlib releases the GIL
            for start in blocks[::_WINDOW]:
                window = blocks[start : start + _WINDOW]
                results = pool.map(lambda block: self._block(split, block), window)
                for block, (block_checksums, count, non_finite) in zip(window, results, strict=True):
                    checksums[block] = block_checksums
                    self.advance(count)
                    yield from non_finite

    def _block(self, split: str, block: int) -> tuple[NDArray[np.uint8], int, list[Damage]]:
        """Return a block's checksums (columns, 32), its size in bytes, and its non-finite values."""
        images, names = self.sizes.block(split, block), self.sizes.columns(split)
        count, non_finite, checksums = 0, [], b""
        for name in names:
            column, rows = self.columns[f"{split}_{name}"], self.sizes.column_rows(split, name, images)
            digest = hashlib.sha256()
            for start, piece in column.pieces(rows.start, rows.stop):
                digest.update(piece.data)
                count += piece.nbytes
                if piece.dtype.kind == "f" and (values := _not_finite(piece)).any():
                    row = start + int(values.any(axis=1).argmax())
                    non_finite.append(Damage(f"{split}_{name}", range(row, row + 1), "NaN or infinite"))
            checksums += digest.digest()
        return np.frombuffer(checksums, np.uint8).reshape(len(names), CHECKSUM_BYTES), count, non_finite

    def _damaged_rows(self, name: str, original: Checksums, computed: Checksums, certain: bool) -> Iterator[Damage]:
        """Yield the rows with wrong checksums, column by column; adjacent blocks are joined."""
        split = name.removesuffix("_checksums")
        for i, column in enumerate(self.sizes.columns(split)):
            for blocks in _runs((original[name][:, i] != computed[name][:, i]).any(axis=1)):
                first, last = self.sizes.block(split, blocks[0]), self.sizes.block(split, blocks[-1])
                rows = self.sizes.column_rows(split, column, range(first.start, last.stop))
                yield Damage(f"{split}_{column}", range(rows.start, rows.stop), DAMAGED if certain else AMBIGUOUS)

    def _damage_without_checksums(self, damaged: set[str]) -> Iterator[Damage]:
        """Yield damage that only the manifest reveals: in weights, classes, and the teacher's correct predictions."""
        weights = self.columns.get("teacher_weights")
        if weights is not None and sha256_of(weights).hex() != self.manifest["teacher"]["weights_sha256"]:
            yield Damage("teacher_weights", range(len(weights)))
        program = self.columns.get("teacher_program")
        if program is not None and sha256_of(program).hex() != self.manifest["teacher"]["program_sha256"]:
            yield Damage("teacher_program", range(len(program)), "does not match its SHA-256")
        described = {f"{split}_{column}" for split in SPLITS for column in ("labels", "keys", "digests")}
        classes = self.columns["classes"].load()
        wrong = fingerprint(classes.tobytes(), self.columns) != self.manifest["dataset"]["fingerprint"]
        if wrong and not damaged & described:
            yield Damage("classes", range(len(classes)))
        for split in SPLITS:
            keys, count = self.columns[f"{split}_keys"].load(), self.manifest["teacher"]["correct"][split]
            if f"{split}_keys" not in damaged and len(np.unique(keys)) < len(keys):
                yield Damage(f"{split}_keys", range(len(keys)), "two images have the same key")
            if (
                not damaged & {f"{split}_logits", f"{split}_labels"}
                and count_correct(self.columns, self.sizes, split) != count
            ):
                yield Damage(f"{split}_logits", range(self.sizes.images(split)), f"not {count:,} correct predictions")


def _structure(path: Path) -> Structure:
    """Return a file's structure, whatever its id, even if the id of a finished file was overwritten with zeros."""
    try:
        return inspect(path, identified=False)
    except CacheIncomplete:
        structure = inspect(path, finished=False)
        if path.suffix == ".part" or structure.manifest["dataset"]["fingerprint"] is None:
            raise
        return structure


def _count_differences(first: bytes, second: bytes) -> int:
    return sum(a != b for a, b in zip(first, second, strict=True))


def _runs(which: NDArray[np.bool_]) -> Iterator[range]:
    """Yield the ranges of consecutive true values."""
    places = np.flatnonzero(which)
    for run in np.split(places, np.flatnonzero(np.diff(places) > 1) + 1):
        if len(run):
            yield range(int(run[0]), int(run[-1]) + 1)


def _not_finite(values: NDArray[np.floating]) -> NDArray[np.bool_]:
    """Return where float16 or float32 is NaN or infinite (all exponent bits set); numpy.isfinite is 10 × slower."""
    exponent = 0x7C00 if values.itemsize == 2 else 0x7F800000
    bits = values.view(f"<u{values.itemsize}")
    return np.equal(np.bitwise_and(bits, exponent), exponent)  # type: ignore[no-any-return]

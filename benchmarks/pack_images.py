"""Packs a folder of small PNGs of one size without loss, in fewer bytes than the PNGs, to take it to another machine.

python benchmarks/pack_images.py pack FOLDER NAME [PIECES]   writes NAME-0.zip, NAME-1.zip, …, each with some classes
python benchmarks/pack_images.py unpack FOLDER PIECE…        writes FOLDER/SPLIT/CLASS/IMAGE.png again

Channels are coded as differences to green, and pixels as differences to their neighbours (as PNG's filters do), with
one Huffman code for all images of a class. Packed pixels have a SHA-256, which unpacking checks.
"""

import hashlib
import json
import sys
import zipfile
import zlib
from multiprocessing import Pool
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]  # (n, H, W, 3)


def encode(pixels: Pixels) -> bytes:
    planes = pixels.transpose(3, 0, 1, 2).copy()
    planes[[0, 2]] -= planes[1]
    for axis in (3, 2):
        planes = np.diff(planes, axis=axis, prepend=np.uint8(0))
    coder = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY)
    return coder.compress(planes.tobytes()) + coder.flush()


def decode(data: bytes, shape: tuple[int, int, int, int]) -> Pixels:
    """Return the pixels of this shape (n, H, W, 3)."""
    planes = np.frombuffer(zlib.decompress(data, -15), np.uint8).reshape(3, *shape[:3])
    for axis in (2, 3):
        planes = np.cumsum(planes, axis=axis, dtype=np.uint8)
    planes[[0, 2]] += planes[1]
    return np.ascontiguousarray(planes.transpose(1, 2, 3, 0))


def pack(folder: Path, name: str, pieces: int = 2) -> None:
    classes = sorted(path for path in folder.glob("*/*") if path.is_dir())
    for number in range(pieces):
        with zipfile.ZipFile(f"{name}-{number}.zip", "w") as piece:
            for path in classes:
                if sorted(other.name for other in path.parent.iterdir()).index(path.name) % pieces != number:
                    continue
                files = sorted(path.glob("*.png"))
                pixels = np.stack([np.asarray(Image.open(file)) for file in files])
                facts = {"names": [file.name for file in files], "shape": pixels.shape, "sha256": sha256(pixels)}
                member = f"{path.parent.name}/{path.name}"
                piece.writestr(f"{member}.json", json.dumps(facts), zipfile.ZIP_DEFLATED)
                piece.writestr(f"{member}.pixels", encode(pixels))
        print(f"{piece.filename}: {Path(str(piece.filename)).stat().st_size:,} bytes")


def unpack(folder: Path, pieces: list[str]) -> None:
    members = [
        (folder, path, name.removesuffix(".json"))
        for path in pieces
        for name in zipfile.ZipFile(path).namelist()
        if name.endswith(".json")
    ]
    with Pool() as pool:
        print(f"{folder}: {sum(pool.starmap(unpack_class, members)):,} images")


def unpack_class(folder: Path, path: str, member: str) -> int:
    with zipfile.ZipFile(path) as piece:
        facts = json.loads(piece.read(f"{member}.json"))
        pixels = decode(piece.read(f"{member}.pixels"), facts["shape"])
    if sha256(pixels) != facts["sha256"]:
        raise SystemExit(f"{path} is damaged: {member} has other pixels than were packed.")
    (folder / member).mkdir(parents=True, exist_ok=True)
    for name, image in zip(facts["names"], pixels, strict=True):
        Image.fromarray(image).save(folder / member / Path(name).name, compress_level=1)
    return len(pixels)


def sha256(pixels: Pixels) -> str:
    return hashlib.sha256(np.ascontiguousarray(pixels)).hexdigest()


if __name__ == "__main__":
    command, target, *rest = sys.argv[1:]
    if command == "pack":
        pack(Path(target), rest[0], *map(int, rest[1:]))
    else:
        unpack(Path(target), rest)

"""Transfers caches to and from a mounted folder, a bucket, a hub, or a web server (pull only).

Beside each file is a `NAME.h5.sha256` in the format of `sha256sum -c`. Transferred bytes are compared with it, and at
both ends a file appears under its name only when it is complete.
"""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import Any

from tspipe.cache.checksums import checksum_names
from tspipe.cache.column import Column
from tspipe.cache.inspect import inspect
from tspipe.cache.manifest import Manifest
from tspipe.cache.read import Cache, open_cache
from tspipe.cache.remote import (
    Advance,
    ReadPiece,
    Remote,
    RemoteError,
    file_name,
    is_url,
    without_secrets,
)
from tspipe.errors import CacheBusy, CacheDamaged, CacheError, CacheMismatch
from tspipe.utils.files import lock, sync_folder, write_whole

__all__ = [
    "Advance",
    "Fetched",
    "Peek",
    "Pulled",
    "Pushed",
    "RemoteError",
    "carried",
    "fetch",
    "file_name",
    "is_url",
    "peek",
    "pull",
    "push",
    "remote_size",
    "without_secrets",
]

_CHUNK = 4 * 2**20
_HEAD = 200 * 2**10  # bytes that contain HDF5's metadata, the manifest, the id and the first class names
_PEEK = 252 * 2**10  # the most that a peek reads


@dataclass(frozen=True)
class Pushed:
    """A cache at `address` (without secrets); `new` is False if it was there before."""

    address: str
    sha256: str
    new: bool


@dataclass(frozen=True)
class Pulled:
    """A cache at `path`; `new` is False if it was there before.

    If `stated` is False, no SHA-256 was published, and only the checksums inside the file can show that it is complete.
    """

    path: Path
    sha256: str
    new: bool
    stated: bool


@dataclass(frozen=True)
class Fetched:
    """The local copy of a remote cache.

    `how` is `fetched`, `unchanged` or `unreachable`; `problem` then says why the remote could not be reached. `stated`
    is that of `Pulled`, or True for a copy that was there before.
    """

    path: Path
    how: str
    problem: str = ""
    stated: bool = True


@dataclass(frozen=True)
class Peek:
    """What the head of a remote cache contains.

    Its structure and manifest are checked as a local file's are. `identified` says whether its id is checked too, which
    takes all checksums; a large cache has too many.
    """

    name: str
    size: int
    id: str
    classes: list[str]  # the first ones; their number is in the manifest
    manifest: Manifest
    has_images: bool
    has_teacher: bool
    identified: bool


def remote_size(url: str) -> int | None:
    """Return the size in bytes of the file at an address, or None if unknown. Raises CacheError."""
    return Remote.at(url).size()


def push(path: Path, url: str, advance: Advance, *, force: bool = False) -> Pushed:
    """Publish a cache with its SHA-256 beside it. It is read back before it gets its name.

    Args:
        path: the cache, which the caller has opened and thereby checked.
        url: an address or path, of the file if it ends in `.h5`, else of its folder.
        advance: called with the bytes moved, in total twice the file's size.
        force: replace another file of that name.

    Raises CacheMismatch if another file has that name, CacheDamaged if the bytes read back differ, CacheError.
    """
    target = _target(path, url)
    if not force and (size := target.existing_size()) is not None:
        if (pushed := _same(path, target, size)) is not None:
            return pushed
        remedy = "Push under another name, or replace it: --force"
        raise CacheMismatch(f"{target.shown} is not the same file as {path}. {remedy}")
    digest = hashlib.sha256()

    def upload(part: Remote) -> None:
        part.write(_read(path, digest, advance))
        if part.sha256(advance) != digest.hexdigest():
            raise CacheDamaged(f"{target.shown} differs from what was written. Run the same command again.")
        target.checksum.remove()  # that of an older file: until the new one exists, none is better than a wrong one

    target.clear()
    target.publish(upload)
    _state(target, digest.hexdigest())
    return Pushed(target.shown, digest.hexdigest(), new=True)


def pull(url: str, path: Path, advance: Advance, *, force: bool = False) -> Pulled:
    """Download a cache. An interrupted pull of the same bytes resumes.

    Args:
        url: the address or path of the file.
        path: the local file; take its name from `file_name`, not from the address itself.
        advance: called with the bytes moved, including those of an earlier attempt.
        force: replace another file at `path`.

    Raises CacheMismatch if another file is at `path`, CacheDamaged if the bytes are not those pushed, CacheBusy if
    another process pulls to `path`, NotACache, CacheIncomplete, CacheError.
    """
    remote = Remote.at(url)
    with _local_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with lock(path, CacheBusy):
            size, stated = remote.size(), remote.stated()
            if path.exists():
                if stated and path.stat().st_size == size and _sha256(path) == stated:
                    return Pulled(path, stated, new=False, stated=True)
                if not force:
                    raise CacheMismatch(f"{path} may not be {remote.shown}. Delete it, or replace it: --force")
            part = _part(path, stated)
            sha256 = _download(remote, part, size, advance)
            _check(part, sha256, stated, remote.shown)
            part.replace(path)
            sync_folder(path.parent)
    return Pulled(path, sha256, new=True, stated=stated is not None)


def fetch(url: str, advance: Advance, home: Path | None = None) -> Fetched:
    """Return the local copy of a remote cache, updated if the remote can be reached.

    `home` is the folder of all copies, by default `$XDG_CACHE_HOME/tspipe`. Raises as `pull`, except that an existing
    copy is returned if the remote cannot be reached.
    """
    folder = (home or _home()) / hashlib.sha256(url.encode()).hexdigest()[:16]
    path = folder / file_name(url)
    note = path.with_suffix(".json")
    if path.exists() and _noted(note, "copy") != _copy(path):  # truncated or modified since
        with _local_errors(path):
            path.unlink()
    try:
        version = Remote.at(url).version()
        if version and path.exists() and _noted(note, "version") == version:
            return Fetched(path, "unchanged")
        pulled = pull(url, path, advance, force=True)
    except RemoteError as problem:
        if not path.exists():
            raise
        return Fetched(path, "unreachable", str(problem))
    with _local_errors(note):
        facts = {"url": without_secrets(url), "version": version, "copy": _copy(path)}
        write_whole(note, json.dumps(facts).encode())
    return Fetched(path, "fetched" if pulled.new else "unchanged", stated=pulled.stated)


def peek(url: str) -> Peek:
    """Describe a remote cache of any size with at most four requests and 256 KiB.

    Raises NotACache, CacheIncomplete or CacheDamaged as for a local file, and CacheError.
    """
    remote = Remote.at(url)
    with tempfile.TemporaryDirectory(prefix="tspipe-") as folder:
        # The head goes into a sparse file of the full size, so that the checks work as for a local file.
        sparse = Path(folder) / file_name(url)
        with _renamed_errors(sparse, remote.shown), remote.pieces() as read:
            head, size = read(0, _HEAD)
            with _local_errors(sparse):
                sparse.write_bytes(head)
                os.truncate(sparse, size)
            columns = inspect(sparse, identified=False).columns
            identified = _complete(sparse, columns, read, requests=3 if remote.web else 2)
            structure = inspect(sparse, identified=identified)
            columns, names = structure.columns, structure.columns["classes"]
            return Peek(
                name=sparse.name,
                size=size,
                id=columns["id"].load().tobytes().decode("ascii", "replace"),
                classes=_texts(names[: max(0, len(head) - names.offset) // names.dtype.itemsize]),
                manifest=structure.manifest,
                has_images="train_images" in columns,
                has_teacher="teacher_weights" in columns,
                identified=identified,
            )


def carried(cache: Cache) -> list[str]:
    """List the contents of a cache with their licences, a line each. The text is from the file: escape it."""
    dataset, teacher = cache.manifest["dataset"], cache.manifest["teacher"]
    lines = [f"features of {dataset['name']}; its licence: {dataset['license'] or 'not stated'}"]
    if cache.has_images:
        lines.append(f"the pixels of the images of {dataset['name']}, under the same licence")
    if cache.has_teacher:
        weights = f"{teacher['network']}, {teacher['weights_sha256'][:12]}"
        lines.append(f"the teacher's weights ({weights}); their licence is their publisher's")
    return lines


def _target(path: Path, url: str) -> Remote:
    """Return the target of a push."""
    if not url or not path.name.isprintable():
        raise CacheError(f"{path.name!r} cannot be pushed to {url!r}. Give a folder or an address, and a plain name.")
    target = Remote.at(url)
    if target.web:
        raise CacheError(
            f"{target.shown}: a web server does not accept files. Push to a mounted folder, s3://, gs:// or hf://."
        )
    return target if target.shown.endswith(".h5") and not target.is_folder() else target.child(path.name)


def _same(path: Path, target: Remote, size: int) -> Pushed | None:
    """Return the result of a push if the target already has the same bytes."""
    with _local_errors(path):
        if path.stat().st_size != size:
            return None
        sha256 = _sha256(path)
    if sha256 != target.sha256():  # read them, whatever is published: remote disks fail too
        return None
    if target.stated() != sha256:  # the push that wrote them was killed before this
        _state(target, sha256)
    return Pushed(target.shown, sha256, new=False)


def _state(target: Remote, sha256: str) -> None:
    """Write the checksum file, in the format of `sha256sum -c`."""
    line = f"{sha256}  {target.name}\n".encode()
    target.checksum.publish(lambda part: part.write([line]))


def _read(path: Path, digest: Any, advance: Advance) -> Iterator[bytes]:
    """Yield a file's bytes, updating their digest."""
    with _local_errors(path), path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            yield chunk
            advance(len(chunk))


def _part(path: Path, stated: str | None) -> Path:
    """Return the file that a pull writes into, named after its content; remove those of other content."""
    part = path.with_name(f".{path.name}.{(stated or '0' * 16)[:16]}.part")
    for other in path.parent.glob(f".{escape(path.name)}.{'[0-9a-f]' * 16}.part"):
        if other != part or not stated:  # without a SHA-256, the rest may not match
            other.unlink()
    return part


def _download(remote: Remote, part: Path, size: int | None, advance: Advance) -> str:
    """Complete the part file from where an earlier pull stopped; return its SHA-256."""
    # Not through a link, which somebody may have planted in a shared folder.
    with os.fdopen(os.open(part, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o666), "a+b") as file:
        have = file.seek(0, os.SEEK_END)
        if size is None or have > size:
            file.truncate(have := 0)
        elif size - have > (free := shutil.disk_usage(part.parent).free):
            more = f"{remote.shown} needs {size - have:,} more bytes, and {free:,} are free"
            raise CacheError(f"{part.parent}: {more}. Free some space, then run the same command again.")
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256")
        if have != size:
            with remote.open_at(have) as (source, begins_there):
                if not begins_there:
                    file.truncate(have := 0)
                    digest = hashlib.sha256()
                advance(have)
                for chunk in remote.chunks(source):
                    file.write(chunk)
                    digest.update(chunk)
                    advance(len(chunk))
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def _check(part: Path, sha256: str, stated: str | None, shown: str) -> None:
    """Raise, and delete the part file, if it is not what was pushed or not a valid cache."""
    try:
        if stated and sha256 != stated:
            raise CacheDamaged(
                f"{shown} arrived with SHA-256 {sha256[:12]}, not {stated[:12]}: it is damaged, or was replaced "
                "meanwhile. Run the same command again; if that does not help, push the file again."
            )
        with _renamed_errors(part, shown):
            open_cache(part)
    except CacheError:
        part.unlink(missing_ok=True)
        raise


def _complete(sparse: Path, columns: dict[str, Column], read: ReadPiece, requests: int) -> bool:
    """Fetch the checksums that are not in the head, unless they are too many; return whether all are present."""
    left = [columns[name] for name in checksum_names(columns)]
    left = [column for column in left if column.offset + column.nbytes > _HEAD]
    if len(left) > requests or sum(column.nbytes for column in left) > _PEEK - _HEAD:
        return False
    with _local_errors(sparse), sparse.open("r+b") as file:
        for column in left:
            file.seek(column.offset)
            file.write(read(column.offset, column.offset + column.nbytes)[0])
    return True


def _texts(names: Any) -> list[str]:
    return [name.decode("utf-8", "replace") for name in names.tolist()]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _home() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tspipe"


def _copy(path: Path) -> list[int]:
    """Return what changes when a copy is modified."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def _noted(note: Path, what: str) -> Any:
    """Return what an earlier fetch recorded, or None."""
    try:
        return json.loads(note.read_bytes())[what]
    except (OSError, ValueError, KeyError, TypeError):
        return None


@contextlib.contextmanager
def _local_errors(path: Path) -> Iterator[None]:
    """Turn errors of the local disk into one sentence."""
    try:
        yield
    except (OSError, OverflowError) as problem:  # a server may claim an impossible length
        why = getattr(problem, "strerror", None) or problem
        raise CacheError(f"{path}: {why}. Fix that, then run the same command again.") from problem


@contextlib.contextmanager
def _renamed_errors(path: Path, shown: str) -> Iterator[None]:
    """Name the address in errors about a temporary file."""
    try:
        yield
    except CacheError as problem:
        raise type(problem)(str(problem).replace(str(path), shown)) from problem.__cause__

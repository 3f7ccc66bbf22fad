"""Transfers caches, students and exports to and from a mounted folder, a bucket, a hub, or a web server (pull only).

Beside each file is a `NAME.sha256` in the format of `sha256sum -c`. Transferred bytes are compared with it, and at
both ends a file appears under its name only when it is complete and verified.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import Any

from tspipe.cache.address import CACHE_SUFFIX, file_name, without_secrets
from tspipe.cache.object_headers import SUPERBLOCK_BYTES, recorded_size
from tspipe.cache.read import Cache, open_cache
from tspipe.cache.remote import Advance, Remote, RemoteError, open_remote
from tspipe.cache.verify import find_damage
from tspipe.errors import CacheBusy, CacheDamaged, CacheError, CacheMismatch, NotACache
from tspipe.utils.files import lock, open_without_links, sync_folder, write_at, write_whole
from tspipe.utils.reading import read_file

_CHUNK = 4 * 2**20
_AGAIN = "Run the same command again; if that does not help, push the file again."


@dataclass(frozen=True)
class Pushed:
    """A file at `address` (without secrets); `new` is False if it was there before."""

    address: str
    sha256: str
    new: bool


@dataclass(frozen=True)
class Pulled:
    """A file at `path`; `new` is False if it was there before.

    If `published` is False, no SHA-256 was beside the file. A cache was then verified with the checksums inside.
    """

    path: Path
    sha256: str
    new: bool
    published: bool


@dataclass(frozen=True)
class Fetched:
    """The local copy of a remote file.

    `status` is `fetched`, `unchanged` or `unreachable`; `problem` then says why the remote could not be reached.
    """

    path: Path
    status: str
    problem: str = ""


def remote_size(url: str) -> int | None:
    """Return the size in bytes of the file at an address, or None if unknown. Raises CacheError."""
    size: int | None = open_remote(url).info().get("size")
    return size


def push(path: Path, url: str, advance: Advance, *, force: bool = False) -> Pushed:
    """Publish a file with its SHA-256 beside it. It is read back before it gets its name.

    Args:
        path: the file, which the caller has opened and thereby checked.
        url: an address or path, of the file if it ends as `path` does (`.h5`), else of its folder.
        advance: called with the bytes moved, in total twice the file's size.
        force: replace another file of that name.

    Raises CacheMismatch if another file has that name, CacheDamaged if the bytes read back differ, CacheError.
    """
    target = _target(path, url)
    target.remove_abandoned()
    if not force and (info := target.info_if_present()) is not None:
        if (pushed := _same(path, target, info.get("size"))) is not None:
            return pushed
        remedy = "Push under another name, or replace it: --force"
        raise CacheMismatch(f"{target.address} is not the same file as {path}. {remedy}")
    digest = hashlib.sha256()

    def upload(part: Remote) -> None:
        part.write(_read(path, digest, advance))
        if part.sha256(advance) != digest.hexdigest():
            raise CacheDamaged(f"{target.address} differs from what was written. Run the same command again.")
        target.checksum.remove()  # that of an older file: until the new one exists, none is better than a wrong one

    target.publish(upload)
    _publish_sha256(target, digest.hexdigest())
    return Pushed(target.address, digest.hexdigest(), new=True)


def pull(url: str, path: Path, advance: Advance, *, force: bool = False) -> Pulled:
    """Download a file and verify it; a cache is one whose name ends in `.h5`. An interrupted pull resumes.

    Args:
        url: the address or path of the file.
        path: the local file; take its name from `file_name`, not from the address itself.
        advance: called with the bytes moved, including those of an earlier attempt.
        force: replace another file at `path`.

    Raises CacheMismatch if another file is at `path`, CacheDamaged if the bytes are not those pushed, CacheBusy if
    another process pulls to `path`, NotACache, CacheIncomplete, CacheError.
    """
    remote = open_remote(url)
    with local_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with lock(path, CacheBusy):
            size, published = remote.info().get("size"), remote.published_sha256()
            if size is None and path.suffix != CACHE_SUFFIX:  # a cache's first bytes tell its size
                raise CacheError(f"{remote.address}: its server does not say how large it is. Download it yourself.")
            if path.exists():
                if published and path.stat().st_size == size and _sha256(path) == published:
                    return Pulled(path, published, new=False, published=True)
                if not force:
                    raise CacheMismatch(f"{path} may not be {remote.address}. Delete it, or replace it: --force")
            part = _part(path, published)
            try:
                sha256 = _download(remote, part, size, advance)
                _verify(part, sha256, published, remote.address, is_cache=path.suffix == CACHE_SUFFIX)
            except BaseException:
                if not published or (part.is_file() and not part.stat().st_size):  # it cannot be resumed
                    part.unlink(missing_ok=True)
                raise
            part.replace(path)
            sync_folder(path.parent)
    return Pulled(path, sha256, new=True, published=published is not None)


def fetch(url: str, advance: Advance, home: Path | None = None) -> Fetched:
    """Return the local copy of a remote file, updated if the remote can be reached.

    `home` is the folder of all copies, by default `$XDG_CACHE_HOME/tspipe`. Raises as `pull`, except that an existing
    copy is returned if the remote cannot be reached.
    """
    path = (home or _copies()) / hashlib.sha256(url.encode()).hexdigest()[:16] / file_name(url)
    record = path.with_suffix(".json")
    if path.exists() and _recorded(record, "copy") != _stamp(path):  # truncated or modified since
        with local_errors(path):
            path.unlink()
    try:
        version = open_remote(url).version()
        if version and path.exists() and _recorded(record, "version") == version:
            return Fetched(path, "unchanged")
        pulled = pull(url, path, advance, force=True)
    except RemoteError as problem:
        if not path.exists():
            raise
        return Fetched(path, "unreachable", str(problem))
    with local_errors(record):
        facts = {"url": without_secrets(url), "version": version, "copy": _stamp(path)}
        write_whole(record, json.dumps(facts).encode())
    return Fetched(path, "fetched" if pulled.new else "unchanged")


def _copies() -> Path:
    """Return the folder of all copies, and create it."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tspipe"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as problem:  # no home folder is a RuntimeError
        raise CacheError(
            f"There is no folder for copies of remote caches ({problem}). Name one: export XDG_CACHE_HOME=FOLDER"
        ) from problem
    return folder


def describe_contents(cache: Cache) -> list[str]:
    """List the contents of a cache with their licences, a line each. The text is from the file: escape it."""
    dataset, teacher = cache.manifest["dataset"], cache.manifest["teacher"]
    lines = [f"features of {dataset['name']}; its licence: {dataset['license'] or 'not stated'}"]
    if cache.has_images:
        lines.append(f"the pixels of the images of {dataset['name']}, under the same licence")
    if cache.has_teacher:
        weights = f"{teacher['network']}, {teacher['weights_sha256'][:12]}"
        lines.append(f"the teacher's weights ({weights}); their licence is their publisher's")
    if "program_sha256" in teacher:
        lines.append("the teacher's operations, which run without its Python file")
    return lines


def _target(path: Path, url: str) -> Remote:
    """Return the target of a push."""
    if not url or not path.name.isprintable():
        address = without_secrets(url)
        raise CacheError(
            f"{path.name!r} cannot be pushed to {address!r}. Give a folder or an address, and a plain name."
        )
    target = open_remote(url)
    if target.web:
        raise CacheError(
            f"{target.address}: a web server does not accept files. Push to a mounted folder, s3://, gs:// or hf://."
        )
    is_folder = (target.info_if_present() or {}).get("type") == "directory"
    return target if target.address.endswith(path.suffix) and not is_folder else target.child(path.name)


def _same(path: Path, target: Remote, size: int | None) -> Pushed | None:
    """Return the result of a push if the target already has the same bytes."""
    with local_errors(path):
        if path.stat().st_size != size:
            return None
        sha256 = _sha256(path)
    if sha256 != target.sha256():  # read them, whatever is published: remote disks fail too
        return None
    if target.published_sha256() != sha256:  # the push that wrote them was killed before this
        _publish_sha256(target, sha256)
    return Pushed(target.address, sha256, new=False)


def _publish_sha256(target: Remote, sha256: str) -> None:
    """Write the checksum file, in the format of `sha256sum -c`."""
    line = f"{sha256}  {target.name}\n".encode()
    target.checksum.publish(lambda part: part.write([line]))


def _read(path: Path, digest: Any, advance: Advance) -> Iterator[bytes]:
    """Yield a file's bytes, updating their digest."""
    with local_errors(path), path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            yield chunk
            advance(len(chunk))


def _part(path: Path, published: str | None) -> Path:
    """Return the file that a pull writes into, named after its content; remove those of other content."""
    part = path.with_name(f".{path.name}.{(published or '0' * 16)[:16]}.part")
    for other in path.parent.glob(f".{escape(path.name)}.{'[0-9a-f]' * 16}.part"):
        if other != part or not published:  # without a SHA-256, the rest may not match
            other.unlink()
    return part


def _download(remote: Remote, part: Path, announced: int | None, advance: Advance) -> str:
    """Complete the part file from where an earlier pull stopped; return its SHA-256.

    No more bytes are written than the server announces or the head of the file records.
    """
    with os.fdopen(open_without_links(part, os.O_RDWR | os.O_CREAT), "r+b", buffering=0) as file:
        received = file.seek(0, os.SEEK_END)
        if announced is None or received > announced:
            file.truncate(received := 0)
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256")
        if received == announced:
            return digest.hexdigest()
        _check_space(remote, part.parent, (announced or 0) - received)
        with remote.open_at(received) as (source, begins_there):
            if not begins_there:
                file.truncate(received := 0)
                digest = hashlib.sha256()
            advance(received)
            for chunk in remote.chunks(source):
                head = os.pread(file.fileno(), SUPERBLOCK_BYTES, 0) + chunk
                limit = _limit(remote, head[:SUPERBLOCK_BYTES], announced)
                _check_space(remote, part.parent, (limit or 0) - received)
                if limit is not None and received + len(chunk) > limit:
                    raise CacheDamaged(f"{remote.address} sends more than the {limit:,} bytes of the file. {_AGAIN}")
                write_at(file.fileno(), chunk, received)
                received += len(chunk)
                digest.update(chunk)
                advance(len(chunk))
        os.fsync(file.fileno())
    return digest.hexdigest()


def _limit(remote: Remote, head: bytes, announced: int | None) -> int | None:
    """Return the bytes that the file has: the fewer of those announced and those that its superblock records."""
    if len(head) < SUPERBLOCK_BYTES:
        return announced
    recorded = recorded_size(head)
    if recorded is None and announced is None:
        raise NotACache(f"{remote.address}: it is not an HDF5 file, so not a tspipe cache.")
    return min(size for size in (recorded, announced) if size is not None)


def _check_space(remote: Remote, folder: Path, left: int) -> None:
    """Raise CacheError unless so many bytes are free."""
    if left > (free := shutil.disk_usage(folder).free):
        more = f"{remote.address} needs {left:,} more bytes, and {free:,} are free"
        raise CacheError(f"{folder}: {more}. Free some space, then run the same command again.")


def _verify(part: Path, sha256: str, published: str | None, address: str, *, is_cache: bool) -> None:
    """Raise, and delete the part file, if it is not what was pushed, or should be a cache and is not."""
    try:
        if published and sha256 != published:
            raise CacheDamaged(
                f"{address} arrived with SHA-256 {sha256[:12]}, not {published[:12]}: it is damaged, or was replaced "
                f"meanwhile. {_AGAIN}"
            )
        if not is_cache:
            return
        with renamed_errors(part, address):
            open_cache(part)
            if not published and (damage := find_damage(part)):
                raise CacheDamaged(f"{address} arrived damaged: {damage[0].where}. {_AGAIN}")
    except CacheError:
        part.unlink(missing_ok=True)
        raise


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _stamp(path: Path) -> list[int]:
    """Return what changes when a copy is modified."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def _recorded(record: Path, what: str) -> Any:
    """Return what an earlier fetch recorded, or None."""
    try:
        return json.loads(read_file(record))[what]
    except (OSError, ValueError, KeyError, TypeError):
        return None


@contextlib.contextmanager
def local_errors(path: Path) -> Iterator[None]:
    """Turn errors of the local disk into one sentence."""
    try:
        yield
    except (OSError, OverflowError) as problem:  # a server may claim an impossible length
        why = getattr(problem, "strerror", None) or problem
        raise CacheError(f"{path}: {why}. Fix that, then run the same command again.") from problem


@contextlib.contextmanager
def renamed_errors(path: Path, address: str) -> Iterator[None]:
    """Name the address in errors about a temporary file."""
    try:
        yield
    except CacheError as problem:
        raise type(problem)(str(problem).replace(str(path), address)) from problem.__cause__

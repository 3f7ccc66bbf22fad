"""A remote file, as transfer.py needs it: fsspec, with its drivers' exceptions turned into sentences.

fsspec and its drivers are imported inside functions, so reading a cache never loads them.
"""

import contextlib
import hashlib
import io
import os
import re
import secrets
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any, Self
from urllib.parse import unquote

from tspipe.errors import CacheError, TspipeError

Advance = Callable[[int], None]  # bytes moved since the last call
ReadPiece = Callable[[int, int], tuple[bytes, int]]  # start, stop -> the bytes, and the size of the whole file

_CHUNK = 4 * 2**20
_ABANDONED = timedelta(days=1)
_EXTRAS = {"http": "http", "https": "http", "s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs", "hf": "hf"}
# Fields of `fs.info` that distinguish versions of a file, which the size alone does not.
_VERSION = (
    *("ETag", "etag", "md5Hash", "Content-MD5", "Digest", "generation", "VersionId", "version_id", "blob_id"),
    *("Last-Modified", "LastModified", "last_modified", "mtime", "updated", "created"),
)


class RemoteError(CacheError):
    """The remote could not be reached or, with `absent`, has no such file that we may read."""

    def __init__(self, message: str, absent: bool = False):
        super().__init__(message)
        self.absent = absent


def is_url(text: str) -> bool:
    """Return whether this is an address (`s3://…`) and not a path."""
    return "://" in text


def without_secrets(url: str) -> str:
    """Return an address without user, password, query and fragment, to print it.

    >>> without_secrets("https://me:secret@host/digits.h5?token=1")
    'https://host/digits.h5'
    """
    if not is_url(url):
        return url
    scheme, _, rest = url.partition("://")
    return f"{scheme}://{re.split('[?#]', re.sub('^[^/]*@', '', rest))[0]}"


def file_name(url: str) -> str:
    """Return the local name for the file at an address; never a path, always an `.h5`.

    >>> file_name("https://host/a%2F..%2Fmy%20pets.h5?token=1")
    'my_pets.h5'
    """
    last = unquote(without_secrets(url)).replace("\\", "/").rstrip("/").rpartition("/")[2]
    plain = re.sub(r"[^A-Za-z0-9_.+-]+", "_", last).lstrip(".+-").removesuffix(".h5")
    return f"{plain[:150] or 'unnamed'}.h5"


@dataclass(frozen=True)
class Remote:
    """A remote file. Every method raises RemoteError, which names it as `shown`."""

    fs: Any
    path: str
    shown: str

    @classmethod
    def at(cls, url: str) -> Self:
        """Return the file at an address or a local path. Raises CacheError if a driver is missing."""
        import fsspec

        shown = without_secrets(url)
        protocol = url.partition("://")[0].lower() if is_url(url) else "file"
        try:
            driver = fsspec.get_filesystem_class(protocol)
        except ValueError as problem:
            known = "file, gs, hf, http, https, memory, s3"
            raise CacheError(f"Unknown protocol {protocol!r}. There are: {known}.") from problem
        except ImportError as problem:
            extra = _EXTRAS.get(protocol)
            remedy = f"pip install 'tspipe[{extra}]'" if extra else str(problem)
            raise CacheError(f"{protocol}:// needs a driver: {remedy}") from problem
        with _driver_errors(shown):
            # Not fsspec.url_to_fs, which gives `::` in an address, as in `http://[::1]/`, another meaning.
            options = {**driver._get_kwargs_from_urls(url), **_options(protocol)}
            path = driver._strip_protocol(protocol + url[len(protocol) :] if is_url(url) else url)  # also expands `~`
            return cls(driver(**options), path, shown)

    @property
    def web(self) -> bool:
        """Whether it is on a web server, which is read-only."""
        return "http" in self.fs.protocol

    @property
    def checksum(self) -> "Remote":
        """The file beside it with its SHA-256."""
        path, mark, query = self.path.partition("?") if self.web else (self.path, "", "")
        return replace(self, path=f"{path}.sha256{mark}{query}", shown=f"{self.shown}.sha256")

    def child(self, name: str) -> "Remote":
        """Return the file of this name in this folder."""
        folder = self.shown if self.shown.endswith("://") else f"{self.shown.rstrip('/')}/"
        return replace(self, path=f"{self.path.rstrip('/')}/{name}", shown=folder + name)

    def info(self) -> dict[str, Any]:
        """Return current information about it; drivers would return cached listings."""
        with _driver_errors(self.shown):
            self.fs.invalidate_cache()
            return dict(self.fs.info(self.path))

    def size(self) -> int | None:
        """Return its size in bytes, or None if unknown."""
        size = self.info().get("size")
        return None if size is None else int(size)

    def existing_size(self) -> int | None:
        """Return its size in bytes, or None if there is no such file."""
        try:
            return self.size()
        except RemoteError as problem:
            if not problem.absent:
                raise
            return None

    def is_folder(self) -> bool:
        """Return whether it is a folder."""
        try:
            return self.info().get("type") == "directory"
        except RemoteError as problem:
            if not problem.absent:
                raise
            return False

    def version(self) -> dict[str, str]:
        """Return what changes when the file does; empty if nothing of the kind is known."""
        info = self.info()
        fields = {key: str(info[key]) for key in _VERSION if info.get(key)}
        return {**fields, "size": str(info.get("size"))} if fields else {}

    def stated(self) -> str | None:
        """Return the SHA-256 in the file beside it, or None."""
        try:
            with self.checksum.open_at(0) as (file, _):
                line = b"".join(self.checksum.chunks(file, 66))
        except RemoteError as problem:
            if not problem.absent:
                raise
            return None
        match = re.match(rb"\\?([0-9a-fA-F]{64})\b", line)  # sha256sum puts a backslash before escaped names
        if match is None and line.lstrip().startswith(b"<"):
            return None  # some web servers answer with a page in place of a 404
        if match is None:
            raise CacheError(f"{self.checksum.shown} contains no SHA-256. Push the file again, or delete that one.")
        return match[1].decode().lower()

    def sha256(self, advance: Advance = lambda count: None) -> str:
        """Read all of it and return its SHA-256."""
        digest = hashlib.sha256()
        with self.open_at(0) as (file, _):
            for chunk in self.chunks(file):
                digest.update(chunk)
                advance(len(chunk))
        return digest.hexdigest()

    @contextlib.contextmanager
    def open_at(self, start: int, stop: int | None = None) -> Iterator[tuple[Any, bool]]:
        """Open the file at `start`, for `chunks`; yield it, and whether it begins there.

        Web servers without range requests begin at 0. They get one request, which may end at `stop`.
        """
        with _driver_errors(self.shown):
            if not self.web:
                file = self.fs.open(self.path, "rb", cache_type="none")  # no read-ahead
                file.seek(start)
            else:
                headers = {"Accept-Encoding": "identity"}
                if start or stop:
                    headers["Range"] = f"bytes={start}-{'' if stop is None else stop - 1}"
                # Block size 0 means one plain GET; a given size avoids a HEAD before it.
                file = self.fs.open(self.path, "rb", block_size=0, size=1, headers=headers)
        with file:
            yield file, not self.web or (file.r.status == 206 and _content_range(file)[0] == start)

    def chunks(self, file: Any, length: int | None = None) -> Iterator[bytes]:
        """Yield the rest of an open file, or its next `length` bytes at most, in pieces."""
        left = length
        with _driver_errors(self.shown):
            while left != 0 and (chunk := file.read(_CHUNK if left is None else min(left, _CHUNK))):
                left = None if left is None else left - len(chunk)
                yield chunk

    @contextlib.contextmanager
    def pieces(self) -> Iterator[ReadPiece]:
        """Yield a function that reads a piece of the file with one request."""
        with contextlib.ExitStack() as stack:
            file = None if self.web else stack.enter_context(self.open_at(0))[0]

            def read(start: int, stop: int) -> tuple[bytes, int]:
                if file is None:
                    return self._piece(start, stop)
                with _driver_errors(self.shown):
                    file.seek(start)
                    return file.read(stop - start), file.size

            yield read

    def _piece(self, start: int, stop: int) -> tuple[bytes, int]:
        with self.open_at(start, stop) as (file, begins_there):
            size = _content_range(file)[1]
            if not begins_there or size is None:
                raise CacheError(
                    f"{self.shown}: its server does not support range requests. Download all of it: "
                    f"tspipe pull {self.shown}"
                )
            return b"".join(self.chunks(file, stop - start)), size

    def write(self, chunks: Iterable[bytes]) -> None:
        """Write the file in place; others may see it unfinished."""
        with _driver_errors(self.shown), self.fs.open(self.path, "wb") as file:
            for chunk in chunks:
                file.write(chunk)
            file.flush()
            with contextlib.suppress(AttributeError, io.UnsupportedOperation):  # not a file on a disk
                os.fsync(file.fileno())

    def publish(self, write: Callable[["Remote"], None]) -> None:
        """Have `write` make the file under a temporary name, then rename it; clean up if that fails."""
        part = self._beside(f".{self.name}.push-{secrets.token_hex(4)}.part")
        try:
            write(part)
            with _driver_errors(self.shown):
                self.fs.mv(part.path, self.path)
        except BaseException:
            part.remove()
            raise

    def clear(self) -> None:
        """Remove old temporary files of killed pushes; recent ones may belong to a running push."""
        left = re.compile(rf"\.{re.escape(self.name)}(\.sha256)?\.push-[0-9a-f]{{8}}\.part")
        with contextlib.suppress(Exception):  # a folder that cannot be listed may still be writable
            for path in self.fs.ls(self.path.rpartition("/")[0], detail=False):
                if left.fullmatch(path.rpartition("/")[2]) and _age(self.fs.modified(path)) > _ABANDONED:
                    self.fs.rm_file(path)

    def remove(self) -> None:
        """Remove it if possible."""
        with contextlib.suppress(Exception):
            self.fs.rm_file(self.path)

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.path.rpartition("/")[2]

    def _beside(self, name: str) -> "Remote":
        return replace(self, path=f"{self.path.rpartition('/')[0]}/{name}")


def _age(modified: datetime) -> timedelta:
    return datetime.now(UTC) - (modified if modified.tzinfo else modified.replace(tzinfo=UTC))


def _options(protocol: str) -> dict[str, Any]:
    if protocol == "file":
        return {"auto_mkdir": True}
    if protocol not in ("http", "https"):
        return {}
    import aiohttp

    # By default requests end after five minutes, too soon for a large file, and proxies are ignored.
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=60)
    return {"client_kwargs": {"timeout": timeout, "trust_env": True}}


def _content_range(file: Any) -> tuple[int | None, int | None]:
    """Return the start and the total size in a web server's Content-Range."""
    match = re.fullmatch(r"bytes (\d{1,19})-\d+/(\d{1,18})", file.r.headers.get("Content-Range", ""))
    return (int(match[1]), int(match[2])) if match else (None, None)


@contextlib.contextmanager
def _driver_errors(shown: str) -> Iterator[None]:
    try:
        yield
    except TspipeError:
        raise
    except Exception as problem:  # every driver has its own exceptions
        raise _as_remote_error(problem, shown) from problem


def _as_remote_error(problem: BaseException, shown: str) -> RemoteError:
    """Return a driver's exception as a sentence; its own message may contain the address with secrets."""
    cause = problem.__cause__
    if cause is not None and (isinstance(cause, OSError) or hasattr(cause, "status")):
        problem = cause  # fsspec turns any failed HEAD into a FileNotFoundError
    status = getattr(problem, "status", None) or getattr(problem, "code", None)
    kind = type(problem).__name__
    if isinstance(problem, PermissionError) or status in (401, 403) or re.search("Credential|Token|Auth", kind):
        log_in = "Log in with its own tool, or ask" if is_url(shown) else "Ask"
        return RemoteError(f"{shown}: access is denied. {log_in} its owner for access.", absent=True)
    if isinstance(problem, FileNotFoundError) or status in (404, 410):
        return RemoteError(f"There is no file {shown}. Check the address.", absent=True)
    number = getattr(problem, "errno", None) or 0
    if re.search("Payload|Disconnected", kind):
        why = "the connection was lost"
    else:
        why = f"answer {status}" if status else os.strerror(number) if number > 0 else kind
    return RemoteError(f"{shown}: {why}. Fix that, then run the same command again.")

"""A remote file: fsspec, with its drivers' exceptions turned into sentences.

fsspec and its drivers are imported inside functions, so reading a cache never loads them.
"""

import contextlib
import hashlib
import io
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from tspipe.cache.address import is_url, is_well_formed, without_secrets
from tspipe.errors import CacheError, TspipeError
from tspipe.utils.files import TEMPORARY_NAME, remove_abandoned, temporary_name

Advance = Callable[[int], object]  # bytes moved since the last call

_CHUNK = 4 * 2**20  # bytes
_PATIENCE = 60.0  # seconds without an answer, or with hardly any bytes
_LEAST = 2**16  # bytes that count as progress in that time
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


@dataclass(frozen=True)
class Remote:
    """A remote file. Every method raises RemoteError, which names it as `address`."""

    fs: Any
    path: str
    address: str  # without secrets

    @property
    def web(self) -> bool:
        """Whether it is on a web server, which is read-only."""
        return "http" in self.fs.protocol

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.path.rpartition("/")[2]

    @property
    def checksum(self) -> "Remote":
        """The file beside it with its SHA-256."""
        path, mark, query = self.path.partition("?") if self.web else (self.path, "", "")
        return replace(self, path=f"{path}.sha256{mark}{query}", address=f"{self.address}.sha256")

    def child(self, name: str) -> "Remote":
        """Return the file of this name in this folder."""
        folder = self.address if self.address.endswith("://") else f"{self.address.rstrip('/')}/"
        return replace(self, path=f"{self.path.rstrip('/')}/{name}", address=folder + name)

    def info(self) -> dict[str, Any]:
        """Return current information about it; drivers would return cached listings."""
        with driver_errors(self.address):
            self.fs.invalidate_cache()
            return dict(self.fs.info(self.path, **({"timeout": _PATIENCE} if self.web else {})))

    def info_if_present(self) -> dict[str, Any] | None:
        """Return information about it, or None if there is no such file."""
        try:
            return self.info()
        except RemoteError as problem:
            if not problem.absent:
                raise
            return None

    def version(self) -> dict[str, str]:
        """Return what changes when the file does; empty if nothing of the kind is known."""
        info = self.info()
        fields = {key: str(info[key]) for key in _VERSION if info.get(key)}
        return {**fields, "size": str(info.get("size"))} if fields else {}

    def published_sha256(self) -> str | None:
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
            raise CacheError(f"{self.checksum.address} contains no SHA-256. Push the file again, or delete that one.")
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
        with driver_errors(self.address):
            if self.web:
                file: Any = WebFile(self.fs, self.path, start, stop)
            else:
                if "file" in self.fs.protocol and Path(self.path).is_fifo():  # opening it would wait for its other end
                    raise RemoteError(f"{self.address} is a pipe, not a file.")
                file = self.fs.open(self.path, "rb", cache_type="none")  # no read-ahead
                file.seek(start)
        with contextlib.closing(file):
            yield file, not self.web or file.start == start

    def chunks(self, file: Any, length: int | None = None) -> Iterator[bytes]:
        """Yield the rest of an open file, or its next `length` bytes at most, in pieces.

        Raises RemoteError if hardly any bytes arrive for a minute.
        """
        left, begin, received = length, time.monotonic(), 0
        with driver_errors(self.address):
            while left != 0 and (chunk := file.read(_CHUNK if left is None else min(left, _CHUNK))):
                left = None if left is None else left - len(chunk)
                received += len(chunk)
                if time.monotonic() > begin + _PATIENCE:
                    if received < _LEAST:
                        raise TimeoutError
                    begin, received = time.monotonic(), 0
                yield chunk

    def publish(self, write: Callable[["Remote"], None]) -> None:
        """Have `write` make the file under a temporary name, then rename it; clean up if that fails."""
        folder = self.path.rpartition("/")[0]
        part = replace(self, path=f"{folder}/{temporary_name(self.name)}")
        try:
            write(part)
            with driver_errors(self.address):
                self.fs.mv(part.path, self.path)
        except BaseException:
            part.remove()
            raise

    def write(self, chunks: Iterable[bytes]) -> None:
        """Write the file in place; others may see it unfinished."""
        with driver_errors(self.address), self.fs.open(self.path, "wb") as file:
            for chunk in chunks:
                file.write(chunk)
            file.flush()
            with contextlib.suppress(AttributeError, io.UnsupportedOperation):  # not a file on a disk
                os.fsync(file.fileno())

    def remove_abandoned(self) -> None:
        """Remove temporary files of killed pushes: after a day, in a local folder those of this host at once."""
        folder = self.path.rpartition("/")[0]
        with contextlib.suppress(Exception):  # a folder that cannot be listed may still be writable
            if "file" in self.fs.protocol:
                remove_abandoned(Path(folder))
                return
            for path in self.fs.ls(folder, detail=False):
                name = path.rpartition("/")[2]
                temporary = name.startswith(f".{self.name[:100]}.") and TEMPORARY_NAME.fullmatch(name)
                if temporary and _age(self.fs.modified(path)) > _ABANDONED:
                    self.fs.rm_file(path)

    def remove(self) -> None:
        """Remove it if possible."""
        with contextlib.suppress(Exception):
            self.fs.rm_file(self.path)


class WebFile:
    """The body of a web server's answer to one request; each wait for the server is limited.

    Attributes:
        start: the position in the file at which the body begins.
        size: the size of the whole file, if the server supports range requests and states it.
    """

    def __init__(self, fs: Any, url: str, start: int, stop: int | None):
        from fsspec.asyn import sync

        headers = {"Accept-Encoding": "identity"}
        if start or stop:
            headers["Range"] = f"bytes={start}-{'' if stop is None else stop - 1}"

        async def request() -> Any:
            session = await fs.set_session()
            response = await session.get(fs.encode_url(url), headers=headers)
            fs._raise_not_found_for_status(response, url)
            return response

        self._loop = fs.loop
        self._response = sync(fs.loop, request, timeout=_PATIENCE)
        content_range = self._response.headers.get("Content-Range", "") if self._response.status == 206 else ""
        match = re.fullmatch(r"bytes (\d{1,18})-\d+/(\d{1,18})", content_range)
        self.start = int(match[1]) if match else 0
        self.size = int(match[2]) if match else None

    def read(self, count: int) -> bytes:
        """Return the next bytes, at most `count`; none at the end."""
        from fsspec.asyn import sync

        return bytes(sync(self._loop, self._response.content.read, count, timeout=_PATIENCE))

    def close(self) -> None:
        """Close the connection."""
        self._loop.call_soon_threadsafe(self._response.close)


def open_remote(url: str) -> Remote:
    """Return the file at an address or a local path. Raises CacheError if a driver is missing."""
    import fsspec

    if is_url(url) and not is_well_formed(url):
        raise CacheError(
            "The address is malformed. Write it as https://HOST/PATH/NAME.h5, or with s3://, gs:// or hf://."
        )
    address = without_secrets(url)
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
    with driver_errors(address):
        # Not fsspec.url_to_fs, which gives `::` in an address, as in `http://[::1]/`, another meaning.
        options = {**driver._get_kwargs_from_urls(url), **_options(protocol)}
        path = driver._strip_protocol(protocol + url[len(protocol) :] if is_url(url) else url)  # also expands `~`
        return Remote(driver(**options), path, address)


def _options(protocol: str) -> dict[str, Any]:
    if protocol == "file":
        return {"auto_mkdir": True}
    if protocol not in ("http", "https"):
        return {}
    import aiohttp

    # By default requests end after five minutes, too soon for a large file, and proxies are ignored.
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=_PATIENCE)
    return {"client_kwargs": {"timeout": timeout, "trust_env": True}}


def _age(modified: datetime) -> timedelta:
    return datetime.now(UTC) - (modified if modified.tzinfo else modified.replace(tzinfo=UTC))


@contextlib.contextmanager
def driver_errors(address: str) -> Iterator[None]:
    """Turn a driver's exceptions into sentences about the address; their own texts may contain secrets."""
    try:
        yield
    except TspipeError:
        raise
    except Exception as problem:  # every driver has its own exceptions
        raise _as_remote_error(problem, address) from problem


def _as_remote_error(problem: BaseException, address: str) -> RemoteError:
    cause = problem.__cause__
    # fsspec turns any failed HEAD into a FileNotFoundError; a LookupError is that of a store without the file.
    wrapped = isinstance(problem, FileNotFoundError) and not isinstance(cause, LookupError)
    if cause is not None and (wrapped or isinstance(cause, OSError) or hasattr(cause, "status")):
        problem = cause
    status = problem.status if hasattr(problem, "status") else getattr(problem, "code", None)
    kind = type(problem).__name__
    if "Redirect" in kind:  # before the status, which is that of the redirect
        where = "in a circle, or too often" if kind == "TooManyRedirects" else "to something that is not a web address"
        return RemoteError(f"{address}: its server redirects {where}. Ask its owner for another address.")
    if isinstance(problem, PermissionError) or status in (401, 403) or re.search("Credential|Token|Auth", kind):
        log_in = "Log in with its own tool, or ask" if is_url(address) else "Ask"
        return RemoteError(f"{address}: access is denied. {log_in} its owner for access.", absent=True)
    if isinstance(problem, FileNotFoundError) or status in (404, 410):
        return RemoteError(f"There is no file {address}. Check the address.", absent=True)
    number = getattr(problem, "errno", None) or 0
    check = "Check the address and the network, then run the same command again."
    if isinstance(problem, TimeoutError) and not number:
        why = (
            f"hardly anything arrived for {_PATIENCE:g} seconds. The server sends too slowly: run the same command "
            "again later."
        )
    elif re.search("Payload|Disconnected", kind):
        why = "the connection was lost. Run the same command again."
    elif status:
        why = f"its server answers {status}. Ask its owner, or run the same command again later."
    elif number > 0:
        why = f"{os.strerror(number)}. Fix that, then run the same command again."
    elif number or "DNS" in kind:
        why = f"its host cannot be found. {check}"
    elif isinstance(problem, ValueError | OverflowError) and "JSON" not in kind:
        why = "it is not a valid address. Check its host and port."
    else:
        why = f"the transfer failed ({kind}). {check}"
    return RemoteError(f"{address}: {why}")

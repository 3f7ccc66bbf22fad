"""A file somewhere else, as transfer.py needs it: fsspec with its many exceptions turned into sentences.

fsspec and its drivers are imported inside functions: whoever only reads caches never loads them.
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
ReadPiece = Callable[[int, int], tuple[bytes, int]]  # start, stop -> what is there, and the size of the whole file

_CHUNK = 4 * 2**20
_ABANDONED = timedelta(days=1)
_EXTRAS = {"http": "http", "https": "http", "s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs", "hf": "hf"}
# Whichever of these `fs.info` gives tells one version of a file from another; the size alone does not.
_VERSION = (
    *("ETag", "etag", "md5Hash", "Content-MD5", "Digest", "generation", "VersionId", "version_id", "blob_id"),
    *("Last-Modified", "LastModified", "last_modified", "mtime", "updated", "created"),
)


class RemoteError(CacheError):
    """The other end could not be asked, or (`absent`) it answered and has no such file for us."""

    def __init__(self, message: str, absent: bool = False):
        super().__init__(message)
        self.absent = absent


def is_url(text: str) -> bool:
    """Whether this is an address (`s3://…`) and not a path."""
    return "://" in text


def without_secrets(url: str) -> str:
    """An address as it may be shown: without user, password, query and fragment.

    >>> without_secrets("https://me:secret@host/digits.h5?token=1")
    'https://host/digits.h5'
    """
    if not is_url(url):
        return url
    scheme, _, rest = url.partition("://")
    return f"{scheme}://{re.split('[?#]', re.sub('^[^/]*@', '', rest))[0]}"


def file_name(url: str) -> str:
    """The plain name that the file at an address gets here; never a path, always an `.h5`.

    >>> file_name("https://host/a%2F..%2Fmy%20pets.h5?token=1")
    'my_pets.h5'
    """
    last = unquote(without_secrets(url)).replace("\\", "/").rstrip("/").rpartition("/")[2]
    plain = re.sub(r"[^A-Za-z0-9_.+-]+", "_", last).lstrip(".+-").removesuffix(".h5")
    return f"{plain[:150] or 'unnamed'}.h5"


@dataclass(frozen=True)
class Remote:
    """One file at the other end. Every method raises RemoteError, with `shown` for its address."""

    fs: Any
    path: str
    shown: str

    @classmethod
    def at(cls, url: str) -> Self:
        """The file at an address; a plain path is the local disk's. Raises CacheError where no driver is installed."""
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
            how = f"pip install 'tspipe[{extra}]'" if extra else str(problem)
            raise CacheError(f"{protocol}:// needs a driver: {how}") from problem
        with _driver_errors(shown):
            # Not fsspec.url_to_fs, to which `::` in an address, as in `http://[::1]/`, means something else.
            options = {**driver._get_kwargs_from_urls(url), **_options(protocol)}
            path = driver._strip_protocol(protocol + url[len(protocol) :] if is_url(url) else url)  # expands `~`, too
            return cls(driver(**options), path, shown)

    @property
    def web(self) -> bool:
        """Whether a web server has it: those only give."""
        return "http" in self.fs.protocol

    @property
    def checksum(self) -> "Remote":
        """The file beside it that states its SHA-256."""
        path, mark, query = self.path.partition("?") if self.web else (self.path, "", "")
        return replace(self, path=f"{path}.sha256{mark}{query}", shown=f"{self.shown}.sha256")

    def child(self, name: str) -> "Remote":
        """The file of this name in this folder."""
        folder = self.shown if self.shown.endswith("://") else f"{self.shown.rstrip('/')}/"
        return replace(self, path=f"{self.path.rstrip('/')}/{name}", shown=folder + name)

    def info(self) -> dict[str, Any]:
        """What its place says of it, now: drivers remember listings."""
        with _driver_errors(self.shown):
            self.fs.invalidate_cache()
            return dict(self.fs.info(self.path))

    def size(self) -> int | None:
        """Its bytes, or None where its place does not tell."""
        size = self.info().get("size")
        return None if size is None else int(size)

    def existing_size(self) -> int | None:
        """Its bytes, or None where there is no such file."""
        try:
            return self.size()
        except RemoteError as problem:
            if not problem.absent:
                raise
            return None

    def is_folder(self) -> bool:
        """Whether there is a folder of this name."""
        try:
            return self.info().get("type") == "directory"
        except RemoteError as problem:
            if not problem.absent:
                raise
            return False

    def version(self) -> dict[str, str]:
        """What changes when the file does; empty where its place tells nothing of the kind."""
        info = self.info()
        fields = {key: str(info[key]) for key in _VERSION if info.get(key)}
        return {**fields, "size": str(info.get("size"))} if fields else {}

    def stated(self) -> str | None:
        """The SHA-256 that lies beside it, or None."""
        try:
            with self.checksum.open_at(0) as (file, _):
                line = b"".join(self.checksum.chunks(file, 66))
        except RemoteError as problem:
            if not problem.absent:
                raise
            return None
        match = re.match(rb"\\?([0-9a-fA-F]{64})\b", line)  # with a backslash before names that have one
        if match is None and line.lstrip().startswith(b"<"):
            return None  # a page in place of a 404, as some web servers answer
        if match is None:
            raise CacheError(f"{self.checksum.shown} states no SHA-256. Push the file again, or delete that one.")
        return match[1].decode().lower()

    def sha256(self, advance: Advance = lambda count: None) -> str:
        """Its SHA-256, by reading all of it."""
        digest = hashlib.sha256()
        with self.open_at(0) as (file, _):
            for chunk in self.chunks(file):
                digest.update(chunk)
                advance(len(chunk))
        return digest.hexdigest()

    @contextlib.contextmanager
    def open_at(self, start: int, stop: int | None = None) -> Iterator[tuple[Any, bool]]:
        """The file from `start` on, to be read by `chunks`; and whether it begins there.

        Web servers without range requests begin at 0. They get one request, which may end at `stop`.
        """
        with _driver_errors(self.shown):
            if not self.web:
                file = self.fs.open(self.path, "rb", cache_type="none")  # no reading ahead
                file.seek(start)
            else:
                headers = {"Accept-Encoding": "identity"}
                if start or stop:
                    headers["Range"] = f"bytes={start}-{'' if stop is None else stop - 1}"
                # Block size 0 is one plain GET; with any size given, no HEAD comes before it.
                file = self.fs.open(self.path, "rb", block_size=0, size=1, headers=headers)
        with file:
            yield file, not self.web or (file.r.status == 206 and _content_range(file)[0] == start)

    def chunks(self, file: Any, length: int | None = None) -> Iterator[bytes]:
        """What is left of an opened file, or its next `length` bytes at most, piece by piece."""
        left = length
        with _driver_errors(self.shown):
            while left != 0 and (chunk := file.read(_CHUNK if left is None else min(left, _CHUNK))):
                left = None if left is None else left - len(chunk)
                yield chunk

    @contextlib.contextmanager
    def pieces(self) -> Iterator[ReadPiece]:
        """A function that reads a piece of the file with one request, of no more bytes than it needs."""
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
                    f"{self.shown}: its server gives no parts of files. Fetch all of it: tspipe pull {self.shown}"
                )
            return b"".join(self.chunks(file, stop - start)), size

    def write(self, chunks: Iterable[bytes]) -> None:
        """Write it anew; under this name it may be seen unfinished."""
        with _driver_errors(self.shown), self.fs.open(self.path, "wb") as file:
            for chunk in chunks:
                file.write(chunk)
            file.flush()
            with contextlib.suppress(AttributeError, io.UnsupportedOperation):  # those that are no file of a disk's
                os.fsync(file.fileno())

    def publish(self, write: Callable[["Remote"], None]) -> None:
        """Let `write` make it under a temporary name in the same folder, then rename it; clean up if that fails."""
        part = self._beside(f".{self.name}.push-{secrets.token_hex(4)}.part")
        try:
            write(part)
            with _driver_errors(self.shown):
                self.fs.mv(part.path, self.path)
        except BaseException:
            part.remove()
            raise

    def clear(self) -> None:
        """Remove what killed pushes to this name left; younger files may be those of a push that is running."""
        left = re.compile(rf"\.{re.escape(self.name)}(\.sha256)?\.push-[0-9a-f]{{8}}\.part")
        with contextlib.suppress(Exception):  # a folder that cannot be listed can still be written to
            for path in self.fs.ls(self.path.rpartition("/")[0], detail=False):
                if left.fullmatch(path.rpartition("/")[2]) and _age(self.fs.modified(path)) > _ABANDONED:
                    self.fs.rm_file(path)

    def remove(self) -> None:
        """Remove it, as well as can be."""
        with contextlib.suppress(Exception):
            self.fs.rm_file(self.path)

    @property
    def name(self) -> str:
        """The last part of its path."""
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

    # By default a request ends after five minutes, which a large file needs, and proxies are not asked.
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=60)
    return {"client_kwargs": {"timeout": timeout, "trust_env": True}}


def _content_range(file: Any) -> tuple[int | None, int | None]:
    """Where a web server says that its answer begins, and of how many bytes it is a part."""
    match = re.fullmatch(r"bytes (\d{1,19})-\d+/(\d{1,18})", file.r.headers.get("Content-Range", ""))
    return (int(match[1]), int(match[2])) if match else (None, None)


@contextlib.contextmanager
def _driver_errors(shown: str) -> Iterator[None]:
    try:
        yield
    except TspipeError:
        raise
    except Exception as problem:  # every driver has exceptions of its own
        raise _as_remote_error(problem, shown) from problem


def _as_remote_error(problem: BaseException, shown: str) -> RemoteError:
    """A driver's exception as a sentence. Its own words may hold the address with all its secrets."""
    cause = problem.__cause__
    if cause is not None and (isinstance(cause, OSError) or hasattr(cause, "status")):
        problem = cause  # to fsspec whatever goes wrong with a HEAD is a FileNotFoundError
    status = getattr(problem, "status", None) or getattr(problem, "code", None)
    kind = type(problem).__name__
    if isinstance(problem, PermissionError) or status in (401, 403) or re.search("Credential|Token|Auth", kind):
        how = f"{'Log in with the tool of that place, or ask' if is_url(shown) else 'Ask'} its owner to let you in."
        return RemoteError(f"{shown}: access is denied. {how}", absent=True)
    if isinstance(problem, FileNotFoundError) or status in (404, 410):
        return RemoteError(f"There is no file {shown}. Check the address.", absent=True)
    number = getattr(problem, "errno", None) or 0
    if re.search("Payload|Disconnected", kind):
        why = "the connection broke off"
    else:
        why = f"answer {status}" if status else os.strerror(number) if number > 0 else kind
    return RemoteError(f"{shown}: {why}. When that is put right, run the same command again.")

"""A web server that is slow, endless or damaged costs a limited time and no more bytes than the file has."""

import gzip
import hashlib
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pets import plan, write
from tspipe.cache import remote
from tspipe.cache.peek import peek
from tspipe.cache.remote import RemoteError
from tspipe.cache.transfer import fetch, pull
from tspipe.errors import CacheDamaged, CacheError, NotACache

Answer = Callable[[bytes], Iterator[bytes]]  # the request -> the pieces of the answer


class Server:
    """Answers each connection with pieces of bytes until the client hangs up."""

    def __init__(self, answer: Answer):
        self.answer, self.sent = answer, 0
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}/pets.h5"
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self) -> None:
        while True:
            try:
                connection, _ = self.socket.accept()
            except OSError:
                return
            threading.Thread(target=self.reply, args=(connection,), daemon=True).start()

    def reply(self, connection: socket.socket) -> None:
        with connection:
            try:
                for piece in self.answer(connection.recv(65536)):
                    connection.sendall(piece)
                    self.sent += len(piece)
            except OSError:
                pass


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Answer], Server]]:
    """Start servers whose every `.sha256` is missing; 0.4 seconds without progress are too long."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(remote, "_PATIENCE", 0.4)
    servers = []

    def begin(answer: Answer) -> Server:
        def reply(request: bytes) -> Iterator[bytes]:
            if b".sha256" in request.split(b"\r\n")[0]:
                return iter([head("404 Not Found", "Content-Length: 0")])
            return answer(request)

        servers.append(Server(reply))
        return servers[-1]

    yield begin
    for server in servers:
        server.socket.close()


def head(status: str, *headers: str) -> bytes:
    return "\r\n".join([f"HTTP/1.1 {status}", "Connection: close", *headers, "", ""]).encode()


def with_body(body: Callable[[], Iterator[bytes]], *headers: str, announced: int | None = None) -> Answer:
    """Answer HEAD with the announced length, if any, and GET with a body of no stated length."""

    def answer(request: bytes) -> Iterator[bytes]:
        if request.startswith(b"HEAD"):
            yield head("200 OK", *headers, *([f"Content-Length: {announced}"] if announced is not None else []))
        else:
            yield head("200 OK", *headers)
            yield from body()

    return answer


def nothing(count: int) -> None:
    pass


def endless(beginning: bytes) -> Callable[[], Iterator[bytes]]:
    def body() -> Iterator[bytes]:
        yield beginning
        while True:
            yield bytes(2**16)

    return body


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path, weights = tmp_path_factory.mktemp("servers") / "pets.h5", bytes(1_000_000)
    manifest = plan({"train": 10, "test": 6})
    manifest["teacher"]["weights_sha256"] = hashlib.sha256(weights).hexdigest()
    write(path, manifest, weights)
    return path.read_bytes()


def test_a_header_that_drips_is_not_waited_for(start: Callable[[Answer], Server], tmp_path: Path) -> None:
    def drip(request: bytes) -> Iterator[bytes]:
        yield b"HTTP/1.1 200 OK\r\nX: "
        while True:
            time.sleep(0.1)
            yield b"x"

    server = start(drip)
    for act in (lambda: pull(server.url, tmp_path / "pets.h5", nothing), lambda: peek(server.url)):
        begin = time.monotonic()
        with pytest.raises(RemoteError) as refused:
            act()
        assert time.monotonic() - begin < 5
        assert str(refused.value) == (
            f"{server.url}: hardly anything arrived for 0.4 seconds. The server sends too slowly: run the same command "
            "again later."
        )


def test_a_body_that_drips_is_not_waited_for(start: Callable[[Answer], Server], tmp_path: Path, cache: bytes) -> None:
    def body() -> Iterator[bytes]:
        for i in range(1000):
            time.sleep(0.05)
            yield cache[i : i + 1]

    server, begin = start(with_body(body, announced=len(cache))), time.monotonic()
    with pytest.raises(RemoteError, match="hardly anything arrived"):
        pull(server.url, tmp_path / "pets.h5", nothing)
    assert time.monotonic() - begin < 5


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (
            head("302 Found", "Location: file:///etc/passwd"),
            "its server redirects to something that is not a web address.",
        ),
        (head("302 Found", "Location: /pets.h5"), "its server redirects in a circle, or too often."),
        (b"", "the connection was lost."),
        (head("400 Bad Request", "Content-Length: 0"), "its server answers 400."),
    ],
)
def test_what_happened_is_said(start: Callable[[Answer], Server], tmp_path: Path, answer: bytes, reason: str) -> None:
    server = start(lambda request: iter([answer]))
    for act in (lambda: pull(server.url, tmp_path / "pets.h5", nothing), lambda: peek(server.url)):
        with pytest.raises(RemoteError) as refused:
            act()
        assert str(refused.value).startswith(f"{server.url}: {reason}") and not refused.value.absent
        assert not list(tmp_path.iterdir())


def test_a_port_that_does_not_exist(tmp_path: Path) -> None:
    url = "http://127.0.0.1:99999/pets.h5"
    for act in (lambda: pull(url, tmp_path / "pets.h5", nothing), lambda: peek(url)):
        with pytest.raises(RemoteError) as refused:
            act()
        assert str(refused.value) == f"{url}: it is not a valid address. Check its host and port."


def test_an_impossible_size(start: Callable[[Answer], Server], cache: bytes) -> None:
    answer = head("206 Partial Content", f"Content-Range: bytes 0-{len(cache) - 1}/{10**17}")
    server = start(lambda request: iter([answer, cache]))
    with pytest.raises(CacheError, match=r"its server claims that the file has 100,000,000,000,000,000 bytes"):
        peek(server.url)


@pytest.mark.parametrize("announced", [True, False])
def test_no_more_is_written_than_the_file_has(
    start: Callable[[Answer], Server], tmp_path: Path, cache: bytes, announced: bool
) -> None:
    server = start(with_body(endless(cache), announced=len(cache) if announced else None))
    with pytest.raises(CacheDamaged) as refused:
        pull(server.url, tmp_path / "pets.h5", nothing)
    assert str(refused.value).startswith(f"{server.url} sends more than the {len(cache):,} bytes of the file.")
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= len(cache)
    assert not (tmp_path / "pets.h5").exists()


def test_an_announced_length_beyond_the_file_is_not_believed(
    start: Callable[[Answer], Server], tmp_path: Path, cache: bytes
) -> None:
    server = start(with_body(endless(cache), announced=len(cache) + 10**7))
    with pytest.raises(CacheDamaged):
        pull(server.url, tmp_path / "pets.h5", nothing)
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= len(cache)


def test_what_is_no_cache_and_has_no_length_is_left_at_its_beginning(
    start: Callable[[Answer], Server], tmp_path: Path
) -> None:
    server = start(with_body(endless(b"<html>" * 100)))
    with pytest.raises(NotACache) as refused:
        pull(server.url, tmp_path / "pets.h5", nothing)
    assert str(refused.value) == f"{server.url}: it is not an HDF5 file, so not a tspipe cache."
    assert not list(tmp_path.iterdir())


def test_a_compressed_body_is_unpacked_no_further_than_the_file(
    start: Callable[[Answer], Server], tmp_path: Path, cache: bytes
) -> None:
    packed = gzip.compress(cache + bytes(50_000_000), 1)
    server = start(with_body(lambda: iter([packed]), "Content-Encoding: gzip"))
    with pytest.raises(CacheDamaged, match="sends more than"):
        pull(server.url, tmp_path / "pets.h5", nothing)
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= len(cache)


def test_free_space_is_checked_when_the_length_is_known_from_the_file(
    start: Callable[[Answer], Server], tmp_path: Path, cache: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=500_000))
    server = start(with_body(lambda: iter([cache[:2000], cache[2000:]])))
    with pytest.raises(CacheError, match="more bytes, and 500,000 are free"):
        pull(server.url, tmp_path / "pets.h5", nothing)


def test_a_damaged_copy_is_never_taken_for_the_file(
    start: Callable[[Answer], Server], tmp_path: Path, cache: bytes
) -> None:
    """The server states a version, and no SHA-256."""
    data = bytearray(cache)
    data[-1000] ^= 1
    server = start(with_body(lambda: iter([bytes(data)]), 'ETag: "1"', announced=len(cache)))
    for _ in range(2):
        with pytest.raises(CacheDamaged) as refused:
            fetch(server.url, nothing, tmp_path / "home")
        assert str(refused.value).startswith(f"{server.url} arrived damaged: teacher_weights, rows 0 to 999,999. ")
        with pytest.raises(CacheDamaged):
            pull(server.url, tmp_path / "pets.h5", nothing)
    assert [file.name for file in tmp_path.rglob("*") if file.is_file()] == []
    data[-1000] ^= 1
    assert fetch(server.url, nothing, tmp_path / "home").path.read_bytes() == cache
    assert fetch(server.url, nothing, tmp_path / "home").status == "unchanged"

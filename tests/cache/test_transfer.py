"""A cache arrives elsewhere as it was, or not at all."""

import contextlib
import errno
import hashlib
import json
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
import threading
import time
from base64 import b64encode
from collections.abc import Iterator
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem

from pets import plan, write
from tspipe.cache import SPLITS, CacheWriter, Dimensions, open_cache
from tspipe.cache.address import beside, file_name, is_url, without_secrets
from tspipe.cache.peek import peek
from tspipe.cache.transfer import Pushed, describe_contents, fetch, pull, push, remote_size
from tspipe.errors import (
    CacheBusy,
    CacheDamaged,
    CacheError,
    CacheIncomplete,
    CacheMismatch,
    NotACache,
)
from tspipe.utils.files import lock


class Web:
    """A web server on this machine: what it serves, how it misbehaves, and what it was asked."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.ranges = True
        self.etags = True
        self.password = ""
        self.cut_after: int | None = None  # bytes of a body before the connection breaks…
        self.stalled = threading.Event()  # …at once, or not before this is set
        self.stalled.set()
        self.requests: list[tuple[str, str]] = []  # (method, path with query)
        self.sent = 0  # bytes of bodies
        self.connections: list[socket.socket] = []
        handler = type("Handler", (_Handler,), {"web": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}/{name}"

    def put(self, path: Path, *, stated: bool = True) -> str:
        """Serve a file, and beside it its SHA-256; its address."""
        self.files[path.name] = data = path.read_bytes()
        if stated:
            self.files[f"{path.name}.sha256"] = f"{hashlib.sha256(data).hexdigest()}  {path.name}\n".encode()
        return self.url(path.name)

    def forget(self) -> None:
        self.requests, self.sent = [], 0

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        for connection in self.connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    web: Web

    def setup(self) -> None:
        super().setup()
        self.web.connections.append(self.connection)

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        self.web.requests.append((self.command, self.path))
        data = self.web.files.get(self.path[1:].partition("?")[0])
        login = "Basic " + b64encode(f"me:{self.web.password}".encode()).decode()
        if self.web.password and self.headers["Authorization"] != login:
            return self.head(401, {}, 0)
        if data is None:
            return self.head(404, {}, 0)
        headers = {"ETag": f'"{hashlib.md5(data).hexdigest()}"'} if self.web.etags else {}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers["Range"] or "")
        if not (asked and self.web.ranges):
            return self.body(200, headers, data)
        start, stop = int(asked[1]), min(int(asked[2] or len(data)), len(data) - 1) + 1
        if start >= len(data):
            return self.head(416, {}, 0)
        return self.body(206, headers | {"Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"}, data[start:stop])

    def head(self, status: int, headers: dict[str, str], length: int) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(length)}.items():
            self.send_header(name, value)
        self.end_headers()

    def body(self, status: int, headers: dict[str, str], data: bytes) -> None:
        self.head(status, headers, len(data))
        if self.command == "GET":
            shown = data[: self.web.cut_after]
            self.close_connection = len(shown) < len(data)
            for start in range(0, len(shown), 2**16):
                try:
                    self.wfile.write(piece := shown[start : start + 2**16])
                except OSError:
                    break
                self.web.sent += len(piece)
            if self.close_connection:
                self.web.stalled.wait(60)

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = Web()
    yield server
    server.stop()


@pytest.fixture
def memory() -> Iterator[MemoryFileSystem]:
    """The memory:// of fsspec, empty before and after."""
    result = MemoryFileSystem()
    result.store.clear()
    result.pseudo_dirs[:] = [""]
    yield result
    result.store.clear()
    result.pseudo_dirs[:] = [""]


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A cache of 3 MB, most of which are the teacher's."""
    return make(tmp_path / "here" / "pets.h5")


def make(path: Path, train: int = 10, weights: int = 3_000_000) -> Path:
    manifest, teacher = plan({"train": train, "test": 6}), np.random.default_rng(train).bytes(weights)
    manifest["teacher"]["weights_sha256"] = hashlib.sha256(teacher).hexdigest()
    write(path, manifest, teacher)
    return path


def nothing(count: int) -> None:
    pass


class Moved(list[int]):
    """An `advance` that adds up."""

    def __call__(self, count: int) -> None:
        self.append(count)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


class Place(NamedTuple):
    """Where a test pushes to: an address, and how that is shown."""

    url: str
    shown: str


@pytest.fixture(params=["path", "file", "memory", "memory-root", "named"])
def place(request: pytest.FixtureRequest, tmp_path: Path, memory: MemoryFileSystem) -> Place:
    folder = tmp_path / "team" / "caches"
    return {
        "path": Place(str(folder), f"{folder}/pets.h5"),
        "file": Place(f"file://{folder}/", f"file://{folder}/pets.h5"),
        "memory": Place("memory://team/caches//", "memory://team/caches/pets.h5"),
        "memory-root": Place("memory://", "memory://pets.h5"),
        "named": Place(f"{folder}/pets.h5", f"{folder}/pets.h5"),
    }[request.param]


def test_what_is_pushed_is_pulled(cache: Path, place: Place, tmp_path: Path) -> None:
    sent, got = Moved(), Moved()
    assert push(cache, place.url, sent) == Pushed(place.shown, sha256(cache), new=True)
    assert sum(sent) == 2 * cache.stat().st_size  # there, and read back
    assert remote_size(place.shown) == cache.stat().st_size
    target = tmp_path / "there" / "copy.h5"
    pulled = pull(place.shown, target, got)
    assert (pulled.path, pulled.sha256, pulled.new, pulled.published) == (target, sha256(cache), True, True)
    assert target.read_bytes() == cache.read_bytes()
    assert sum(got) == cache.stat().st_size
    assert names(target.parent) == ["copy.h5"]


def test_sha256sum_reads_what_lies_beside_it(cache: Path, tmp_path: Path) -> None:
    push(cache, str(tmp_path / "team"), nothing)
    assert names(tmp_path / "team") == ["pets.h5", "pets.h5.sha256"]
    assert (tmp_path / "team" / "pets.h5.sha256").read_text() == f"{sha256(cache)}  pets.h5\n"
    if shutil.which("sha256sum"):
        command = ["sha256sum", "--strict", "-c", "pets.h5.sha256"]
        result = subprocess.run(command, cwd=tmp_path / "team", capture_output=True, text=True)
        assert (result.returncode, result.stdout) == (0, "pets.h5: OK\n")


def test_the_same_file_is_not_pushed_twice(cache: Path, place: Place) -> None:
    push(cache, place.url, nothing)
    again = Moved()
    assert push(cache, place.url, again) == Pushed(place.shown, sha256(cache), new=False)
    assert again == []


def test_another_file_is_replaced_only_by_force(cache: Path, tmp_path: Path) -> None:
    team = tmp_path / "team" / "pets.h5"
    push(make(tmp_path / "other" / "pets.h5", train=11), str(team), nothing)
    before = team.read_bytes()
    with pytest.raises(CacheMismatch) as refused:
        push(cache, str(team), nothing)
    assert str(refused.value) == (
        f"{team} is not the same file as {cache}. Push under another name, or replace it: --force"
    )
    assert team.read_bytes() == before
    assert push(cache, str(team), nothing, force=True).new
    assert team.read_bytes() == cache.read_bytes()
    assert pull(str(team), tmp_path / "copy.h5", nothing).published


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()], ids=["full", "interrupted"])
def test_a_push_that_fails_midway_leaves_nothing(
    cache: Path, memory: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def fail(file: MemoryFile, data: bytes) -> int:
        super(MemoryFile, file).write(data[: len(data) // 2])
        raise error

    with monkeypatch.context() as broken, pytest.raises((CacheError, KeyboardInterrupt)) as refused:
        broken.setattr(MemoryFile, "write", fail, raising=False)
        push(cache, "memory://team", nothing)
    if isinstance(error, OSError):
        message = "memory://team/pets.h5: No space left on device. Fix that, then run the same command again."
        assert str(refused.value) == message
    assert list(memory.store) == []
    assert push(cache, "memory://team", nothing).new
    assert sorted(memory.store) == ["/team/pets.h5", "/team/pets.h5.sha256"]
    assert memory.cat_file("/team/pets.h5") == cache.read_bytes()


def test_an_older_files_sha256_never_lies_beside_a_newer_file(
    cache: Path, memory: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    push(make(tmp_path / "other" / "pets.h5", train=11), "memory://team", nothing)

    def fail(file: MemoryFile, data: bytes) -> int:
        if data.endswith(b"pets.h5\n"):
            raise KeyboardInterrupt
        return super(MemoryFile, file).write(data)

    with monkeypatch.context() as broken, pytest.raises(KeyboardInterrupt):
        broken.setattr(MemoryFile, "write", fail, raising=False)
        push(cache, "memory://team", nothing, force=True)
    assert list(memory.store) == ["/team/pets.h5"]
    pulled = pull("memory://team/pets.h5", tmp_path / "pets.h5", nothing)
    assert (pulled.sha256, pulled.published) == (sha256(cache), False)


def test_a_place_that_keeps_other_bytes_is_noticed(
    cache: Path, memory: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(file: MemoryFile, data: bytes) -> int:
        return super(MemoryFile, file).write(bytes([data[0] ^ 1]) + data[1:])

    monkeypatch.setattr(MemoryFile, "write", spoil, raising=False)
    with pytest.raises(CacheDamaged) as refused:
        push(cache, "memory://team", nothing)
    assert str(refused.value) == ("memory://team/pets.h5 differs from what was written. Run the same command again.")
    assert list(memory.store) == []


KILLED = """
import os, signal, sys
from pathlib import Path
from tspipe.cache.transfer import pull, push

moved = 0
def advance(count):
    global moved
    moved += count
    if moved >= int(sys.argv[4]):
        os.kill(os.getpid(), signal.SIGKILL)

if sys.argv[1] == "push":
    push(Path(sys.argv[2]), sys.argv[3], advance)
else:
    pull(sys.argv[3], Path(sys.argv[2]), advance)
"""


def kill_after(size: int, what: str, path: Path, url: str) -> None:
    """Push or pull in another process, which is killed when so many bytes have moved."""
    result = subprocess.run([sys.executable, "-c", KILLED, what, path, url, str(size)], capture_output=True)
    assert result.returncode == -9, result.stderr


def kill_pull(web: Web, path: Path, url: str) -> None:
    """Kill a pull from a server that has stalled after 1.5 MB, when more than 1 MB has come."""
    web.cut_after = 1_500_000
    web.stalled.clear()
    kill_after(1_000_000, "pull", path, url)
    web.cut_after = None
    web.stalled.set()


def test_the_temporary_file_of_a_killed_push_is_removed_by_the_next(cache: Path, tmp_path: Path) -> None:
    """That of another host, whose process may still run, only after a day."""
    team = tmp_path / "team"
    kill_after(1, "push", cache, str(team))
    [abandoned] = names(team)
    remote = re.sub("@.*", f"@elsewhere.{'0' * 16}.tmp", abandoned)
    shutil.copy(team / abandoned, team / remote)
    assert push(cache, str(team), nothing).new
    assert names(team) == [remote, "pets.h5", "pets.h5.sha256"]
    long_ago = time.time() - 2 * 24 * 3600
    os.utime(team / remote, (long_ago, long_ago))
    assert push(cache, str(team), nothing, force=True).new
    assert names(team) == ["pets.h5", "pets.h5.sha256"]


def test_in_a_remote_store_temporary_files_are_removed_after_a_day(cache: Path) -> None:
    store = fsspec.filesystem("memory")
    path = f"/abandoned/.pets.h5.1@{socket.gethostname()}.{'0' * 16}.tmp"
    store.pipe(path, b"half")
    push(cache, "memory://abandoned", nothing)
    assert store.exists(path)
    store.store[path].modified -= timedelta(days=2)
    push(cache, "memory://abandoned", nothing)
    assert not store.exists(path)


def test_a_file_damaged_at_the_other_end_is_not_taken_for_the_same(cache: Path, tmp_path: Path) -> None:
    push(cache, str(tmp_path / "team"), nothing)
    target = tmp_path / "team" / "pets.h5"
    data = bytearray(target.read_bytes())
    data[-1] ^= 1
    target.write_bytes(data)
    with pytest.raises(CacheMismatch):
        push(cache, str(tmp_path / "team"), nothing)
    assert push(cache, str(tmp_path / "team"), nothing, force=True).new
    assert target.read_bytes() == cache.read_bytes()


def test_a_folder_may_be_called_like_a_cache(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "team" / "x.h5").mkdir(parents=True)
    assert push(cache, str(tmp_path / "team" / "x.h5"), nothing).address == f"{tmp_path}/team/x.h5/pets.h5"


def test_nowhere_is_no_place_to_push_to(cache: Path) -> None:
    with pytest.raises(CacheError) as refused:
        push(cache, "", nothing)
    assert str(refused.value) == "'pets.h5' cannot be pushed to ''. Give a folder or an address, and a plain name."


@pytest.mark.parametrize("line", ["{}  pets.h5", "\\{}  pets.h5", "{}"])
def test_checksum_files_of_other_tools(cache: Path, tmp_path: Path, line: str) -> None:
    target = tmp_path / "there.h5"
    target.write_bytes(cache.read_bytes())
    (tmp_path / "there.h5.sha256").write_text(line.format(sha256(cache).upper()))
    assert pull(str(target), tmp_path / "here.h5", nothing).published
    (tmp_path / "there.h5.sha256").write_text("no checksum")
    with pytest.raises(CacheError) as refused:
        pull(str(target), tmp_path / "second.h5", nothing)
    assert str(refused.value) == f"{target}.sha256 contains no SHA-256. Push the file again, or delete that one."


def test_a_part_file_that_is_a_link_is_not_followed(cache: Path, tmp_path: Path) -> None:
    push(cache, str(tmp_path / "team"), nothing)
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    target = tmp_path / "pets.h5"
    target.with_name(f".pets.h5.{sha256(cache)[:16]}.part").symlink_to(victim)
    with pytest.raises(CacheError):
        pull(str(tmp_path / "team" / "pets.h5"), target, nothing)
    assert victim.read_bytes() == b"precious"


def test_a_copy_that_was_changed_is_fetched_again(cache: Path, tmp_path: Path) -> None:
    push(cache, str(tmp_path / "team"), nothing)
    url = f"file://{tmp_path}/team/pets.h5"
    copy = fetch(url, nothing, tmp_path / "home").path
    copy.write_bytes(copy.read_bytes()[:1000])
    assert fetch(url, nothing, tmp_path / "home").status == "fetched"
    assert copy.read_bytes() == cache.read_bytes()


def test_a_push_killed_before_it_stated_the_sha256_is_completed(cache: Path, tmp_path: Path) -> None:
    push(cache, str(tmp_path / "team"), nothing)
    (tmp_path / "team" / "pets.h5.sha256").unlink()
    assert not push(cache, str(tmp_path / "team"), nothing).new
    assert (tmp_path / "team" / "pets.h5.sha256").read_text() == f"{sha256(cache)}  pets.h5\n"


def test_a_killed_pull_goes_on_where_it_stopped(cache: Path, web: Web, tmp_path: Path) -> None:
    url, target = web.put(cache), tmp_path / "there" / "pets.h5"
    kill_pull(web, target, url)
    part = target.with_name(f".pets.h5.{sha256(cache)[:16]}.part")
    have = part.stat().st_size
    assert not target.exists()
    assert 900_000 < have <= 1_500_000
    web.forget()
    moved = Moved()
    pull(url, target, moved)
    left = cache.stat().st_size - have
    assert web.sent - left == len(web.files["pets.h5.sha256"])
    assert moved[0] == have
    assert sum(moved) == cache.stat().st_size
    assert target.read_bytes() == cache.read_bytes()
    assert names(target.parent) == ["pets.h5"]


def test_what_another_file_left_is_not_gone_on_with(cache: Path, web: Web, tmp_path: Path) -> None:
    url, target = web.put(cache), tmp_path / "there" / "pets.h5"
    kill_pull(web, target, url)
    other = make(tmp_path / "other" / "pets.h5", train=11)
    web.put(other)
    web.forget()
    pull(url, target, nothing)
    assert web.sent > other.stat().st_size
    assert target.read_bytes() == other.read_bytes()
    assert names(target.parent) == ["pets.h5"]


@pytest.mark.parametrize("spoiled", ["shorter", "longer", "other"])
def test_a_part_file_that_does_not_fit_is_noticed(spoiled: str, cache: Path, web: Web, tmp_path: Path) -> None:
    url, target = web.put(cache), tmp_path / "pets.h5"
    part = target.with_name(f".pets.h5.{sha256(cache)[:16]}.part")
    data = cache.read_bytes()
    part.write_bytes({"shorter": data[:1000], "longer": data + b"x", "other": bytes(1000)}[spoiled])
    if spoiled == "other":
        with pytest.raises(CacheDamaged):
            pull(url, target, nothing)
        assert names(tmp_path) == ["here"]
    pull(url, target, nothing)
    assert target.read_bytes() == data


def test_a_broken_connection_is_told(cache: Path, web: Web, tmp_path: Path) -> None:
    url, target = web.put(cache), tmp_path / "there" / "pets.h5"
    web.cut_after = 1_500_000
    with pytest.raises(CacheError) as refused:
        pull(url, target, nothing)
    assert str(refused.value) == f"{url}: the connection was lost. Run the same command again."
    assert not target.exists()
    web.cut_after = None
    pull(url, target, nothing)
    assert target.read_bytes() == cache.read_bytes()


def test_without_range_requests_a_pull_begins_anew(cache: Path, web: Web, tmp_path: Path) -> None:
    url, target = web.put(cache), tmp_path / "there" / "pets.h5"
    kill_pull(web, target, url)
    web.ranges = False
    web.forget()
    moved = Moved()
    pull(url, target, moved)
    assert web.sent > cache.stat().st_size
    assert sum(moved) == cache.stat().st_size
    assert target.read_bytes() == cache.read_bytes()


def test_a_damaged_transfer_is_refused(cache: Path, web: Web, tmp_path: Path) -> None:
    url, target = web.put(cache), tmp_path / "there" / "pets.h5"
    data = bytearray(web.files["pets.h5"])
    data[-1000] ^= 1
    web.files["pets.h5"] = bytes(data)
    with pytest.raises(CacheDamaged) as refused:
        pull(url, target, nothing)
    assert str(refused.value) == (
        f"{url} arrived with SHA-256 {hashlib.sha256(data).hexdigest()[:12]}, not {sha256(cache)[:12]}: it is "
        "damaged, or was replaced meanwhile. Run the same command again; if that does not help, push the file again."
    )
    assert names(target.parent) == []


@pytest.mark.parametrize("stated", [True, False])
def test_what_is_no_cache_is_refused(stated: bool, web: Web, tmp_path: Path) -> None:
    (tmp_path / "evil.h5").write_bytes(b"<html>" * 1000)
    url, target = web.put(tmp_path / "evil.h5", stated=stated), tmp_path / "there" / "evil.h5"
    with pytest.raises(NotACache) as refused:
        pull(url, target, nothing)
    assert str(refused.value) == f"{url}: it is not an HDF5 file, so not a tspipe cache."
    assert names(target.parent) == []


def test_without_a_stated_sha256_the_caller_is_told(cache: Path, web: Web, tmp_path: Path) -> None:
    pulled = pull(web.put(cache, stated=False), tmp_path / "pets.h5", nothing)
    assert not pulled.published
    assert pulled.sha256 == sha256(cache)
    web.files["pets.h5.sha256"] = b"<html>Not found, but with status 200</html>"
    assert not pull(web.url("pets.h5"), tmp_path / "pets.h5", nothing, force=True).published


def test_what_is_here_already_stays(cache: Path, web: Web, tmp_path: Path) -> None:
    url, target = web.put(cache), tmp_path / "pets.h5"
    pull(url, target, nothing)
    before, moved = target.stat(), Moved()
    assert not pull(url, target, moved).new
    assert (target.stat().st_ino, moved) == (before.st_ino, [])
    other = make(tmp_path / "other" / "pets.h5", train=11)
    web.put(other)
    with pytest.raises(CacheMismatch) as refused:
        pull(url, target, nothing)
    assert str(refused.value) == f"{target} may not be {url}. Delete it, or replace it: --force"
    assert target.read_bytes() == cache.read_bytes()
    assert pull(url, target, nothing, force=True).new
    assert target.read_bytes() == other.read_bytes()


def test_a_second_pull_at_once_is_refused(cache: Path, web: Web, tmp_path: Path) -> None:
    url, target = web.put(cache), tmp_path / "pets.h5"
    with lock(target, CacheBusy), pytest.raises(CacheBusy) as refused:
        pull(url, target, nothing)
    assert re.fullmatch(
        rf"{target} is being written by process {os.getpid()} on \S+\. Wait for it to end, or stop it\.",
        str(refused.value),
    )


def test_too_little_room_is_met_before_anything_moves(
    cache: Path, web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, target = web.put(cache), tmp_path / "there" / "pets.h5"
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1_000_000))
    with pytest.raises(CacheError) as refused:
        pull(url, target, nothing)
    assert str(refused.value) == (
        f"{target.parent}: {url} needs {cache.stat().st_size:,} more bytes, and 1,000,000 are free. "
        "Free some space, then run the same command again."
    )
    assert ("GET", "/pets.h5") not in web.requests


def test_a_disk_that_takes_no_more_is_told_in_one_sentence(cache: Path, web: Web, tmp_path: Path) -> None:
    url, target = web.put(cache), tmp_path / "there" / "pets.h5"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
    try:
        with pytest.raises(CacheError) as refused:
            pull(url, target, nothing)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(refused.value) == f"{target}: File too large. Fix that, then run the same command again."
    web.forget()
    pull(url, target, nothing)
    assert web.sent < cache.stat().st_size - 900_000  # what was there was kept
    assert target.read_bytes() == cache.read_bytes()


def test_a_fetched_copy_is_kept_and_kept_up_to_date(cache: Path, web: Web, tmp_path: Path) -> None:
    url, home = web.put(cache), tmp_path / "home"
    first = fetch(url, nothing, home)
    assert first.status == "fetched"
    assert first.path == home / hashlib.sha256(url.encode()).hexdigest()[:16] / "pets.h5"
    assert first.path.read_bytes() == cache.read_bytes()
    web.forget()
    assert fetch(url, nothing, home).status == "unchanged"
    assert web.requests == [("HEAD", "/pets.h5")]

    other = make(tmp_path / "other" / "pets.h5", train=11)
    web.put(other)
    assert fetch(url, nothing, home).status == "fetched"
    assert first.path.read_bytes() == other.read_bytes()
    assert fetch(url, nothing, home).status == "unchanged"

    web.stop()
    gone = fetch(url, nothing, home)
    assert (gone.path, gone.status) == (first.path, "unreachable")
    assert gone.problem == f"{url}: Connection refused. Fix that, then run the same command again."


def test_a_fetch_with_nothing_to_fall_back_on_fails(web: Web, tmp_path: Path) -> None:
    with pytest.raises(CacheError) as refused:
        fetch(web.url("pets.h5"), nothing, tmp_path)
    assert str(refused.value) == f"There is no file {web.url('pets.h5')}. Check the address."


def test_a_copy_is_not_taken_for_a_remote_that_became_damaged(cache: Path, web: Web, tmp_path: Path) -> None:
    url = web.put(cache)
    copy = fetch(url, nothing, tmp_path / "home").path
    web.files["pets.h5"] = bytes(100)
    with pytest.raises(CacheDamaged):
        fetch(url, nothing, tmp_path / "home")
    assert copy.read_bytes() == cache.read_bytes()


@pytest.mark.parametrize("stated", [True, False])
def test_where_nothing_tells_versions_apart_the_bytes_do(stated: bool, cache: Path, web: Web, tmp_path: Path) -> None:
    web.etags = False
    url = web.put(cache, stated=stated)
    fetch(url, nothing, tmp_path / "home")
    assert fetch(url, nothing, tmp_path / "home").status == ("unchanged" if stated else "fetched")
    other = make(tmp_path / "other" / "pets.h5", train=9, weights=3_000_000 + 5 * 2 + 2 * 4 + 8 + 6 + 8)
    web.put(other, stated=stated)
    result = fetch(url, nothing, tmp_path / "home")
    assert (result.status, result.path.read_bytes()) == ("fetched", other.read_bytes())


def test_fetch_keeps_its_copies_where_the_desktop_says(
    cache: Path, memory: MemoryFileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(cache, "memory://team", nothing)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert fetch("memory://team/pets.h5", nothing).path.parent.parent == tmp_path / "xdg" / "tspipe"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    result = fetch("memory://team/pets.h5", nothing)
    assert (result.status, result.path.parent.parent) == ("fetched", tmp_path / "home" / ".cache" / "tspipe")
    assert fetch("memory://team/pets.h5", nothing).status == "unchanged"
    push(make(tmp_path / "other" / "pets.h5", train=11), "memory://team", nothing, force=True)
    assert fetch("memory://team/pets.h5", nothing).status == "fetched"


def big(path: Path, block_rows: int) -> Path:
    """A cache of several megabytes with 1,000 classes, whose names are long."""
    manifest = plan({"train": 1000, "test": 200}, width=512, block_rows=block_rows)
    manifest["dataset"]["classes"] = 1000
    classes = [f"class {i}, ".ljust(120, "x") for i in range(1000)]
    sizes = Dimensions(
        rows=manifest["dataset"]["rows"],
        width=512,
        classes=1000,
        feature_dtype="<f2",
        block_rows=block_rows,
        class_bytes=120,
        key_bytes=dict.fromkeys(SPLITS, 60),
        weights_bytes=100_000,
    )
    with CacheWriter(path, manifest, sizes, classes, bytes(100_000)) as writer:
        for split in SPLITS:
            for block in writer.missing(split):
                n = len(sizes.block(split, block))
                columns = {"features": (n, 512), "logits": (n, 1000), "labels": (n,), "digests": (n, 8)}
                rows = {name: np.zeros(shape) for name, shape in columns.items()}
                writer.write_block(split, block, {**rows, "keys": np.full(n, b"k")})
        writer.finish()
    return path


@pytest.mark.parametrize(("block_rows", "identified"), [(64, True), (1, False)])
def test_a_peek_is_cheap_however_big_the_cache(block_rows: int, identified: bool, web: Web, tmp_path: Path) -> None:
    path = big(tmp_path / "big.h5", block_rows)
    assert path.stat().st_size > 6_000_000
    result, cache = peek(web.put(path)), open_cache(path)
    assert len(web.requests) <= 4
    assert web.sent <= 256 * 1024
    assert result.identified == identified
    assert (result.name, result.size, result.id, result.manifest, result.has_teacher, result.has_images) == (
        *("big.h5", path.stat().st_size, cache.id, cache.manifest),
        True,
        cache.has_images,
    )
    assert 5 < len(result.classes) < 1000
    assert result.classes == cache.classes[: len(result.classes)]


def test_a_peek_of_a_small_cache_takes_one_request(web: Web, tmp_path: Path) -> None:
    path = make(tmp_path / "pets.h5", weights=0)
    result = peek(web.put(path))
    assert web.requests == [("GET", "/pets.h5")]
    assert (result.classes, result.has_teacher, result.identified) == (["cat", "dög"], False, True)


@pytest.mark.parametrize("scheme", ["memory", "path"])
def test_peek_elsewhere(scheme: str, memory: MemoryFileSystem, tmp_path: Path) -> None:
    path = big(tmp_path / "here" / "big.h5", 64)
    url = push(path, "memory://team" if scheme == "memory" else str(tmp_path / "team"), nothing).address
    result = peek(url)
    assert (result.id, result.identified) == (open_cache(path).id, True)


def spoiled(path: Path, name: str) -> bytes:
    """The file with the first byte of a dataset changed."""
    import h5py

    with h5py.File(path, "r") as file:
        offset = file[name].id.get_offset()
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    return bytes(data)


def test_a_peek_checks_as_opening_does(web: Web, tmp_path: Path) -> None:
    path = big(tmp_path / "big.h5", 64)
    url, size = web.put(path), path.stat().st_size
    for content, error, message in [
        (spoiled(path, "test_checksums"), CacheDamaged, "its id does not match its manifest and checksums. Get the "),
        (path.read_bytes()[:-1], NotACache, f"it is truncated: {size - 1:,} bytes, not {size:,}. Get it again from "),
        (b"<html>" * 1000, NotACache, "it is not an HDF5 file, so not a tspipe cache."),
        (path.read_bytes().replace(open_cache(path).id.encode(), bytes(64)), CacheIncomplete, "it is not finished. "),
    ]:
        web.files["big.h5"] = content
        with pytest.raises(error) as refused:
            peek(url)
        assert str(refused.value).startswith(f"{url}: {message}")


def test_a_server_that_gives_no_parts_is_not_peeked_into(web: Web, tmp_path: Path) -> None:
    url = web.put(big(tmp_path / "big.h5", 64))
    web.ranges = False
    with pytest.raises(CacheError) as refused:
        peek(url)
    assert (
        str(refused.value)
        == f"{url}: its server does not support range requests. Download all of it: tspipe pull {url}"
    )
    assert pull(url, tmp_path / "copy.h5", nothing).new


def test_a_web_server_takes_no_files(cache: Path) -> None:
    with pytest.raises(CacheError) as refused:
        push(cache, "https://me:secret@host/caches?token=1", nothing)
    assert str(refused.value) == (
        "https://host/caches: a web server does not accept files. Push to a mounted folder, s3://, gs:// or hf://."
    )


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("s3://bucket/pets.h5", "s3:// needs a driver: pip install 'tspipe[s3]'"),
        (
            "abfs://box/pets.h5",
            "abfs:// needs a driver: Install adlfs to access Azure Datalake Gen2 and Azure Blob Storage",
        ),
        ("ss3://me:secret@b/x.h5", "Unknown protocol 'ss3'. There are: file, gs, hf, http, https, memory, s3."),
        ("memory://none/pets.h5", "There is no file memory://none/pets.h5. Check the address."),
        ("/none/pets.h5", "There is no file /none/pets.h5. Check the address."),
    ],
)
def test_what_cannot_be_had_is_told_in_one_sentence(
    url: str, message: str, monkeypatch: pytest.MonkeyPatch, memory: MemoryFileSystem, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.setitem(sys.modules, "adlfs", None)
    for act in (
        lambda: pull(url, tmp_path / "x.h5", nothing),
        lambda: peek(url),
        lambda: fetch(url, nothing, tmp_path),
    ):
        with pytest.raises(CacheError) as refused:
            act()
        assert str(refused.value) == message


class Refusing(MemoryFileSystem):
    """A place whose driver raises what it likes, with secrets in the text."""

    protocol = "refusing"
    error: Exception = ValueError()

    def info(self, path: str, **options: object) -> dict[str, object]:
        raise self.error


class NoCredentialsError(Exception):
    """As botocore has one."""


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            PermissionError("k=secret"),
            "access is denied. Log in with its own tool, or ask its owner for access.",
        ),
        (NoCredentialsError(), "access is denied. Log in with its own tool, or ask its owner for access."),
        (
            TimeoutError("secret"),
            "hardly anything arrived for 60 seconds. The server sends too slowly: run the same command again later.",
        ),
        (
            OSError(errno.EHOSTUNREACH, "secret"),
            "No route to host. Fix that, then run the same command again.",
        ),
        (
            RuntimeError("https://me:secret@host"),
            "the transfer failed (RuntimeError). Check the address and the network, then run the same command again.",
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_no_exception_of_a_driver_comes_through(
    error: Exception, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsspec.register_implementation("refusing", Refusing, clobber=True)
    monkeypatch.setattr(Refusing, "error", error)
    with pytest.raises(CacheError) as refused:
        pull("refusing://team/pets.h5", tmp_path / "pets.h5", nothing)
    assert str(refused.value) == f"refusing://team/pets.h5: {message}"


def test_secrets_in_an_address_are_used_and_not_shown(cache: Path, web: Web, tmp_path: Path) -> None:
    web.password = "hush"
    plain = web.put(cache)
    secret = plain.replace("http://", "http://me:hush@") + "?token=quiet"
    assert pull(secret, tmp_path / "pets.h5", nothing).published
    assert ("GET", "/pets.h5.sha256?token=quiet") in web.requests
    home = tmp_path / "home"
    note = fetch(secret, nothing, home).path.with_suffix(".json")
    assert json.loads(note.read_text())["url"] == plain
    web.password = "another"
    with pytest.raises(CacheError) as refused:
        pull(secret, tmp_path / "pets.h5", nothing)
    assert str(refused.value) == (f"{plain}: access is denied. Log in with its own tool, or ask its owner for access.")
    assert peek_error(secret) == str(refused.value)
    web.stop()
    assert fetch(secret, nothing, home).problem.startswith(f"{plain}: Connection refused.")


def peek_error(url: str) -> str:
    with pytest.raises(CacheError) as refused:
        peek(url)
    return str(refused.value)


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("https://host/caches/pets.h5", "pets.h5"),
        ("https://host/pets.h5?token=../../x.h5#y", "pets.h5"),
        ("https://host/a%2F..%2F..%2Fetc%2Fpasswd", "passwd.h5"),
        ("https://host/..%5C..%5Cpets.h5", "pets.h5"),
        ("https://host/..", "unnamed.h5"),
        ("https://host/%2e%2e", "unnamed.h5"),
        ("https://host/%252e%252e%252fx.h5", "_2e_2e_2fx.h5"),
        ("https://host/-rf.h5", "rf.h5"),
        ("https://host/.hidden.h5", "hidden.h5"),
        ("https://host/a%00b%0a\x1b[31m.h5", "a_b_31m.h5"),
        ("https://host/" + 300 * "a" + ".h5", 150 * "a" + ".h5"),
        ("memory://pets.h5", "pets.h5"),
        ("/mnt/team/my pets.h5", "my_pets.h5"),
    ],
)
def test_a_name_from_an_address_is_never_a_path(url: str, name: str) -> None:
    assert file_name(url) == name


def test_what_an_address_is() -> None:
    assert is_url("https://host/pets.h5")
    assert not is_url("cache/pets.h5")
    assert not is_url("C:\\caches\\pets.h5")
    assert not is_url("C:\\caches\\me@home\\pets.h5")
    assert not is_url("/home/me@host/pets.h5")
    assert without_secrets("https://me:a@b@host:1/x.h5?k=1#f") == "https://host:1/x.h5"
    assert without_secrets("http://host/x;token=1/y.h5;k=2") == "http://host/x/y.h5"
    assert without_secrets("s3://bucket/x;y.h5") == "s3://bucket/x;y.h5"
    assert without_secrets("http:///u:k@host/x.h5") == "the given address"
    assert without_secrets("memory:///x.h5") == "memory:///x.h5"
    assert without_secrets("hf://datasets/me/pets@main/x.h5") == "hf://datasets/me/pets@main/x.h5"
    assert without_secrets("/mnt/what?/x.h5") == "/mnt/what?/x.h5"


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("https://host/net.safetensors?name=net.safetensors", "https://host/net.py?name=net.safetensors"),
        ("https://me:a.b@host/net.safetensors;k=1#f", "https://me:a.b@host/net.py;k=1#f"),
        ("/mnt/what?/net.safetensors", "/mnt/what?/net.py"),
        ("https://host/net?name=net.safetensors", "https://host/net?name=net.safetensors"),
    ],
)
def test_the_file_beside_another_has_its_address_but_for_the_suffix(url: str, expected: str) -> None:
    assert beside(url, ".py") == expected


def test_an_ipv6_address_is_no_chain(tmp_path: Path) -> None:
    with pytest.raises(CacheError) as refused:
        pull("http://[::1]:9/pets.h5", tmp_path / "pets.h5", nothing)
    assert str(refused.value).startswith("http://[::1]:9/pets.h5: ")
    assert "ValueError" not in str(refused.value)


def test_what_a_cache_carries_is_said_with_its_licence(tmp_path: Path) -> None:
    lines = [
        "features of pets; its licence: CC0",
        "the teacher's weights (lenet5, a6a82e54f5ff); their licence is their publisher's",
    ]
    assert describe_contents(open_cache(make(tmp_path / "a.h5", weights=9))) == lines
    manifest = plan({"train": 4, "test": 4})
    manifest["dataset"]["license"] = ""
    write(tmp_path / "b.h5", manifest)
    assert describe_contents(open_cache(tmp_path / "b.h5")) == ["features of pets; its licence: not stated"]


@pytest.mark.parametrize("name", ["pets.h5", "pets.h5.sha256"])
def test_a_pipe_at_the_other_end_is_refused_without_waiting(cache: Path, tmp_path: Path, name: str) -> None:
    push(cache, str(tmp_path / "team"), nothing)
    (tmp_path / "team" / name).unlink()
    os.mkfifo(tmp_path / "team" / name)
    with pytest.raises(CacheError) as refused:
        pull(str(tmp_path / "team" / "pets.h5"), tmp_path / "pets.h5", nothing)
    assert str(refused.value).startswith(f"{tmp_path}/team/pets.h5")


def test_a_second_name_of_a_part_file_is_not_written_to(cache: Path, tmp_path: Path) -> None:
    push(cache, str(tmp_path / "team"), nothing)
    (tmp_path / "victim").write_bytes(b"precious")
    (tmp_path / f".pets.h5.{sha256(cache)[:16]}.part").hardlink_to(tmp_path / "victim")
    with pytest.raises(CacheError, match="second name"):
        pull(str(tmp_path / "team" / "pets.h5"), tmp_path / "pets.h5", nothing)
    assert (tmp_path / "victim").read_bytes() == b"precious"

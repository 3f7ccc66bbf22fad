"""Errors as a person, a log file and an old terminal get them."""

import errno
import io
import os
import pty
import pwd
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import Result, Zygote
from tspipe.cache import Cache
from tspipe.cli import app

Tspipe = Callable[..., Result]
LONG = "a-name-that-is-longer-than-a-line-of-eighty-columns-" * 3 + ".h5"
MISSING = f"There is no file {LONG}. Make the cache first: tspipe cache --dataset NAME"


def test_an_error_is_one_line_that_is_not_wrapped(tspipe: Tspipe) -> None:
    assert tspipe("info", LONG) == Result(1, "", f"Error: {MISSING}\n")


def test_a_usage_error_is_one_line_too(tspipe: Tspipe) -> None:
    result = tspipe("student")
    assert (result.code, result.out, result.err) == (2, "", "Error: Missing option '--cache'.\n")
    result = tspipe("list", "colours")
    assert (result.code, result.out) == (2, "")
    assert result.err == (
        "Error: Invalid value: 'colours': choose from datasets, networks, losses, recipes, settings, "
        "random-kinds, caches\n"
    )
    assert tspipe("nonsense").err == "Error: No such command 'nonsense'.\n"
    assert tspipe().code == 2  # prints the help


@pytest.mark.parametrize(
    ("arguments", "text"), [(["info", "nope.h5"], "no file nope.h5"), (["student"], "Missing option")]
)
def test_on_a_terminal_an_error_is_a_panel(arguments: list[str], text: str) -> None:
    ours, theirs = pty.openpty()
    program = [sys.executable, "-m", "tspipe", *arguments]
    with subprocess.Popen(program, stderr=theirs, stdout=subprocess.DEVNULL, env={**os.environ, "TERM": "xterm"}):
        os.close(theirs)
        shown = b""
        while True:
            try:
                shown += os.read(ours, 4096)
            except OSError:  # the process has ended
                break
    os.close(ours)
    assert "╭" in shown.decode()
    assert " Error " in shown.decode()
    assert text in shown.decode()


@pytest.mark.parametrize("encoding", ["iso8859-1", "ascii"])
def test_no_command_needs_a_terminal_of_utf8(
    tspipe: Tspipe, digits: Cache, encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for command in (["info", digits.path], ["list", "settings"], ["list", "caches", digits.path.parent]):
        with monkeypatch.context() as patch:
            streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict") for _ in range(2)]
            patch.setattr(sys, "stdout", streams[0])
            patch.setattr(sys, "stderr", streams[1])
            assert tspipe(*command).code == 0
            assert streams[0].tell() > 0
    (Path.cwd() / "ü…").mkdir()
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    assert tspipe("list", "caches", "no ü…").code == 1
    sys.stderr.flush()
    shown = {"ascii": b"no \\xfc\\u2026", "iso8859-1": b"no \xfc\\u2026"}[encoding]
    assert sys.stderr.buffer.getvalue().startswith(b"Error: " + shown + b" is not a folder.")  # type: ignore[attr-defined]


def test_a_locale_without_utf8(digits: Cache) -> None:
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": os.environ.get("PYTHONPATH", "")}
    environment |= {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    program = [sys.executable, "-m", "tspipe", "info", digits.path]
    result = subprocess.run(program, env=environment, capture_output=True, check=False)
    assert (result.returncode, result.stderr) == (0, b"")
    assert rb"resize 16\xd716 (bilinear)" in result.stdout


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (errno.ENOSPC, "runs/x: No space left on device. Free some space, and run the same command again."),
        (errno.EACCES, "runs/x: Permission denied. Check the permissions of the file and its folders."),
        (
            errno.EIO,
            "runs/x: Input/output error. The disk or its connection may be failing: copy what is on it, and use "
            "another.",
        ),
        (errno.EBUSY, "runs/x: Device or resource busy. Fix this, then run the same command again."),
    ],
)
def test_an_error_of_the_system_is_a_sentence(
    tspipe: Tspipe, monkeypatch: pytest.MonkeyPatch, number: int, expected: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number), "runs/x")

    monkeypatch.setattr("tspipe.cache.open_cache", fail)
    assert tspipe("info", "x.h5") == Result(1, "", f"Error: {expected}\n")


@pytest.mark.parametrize(
    ("problem", "expected"),
    [
        (
            OSError("Can't read data (file read failed: time = Fri Nov 27\n, errno = 5)"),
            "The system reports an error: Can't read data (file read failed: time = Fri Nov 27\\n, errno = 5). Fix "
            "this, then run the same command again.",
        ),
        (
            OverflowError("Python int too large to convert to C long"),
            "A number in the flags, the recipe or a file is too large: Python int too large to convert to C long.",
        ),
    ],
)
def test_errors_without_a_file(
    tspipe: Tspipe, monkeypatch: pytest.MonkeyPatch, problem: Exception, expected: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise problem

    monkeypatch.setattr("tspipe.cache.open_cache", fail)
    assert tspipe("info", "x.h5") == Result(1, "", f"Error: {expected}\n")


def test_a_bug_keeps_its_traceback(tspipe: Tspipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "_message", lambda problem: None)
    with pytest.raises(app.TspipeError):
        tspipe("info", "nope.h5")


def test_a_file_without_permission(zygote: Zygote, digits: Cache, tmp_path: Path) -> None:
    """For an ordinary user: the superuser may read everything."""
    secret = tmp_path / "secret.h5"
    secret.write_bytes(digits.path.read_bytes())
    (tmp_path / "secret.toml").write_text("epochs = 1")
    for path in tmp_path.iterdir():
        path.chmod(0)
    denied, unreadable = "Permission denied", f"path '{secret}' is not readable."
    recipe = tmp_path / "secret.toml"
    commands = (
        (["info", secret], 1, f"{secret}: cannot be read ({denied})."),
        (["student", "--cache", digits.path, "--recipe", recipe], 1, f"The recipe {recipe} cannot be read: {denied}."),
        (["verify", secret], 2, f"Invalid value for 'file': {unreadable}"),
        (["teacher", "--dataset", "digits", "--weights", secret], 2, f"Invalid value for '--weights': {unreadable}"),
    )
    for command, code, expected in commands:
        result = zygote.run(*command, obey=True)
        assert (result.code, result.lines) == (code, [f"Error: {expected}"])


@pytest.mark.parametrize("home", [None, "/proc/none"])
def test_without_a_home_folder(
    tspipe: Tspipe, digits: Cache, home: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A container's user may have no entry in the password file, and a home folder that cannot be written."""

    def unknown(user: int) -> None:
        raise KeyError(user)

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    for variable in ("HOME", "USER", "LOGNAME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    if home:
        monkeypatch.setenv("HOME", home)
    url = f"file://{digits.path}"
    result = tspipe("student", "--cache", url)
    assert result.code == 1
    assert result.error.startswith("There is no folder for copies of remote caches (")
    assert result.error.endswith("). Name one: export XDG_CACHE_HOME=FOLDER")
    monkeypatch.setenv("XDG_CACHE_HOME", str(Path.cwd()))
    assert tspipe("diff", url, digits.path).out.endswith("They hold the same.\n")
    assert tspipe("cache", "--dataset", "folder:~/photos").code == 1

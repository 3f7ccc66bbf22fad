"""Runs tspipe commands under adverse conditions: reads orders as lines of JSON, answers `[killed, code, lines]`.

A fork of this process, which has imported everything already, is a start in a tenth of a second instead of two.
An order has `arguments`, and `seconds`, after which the command gets SIGKILL (null: never). It may have `limit`, the
largest file in bytes (RLIMIT_FSIZE), and `obey`: then permissions hold for the superuser, too.
"""

import ctypes
import json
import os
import resource
import signal
import sys
import time
import traceback
from importlib import import_module
from typing import Any


def slowly() -> None:
    """Have stage one say which blocks it computes and has written, and take its time, to be killed in."""
    from tspipe.cache import CacheWriter

    write_block = CacheWriter.write_block

    def written(self: CacheWriter, split: str, block: int, columns: Any) -> None:
        os.write(1, f"computed {split} {block}\n".encode())  # in one call: never half a line
        write_block(self, split, block, columns)
        os.write(1, f"written {split} {block}\n".encode())
        time.sleep(0.005)

    CacheWriter.write_block = written  # type: ignore[method-assign]


def obey_permissions() -> None:
    """Drop the superuser's right to write where permissions forbid it (Linux: CAP_DAC_OVERRIDE)."""
    libc, header, sets = (
        ctypes.CDLL(None, use_errno=True),
        (ctypes.c_uint32 * 2)(0x20080522, 0),
        (ctypes.c_uint32 * 6)(),
    )
    assert libc.capget(header, sets) == 0
    for effective_or_permitted in (0, 1):
        sets[effective_or_permitted] &= ~(1 << 1)
    assert libc.capset(header, sets) == 0


def start(arguments: list[str], limit: int | None = None, obey: bool = False) -> tuple[int, int]:
    """Start a command in a fork; its process, and the pipe into which it prints."""
    from tspipe.cli import main

    reader, writer = os.pipe()
    process = os.fork()
    if process:
        os.close(writer)
        return process, reader
    os.dup2(writer, 1)
    os.dup2(writer, 2)
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    if obey and os.getuid() == 0:
        obey_permissions()
    sys.argv, code = ["tspipe", *arguments], 1
    try:
        main()
    except SystemExit as stop:
        code = int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def main() -> None:
    for name in ("matplotlib.backends.backend_agg", "sklearn.datasets", "torch._dynamo"):
        import_module(name)
    for name in ("extract", "report", "train_students", "train_teacher"):
        import_module(f"tspipe.{name}")

    slowly()
    for line in sys.stdin:
        order = json.loads(line)
        seconds = order.pop("seconds")
        process, pipe = start(**order)
        with os.fdopen(pipe) as output:
            if seconds is not None:
                time.sleep(seconds)
                os.kill(process, signal.SIGKILL)
            lines = output.read().splitlines()
        status = os.waitpid(process, 0)[1]
        print(json.dumps([os.WIFSIGNALED(status), os.waitstatus_to_exitcode(status), lines]), flush=True)


if __name__ == "__main__":
    main()

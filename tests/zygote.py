"""Run tspipe commands under adverse conditions: read requests as lines of JSON, answer `[killed, codes, lines]`.

A command is a fork of this process, itself a fork of pytest's, so it starts in a tenth of a second instead of two. The
fields of a request:

    arguments  the command line
    program    Python code to run in place of tspipe
    seconds    send SIGKILL after so many seconds (null: never)
    after      send SIGKILL after the first line that starts with this text
    limit      the size limit of files in bytes (RLIMIT_FSIZE)
    obey       permissions also apply to the superuser
    ranks      run as a torchrun job of so many processes, which are killed together and share one answer
"""

import ctypes
import json
import os
import resource
import signal
import socket
import sys
import time
import traceback
from importlib import import_module
from typing import Any, TextIO


def save_time() -> None:
    """Leave out what no test needs: syncing to the disk, labels of many random images, and pixels of figures."""
    from tspipe.experiments import figures
    from tspipe.training import metrics_log

    os.fsync = lambda descriptor: None  # tests end processes and never the machine
    metrics_log._LABELLED = 64
    figures._STYLE["savefig.dpi"] = 50


def slowly() -> None:
    """Make stage one print the blocks that it computes and writes, and slow it down, so that kills fall in between."""
    from tspipe.cache import CacheWriter
    from tspipe.extraction import forward

    run_teacher, write_block = forward.run_teacher_on_blocks, CacheWriter.write_block

    def computed(*arguments: Any) -> Any:
        os.write(1, "computed {} {}\n".format(*arguments[-2:]).encode())  # in one call: never half a line
        return run_teacher(*arguments)

    def written(self: CacheWriter, split: str, block: int, columns: Any) -> None:
        write_block(self, split, block, columns)
        os.write(1, f"written {split} {block}\n".encode())
        time.sleep(0.005)

    forward.run_teacher_on_blocks = computed
    CacheWriter.write_block = written  # type: ignore[method-assign]


def obey_permissions() -> None:
    """Drop the superuser's right to ignore permissions (Linux: CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH)."""
    libc, header, sets = (
        ctypes.CDLL(None, use_errno=True),
        (ctypes.c_uint32 * 2)(0x20080522, 0),
        (ctypes.c_uint32 * 6)(),
    )
    assert libc.capget(header, sets) == 0
    for effective_or_permitted in (0, 1):
        sets[effective_or_permitted] &= ~0b110
    assert libc.capset(header, sets) == 0


def rank_environments(ranks: int) -> list[dict[str, str]]:
    """Return the environment variables that torchrun sets for each process of a job."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    job = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(ranks)}
    return [{**job, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def start(
    variables: dict[str, str],
    arguments: list[str],
    limit: int | None = None,
    obey: bool = False,
    program: str | None = None,
) -> tuple[int, int]:
    """Start a command in a fork; return its process id and the pipe that it prints to."""
    from tspipe.cli.app import main

    reader, writer = os.pipe()
    process = os.fork()
    if process:
        os.close(writer)
        return process, reader
    os.environ.update(variables)
    os.dup2(writer, 1)
    os.dup2(writer, 2)
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    if obey and os.getuid() == 0:
        obey_permissions()
    sys.argv, code = ["tspipe", *arguments], 1
    try:
        exec(program, {}) if program else main()
    except SystemExit as stop:
        code = int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def serve(requests: TextIO, answers: TextIO) -> None:
    """Answer requests until there are no more."""
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__  # in place of pytest's
    sys.modules["matplotlib.figure"] = None  # type: ignore[assignment]  # figures are tested elsewhere
    for name in ("torch._dynamo", "tspipe.experiments.report", "tspipe.training.trainer"):
        import_module(name)  # what most commands need and pytest may not have imported
    slowly()
    for line in requests:
        request = json.loads(line)
        seconds, ranks, after = request.pop("seconds"), request.pop("ranks", None), request.pop("after", None)
        started = [start(environment, **request) for environment in (rank_environments(ranks) if ranks else [{}])]
        if seconds is not None:
            time.sleep(seconds)
            for process, _ in started:
                os.kill(process, signal.SIGKILL)
        lines = []
        for process, pipe in started:
            with os.fdopen(pipe) as output:
                for printed in output:
                    lines.append(printed.rstrip("\n"))
                    if after and printed.startswith(after):
                        os.kill(process, signal.SIGKILL)
        ends = [os.waitpid(process, 0)[1] for process, _ in started]
        codes = [os.waitstatus_to_exitcode(end) for end in ends]
        answer = any(map(os.WIFSIGNALED, ends)), codes, lines
        print(json.dumps(answer), file=answers, flush=True)

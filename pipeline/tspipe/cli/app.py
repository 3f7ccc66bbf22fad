"""The `tspipe` command: one function per subcommand, which turns flags into a config for one stage.

Stages are imported inside the commands, so that `tspipe --help` answers at once.
"""

import contextlib
import errno
import gc
import os
import sys
from typing import Annotated, Any

import typer

from tspipe.cli import cache, deploy, share, student, teacher
from tspipe.errors import OtherProcessFailed, TspipeError, is_out_of_memory
from tspipe.utils.console import printable

_UsageError: Any = typer.BadParameter.__base__  # click's, wherever this version of typer has it
_REMEDIES = {
    errno.ENOSPC: "Free some space, and run the same command again.",
    errno.EDQUOT: "Free some of your quota, and run the same command again.",
    errno.EACCES: "Check the permissions of the file and its folders.",
    errno.EPERM: "Check the permissions of the file and its folders.",
    errno.EROFS: "Choose a folder that can be written.",
    errno.EIO: "The disk or its connection may be failing: copy what is on it, and use another.",
    errno.EMFILE: "Allow more open files: ulimit -n 65536",
}

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 80},
    help="Run a teacher once, cache its features, train many students against the file.",
)


def _print_version(requested: bool) -> None:
    if requested:
        from importlib import metadata

        print(f"tspipe {metadata.version('tspipe')}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Options before the command; `main` reads --debug itself."""


for panel, commands in {
    "Train": (teacher.teacher, cache.cache, student.student),
    "Feature caches": (cache.info, cache.verify, cache.diff, share.push, share.pull),
    "Students in use": (deploy.predict, deploy.export),
    "Results": (student.report, student.reproduce, student.bench),
}.items():
    for command in commands:
        app.command(rich_help_panel=panel)(command)
app.command("eval", rich_help_panel="Students in use")(deploy.eval_)
app.command("list", rich_help_panel="Results")(share.list_)
app.command(rich_help_panel="Results")(share.recipe)


def main() -> None:
    """Run the command line. An error is one message and exit code 1 (usage: 2), a traceback only with --debug."""
    streams: tuple[Any, ...] = sys.stdout, sys.stderr
    for stream in streams:
        with contextlib.suppress(AttributeError, OSError):  # of streams that are replaced or closed
            stream.reconfigure(errors="backslashreplace")  # of characters that the locale's encoding lacks
    try:
        code = app(standalone_mode=False)
    except _UsageError as problem:
        code = problem.exit_code
        if sys.stderr.isatty():
            from typer import rich_utils

            rich_utils.rich_format_error(problem)
        elif text := problem.format_message():
            _print_error(text)
    except SystemExit as stop:
        # Shell completion, asked by a variable such as _TSPIPE_COMPLETE, has printed its answer; or the reader of a
        # pipe, as `head`, has gone.
        completing = any(name.startswith("_") and name.endswith("_COMPLETE") for name in os.environ)
        if completing or isinstance(stop.__context__, BrokenPipeError):
            raise
        code = 1
        _print_error(f"A plug-in ended the command with exit({stop.code!r}). Raise an error in its place.")
    except Exception as problem:
        text, code = _message(problem), 1
        if text is None or "--debug" in sys.argv:
            raise
        if isinstance(problem, OtherProcessFailed):  # that process prints its error
            print(problem, file=sys.stderr)
        else:
            _print_error(text)
    finally:
        gc.freeze()  # or Python searches all imported modules for garbage at exit: 40 ms, with torch 0.6 s
    if code == 130:  # Ctrl-C
        print("Interrupted. Run the same command again to resume from the last checkpoint.", file=sys.stderr)
    sys.exit(code or 0)


def _print_error(text: str) -> None:
    """Print a panel on a terminal; elsewhere one line that is not wrapped, so that logs can be searched for it."""
    if not sys.stderr.isatty():
        print(f"Error: {printable(text)}", file=sys.stderr)
        return
    from rich.panel import Panel
    from rich.text import Text

    from tspipe.utils.progress import stderr_console

    stderr_console.print(Panel(Text(printable(text)), title="Error", title_align="left", border_style="red"))


def _message(problem: Exception) -> str | None:
    """Return what to tell a user about an error; None if it is a bug."""
    if isinstance(problem, TspipeError):
        return str(problem)
    if isinstance(problem, OSError):
        reason = f"{problem.strerror or problem}".rstrip(".")
        text = f"{problem.filename}: {reason}." if problem.filename else f"The system reports an error: {reason}."
        return f"{text} {_REMEDIES.get(problem.errno or 0, 'Fix this, then run the same command again.')}"
    if isinstance(problem, OverflowError):
        return f"A number in the flags, the recipe or a file is too large: {problem}."
    if is_out_of_memory(problem):
        return (
            "Out of memory. Use smaller batches in stage one (--set compute.batch_size=N) or in training (--set "
            "batch_size=N, teacher.batch_size=N), or keep images on the disk (--set memory=SIZE)."
        )
    return None

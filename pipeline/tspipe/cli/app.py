"""The `tspipe` command: one function per subcommand, which turns flags into a config for one stage.

Stages are imported inside the commands, so that `tspipe --help` answers at once.
"""

import gc
import sys
from typing import Annotated

import typer

from tspipe.cli import cache, share, student, teacher
from tspipe.errors import OtherProcessFailed, TspipeError, is_out_of_memory

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
    "Results": (student.report, student.reproduce, student.bench),
}.items():
    for command in commands:
        app.command(rich_help_panel=panel)(command)
app.command("list", rich_help_panel="Results")(share.list_)


def main() -> None:
    """Run the command line; an error of tspipe is one red panel and exit code 1."""
    try:
        app()
    except SystemExit as stop:
        if stop.code == 130:  # Ctrl-C
            print("Interrupted. Run the same command again to resume from the last checkpoint.", file=sys.stderr)
        raise
    except Exception as problem:
        text = _message(problem)
        if text is None or "--debug" in sys.argv:
            raise
        if isinstance(problem, OtherProcessFailed):  # that process prints the panel
            print(problem, file=sys.stderr)
        else:
            _print_error(text)
        sys.exit(1)
    finally:
        gc.freeze()  # or Python searches all imported modules for garbage at exit: 40 ms, with torch 0.6 s


def _print_error(text: str) -> None:
    from rich.panel import Panel
    from rich.text import Text

    from tspipe.utils.console import printable
    from tspipe.utils.progress import stderr_console

    stderr_console.print(Panel(Text(printable(text)), title="Error", title_align="left", border_style="red"))


def _message(problem: Exception) -> str | None:
    """Return what to tell a user about an error; None if it is a bug."""
    if isinstance(problem, TspipeError | OSError):
        return str(problem)
    if is_out_of_memory(problem):
        return (
            "Out of memory. Use smaller batches in stage one (--set compute.batch_size=N) or in training (--set "
            "batch_size=N, teacher.batch_size=N), or keep images on the disk (--set memory=SIZE)."
        )
    return None

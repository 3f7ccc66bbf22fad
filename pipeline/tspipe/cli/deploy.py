"""The commands on trained students: export them."""

from pathlib import Path
from typing import Annotated

import typer

from tspipe.cli import options
from tspipe.errors import NetworkError
from tspipe.utils.console import echo, format_bytes

Source = Annotated[Path, typer.Argument(metavar="STUDENT", help="A run folder, or a file student-*.safetensors.")]
Name = Annotated[
    str | None, typer.Option("--student", help="Which student of a run: a name or a pattern (default: the best).")
]
Network = Annotated[str | None, typer.Option(help="The network's file, if it is your own: ./mine.py.")]
CacheFile = Annotated[
    Path | None, typer.Option("--cache", help="The student's cache (default: found in cache/ by its id).")
]


def export(
    source: Source,
    student: Name = None,
    format_: Annotated[str, typer.Option("--format", help="onnx, torch or safetensors.")] = "onnx",
    out: Annotated[Path | None, typer.Option(help="Output file (default: beside the student).")] = None,
    uint8: Annotated[
        bool, typer.Option("--uint8", help="Image bytes in, probabilities out: normalisation is in the file.")
    ] = False,
    network: Network = None,
    cache: CacheFile = None,
    data: options.Data = None,
    force: options.Force = False,
) -> None:
    """Export a student to a file that needs no tspipe, and check it."""
    from tspipe.deploy import export as stage
    from tspipe.deploy.formats import FORMATS
    from tspipe.deploy.labelled_images import find_test_images
    from tspipe.deploy.student import load_student

    if format_ not in FORMATS:
        raise typer.BadParameter(f"{format_!r}: choose from {', '.join(FORMATS)}", param_hint="--format")
    loaded = load_student(source, student=student, network=network)
    name = loaded.name + ("-uint8" if uint8 else "")
    out = out or loaded.path.with_name(name + FORMATS[format_].suffix)
    if out.exists() and not force:
        raise NetworkError(f"{out} exists already. Replace it with --force, or choose another --out.")
    test = find_test_images(loaded.facts.cache, cache, data)
    images = None if isinstance(test, str) else test
    exported = stage.export(loaded, format_, out, images, uint8=uint8)
    compared, what = exported.comparison, "probabilities" if uint8 else "logits"
    trained = sum(parameter.numel() for parameter in loaded.parameters())
    echo(f"{exported.path}: {format_bytes(exported.size)}, {exported.parameters:,} weights of {trained:,}")
    kind = "test images" if compared.real else "images of random pixels"
    echo(f"Its {what} for {compared.images:,} {kind} differ from the student's by up to {compared.difference:.1g}.")
    if compared.accuracy is not None:
        echo(f"Its test accuracy is {compared.accuracy:.2%}, the student's {compared.student_accuracy:.2%}.")
    elif isinstance(test, str):
        echo(f"It was not run on real images: {test}")

"""The commands on trained students: classify images, compare students, export."""

import csv
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tspipe.cli import options
from tspipe.cli.share import local_path
from tspipe.errors import NetworkError
from tspipe.utils.console import echo, format_bytes, pluralize
from tspipe.utils.files import check_writable

if TYPE_CHECKING:
    from tspipe.deploy.export import Export
    from tspipe.deploy.student import Student

Source = Annotated[
    str, typer.Argument(metavar="STUDENT", help="A run folder, or a file student-*.safetensors, or its URL.")
]
Name = Annotated[
    str | None, typer.Option("--student", help="Which student of a run: a name or a pattern (default: the best).")
]
Last = Annotated[bool, typer.Option("--last", help="From a run folder, take the last epoch and not the best one.")]
Network = Annotated[str | None, typer.Option(help="The network's file, if it is your own: ./mine.py.")]
CacheFile = Annotated[
    Path | None, typer.Option("--cache", help="The student's cache (default: found in cache/ by its id).")
]


def export(
    source: Source,
    student: Name = None,
    format_: Annotated[str, typer.Option("--format", help="onnx, torch, executorch or safetensors.")] = "onnx",
    out: Annotated[Path | None, typer.Option(help="Output file (default: beside the student).")] = None,
    uint8: Annotated[
        bool, typer.Option("--uint8", help="Image bytes in, probabilities out: normalisation is in the file.")
    ] = False,
    int8: Annotated[bool, typer.Option("--int8", help="8-bit weights and activations (onnx, executorch).")] = False,
    last: Last = False,
    network: Network = None,
    cache: CacheFile = None,
    data: options.Data = None,
    images: Annotated[
        Path | None, typer.Option(help="Photos without labels to check the file with, if the cache is not available.")
    ] = None,
    force: options.Force = False,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Export a student to a file that needs no tspipe, and check it."""
    from tspipe.cache.address import is_url
    from tspipe.deploy import export as stage
    from tspipe.deploy.exported import load_classifier
    from tspipe.deploy.folder_images import FolderImages
    from tspipe.deploy.formats import FORMATS
    from tspipe.deploy.labelled_images import find_test_images
    from tspipe.deploy.student import Student

    if format_ not in FORMATS:
        raise typer.BadParameter(f"{format_!r}: choose from {', '.join(FORMATS)}", param_hint="--format")
    loaded = load_classifier(local_path(source), student, network, last=last)
    if not isinstance(loaded, Student):
        raise NetworkError(f"{source} is an export already. Name the student that it was made of.")
    name = loaded.name + "-uint8" * uint8 + "-int8" * int8
    suffix = FORMATS[format_].suffix
    out = out or (Path() if is_url(source) else loaded.path.parent) / (name + suffix)
    if out.suffix != suffix:
        raise typer.BadParameter(f"{str(out)!r}: a file of the format {format_} ends in {suffix}", param_hint="--out")
    for existing in (out, out.with_suffix(".py")) if format_ == "safetensors" else (out,):
        if existing.exists() and not force:
            raise NetworkError(f"{existing} exists already. Replace it with --force, or choose another --out.")
    check_writable(out)
    if images and (cache or data):
        raise typer.BadParameter("it excludes --cache and --data", param_hint="--images")
    test = FolderImages(images, loaded.facts) if images else find_test_images(loaded.facts.cache, cache, data)
    if int8 and isinstance(test, str):
        raise NetworkError(f"--int8 takes its scales from images. {test}, or photos: --images FOLDER")
    config = stage.ExportConfig(format_, out, uint8, int8)
    exported = stage.export(loaded, config, None if isinstance(test, str) else test)
    _show_export(exported, loaded, config.output, "image" if images else "test image")
    if isinstance(test, str):
        echo(f"It was not run on real images: {test}")


def _show_export(exported: "Export", student: "Student", output: str, kind: str) -> None:
    from tspipe.models.loading import count_parameters

    compared, trained = exported.comparison, count_parameters(student)
    echo(f"{exported.path}: {format_bytes(exported.size)}, {exported.parameters:,} weights of {trained:,}")
    images = pluralize(compared.images, kind if compared.real else "random image")
    difference = f"differ from the student's by up to {compared.difference:.1g}"
    echo(f"Its {output} for {images} {difference}.")
    if compared.accuracy is not None:
        accuracies = f"{compared.accuracy:.2%}, the student's {compared.student_accuracy:.2%}"
        echo(f"Its test accuracy is {accuracies}; they agree on {compared.agreement:.2%} of the images.")
    else:
        echo(f"They predict the same class for {compared.agreement:.2%} of the images.")


def predict(
    source: Annotated[
        str, typer.Argument(metavar="STUDENT", help="A run folder, a student's file, an export, or its URL.")
    ],
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE|FOLDER", help="Images, or folders of images.")],
    top: Annotated[int, typer.Option(min=1, help="Classes to print for each image.")] = 3,
    student: Name = None,
    last: Last = False,
    network: Network = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images classified at once.")] = 64,
    json_: options.Json = False,
    csv_: Annotated[bool, typer.Option("--csv", help="Print CSV.")] = False,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Classify images; the exit code is 1 if some cannot be classified."""
    from tspipe.deploy.classifier import find_images, predict_each
    from tspipe.deploy.exported import load_classifier
    from tspipe.errors import DatasetError
    from tspipe.utils.progress import progress, warn

    if json_ and csv_:
        raise typer.BadParameter("--json and --csv exclude each other")
    files, classifier = find_images(images), load_classifier(local_path(source), student, network, last=last)
    classes, problems = classifier.facts.classes, 0
    records: list[dict[str, Any]] = []
    top = min(top, len(classes))
    writer = csv.writer(sys.stdout, lineterminator="\n")
    if csv_:
        columns = [f"{column}_{rank}" for rank in range(1, top + 1) for column in ("class", "probability")]
        writer.writerow(["image", *columns])
    with progress("classifying", len(files), "images") as advance:
        for file, result in zip(files, predict_each(classifier, files, batch_size), strict=True):
            advance(1, "classifying")
            if isinstance(result, DatasetError):
                warn(str(result))
                problems += 1
                records.append({"image": str(file), "error": str(result)})
                continue
            probabilities, indices = (part.tolist() for part in result.topk(top))
            ranked = [(classes[i], p) for i, p in zip(indices, probabilities, strict=True)]
            if json_:
                predictions = [{"class": name, "probability": p} for name, p in ranked]
                records.append({"image": str(file), "predictions": predictions})
            elif csv_:
                writer.writerow([str(file), *(value for name, p in ranked for value in (name, f"{p:.6f}"))])
            else:
                echo(f"{file}: " + ", ".join(f"{name} {p:.1%}" for name, p in ranked))
    if json_:
        print(json.dumps(records, indent=2))
    if problems:
        raise typer.Exit(1)


def eval_(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="STUDENT|EXPORT|CACHE", help="Run folders, students' files, exports or caches, or their URLs."
        ),
    ],
    student: Name = None,
    last: Last = False,
    network: Annotated[
        list[str] | None, typer.Option(help="The file of a network, if it is your own: ./mine.py; repeatable.")
    ] = None,
    cache: CacheFile = None,
    data: options.Data = None,
    seconds: Annotated[
        float, typer.Option(min=0, help="Seconds per latency; 0 measures neither latency nor memory.")
    ] = 0.5,
    html: Annotated[Path | None, typer.Option(help="Write an HTML page with a plot, confusions and mistakes.")] = None,
    json_: options.Json = False,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Compare students, exports and the teachers of caches."""
    from tspipe.cache import open_cache
    from tspipe.cli.render import show_evaluations
    from tspipe.deploy.evaluate import as_json, evaluate, leak_remarks
    from tspipe.deploy.exported import load_classifier
    from tspipe.deploy.labelled_images import find_cache, open_labelled_images
    from tspipe.experiments import evaluation, figures

    if html:
        figures.check()
        check_writable(html)
    files = [local_path(source) for source in sources]
    caches = [open_cache(file) for file in dict.fromkeys([cache, *files]) if file and file.suffix == ".h5"]
    classifiers = [load_classifier(file, student, network, last=last) for file in files if file.suffix != ".h5"]
    caches = caches or [find_cache(classifiers[0].facts.cache)]
    tests = [open_labelled_images(opened, data) for opened in caches]
    evaluations, remarks = evaluate(tests, classifiers, seconds, network), leak_remarks(classifiers, tests)
    if json_:
        results = [as_json(one, caches[0].classes) for one in evaluations]
        ids = [opened.id for opened in caches]
        content = {"caches": ids, "images": len(tests[0].labels), "results": results, "remarks": remarks}
        print(json.dumps(content, indent=2))
    else:
        show_evaluations(evaluation.tables(evaluations), evaluation.notes(evaluations, tests[0], remarks))
    if html:
        evaluation.write(html, evaluations, tests, remarks)
        if not json_:
            echo(f"Page: {html}")

"""What travels with a student or an export, and what its receiver needs."""

from pathlib import Path

from tspipe.cache import address
from tspipe.cache.remote import Advance
from tspipe.cache.transfer import Pushed, push
from tspipe.deploy.exported import ExecutorchExport, OnnxExport
from tspipe.deploy.facts import ExportFacts, Facts, StudentFacts, parse
from tspipe.deploy.model_card import card_address, model_card, write_card
from tspipe.deploy.rebuilt import is_export, read_archive
from tspipe.errors import NetworkError
from tspipe.models import networks, weights

_RUNTIMES = {
    ".onnx": "onnxruntime",
    ".pt2": "PyTorch (torch.export.load unpickles: load it only from people you trust)",
    ".pte": "ExecuTorch",
    ".safetensors": "PyTorch and the Python file beside it",
}


def read_facts(path: Path) -> Facts:
    """Return what a student's file or an export says of itself. Raises NetworkError if it is neither, or damaged."""
    if not path.is_file():
        raise NetworkError(f"There is no file {path}. Give a cache, a student, an export, or a run folder.")
    if path.suffix == ".onnx":
        return OnnxExport(path).facts
    if path.suffix == ".pt2":
        return parse(ExportFacts, read_archive(path)[1], str(path))
    if path.suffix == ".pte":
        return ExecutorchExport(path).facts
    kind = ExportFacts if is_export(path) else StudentFacts
    return parse(kind, weights.read(path).metadata, str(path))


def files_of(path: Path, facts: Facts) -> list[Path]:
    """Return the files that travel together, the one that was named last."""
    source = path.with_suffix(".py")
    if path.suffix != ".safetensors" or not isinstance(facts, ExportFacts):
        return [path]
    if not source.is_file():
        raise NetworkError(f"{source}, which runs {path}, is not beside it. Export the student again.")
    return [source, path]


def push_files(paths: list[Path], url: str, advance: Advance, *, force: bool) -> Pushed:
    """Publish files that travel together, beside each other; return where the last one is."""
    *others, last = paths
    for path in others:
        push(path, address.beside(url, path.suffix) if url.endswith(last.suffix) else url, advance, force=force)
    return push(last, url, advance, force=force)


def push_card(facts: Facts, pushed: Pushed, *, force: bool) -> str:
    """Write the model card of a file on the Hugging Face hub; return a sentence on it, or nothing elsewhere."""
    url = card_address(pushed.address)
    if url is None:
        return ""
    if write_card(url, model_card(facts, pushed.address, pushed.sha256), force=force):
        return f"Its model card is {url}."
    return f"{url} is not a card of tspipe's, or was edited, and is kept. Replace it: --force"


def needs(path: Path, facts: Facts) -> list[str]:
    """List what the receiver needs to run a file, besides the file."""
    if isinstance(facts, ExportFacts):
        is_rebuilt = path.suffix in (".pt2", ".safetensors") and networks.is_user_network(facts.network)
        file = f"for tspipe's commands also the network's file (--network ./{facts.network}.py)"
        return [_RUNTIMES[path.suffix], *([file] if is_rebuilt else [])]
    lines = ["tspipe"]
    if facts.network.startswith("timm:"):
        lines.append("timm (pip install 'tspipe[timm]')")
    elif facts.network.startswith("hub:"):
        lines.append(f"the code of {facts.network}, which runs only with --trust-remote-code (an export needs none)")
    elif networks.is_user_network(facts.network):
        lines.append(f"the network's file: --network ./{facts.network}.py (an export needs none)")
    return lines

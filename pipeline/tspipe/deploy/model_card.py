"""The model card, README.md, of a student or an export that is pushed to the Hugging Face hub."""

import hashlib
import json
import re
from pathlib import PurePath, PurePosixPath

from tspipe.cache.remote import open_remote
from tspipe.deploy.facts import ExportFacts, Facts, StudentFacts
from tspipe.errors import NetworkError
from tspipe.models import networks
from tspipe.training.arms import UNTAUGHT
from tspipe.utils.console import quote

_LONGEST = 2**20  # bytes
_MARK = "\n<!-- Written by tspipe; SHA-256 of the text above: {} -->\n"
_RUNS = {
    ".onnx": 'session = onnxruntime.InferenceSession("{name}")\noutput = session.run(None, {{"images": images}})[0]',
    ".pt2": 'network = torch.export.load("{name}").module()  # uses pickle\noutput = network(images)',
    ".pte": 'method = Runtime.get().load_program("{name}").load_method("forward")\noutput = method.execute([image])[0]',
    ".safetensors": 'network, metadata = {stem}.load("{name}")  # of the file beside it\noutput = network(images)',
}
_IMPORTS = {".onnx": "import onnxruntime", ".pt2": "import torch", ".pte": "from executorch.runtime import Runtime"}


def card_address(url: str) -> str | None:
    """Return the address of the model card of the repository that an address is in; None if it is not a hub's model."""
    match = re.match(r"hf://(?!datasets/|spaces/)([^/]+/[^/]+)", url)
    return f"hf://{match[1]}/README.md" if match else None


def model_card(facts: Facts, address: str, sha256: str) -> str:
    """Return the card of a pushed file: front matter, facts and how to load it, then a checksum of all of it."""
    name = PurePosixPath(address).name
    accuracy = facts.test_accuracy
    alone, origin = facts.arm in UNTAUGHT, "distilled with tspipe"
    if alone:
        source = "on a teacher's labels" if facts.labels == "teacher" else "without a teacher"
        origin = f"trained {source}, with tspipe"
    dataset = _code(facts.dataset) if facts.dataset else "not recorded"
    rows = {
        "Network": _code(facts.network),
        "Classes": f"{len(facts.classes)}: {', '.join(map(_code, facts.classes[:20]))}"
        + (", …" if len(facts.classes) > 20 else ""),
        "Input": f"{'×'.join(map(str, facts.input_shape))} (channels×height×width)",
        "Preprocessing": _code(json.dumps(facts.preprocess.as_dict())),
        "Data": f"{dataset}; its licence: {_code(facts.dataset_license) if facts.dataset_license else 'not stated'}",
        "Teacher": "none" if alone and facts.labels == "dataset" else _code(facts.teacher or "not recorded"),
        "Cache": f"tspipe cache `{facts.cache[:12]}`",
        "Test accuracy": "not recorded" if accuracy is None else f"{accuracy:.2%}",
        **({"Weights": f"of {facts.describe_epoch()}"} if isinstance(facts, StudentFacts) else {}),
        "SHA-256": f"`{sha256}`",
    }
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    text = (
        f"---\n{_front_matter(facts, name)}---\n\n# {name}\n\nAn image classifier, {origin}.\n\n"
        f"| | |\n|---|---|\n{table}\n\n## Use\n\n{_usage(facts, name, address)}"
    )
    return text + _MARK.format(hashlib.sha256(text.encode()).hexdigest())


def command(location: str, path: PurePath, facts: Facts) -> str:
    """Return the command that classifies an image with a file at an address or path."""
    words = ["tspipe", "predict", location, "IMAGE"]
    if path.suffix not in (".onnx", ".pte"):
        if networks.is_user_network(facts.network):
            words += ["--network", f"./{facts.network}.py"]
        elif facts.network.startswith("hub:"):
            words += ["--trust-remote-code"]
    return " ".join(map(quote, words))


def write_card(url: str, text: str, *, force: bool) -> bool:
    """Write a model card; return False, and keep it, if there is one that tspipe did not write, or that was edited."""
    remote = open_remote(url)
    if remote.info_if_present() is not None and not force:
        with remote.open_at(0) as (file, _):
            existing = b"".join(remote.chunks(file, _LONGEST)).decode(errors="replace")
        if not _is_unedited(existing):
            return False
    remote.publish(lambda part: part.write([text.encode()]))
    return True


def _is_unedited(text: str) -> bool:
    start = text.rfind(_MARK.partition(":")[0])
    return start >= 0 and text[start:] == _MARK.format(hashlib.sha256(text[:start].encode()).hexdigest())


def _front_matter(facts: Facts, name: str) -> str:
    """Return YAML, in which every text is quoted as JSON quotes it."""
    lines = ["pipeline_tag: image-classification", "tags: [image-classification, knowledge-distillation, tspipe]"]
    if facts.dataset and facts.test_accuracy is not None:
        result = {
            "task": {"type": "image-classification"},
            "dataset": {"type": facts.dataset, "name": facts.dataset, "split": "test"},
            "metrics": [{"type": "accuracy", "value": facts.test_accuracy}],
        }
        lines.append(f"model-index: {json.dumps([{'name': name, 'results': [result]}])}")
    return "\n".join(lines) + "\n"


def _usage(facts: Facts, name: str, address: str) -> str:
    lines = [f"    {command(address, PurePosixPath(name), facts)}", ""]
    if isinstance(facts, ExportFacts):
        path = PurePosixPath(name)
        if path.suffix not in _RUNS:
            raise NetworkError(f"{name} is not an export of tspipe's: its name ends in none of {', '.join(_RUNS)}.")
        run = _RUNS[path.suffix].format(name=name, stem=path.stem.replace("-", "_"))
        lines += ["```python", *filter(None, [_IMPORTS.get(path.suffix, "")]), run, "```"]
        takes = "bytes" if facts.output == "probabilities" else "float32, normalised"
        lines += ["", f"`images` is a batch of preprocessed images ({takes}), and `output` their {facts.output}."]
    else:
        network = f", network='./{facts.network}.py'" if networks.is_user_network(facts.network) else ""
        lines += ["```python", "import tspipe"]
        if facts.network.startswith("hub:"):
            lines += ["from tspipe.models import networks", "", f"networks.trust_remote_code()  # of {facts.network}"]
        lines += ["", f'student = tspipe.load_student("{name}"{network})']
        lines += ['labels, probabilities = student.predict(["image.png"])', "```"]
    return "\n".join(lines) + "\n"


def _code(text: str) -> str:
    """Return a text of the file as code, which no Markdown or HTML in it can leave."""
    return "`" + re.sub(r"[`|\s]+", " ", text) + "`"

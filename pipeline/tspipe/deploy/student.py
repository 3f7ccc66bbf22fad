"""A trained student as a plain module, read from its file or its run folder."""

import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path

import torch
from torch import Tensor, nn

from tspipe.data.decode import has_image_extension
from tspipe.data.preprocess import Preprocess
from tspipe.deploy import images
from tspipe.deploy.classifier import Prediction, predict
from tspipe.deploy.facts import Facts, StudentFacts, parse
from tspipe.errors import NetworkError
from tspipe.models import networks, weights
from tspipe.models.feature_net import FeatureNet, student_of
from tspipe.models.loading import NetworkSpec, load_into
from tspipe.models.probe import eval_mode, probe_images
from tspipe.training.run_folder import RunFolder

NetworkFiles = str | Sequence[str] | None  # paths of users' networks
_BEST = re.compile("-best-(validation|test)$")  # in names of students after their best epoch
_SPARE_PARAMETERS = 2**24  # that the network without g(x) may have beyond 16 times those in the file


class Student(nn.Module):
    """A trained student: a module that maps normalised images (n, C, H, W) float32 to logits (n, c).

    Attributes:
        network: the network, which returns features and logits.
        facts: what its file says of it.
        path: its file.
    """

    def __init__(self, network: FeatureNet, facts: StudentFacts, path: Path):
        super().__init__()
        self.network, self.facts, self.path = network, facts, path

    @property
    def name(self) -> str:
        """The student's name in file names: `lenet5-taught-random-seed0`, or with `-best-test` after its best epoch."""
        return self.path.stem.removeprefix("student-")

    @property
    def classes(self) -> list[str]:
        """The class names."""
        return self.facts.classes

    @property
    def preprocess(self) -> Preprocess:
        """The preprocessing that the student was trained with; a transform for torchvision's datasets."""
        return self.facts.preprocess

    def forward(self, images: Tensor) -> Tensor:
        """Map normalised images (n, C, H, W) float32 to logits (n, c)."""
        return self.network(images).logits  # type: ignore[no-any-return]

    def probabilities(self, pixels: Tensor) -> Tensor:
        """Return the probabilities (n, c) of images (n, C, H, W) uint8 after resize and crop."""
        device = self.network.head.weight.device
        with eval_mode(self):
            return self(self.preprocess.normalise(pixels.to(device))).softmax(1).cpu()  # type: ignore[no-any-return]

    def predict(self, pictures: images.Pictures, batch_size: int = 64) -> Prediction:
        """Classify images: paths, Pillow images, or uint8 arrays (H, W) or (H, W, C); preprocessing is included.

        Raises DatasetError for an image that cannot be decoded or has a size that the network does not take.
        """
        return predict(self, images.as_sequence(pictures), batch_size)


def load_student(
    path: str | Path, *, student: str | None = None, network: NetworkFiles = None, last: bool = False
) -> Student:
    """Load a trained student, in eval mode on the CPU. No code of the file is run.

    Args:
        path: a file `student-*.safetensors`, or a run folder.
        student: which student of a run folder; a name, or a pattern such as `lenet5-taught*`. Of several, the one with
            the highest accuracy on held-back images is loaded or, if the run held none back, on the test split.
        network: the path of the network's file, if it is a user's (`./mine.py`); several for several students.
        last: of a run folder, load the weights after the last epoch, and not those after the best one. The best is
            selected as students are; `facts.selected` says by what.

    Raises NetworkError if there is no such student, it has changed since its run was finished, its metadata or weights
    do not fit, or `network` is needed.
    """
    path = Path(path)
    file = next(iter(find_students(path, student, last=last))) if path.is_dir() else path
    if not file.is_file():
        raise NetworkError(f"There is no student {file}. Give a file student-*.safetensors or a run folder.")
    if file.suffix == ".h5" or has_image_extension(file.name):  # as where the first argument was left out
        raise NetworkError(
            f"{file} is not a student. Give a file student-*.safetensors, an export or a run folder first."
        )
    read = weights.read(file)
    recorded = RunFolder(file.parent, {}, {}).recorded_files().get(file.name)
    if recorded and recorded["sha256"] != read.sha256:
        raise NetworkError(
            f"{file} is not the student that its run wrote: summary.json states another SHA-256. Train it again with "
            f"the run's command: tspipe student --cache CACHE --out {file.parent}, and the settings in config.json"
        )
    facts = parse(StudentFacts, read.metadata, str(file))
    return Student(_load(facts, read.tensors, network, file), facts, file).eval()


def find_students(run: Path, pattern: str | None = None, *, last: bool = False) -> list[Path]:
    """Return the files of a run's students whose names match a pattern, one for each student, the most accurate first.

    They are of each student's best epoch, if it is there, or with `last` of its last one. Raises NetworkError if there
    is none.
    """
    files = dict[str, Path]()
    for file in sorted(run.glob("student-*.safetensors")):  # …-best-test.safetensors comes before ….safetensors
        name = file.stem.removeprefix("student-")
        if (student := _BEST.sub("", name)) == name or not last:
            files.setdefault(student, file)
    if not files:
        raise NetworkError(f"{run} has no students. They are written at the end of each seed of a run.")
    matching = [
        file
        for student, file in files.items()
        if pattern is None or fnmatch(student, pattern) or fnmatch(file.stem, f"student-{pattern}")
    ]
    if not matching:
        raise NetworkError(f"{run} has no student {pattern}. There are: {', '.join(files)}.")
    return sorted(matching, key=lambda file: -_accuracy(file))


def _accuracy(file: Path) -> float:
    """Return the accuracy that selects a student; -1 for a damaged file, which is reported when it is loaded."""
    try:
        return parse(StudentFacts, weights.read_metadata(file), str(file)).accuracy
    except NetworkError:
        return -1


def find_network_file(name: str, network: NetworkFiles) -> str | None:
    """Return which of users' files is that of the network of this recorded name, None if none is."""
    files = [network] if isinstance(network, str) else network or ()
    return next((file for file in files if networks.recorded_name(file) == name), None)


def _network_name(facts: Facts, network: NetworkFiles, file: Path) -> str:
    """Return the name to build the student's network by. A name in the file is never imported unless it is tspipe's."""
    if own := find_network_file(facts.network, network):
        return own
    if isinstance(network, str):
        raise NetworkError(f"{file} is a student of the network {facts.network!r}, not of {network}.")
    if not networks.is_user_network(facts.network):
        return facts.network
    raise NetworkError(
        f"{file} is a student of {facts.network!r}, which is not one of tspipe's networks. Name the network's file: "
        f"--network ./{facts.network}.py (in Python: load_student(…, network='./{facts.network}.py'))"
    )


def build(facts: Facts, stored: int, width: int, network: NetworkFiles, path: Path) -> FeatureNet:
    """Build the network of a student's file, or of an export, with random weights.

    Args:
        stored: the number of values in the file, which limits how large a network the file may claim.
        width: the number of features that g(x) returns.
        network: the path of the network's file, if it is a user's.

    Raises NetworkError if the network is not tspipe's and `network` is not its file, or is too large.
    """
    name, classes = _network_name(facts, network, path), len(facts.classes)
    spec = NetworkSpec(name, classes, facts.input_shape, facts.options)
    if spec.count_parameters() > 16 * stored + _SPARE_PARAMETERS:
        raise NetworkError(f"{path} is damaged: it has {stored:,} numbers, far too few for its network {name}.")
    with torch.random.fork_rng(devices=[]):  # the initial weights are replaced
        projected = None if facts.native_width else width
        return student_of(spec.build(), name, projected, classes, probe_images(facts.input_shape))


def _load(facts: StudentFacts, tensors: Mapping[str, Tensor], network: NetworkFiles, path: Path) -> FeatureNet:
    """Build the student's network and load its weights; what the file claims is compared with its tensors before."""
    head, expected = tensors.get("head.weight"), (len(facts.classes), facts.width)
    if head is None or head.shape != expected:
        raise NetworkError(f"{path} is damaged: its head is not of {expected[1]} features and {expected[0]} classes.")
    if any(not tensor.isfinite().all() for tensor in tensors.values()):
        raise NetworkError(f"{path} has weights that are not finite numbers, so it predicts nothing. Train it again.")
    built = build(facts, sum(tensor.numel() for tensor in tensors.values()), facts.width, network, path)
    load_into(built, tensors, facts.network, str(path))
    return built

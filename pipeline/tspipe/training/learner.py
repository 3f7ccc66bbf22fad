"""A learner: one student network in training, with one loss, one arm and one seed."""

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from tspipe import losses
from tspipe.errors import RecipeError, TrainingError
from tspipe.losses import BuiltLoss, Target
from tspipe.losses._statistics import TeacherStatistics
from tspipe.models import feature_net, initial, networks
from tspipe.models.feature_net import FeatureNet
from tspipe.models.initial import InitialWeights
from tspipe.models.loading import count_parameters
from tspipe.models.output import Output
from tspipe.models.probe import probe_images
from tspipe.recipes.schema import Recipe
from tspipe.training.arms import OWN, UNTAUGHT, WITH_RANDOM, LearnerSpec
from tspipe.training.batches import Batch
from tspipe.training.best_epoch import BestEpoch
from tspipe.training.checkpoint import load_training_state, prefixed, training_state, without_prefix
from tspipe.training.matching import match_widths, sizes_and_statistics
from tspipe.training.metrics import EpochMetrics
from tspipe.training.optimizers import make_optimizer, set_batch_norm_momentum, set_learning_rate
from tspipe.utils.distributed import Group
from tspipe.utils.rng import seed_torch
from tspipe.utils.timing import Stopwatch


@dataclass(frozen=True)
class TaskShape:
    """The width of the teacher's features, the number of classes, (C, H, W) of an image, and the cache's statistics."""

    feature_dim: int
    num_classes: int
    input_shape: tuple[int, int, int]
    statistics: TeacherStatistics


class StudentWithLoss(nn.Module):
    """The modules that an optimiser updates: the student network and its loss, which may have weights of its own.

    Args:
        separate: pass random images through the network apart from real ones, so that batch norm never mixes them.
        random_weight: how many real images a random one counts for in the mean of the loss.
    """

    def __init__(self, network: FeatureNet, loss: nn.Module, separate: bool, random_weight: float = 1.0):
        super().__init__()
        self.network, self.loss, self.separate, self.random_weight = network, loss, separate, random_weight

    def forward(
        self, images: Tensor, target: Target, random: tuple[Tensor, Target] | None
    ) -> tuple[Output, dict[str, Tensor]]:
        """Return the network's output for the images, followed by that for random images, and the loss terms."""
        if random is None:
            output: Output = self.network(images)
            return output, self.loss(output, target)
        random_images, random_target = random
        if self.separate:
            output = Output(*map(torch.cat, zip(self.network(images), self.network(random_images), strict=True)))
        else:
            output = self.network(torch.cat([images, random_images]))
        # One of several processes may have no images of a sort; the mean over those that it has needs no weights.
        if self.random_weight == 1 or not len(images) or not len(random_images):
            return output, self.loss(output, Target(*map(torch.cat, zip(target, random_target, strict=True))))
        return output, self._weighted_loss(output, target, random_target)

    def _weighted_loss(self, output: Output, target: Target, random_target: Target) -> dict[str, Tensor]:
        """Return the mean of the loss over real images and of that over random ones, weighted by their numbers."""
        counts = [len(target.labels), len(random_target.labels)]
        parts = zip(*(tensor.split(counts) for tensor in output), strict=True)
        weights = [counts[0], self.random_weight * counts[1]]
        weighted = [
            {name: weight / sum(weights) * term for name, term in self.loss(Output(*part), of_part).items()}
            for part, of_part, weight in zip(parts, (target, random_target), weights, strict=True)
            if weight  # 0 times a loss that is not finite is not a number
        ]
        return {name: torch.stack([terms[name] for terms in weighted]).sum() for name in weighted[0]}


class Times(NamedTuple):
    """The time that a learner takes for an epoch."""

    training: Stopwatch
    testing: Stopwatch


class Learner:
    """One student network with one loss, one arm, one seed.

    Args:
        start: the weights that the network starts from; None for random ones.

    Attributes:
        spec: which learner it is.
        model: the network and the loss.
        times: the epoch's seconds.
        best: the network's weights after its best epoch.
        metrics: the epoch's metrics; loss terms are weighted by the number of real images.
    """

    def __init__(
        self,
        spec: LearnerSpec,
        recipe: Recipe,
        shape: TaskShape,
        device: torch.device,
        start: InitialWeights | None = None,
    ):
        self.spec = spec
        self.optimization = recipe.optimisation(spec.student, alone=spec.arm == OWN)
        student = _build_student(spec, recipe, shape, device, start)
        set_batch_norm_momentum(student, self.optimization)
        loss = _build_loss(spec, recipe, shape, student)
        separate = recipe.random_forward == "separate"
        self.model = StudentWithLoss(student, loss.module.to(device), separate, recipe.random_weight)
        if recipe.compile:
            compile_in_place(self.model, device)
        self._parallel_model: nn.Module = self.model
        self.optimizer = make_optimizer(self.optimization, self.model.parameters(), device)
        self.times, self.best = Times(Stopwatch(device), Stopwatch(device)), BestEpoch()
        self.metrics = EpochMetrics(loss.terms, device)
        self.start_epoch(0)

    @property
    def name(self) -> str:
        """The learner's name in file names."""
        return self.spec.name

    @property
    def network(self) -> FeatureNet:
        """The student: maps images to features of the teacher's width, and logits."""
        return self.model.network

    @property
    def needs(self) -> frozenset[str]:
        """What its loss needs: a subset of features, logits and labels."""
        return frozenset[str](self.model.loss.needs)  # type: ignore[arg-type]

    @property
    def parameter_counts(self) -> tuple[int, int]:
        """How many weights the network has, in training and when g(x) and the classifier are one layer."""
        (backbone, *projection), head = cast(nn.Sequential, self.network.backbone), self.network.head
        trained = count_parameters(self.network)
        if not projection:
            return trained, trained
        native = cast(nn.Linear, projection[0]).in_features
        return trained, count_parameters(backbone) + (native + 1) * head.out_features

    def start_epoch(self, epoch: int, *, resumed: bool = False) -> None:
        """Set the epoch's learning rate; reset the metrics unless the epoch is resumed."""
        set_learning_rate(self.optimizer, self.optimization, epoch)
        if start := getattr(self.model.loss, "start_epoch", None):
            start(epoch)
        self.network.train()
        for stopwatch in self.times:
            stopwatch.reset()
        if not resumed:
            self.metrics.reset()

    def distribute(self, group: Group) -> None:
        """Have every process of the group train this learner, each on its part of a batch."""
        self._parallel_model = group.wrap_ddp(self.model, self.metrics.device)

    def step(self, batch: Batch, number: int) -> None:
        """Train on this arm's share of a batch. Nothing waits for the device."""
        self.times.training.start()
        self.optimizer.zero_grad(set_to_none=True)
        output, terms = self._parallel_model(*batch.of_arm(self.spec.arm))
        values = torch.stack(list(terms.values()))
        count, scale = self._weigh(batch)
        (values.sum() if scale is None else values.sum() * scale).backward()
        self.optimizer.step()
        if count:  # the mean over no images is not a number
            self.metrics.add(number, values, count, output.logits[: len(batch.images)], batch.target.labels)
        self.times.training.stop()

    def _weigh(self, batch: Batch) -> tuple[float, float | None]:
        """Return how many images the loss counts for, and the factor of its gradient; None for a whole batch.

        The loss is a mean over a process's images, and `DistributedDataParallel` averages gradients over processes.
        With this factor the result is the gradient of the mean over the whole batch.
        """
        global_batch = batch.global_batch
        if global_batch is None:
            return len(batch.images), None
        local, total = float(len(batch.images)), float(global_batch.images)
        if batch.unlabelled and self.spec.arm not in UNTAUGHT:
            local, total = local + len(batch.unlabelled[0]), total + global_batch.unlabelled
        if self.spec.arm in WITH_RANDOM and batch.random is not None:
            weight = self.model.random_weight
            local, total = local + weight * len(batch.random[0]), total + weight * global_batch.random
        return local / total * global_batch.images, local / total * global_batch.processes

    def check_finite(self, epoch: int) -> None:
        """Raise TrainingError if a loss of this epoch was not finite."""
        if (step := int(self.metrics.bad_step)) >= 0:
            section = "alone" if self.spec.arm == OWN else f"students.{self.spec.student}"
            raise TrainingError(
                f"The loss of {self.name} is not finite in epoch {epoch + 1}, step {step + 1}. The last checkpoint is "
                f"kept. Try a smaller learning rate: --set {section}.lr={self.optimization.lr / 10:g}"
            )

    def state_dict(self) -> dict[str, Tensor]:
        """Return the whole state of training as flat tensors."""
        parts = {"counted/": self.metrics.state_dict(), "best/": self.best.state_dict()}
        more = {key: value for prefix, part in parts.items() for key, value in prefixed(prefix, part).items()}
        return {**training_state(self.model, self.optimizer), **more}

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue from what `state_dict` returned."""
        load_training_state(tensors, self.model, self.optimizer)
        self.metrics.load_state_dict(without_prefix("counted/", tensors))
        self.best.load_state_dict(without_prefix("best/", tensors))

    def logits(self, images: Tensor) -> Tensor:
        """Return the logits (n, c) for images (n, C, H, W)."""
        return self.network(images).logits  # type: ignore[no-any-return]

    def row(self, epoch: int) -> dict[str, Any]:
        """Return the epoch's training metrics as columns of metrics.csv."""
        return {
            "seed": self.spec.seed,
            "epoch": epoch + 1,
            "student": self.spec.student,
            "arm": self.spec.arm,
            "loss": self.spec.loss_name,
            **self.metrics.means(),
            "seconds_training": round(self.times.training.seconds(), 4),
        }


def compile_in_place(module: nn.Module, device: torch.device) -> None:
    """Compile a module at its first call, once for each input shape; its state keeps its names.

    On a GPU it becomes CUDA graphs, because a small network spends most of its time launching kernels. Raises
    RecipeError if there is no C++ compiler.
    """
    compilers = os.environ.get("CXX", "g++"), "clang++"
    if not any(map(shutil.which, compilers)):
        raise RecipeError(
            f"compile=true needs a C++ compiler ({' or '.join(compilers)}), and none is installed. Install one, or "
            "leave the setting out."
        )
    # Each learner is compiled on its own, and PyTorch stops after eight versions of one module.
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 1000
    module.compile(mode="reduce-overhead" if device.type == "cuda" else None, dynamic=False)


def _build_student(
    spec: LearnerSpec, recipe: Recipe, shape: TaskShape, device: torch.device, start: InitialWeights | None
) -> FeatureNet:
    seed_torch(spec.seed, "weights")  # the same for every arm: they start from the same weights
    options = start.options if start else recipe.student_options(spec.student)
    module = networks.build(spec.student, shape.num_classes, shape.input_shape, options)
    keys, probe = set(module.state_dict()), probe_images(shape.input_shape)
    width = shape.feature_dim if recipe.match == "project" else None
    network = feature_net.student_of(module, spec.student, width, shape.num_classes, probe)
    if start:
        initial.load_backbone(network.get_submodule("backbone.0"), keys, start, spec.student)
    network.precision = getattr(torch, recipe.precision)
    # Channels-last, as the image loader yields batches: 5 to 30 % faster for all of the paper's students.
    return network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def _build_loss(spec: LearnerSpec, recipe: Recipe, shape: TaskShape, student: FeatureNet) -> BuiltLoss:
    """Build the loss with what makes the student's width meet the teacher's; give the student the loss's classifier."""
    seed_torch(spec.seed, "loss weights")
    sizes = losses.Sizes(shape.feature_dim, shape.num_classes, student.width)
    compared_sizes, compared_statistics = sizes_and_statistics(recipe.match, sizes, shape.statistics)
    loss = losses.build(spec.loss, compared_sizes, recipe.loss_options(spec.loss), compared_statistics)
    if head := getattr(loss.module, "student_head", None):
        if head.in_features != student.width:
            raise RecipeError(
                f"The loss {spec.loss_name} gives the student a classifier of {head.in_features} features, and "
                f"{spec.student} has {student.width}. Use --match project."
            )
        has_bias = student.head.bias is not None
        if head.bias is not None and not has_bias:
            raise RecipeError(
                f"The loss {spec.loss_name} gives the student a classifier with a bias, and that of {spec.student} has "
                "none. Use --match project."
            )
        no_bias = {"bias": torch.zeros(head.out_features)} if has_bias else {}
        student.head.requires_grad_(False).load_state_dict({**no_bias, **head.state_dict()})
    return loss._replace(module=match_widths(loss.module, recipe.match, sizes, shape.statistics))

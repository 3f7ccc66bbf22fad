"""One student in training: its network, its loss, its optimiser, and what it counts."""

import os
import shutil
from typing import Any

import torch
from torch import Tensor, nn

from tspipe import losses
from tspipe.errors import RecipeError
from tspipe.losses import Target
from tspipe.models import feature_net, networks
from tspipe.models.feature_net import FeatureNet
from tspipe.models.output import Output
from tspipe.recipes.schema import Recipe
from tspipe.training import checkpoint
from tspipe.training import optimizers as training
from tspipe.training.arms import OWN, RANDOM, UNTAUGHT, learner_name
from tspipe.training.batches import Batch
from tspipe.training.metrics import Tally
from tspipe.utils import timing
from tspipe.utils.distributed import Group
from tspipe.utils.rng import seed_torch


class Trained(nn.Module):
    """What a learner's optimiser fits: the network, and the loss, which may learn too."""

    def __init__(self, network: FeatureNet, loss: nn.Module, separate: bool):
        super().__init__()
        self.network, self.loss, self.separate = network, loss, separate

    def forward(
        self, images: Tensor, target: Target, random: tuple[Tensor, Target] | None
    ) -> tuple[Output, dict[str, Tensor]]:
        """The network's output for the images and, after them, the random ones; and the loss's terms."""
        if random is None:
            output: Output = self.network(images)
            return output, self.loss(output, target)
        noise, its_target = random
        target = Target(*map(torch.cat, zip(target, its_target, strict=True)))
        if self.separate:
            output = Output(*map(torch.cat, zip(self.network(images), self.network(noise), strict=True)))
        else:
            output = self.network(torch.cat([images, noise]))
        return output, self.loss(output, target)


def compile_in_place(module: nn.Module, device: torch.device) -> None:
    """Have PyTorch compile a module when it is first called, once for each shape; its state keeps its names.

    On a GPU it becomes CUDA graphs: a network as small as LeNet-5 spends its time launching kernels. Raises RecipeError
    where there is no C++ compiler.
    """
    compilers = os.environ.get("CXX", "g++"), "clang++"
    if not any(map(shutil.which, compilers)):
        raise RecipeError(
            f"compile=true needs a C++ compiler, and there is none here ({', '.join(compilers)}). Install one, or "
            "leave the setting out."
        )
    # Each student, arm and loss is compiled by itself, and PyTorch gives up after eight of one module.
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 1000
    module.compile(mode="reduce-overhead" if device.type == "cuda" else None, dynamic=False)


class Learner:
    """One student network with one loss, one arm, one seed.

    Attributes:
        network: maps images to (features of the teacher's width, logits).
        tally: what it has counted this epoch; loss terms are weighted by their batch's real images.
    """

    def __init__(
        self,
        student: str,
        arm: str,
        seed: int,
        recipe: Recipe,
        width: int,
        num_classes: int,
        input_shape: tuple[int, int, int],
        device: torch.device,
        loss: str = "ts",
    ):
        self.student, self.arm, self.seed, self.device = student, arm, seed, device
        self.loss_name = losses.recorded_name(loss := "xent" if arm in UNTAUGHT else loss)
        seed_torch(seed, "loss weights")
        self.loss = losses.build(loss, {**recipe.model_dump(), "width": width}, recipe.loss_options(loss)).to(device)
        self.how = recipe.optimisation(student, alone=arm == OWN)
        options = recipe.student_options(student)
        # The same seed for every arm: they begin as the same network.
        seed_torch(seed, "weights")
        module = networks.build(student, num_classes, input_shape, options)
        probe = feature_net.probe_images(input_shape)
        network = feature_net.student_of(module, student, width, num_classes, probe)
        network.precision = getattr(torch, recipe.precision)
        # Channels-last, as the pixels come: 5 to 30 % faster than channels-first for all of the paper's students.
        self.network = network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.trained = Trained(self.network, self.loss, recipe.random_forward == "separate")
        if recipe.compile:
            compile_in_place(self.trained, device)
        self._forward: nn.Module = self.trained
        self._processes = 1
        self.optimizer = training.make_optimizer(self.how, self.trained.parameters(), device)
        self.training, self.testing = timing.Stopwatch(device), timing.Stopwatch(device)
        self.terms = self._term_names(width, num_classes)
        self.start_epoch(0)

    @property
    def needs(self) -> frozenset[str]:
        """What its loss asks of the cache."""
        return frozenset[str](self.loss.needs)  # type: ignore[arg-type]

    @property
    def parameters(self) -> int:
        """How many weights it trains."""
        return sum(parameter.numel() for parameter in self.network.parameters())

    @property
    def name(self) -> str:
        """As in file names: `lenet5-taught-random-seed0`, of another loss than ts `lenet5-taught-random-kd-seed0`."""
        return learner_name(self.student, self.arm, self.loss_name, self.seed)

    def start_epoch(self, epoch: int, *, counted: bool = False) -> None:
        """Set the epoch's learning rate; forget what the last one counted, unless this one was `counted` in part."""
        training.set_learning_rate(self.optimizer, self.how, epoch)
        self.network.train()
        self.training.reset()
        self.testing.reset()
        if not counted:
            self.forget()

    def forget(self) -> None:
        """Forget what it has counted this epoch."""
        self.tally = Tally(len(self.terms), self.device)

    def distribute(self, group: Group) -> None:
        """Have every process of the group train this learner, each on its part of a batch."""
        self._forward, self._processes = group.parallel(self.trained, self.device), group.size

    def step(self, batch: Batch, step: int) -> None:
        """One optimiser step on this arm's share of a batch. Nothing here waits for the device."""
        self.training.start()
        real, random = len(batch.images), batch.random if self.arm == RANDOM else None
        self.optimizer.zero_grad(set_to_none=True)
        output, terms = self._forward(batch.images, batch.target, random)
        parts = torch.stack(list(terms.values()))
        weight, whole = self._weight(batch), batch.whole[0] if batch.whole else real
        loss = parts.sum() if weight is None else parts.sum() * weight * self._processes
        loss.backward()
        self.optimizer.step()
        if weight != 0:  # the mean of no images is no number
            counts = whole if weight is None else weight * whole
            self.tally.add(step, parts, counts, output.logits[:real], batch.target.labels)
        self.training.stop()

    def _weight(self, batch: Batch) -> float | None:
        """This process's share of a batch's images, random ones counted; None where the whole batch is here.

        A loss is a mean over a process's images. Weighted so, the sum over all processes is the mean over the batch.
        """
        if batch.whole is None:
            return None
        here, whole = len(batch.images), batch.whole[0]
        if self.arm == RANDOM and batch.random is not None:
            here, whole = here + len(batch.random[0]), sum(batch.whole)
        return here / whole

    def _term_names(self, width: int, num_classes: int) -> list[str]:
        """The loss's terms, in its order; also the place where a loss of the user's is first tried."""
        unknown = self.needs - {"features", "logits", "labels"}
        if unknown:
            raise RecipeError(f"The loss {self.loss_name} needs {min(unknown)!r}, which a cache does not hold.")
        output = Output(torch.zeros(2, width, device=self.device), torch.zeros(2, num_classes, device=self.device))
        nothing = torch.empty(2, 0, device=self.device)
        features, logits = (part if name in self.needs else nothing for name, part in output._asdict().items())
        target = Target(features, logits, torch.zeros(2, dtype=torch.int64, device=self.device))
        with torch.no_grad():
            return list(self.loss(output, target))

    def pack(self) -> dict[str, Tensor]:
        """Its whole state as flat tensors."""
        return {**checkpoint.pack(self.trained, self.optimizer), **checkpoint.prefixed("counted", self.tally.pack())}

    def unpack(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of `pack`."""
        checkpoint.unpack(tensors, self.trained, self.optimizer)
        self.tally.unpack(checkpoint.below("counted", tensors))

    def logits(self, images: Tensor) -> Tensor:
        """(n, C, H, W) to (n, c), for testing."""
        return self.network(images).logits  # type: ignore[no-any-return]

    def row(self, epoch: int) -> dict[str, Any]:
        """What it counted in this epoch, as columns of metrics.csv."""
        return {
            "seed": self.seed,
            "epoch": epoch + 1,
            "student": self.student,
            "arm": self.arm,
            "loss": self.loss_name,
            **self.tally.row(self.terms),
            "seconds_training": round(self.training.seconds(), 4),
        }

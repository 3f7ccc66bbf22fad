"""Stage two: train students against a cache.

The learners of one seed are a cohort. They share every batch and one teacher pass over its random images, and the arms
of a student start from the same weights, so that arms can be compared pair by pair.
"""

import functools
import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tspipe.data.preprocess import Preprocess
from tspipe.errors import RecipeError
from tspipe.models import initial, networks, weights
from tspipe.models.teacher import count_teacher_parameters
from tspipe.training.arms import UNTAUGHT, WITH_RANDOM, LearnerSpec, arm_losses
from tspipe.training.batches import BatchSource
from tspipe.training.checkpoint import Checkpointer, Position, without_prefix
from tspipe.training.config import StudentConfig, identity
from tspipe.training.evaluation import Evaluator
from tspipe.training.learner import Learner, TaskShape
from tspipe.training.live_views import LiveViews
from tspipe.training.metrics_log import MetricsLog, loss_ratios, record_random_labels
from tspipe.training.partition import Partition, choose_partition
from tspipe.training.resume import WrittenResults, provenance
from tspipe.training.run_data import RunData, open_run_data
from tspipe.training.run_folder import RunFolder, environment, find_run, results_sha256
from tspipe.training.source_selection import open_live_teacher, open_random_source
from tspipe.training.targets import TargetLoader, resolve_mse_weight
from tspipe.training.tensorboard import TensorBoard
from tspipe.training.unlabelled import open_unlabelled_images
from tspipe.utils.device import pick_device, use_full_precision
from tspipe.utils.distributed import ALONE, Group
from tspipe.utils.files import check_lock, lock
from tspipe.utils.memory import keep_freed_memory, memory_limit, release_freed_memory
from tspipe.utils.progress import Advance, progress, warn
from tspipe.utils.rng import seed_torch_with, torch_seeds
from tspipe.utils.timing import Stopwatch


def train_students(config: StudentConfig, group: Group = ALONE) -> RunFolder:
    """Train every student in every arm over every seed; return the run folder.

    The same config resumes the run that it began, and returns at once where the run is finished. The processes of a
    group each train some of a cohort's learners or, if there are fewer learners than processes, a part of every batch.
    Rank 0 alone writes, into a folder that all of them see. Raises CacheMismatch when the cache is not of the local
    data, TrainingError when a loss is not finite.
    """
    device = pick_device(config.recipe.device)
    keep_freed_memory()
    stem = config.cache.path.name.removesuffix(".h5")
    with group.rank_zero_first():
        folder = find_run(identity(config), environment(device.type, torch.get_num_threads()), stem, config.out)
    if group.broadcast(group.rank == 0 and _is_finished(folder)):
        return folder
    if (begun_on := folder.environment["device"]) != device.type:
        raise RecipeError(
            f"{folder.path} was begun on {begun_on}, and this machine would continue on {device.type}, which mixes the "
            "results of both. Choose another --out."
        )
    torch.set_num_threads(folder.environment["threads"])
    use_full_precision()
    with group.rank_zero_first():
        trainer = open_trainer(config, folder, device, group)
        if trainer.partition.is_writer:
            folder.create()
            for sentence in initial_weights(config):
                warn(sentence)
    with lock(folder.path / "run", RecipeError, folder.path) if trainer.partition.is_writer else nullcontext():
        # Another job may have finished it while this one read the data.
        if not group.broadcast(folder.finished and not folder.damaged_files()):
            with group.abort_on_lost_peer():
                trainer.train()
        group.barrier()
    return folder


def _is_finished(folder: RunFolder) -> bool:
    """Return whether the run is finished, and its files are as it wrote them."""
    damaged = folder.damaged_files() if folder.finished else []
    if damaged:
        warn(f"{folder.path} is a finished run, but missing or damaged: {', '.join(damaged)}.")
    elif folder.finished:
        folder.remove_leftovers()
    return folder.finished and not damaged


@dataclass(frozen=True)
class Trainer:
    """Trains the cohorts of a run.

    Attributes:
        config: the configuration; its recipe has a number for `mse_weight`.
        parameters: the number of each student's weights, in training and deployed.
        opened: the learners of seed 0, until they are trained.
    """

    config: StudentConfig
    folder: RunFolder
    partition: Partition
    batches: BatchSource
    log: MetricsLog
    checkpointer: Checkpointer
    parameters: dict[str, tuple[int, int]]
    opened: list[Learner]

    def train(self) -> None:
        """Train what is left of the run, seed by seed, and finish the run folder."""
        recipe, is_writer = self.config.recipe, self.partition.is_writer
        evaluator = Evaluator(self.batches.data, self.partition, recipe.test_batch_size)
        position, states = self._resume()
        with closing(self.log), self._progress(position) as advance:
            for seed in range(position.seed, recipe.seeds):
                learners = self.learners(seed)
                for learner in learners:
                    if states:
                        learner.load_state_dict(without_prefix(f"{learner.name}/", states))
                    self.partition.distribute(learner)
                for epoch in range(position.epoch, recipe.epochs):
                    start = Position(seed, epoch, position.batch)
                    for learner in learners:
                        learner.start_epoch(epoch, resumed=start.batch > 0)
                    for images in self.steps(learners, self.batches, start):
                        advance(images, f"seed {seed}, epoch {epoch + 1}/{recipe.epochs}")
                    if recipe.memory:  # what training has freed in small pieces is of no use to larger test batches
                        release_freed_memory()
                    rows = evaluator.rows(learners, epoch, self.batches.teacher_seconds())
                    if epoch + 1 == recipe.epochs and self.partition.reports_losses:
                        for sentence in evaluator.chance_remarks(learners, rows):
                            warn(sentence)
                    rows = self.partition.gather_rows(rows)
                    if is_writer:
                        self._check_folder()
                        rows = self.log.write(rows)
                        self.checkpointer.files |= self.folder.describe(["metrics.csv"])
                        if (seed, epoch) == (0, 0):
                            for sentence in loss_ratios(rows, hint=self.folder.config.get("mse_weight") != "auto"):
                                warn(sentence)
                            record_random_labels(self.config, self.folder, self.batches.random)
                    position = Position(seed, epoch + 1)
                self._save_students(seed, learners)
                states, position = {}, Position(seed + 1)
                if is_writer:
                    self.checkpointer.save({}, position)
        if is_writer:
            record_random_labels(self.config, self.folder, self.batches.random)
            self.folder.write_json("summary.json", run_summary(self))
            self.checkpointer.delete()

    def learners(self, seed: int) -> list[Learner]:
        """Return new learners of a seed, those that this process trains."""
        specs = self.partition.local_learners(learner_specs(self.config, seed))
        opened = {learner.spec: learner for learner in self.opened}
        self.opened.clear()
        return [opened.get(spec) or build_learner(self.config, self.batches.data, spec) for spec in specs]

    def steps(self, learners: list[Learner], batches: BatchSource, start: Position) -> Iterator[int]:
        """Train on an epoch's batches from the position on, with checkpoints in between; yield the images of each."""
        partition = self.partition
        dropout_seeds = torch_seeds(start.seed, partition.dropout_purpose, start.epoch, start.batch)
        partition.split_metrics(learners)
        for number, batch in batches.epoch(start.seed, start.epoch, slice(start.batch, None)):
            dropout_seed = next(dropout_seeds)
            images = batch.global_batch.images if batch.global_batch else len(batch.images)
            for learner in learners:
                seed_torch_with(dropout_seed)  # the same for every learner, so that arms differ in the loss only
                learner.step(batch, number)
            del batch  # so that the next batch uses its memory, which is still in the processor's cache
            if partition.checkpoint_due(self.checkpointer.clock, number):
                self._merge_metrics(learners, start.epoch)
                self.save_checkpoint(learners, Position(start.seed, start.epoch, number + 1))
                partition.split_metrics(learners)
            yield images
        self._merge_metrics(learners, start.epoch)

    def save_checkpoint(self, learners: list[Learner], position: Position) -> None:
        """Write a checkpoint of the learners of all processes."""
        states = self.partition.gather_states(learners)
        if self.partition.is_writer:
            self._check_folder()
            self.checkpointer.save(states, position)

    def _check_folder(self) -> None:
        """Raise RecipeError if the run folder was deleted, or is now another process's."""
        check_lock(self.folder.path / "run", RecipeError, self.folder.path)

    def _resume(self) -> tuple[Position, dict[str, Tensor]]:
        """Return where an earlier run stopped and its learners' state; drop the metrics of epochs to be run again."""
        recipe, is_writer, recorded = self.config.recipe, self.partition.is_writer, self.folder.recorded_files()
        checkpoint = self.checkpointer.load(visible=is_writer)
        metrics = self.checkpointer.files.pop("metrics.csv", None)
        recorded |= self.checkpointer.files
        self.checkpointer.files = {name: recorded[name] for name in recorded if name.startswith("student-")}
        written = WrittenResults(self.folder, learner_specs(self.config, 0), self.log.columns, recipe.epochs, recorded)
        position, reason = self.partition.group.broadcast(
            written.resume_from(checkpoint and checkpoint.position, recipe.seeds, metrics)
        )
        if is_writer:
            if reason:
                warn(f"{self.folder.path}: {reason}. Seed {position.seed} is trained again.")
            if position.seed < recipe.seeds:
                (self.folder.path / "summary.json").unlink(missing_ok=True)
            end = (position.seed, position.epoch + 1)
            self.folder.keep([row for row in written.rows if (row["seed"], row["epoch"]) < end])
            if (self.folder.path / "metrics.csv").exists():
                self.checkpointer.files |= self.folder.describe(["metrics.csv"])
        return position, checkpoint.tensors if checkpoint and checkpoint.position == position else {}

    def _progress(self, position: Position) -> AbstractContextManager[Advance]:
        recipe, (before, after) = self.config.recipe, self.config.progress_offset
        per_epoch = self.batches.data.train_count
        done = (position.seed * recipe.epochs + position.epoch) * per_epoch + position.batch * recipe.batch_size
        total = before + recipe.seeds * recipe.epochs * per_epoch + after
        return progress("students", total, "images", before + done, self.partition.is_writer)

    def _merge_metrics(self, learners: list[Learner], epoch: int) -> None:
        """Merge the metrics of all processes. Raises TrainingError if a loss is not finite."""
        self.partition.merge_metrics(learners)
        for learner in learners if self.partition.reports_losses else []:
            learner.check_finite(epoch)

    def _save_students(self, seed: int, learners: list[Learner]) -> None:
        """Write the students of a cohort after the last and the best epoch, those of other processes included."""
        states = self.partition.gather_states(learners)
        rows = self.folder.rows() if self.partition.is_writer else []
        for spec in learner_specs(self.config, seed) if self.partition.is_writer else []:
            results, last, best = spec.rows(rows), f"{spec.name}/module/network.", f"{spec.name}/best/"
            width = states[f"{last}head.weight"].shape[1]
            metadata = student_metadata(self.config, self.batches.data, spec, width)
            metadata["results_sha256"] = results_sha256(results)
            for selected, file in spec.files(validation=self.batches.data.validation_count > 0).items():
                is_last = selected == "last"
                row = results[-1 if is_last else int(states[f"{best}epoch"]) - 1]
                facts = {name: repr(v) for name, v in row.items() if name in ("epoch", "test_accuracy", "val_accuracy")}
                facts |= {"epochs": str(len(results)), **metadata, **provenance(self.folder.identity, spec, selected)}
                tensors = without_prefix(last if is_last else f"{best}network.", states)
                weights.save(self.folder.path / file, tensors, facts)
                self.checkpointer.files |= self.folder.describe([file])


def learner_specs(config: StudentConfig, seed: int) -> list[LearnerSpec]:
    """List the learners of a seed: every student in every arm with every loss."""
    return [
        LearnerSpec(student, arm, loss, seed)
        for student in config.recipe.student
        for arm in config.arms
        for loss in arm_losses(arm, config.recipe.loss)
    ]


def initial_weights(config: StudentConfig) -> Iterator[str]:
    """Yield a sentence on each student whose recipe asks for other initial weights than random ones."""
    manifest = config.cache.manifest
    side = manifest["teacher"]["options"]["input_shape"][1]
    for student in config.recipe.student:
        if start := config.initial.get(student):
            implied = {k: v for k, v in start.options.items() if config.recipe.student_options(student).get(k) != v}
            options = f", with {', '.join(f'{name}={value}' for name, value in implied.items())}" if implied else ""
            digest = start.sha256[:12]
            yield f"{student} starts from {start.name} (SHA-256 {digest}){options}; its last layers start at random."
            if difference := initial.preprocess_difference(start, Preprocess.from_dict(manifest["preprocess"]), side):
                yield f"{start.name} are for another preprocessing than the cache's: {difference}."
        elif config.recipe.student_init(student) == initial.AUTO:
            published = networks.imagenet(student) is not None
            reason = "its ImageNet weights are not on this machine. Fetch them: --download" if published else ""
            yield f"{student} starts from random weights: {reason or 'no ImageNet weights are published for it.'}"


def student_metadata(config: StudentConfig, data: RunData, spec: LearnerSpec, width: int) -> dict[str, str]:
    """Return how to build a student of this width of features, what it takes and where it comes from, as metadata."""
    dataset = config.cache.manifest["dataset"]
    return {
        "cache": config.cache.id,
        "classes": json.dumps(config.cache.classes),
        "dataset": dataset["name"],
        "dataset_license": dataset["license"],
        "input_shape": json.dumps(data.train.shape),
        "options": json.dumps(config.student_options(spec.student), sort_keys=True),
        "preprocess": json.dumps(data.preprocess.as_dict(), sort_keys=True),
        **({} if config.recipe.match == "project" else {"native_width": "true"}),
        **({"labels": "teacher"} if config.recipe.labels == "teacher" else {}),
        "teacher": config.cache.manifest["teacher"]["network"],
        "width": str(width),
    }


def run_summary(trainer: Trainer) -> dict[str, Any]:
    """Return summary.json: what a report needs beside the metrics, and what the run has written."""
    config, folder, random = trainer.config, trainer.folder, trainer.batches.random
    manifest, recipe = config.cache.manifest, config.recipe
    specs = [spec for seed in range(recipe.seeds) for spec in learner_specs(config, seed)]
    validation = trainer.batches.data.validation_count > 0
    students = [file for spec in specs for file in spec.files(validation=validation).values()]
    files = ["metrics.csv", *(["random_labels.json"] if random else []), *students]
    return {
        "identity": folder.identity,
        "dataset": manifest["dataset"]["name"],
        "teacher": {
            "network": manifest["teacher"]["network"],
            "test_accuracy": manifest["teacher"]["correct"]["test"] / manifest["dataset"]["rows"]["test"],
            "parameters": count_teacher_parameters(config.cache, recipe, trainer.batches.data.train.shape),
        },
        "initial": {name: {"name": one.name, "sha256": one.sha256} for name, one in config.initial.items()},
        "parameters": {student: trained for student, (trained, _) in trainer.parameters.items()},
        "deployed_parameters": {student: deployed for student, (_, deployed) in trainer.parameters.items()},
        **({"mse_weight": recipe.mse_weight} if folder.config.get("mse_weight") == "auto" else {}),
        "cost": _teacher_cost(trainer),
        "files": folder.describe(files),
    }


def _teacher_cost(trainer: Trainer) -> dict[str, int]:
    """Return the bytes of the cache, the teacher's passes in it, and its passes in an epoch of training, at least.

    A pass is that of one image. Balancing takes more, up to `random_rounds` for each random image.
    """
    config, source = trainer.config, trainer.batches
    sizes = config.cache.dimensions
    live = source.random.spec if source.random and config.recipe.random_source == "live" else None
    return {
        "cache_bytes": config.cache.size,
        "cached_passes": sum(sizes.images(section) * sizes.views_of(section) for section in sizes.sections),
        "epoch_passes": (live.count * live.batches_per_epoch if live else 0)
        + (source.data.train_count if source.live_views else 0),
    }


def build_learner(config: StudentConfig, data: RunData, spec: LearnerSpec) -> Learner:
    """Build a learner for the data and the cache of a run."""
    cache = config.cache
    shape = TaskShape(cache.dimensions.width, len(cache.classes), data.train.shape, data.statistics)
    return Learner(spec, config.recipe, shape, data.train.device, config.initial.get(spec.student))


def open_trainer(config: StudentConfig, folder: RunFolder, device: torch.device, group: Group = ALONE) -> Trainer:
    """Open the data, the targets and the teacher of a run. Raises as `train_students`."""
    data = open_run_data(config, device)
    recipe = resolve_mse_weight(config.recipe, config.cache)
    if recipe is not config.recipe:  # else it keeps the initial weights that it has read
        config = replace(config, recipe=recipe)
    train = config.cache.train
    cohort = [build_learner(config, data, spec) for spec in learner_specs(config, 0)]
    partition = choose_partition(group, len(cohort))
    arms = {learner.spec.arm for learner in partition.local_learners(cohort)}
    open_teacher = functools.cache(functools.partial(open_live_teacher, config, data))
    random = None
    if recipe.random_images and arms.intersection(WITH_RANDOM):
        random = open_random_source(config, data, partition, open_teacher)
    needs = frozenset[str]().union(*(learner.needs for learner in cohort))
    columns, memory = {"features": train.features, "logits": train.logits}, (recipe.memory or memory_limit(device)) // 3
    labels, live_views = data.row_labels, None
    if recipe.view_source == "live":
        columns, labels = {}, data.train_labels
    targets = TargetLoader(columns, labels, needs, memory, device)
    if recipe.view_source == "live" and arms.difference(UNTAUGHT):
        live_views = LiveViews(open_teacher(), targets.select, recipe.labels == "teacher", Stopwatch(device))
    unlabelled = open_unlabelled_images(config, needs, device) if set(config.arms) - set(UNTAUGHT) else None
    board = TensorBoard(folder.path / "tensorboard") if recipe.tensorboard and partition.is_writer else None
    return Trainer(
        config,
        folder,
        partition,
        BatchSource(
            data, targets, random, partition, recipe.batch_size, recipe.random_from - 1, unlabelled, live_views
        ),
        MetricsLog(folder, cohort, board, validation=data.validation_count > 0),
        Checkpointer(folder.path / "checkpoint.safetensors", recipe.checkpoint_seconds, folder.identity),
        {learner.spec.student: learner.parameter_counts for learner in cohort},
        cohort,
    )

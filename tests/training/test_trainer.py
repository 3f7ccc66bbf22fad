"""Stage two: what a cohort shares, what a run folder holds, and when a run is refused."""

import hashlib
import itertools
import json
import platform
import re
import weakref
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor

from shared import metrics_of, untouched, weights_of
from tspipe.cache import Cache
from tspipe.data import datasets
from tspipe.data.preprocess import Preprocess
from tspipe.errors import (
    CacheError,
    CacheMismatch,
    DatasetError,
    NetworkError,
    RecipeError,
    TrainingError,
)
from tspipe.losses._statistics import TeacherStatistics
from tspipe.models import feature_net, initial, networks
from tspipe.models.teacher import load_teacher
from tspipe.recipes import load
from tspipe.training import batches, checkpoint, learner, metrics_log
from tspipe.training.arms import ALONE, OWN, RANDOM, TAUGHT, LearnerSpec, select_arms
from tspipe.training.config import StudentConfig
from tspipe.training.run_folder import RunFolder
from tspipe.training.trainer import train_students
from tspipe.utils import threads as overlap
from tspipe.utils.rng import seed_torch, stream

ARMS = (ALONE, TAUGHT, RANDOM)
SMALL = ["epochs=2", "seeds=1", "batch_size=100", "random_images=7"]


def config(cache: Cache, out: Path, *overrides: str, arms: tuple[str, ...] = ARMS) -> StudentConfig:
    facts = {"preprocess": cache.manifest["preprocess"]}
    return StudentConfig(load.load("digits", [*SMALL, *overrides], facts=facts), cache, arms, out=out)


@pytest.fixture(scope="module")
def run(digits: Cache, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """Train three arms, two seeds, two epochs; count the labels of as many random images as outside tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics_log, "_LABELLED", 1000)
        return train_students(config(digits, tmp_path_factory.mktemp("runs") / "run", "seeds=2"))


def test_a_batch_reuses_memory(digits: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most two batches are alive at a time: more memory makes a small step 2 % slower."""
    made: list[weakref.ref[Tensor]] = []
    normalise = Preprocess.normalise

    def watched(self: Preprocess, images: Tensor) -> Tensor:
        assert sum(ref() is not None for ref in made) <= 1
        result = normalise(self, images)
        made.append(weakref.ref(result))
        return result

    class AtOnce(ThreadPoolExecutor):
        def submit(self, work: Callable[..., object], /, *arguments: object) -> Future[object]:
            future: Future[object] = Future()
            future.set_result(work(*arguments))
            return future

    monkeypatch.setattr(overlap, "ThreadPoolExecutor", AtOnce)
    monkeypatch.setattr(Preprocess, "normalise", watched)
    train_students(config(digits, tmp_path / "run", "epochs=1", arms=(ALONE, TAUGHT)))
    assert len(made) > 10


def test_the_files_of_a_run(run: RunFolder, digits: Cache) -> None:
    names = {path.name for path in run.path.iterdir()}
    arms, seeds = ("alone", "taught", "taught-random"), ("seed0", "seed1")
    students = {f"student-lenet5-{'-'.join(each)}.safetensors" for each in itertools.product(arms, seeds)}
    students |= {name.replace(".", "-best-test.") for name in students}
    assert names == {"config.json", "metrics.csv", "random_labels.json", "summary.json"} | students
    result = run.read_json("config.json")
    assert result["config"]["cache"] == digits.id
    assert result["environment"]["threads"] == 1
    described = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    models = re.findall(r"^model name\s*: (.+)$", described, re.MULTILINE)
    assert result["environment"]["processor"] in (models or [platform.processor() or platform.machine()])
    assert result["environment"]["torch"] == metadata.version("torch")
    assert sum(run.read_json("random_labels.json").values()) == 1000
    rows = run.rows()
    assert [(row["seed"], row["epoch"], row["arm"]) for row in rows] == [
        (seed, epoch, arm) for seed in (0, 1) for epoch in (1, 2) for arm in ARMS
    ]
    assert list(rows[0]) == [
        "seed", "epoch", "student", "arm", "loss", "train_accuracy", "test_accuracy", "mse", "xent",
        "seconds_training", "seconds_testing", "seconds_teacher",
    ]  # fmt: skip
    assert all(row["mse"] == "" for row in rows if row["arm"] == ALONE)


def test_a_saved_student_has_the_accuracy_of_its_last_row(run: RunFolder, digits: Cache) -> None:
    row = next(r for r in run.rows() if (r["seed"], r["epoch"], r["arm"]) == (1, 2, TAUGHT))
    path = run.path / "student-lenet5-taught-seed1.safetensors"
    with safetensors.safe_open(path, "pt") as file:
        facts = json.loads(file.metadata()["tspipe"])
    shape, width = tuple(json.loads(facts["input_shape"])), int(facts["width"])
    student = networks.build(facts["network"], 10, shape, json.loads(facts["options"]))
    student = feature_net.student_of(student, "student", width, 10, torch.zeros(2, *shape))
    student.load_state_dict(safetensors.torch.load_file(path))
    preprocess = Preprocess.from_dict(json.loads(facts["preprocess"]))
    test = datasets.open_dataset("digits").test
    pixels = torch.from_numpy(np.stack([preprocess.apply(test.read(i)) for i in range(len(test))])).permute(0, 3, 1, 2)
    with torch.no_grad():
        guesses = student.eval()(preprocess.normalise(pixels)).logits.argmax(1)
    assert (guesses.numpy() == test.labels).mean() == row["test_accuracy"]


def test_the_same_config_gives_the_same_weights(run: RunFolder, digits: Cache, tmp_path: Path) -> None:
    again = train_students(config(digits, tmp_path / "again", "seeds=2"))
    assert weights_of(again) == weights_of(run)
    assert metrics_of(again) == metrics_of(run)


def test_an_arm_does_not_depend_on_the_arms_beside_it(run: RunFolder, digits: Cache, tmp_path: Path) -> None:
    alone = train_students(config(digits, tmp_path / "one", arms=(TAUGHT,)))
    assert weights_of(alone).items() <= weights_of(run).items()


@pytest.mark.parametrize(
    ("field", "arms", "loss"), [("precision", (ALONE, TAUGHT), "xent"), ("live_precision", (RANDOM,), "mse")]
)
def test_bfloat16_is_another_run_with_about_the_same_losses(
    field: str, arms: tuple[str, ...], loss: str, run: RunFolder, digits: Cache, tmp_path: Path
) -> None:
    rounded = train_students(config(digits, tmp_path / "run", f"{field}=bfloat16", arms=arms))
    assert rounded.config[field] == "bfloat16"
    exact = {row["arm"]: row for row in run.rows() if (row["seed"], row["epoch"]) == (0, 2)}
    for row in rounded.rows()[-len(arms) :]:
        assert row[loss] != exact[row["arm"]][loss]
        assert row["xent"] == pytest.approx(exact[row["arm"]]["xent"], rel=0.05)


def test_a_finished_run_is_left_unchanged(run: RunFolder, digits: Cache) -> None:
    before = {path: untouched(path) for path in run.path.iterdir()}
    assert train_students(config(digits, run.path, "seeds=2")).path == run.path
    assert {path: untouched(path) for path in run.path.iterdir()} == before


def test_training_is_the_plain_loop(digits: Cache, tmp_path: Path) -> None:
    """Compare with one epoch of taught + random images, written in plain PyTorch."""
    result = train_students(config(digits, tmp_path / "run", "epochs=1", arms=(RANDOM,)))
    preprocess = Preprocess.from_dict(digits.manifest["preprocess"])
    images = datasets.open_dataset("digits").train
    pixels = torch.from_numpy(np.stack([preprocess.apply(images.read(i)) for i in range(1000)])).permute(0, 3, 1, 2)
    features, labels = torch.from_numpy(digits.train.features.load()).float(), torch.from_numpy(images.labels)
    teacher = load_teacher(digits, load.load("digits"), (1, 16, 16), torch.device("cpu"))
    seed_torch(0, "weights")
    student = networks.build("lenet5", 10, (1, 16, 16))
    student = feature_net.student_of(student, "lenet5", 84, 10, torch.zeros(2, 1, 16, 16))
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-3, fused=True)
    for number, rows in enumerate(batches.shuffled_batches(0, 0, 1000, 100)):
        random = preprocess.normalise(
            torch.from_numpy(stream(0, "random images", 0, number).random((7, 1, 16, 16), dtype=np.float32))
        )
        with torch.no_grad():
            random_features, random_logits = teacher(random)
        g, z = student(torch.cat([preprocess.normalise(pixels[rows]), random]))
        mse = F.mse_loss(g, torch.cat([features[rows], random_features]))
        loss = mse + F.cross_entropy(z, torch.cat([labels[rows], random_logits.argmax(1)]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    saved = safetensors.torch.load_file(result.path / "student-lenet5-taught-random-seed0.safetensors")
    for name, value in student.state_dict().items():
        torch.testing.assert_close(saved[name], value, rtol=1e-4, atol=1e-6)


def test_arms_start_from_the_same_weights_and_seeds_do_not() -> None:
    statistics = TeacherStatistics.placeholder(84, 10)

    def start(arm: str, seed: int) -> dict[str, torch.Tensor]:
        spec, shape = LearnerSpec("lenet5", arm, "ts", seed), learner.TaskShape(84, 10, (1, 16, 16), statistics)
        made = learner.Learner(spec, load.load("digits"), shape, torch.device("cpu"))
        return made.network.state_dict()

    first = start(ALONE, 0)
    assert all(value.equal(first[name]) for arm in ARMS for name, value in start(arm, 0).items())
    assert not any(value.equal(first[name]) for name, value in start(ALONE, 1).items())


def test_students_start_from_the_weights_of_a_file(
    digits: Cache, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With next to no learning rate, they end there, too. The file is read once."""
    reads, find = list[str](), initial.find
    monkeypatch.setattr(initial, "find", lambda init, *args, **given: reads.append(init) or find(init, *args, **given))
    settings = [f"students.lenet5.init={teacher}", "lr=1e-12", "epochs=1"]
    run = train_students(config(digits, tmp_path / "run", *settings, arms=(ALONE, TAUGHT)))
    start, digest = safetensors.torch.load_file(teacher), hashlib.sha256(teacher.read_bytes()).hexdigest()
    for arm in (ALONE, TAUGHT):
        student = safetensors.torch.load_file(run.path / f"student-lenet5-{arm}-seed0.safetensors")
        kept = [key for key in start if f"backbone.0.{key}" in student]
        assert len(kept) == len(start) - 4
        assert all(torch.allclose(student[f"backbone.0.{key}"], start[key], atol=1e-6) for key in kept)
    assert run.config["init"] == {"lenet5": digest}
    assert reads == [str(teacher)]
    assert (
        f"lenet5 starts from {teacher.name} (SHA-256 {digest[:12]}); its last layers start at random."
        in capsys.readouterr().err
    )


def test_separate_forwards_differ_only_where_there_is_batch_norm(digits: Cache, tmp_path: Path) -> None:
    def weights(student: str, forward: str) -> dict[str, torch.Tensor]:
        file = tmp_path / f"{student}.py"
        norm = "nn.BatchNorm1d(256)" if student == "normed" else "nn.Identity()"
        file.write_text(
            "from torch import nn\n"
            "def build(num_classes):\n"
            f"    return nn.Sequential(nn.Flatten(), {norm}, nn.Linear(256, num_classes))\n"
        )
        settings = [f"student={file}", f"random_forward={forward}", "epochs=1"]
        result = train_students(config(digits, tmp_path / f"{student}-{forward}", *settings, arms=(RANDOM,)))
        return safetensors.torch.load_file(result.path / f"student-{student}-taught-random-seed0.safetensors")

    for student, same in (("plain", True), ("normed", False)):
        one, two = (weights(student, forward) for forward in ("concatenated", "separate"))
        assert all(torch.allclose(one[name], two[name], atol=1e-4) for name in one) == same


def test_arms_are_selected_by_the_recipe() -> None:
    def arms(compare: bool, *overrides: str) -> tuple[str, ...]:
        return select_arms(compare, load.load("digits", overrides))

    assert arms(False) == (RANDOM,)
    assert arms(False, "random_images=0") == (TAUGHT,)
    assert arms(True) == ARMS
    assert arms(True, "random_images=0") == (ALONE, TAUGHT)
    assert arms(True, "alone.lr=1e-4") == (ALONE, OWN, TAUGHT, RANDOM)


def test_the_student_alone_with_its_own_schedule(digits: Cache, tmp_path: Path) -> None:
    """With the settings of the other arms, its weights are those of the student alone, bit for bit."""
    both = (ALONE, OWN)
    same = train_students(config(digits, tmp_path / "same", "alone.lr=0.001", "lr=0.001", arms=both))
    other = train_students(config(digits, tmp_path / "other", "alone.lr=0.01", "lr=0.001", arms=both))
    names = [f"student-lenet5-{arm}-seed0.safetensors" for arm in ("alone", "alone-own-schedule")]
    one, two = ([safetensors.torch.load_file(run.path / name) for name in names] for run in (same, other))
    last = "head.weight"
    assert one[0][last].equal(one[1][last])
    assert two[0][last].equal(one[0][last])
    assert not two[1][last].equal(one[0][last])
    assert other.config["alone"] == {"lr": 0.01}


def test_reading_rows_from_the_file_gives_the_same_students(run: RunFolder, digits: Cache, tmp_path: Path) -> None:
    small = train_students(config(digits, tmp_path / "small", "memory=1", arms=(TAUGHT,)))
    assert weights_of(small).items() <= weights_of(run).items()


def position(out: Path) -> checkpoint.Position | None:
    result = checkpoint.Checkpointer(out / "checkpoint.safetensors", 0, None).load()
    return result and result[1]


def test_a_non_finite_loss_stops_training_and_keeps_the_checkpoint(digits: Cache, tmp_path: Path) -> None:
    with pytest.raises(TrainingError) as refused:
        train_students(config(digits, tmp_path / "nan", "lr=1e30", "checkpoint_seconds=0", arms=(TAUGHT,)))
    assert str(refused.value) == (
        "The loss of lenet5-taught-seed0 is not finite in epoch 1, step 2. The last checkpoint is kept. "
        "Try a smaller learning rate: --set students.lenet5.lr=1e+29"
    )
    assert position(tmp_path / "nan") == checkpoint.Position(0, 0, 1)


def test_too_few_images_for_a_batch(digits: Cache, tmp_path: Path) -> None:
    with pytest.raises(DatasetError) as refused:
        train_students(config(digits, tmp_path / "x", "batch_size=1001"))
    assert str(refused.value) == (
        "digits has 1,000 training images, too few for a batch of 1001. Use smaller batches: --set batch_size=250"
    )
    assert not (tmp_path / "x").exists()


def test_another_preprocess_is_refused(digits: Cache, tmp_path: Path) -> None:
    with pytest.raises(CacheMismatch) as refused:
        train_students(config(digits, tmp_path / "x", "preprocess.resize=[32,32]"))
    assert str(refused.value) == (
        "digits.h5 was made with preprocess.resize = [16, 16], not [32, 32]: its targets belong to those pixels. "
        "Leave the setting out, or make another cache with it."
    )


def test_another_dataset_is_refused(digits: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tspipe.data.datasets.digits.TRAIN", 999)
    with pytest.raises(CacheMismatch) as refused:
        train_students(config(digits, tmp_path / "x"))
    assert str(refused.value) == (
        "digits.h5 is not of these data (1,000 images cached, 999 in the dataset): at train index 999, the cache has "
        "'999', the dataset nothing. Give the data that the cache was made from (--data), or make the cache again "
        "(tspipe cache --force)."
    )


def test_the_folder_of_another_run_is_refused(run: RunFolder, digits: Cache) -> None:
    with pytest.raises(RecipeError) as refused:
        train_students(config(digits, run.path, "seeds=2", "epochs=3"))
    assert str(refused.value) == (f"{run.path} is the folder of another run: epochs is 2, not 3. Choose another --out.")


def test_a_student_for_other_images_is_refused(digits: Cache, tmp_path: Path) -> None:
    with pytest.raises(NetworkError) as refused:
        train_students(config(digits, tmp_path / "x", "student=torchvision:resnet18"))
    assert str(refused.value).startswith("torchvision:resnet18 takes images of 3 channels, these have 1. ")


def test_a_users_own_student(digits: Cache, tmp_path: Path) -> None:
    user_file = tmp_path / "mine.py"
    user_file.write_text(
        "from torch import nn\n"
        "def build(num_classes):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(256, num_classes))\n"
    )
    result = train_students(config(digits, tmp_path / "run", f"student={user_file}", arms=(TAUGHT,)))
    assert (result.path / "student-mine-taught-seed0.safetensors").exists()
    user_file.write_text(user_file.read_text() + "# another version\n")
    with pytest.raises(RecipeError, match="files"):
        train_students(config(digits, tmp_path / "run", f"student={user_file}", arms=(TAUGHT,)))


def test_training_from_a_cache_without_its_teacher(digits: Cache, tmp_path: Path) -> None:
    bare = replace(digits, _weights=None)
    result = train_students(config(bare, tmp_path / "taught", arms=(TAUGHT,)))
    assert not (result.path / "random_labels.json").exists()


def test_a_run_resumes_with_the_same_number_of_threads(digits: Cache, tmp_path: Path) -> None:
    """Threads split sums, so another number of threads changes the weights."""
    run_config = config(digits, tmp_path / "run", "lr=1e30", "batch_size=500", arms=(TAUGHT,))
    with pytest.raises(TrainingError):
        train_students(run_config)
    written = json.loads((tmp_path / "run/config.json").read_text())
    written["environment"]["threads"] = 2
    (tmp_path / "run/config.json").write_text(json.dumps(written))
    try:
        with pytest.raises(TrainingError):
            train_students(run_config)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def test_two_students_of_one_name_are_refused(digits: Cache, tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as refused:
        train_students(config(digits, tmp_path / "x", 'student=["lenet5","lenet5"]'))
    assert str(refused.value) == "Two students are named lenet5. Name each once, and give files different names."


def test_two_learners_of_one_name_are_refused(digits: Cache, tmp_path: Path) -> None:
    """`taught` with a loss named random, and `taught + random` with the default loss."""
    user_file = tmp_path / "random.py"
    user_file.write_text(LOSS)
    with pytest.raises(RecipeError) as refused:
        train_students(config(digits, tmp_path / "x", f'loss=["ts","{user_file}"]'))
    assert str(refused.value) == (
        "Two learners are named lenet5-taught-random-seed0. Name each once, and give files different names."
    )


def test_random_images_need_the_teacher(digits: Cache, tmp_path: Path) -> None:
    with pytest.raises(CacheError) as refused:
        train_students(config(replace(digits, _weights=None), tmp_path / "x"))
    assert str(refused.value) == (
        "digits.h5 does not carry its teacher, so nothing can label random images or live views. Train without them: "
        "--random-images 0 --set view_source=stored"
    )


LOSS = """
import torch.nn.functional as F
from torch import Tensor
from torch import nn

class Loss(nn.Module):
    needs = frozenset({"logits"})

    def __init__(self):
        super().__init__()
        self.scale = nn.Linear(1, 1)  # a loss may have weights

    def forward(self, student, target):
        assert target.features.shape[1] == 0  # columns that the loss does not need are not loaded
        mine, its = student.logits.log_softmax(1), target.logits.log_softmax(1)
        kl = F.kl_div(mine, its, reduction="batchmean", log_target=True)
        return {"kl": kl, "scale": (self.scale.weight**2).sum()}
"""


def test_a_loss_of_the_users_own(digits: Cache, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(LOSS)
    result = train_students(config(digits, tmp_path / "run", f"loss={tmp_path}/mine.py"))
    rows = [row for row in result.rows() if row["arm"] == RANDOM]
    assert rows[-1]["kl"] < rows[0]["kl"]
    assert rows[-1]["scale"] < rows[0]["scale"]
    assert "xent" in result.rows()[0]


def test_changed_code_of_the_teacher_is_refused(digits: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same weights in another network give features other than the cached ones."""
    from torch import nn

    from tspipe.models.networks import lenet5

    whole = lenet5.build

    def other(num_classes: int, input_shape: tuple[int, int, int]) -> nn.Module:
        network = whole(num_classes, input_shape)
        network.features[1] = nn.Tanh()
        return network

    monkeypatch.setattr(lenet5, "build", other)
    with pytest.raises(CacheMismatch, match="computes other features than its rows hold, by up to"):
        train_students(config(digits, tmp_path / "run"))


def test_a_run_does_not_resume_on_another_kind_of_device(digits: Cache, tmp_path: Path) -> None:
    run_config = config(digits, tmp_path / "run", "lr=1e30", "batch_size=500", arms=(TAUGHT,))
    with pytest.raises(TrainingError):
        train_students(run_config)
    text = (tmp_path / "run/config.json").read_text()
    (tmp_path / "run/config.json").write_text(text.replace('"device": "cpu"', '"device": "cuda"'))
    with pytest.raises(RecipeError) as refused:
        train_students(run_config)
    assert str(refused.value) == (
        f"{tmp_path}/run was begun on cuda, and this machine would continue on cpu, which mixes the "
        "results of both. Choose another --out."
    )


def test_a_run_resumes_on_another_device_of_the_same_kind(
    digits: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each process of torchrun has a GPU of its own, and only the first has number 0."""
    run_config = config(digits, tmp_path / "run", "lr=1e30", "batch_size=500", arms=(TAUGHT,))
    for device in (torch.device("cpu"), torch.device("cpu", 0)):
        monkeypatch.setattr("tspipe.training.trainer.pick_device", lambda _, device=device: device)
        with pytest.raises(TrainingError):
            train_students(run_config)
    assert json.loads((tmp_path / "run/config.json").read_text())["environment"]["device"] == "cpu"


def test_half_a_line_of_metrics_is_ignored(run: RunFolder, tmp_path: Path) -> None:
    text = (run.path / "metrics.csv").read_text()
    for cut in (1, 5, 30):
        (tmp_path / "metrics.csv").write_text(text[:-cut])
        assert RunFolder(tmp_path, {}, {}).rows() == run.rows()[:-1]


def test_settings_for_an_unknown_student_are_refused() -> None:
    with pytest.raises(RecipeError) as refused:
        load.load("digits", ["students.lenett.lr=9"])
    assert str(refused.value) == (
        "The recipe digits: Unknown student 'lenett'. There are: lenet5, alexnet, lenet5_wide, mobilenet_v2, ntsnet, "
        "resnet110, resnet18, resnet20, resnet32, resnet44, resnet50, resnet56."
    )
    assert load.load("digits", ["student=./mine.py", "students.mine.lr=9"]).optimisation("./mine.py").lr == 9

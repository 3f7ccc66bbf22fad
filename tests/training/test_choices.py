"""Settings of stage two: several losses, a validation split, loss weights, TensorBoard, the random generator."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from tspipe.cache import Cache
from tspipe.data.random_images import minstd
from tspipe.errors import DatasetError, RecipeError
from tspipe.recipes import load
from tspipe.training.arms import ALONE, RANDOM, TAUGHT
from tspipe.training.config import StudentConfig
from tspipe.training.run_folder import RunFolder
from tspipe.training.targets import resolve_mse_weight
from tspipe.training.trainer import open_trainer, train_students

SMALL = ["epochs=2", "seeds=1", "batch_size=100", "random_images=7"]


def config(cache: Cache, out: Path, *overrides: str, arms: tuple[str, ...] = (ALONE, TAUGHT, RANDOM)) -> StudentConfig:
    facts = {"preprocess": cache.manifest["preprocess"]}
    return StudentConfig(load.load("digits", [*SMALL, *overrides], facts=facts), cache, arms, out=out)


def weights_of(run: RunFolder) -> dict[str, bytes]:
    return {
        path.name.removeprefix("student-"): safetensors.torch.save(safetensors.torch.load_file(path))
        for path in run.path.glob("student-*-seed0.safetensors")
    }


def test_losses_side_by_side(digits: Cache, tmp_path: Path) -> None:
    """Each loss ends with the same weights as in a run of its own, and the student alone is trained once."""
    both = train_students(config(digits, tmp_path / "both", 'loss=["ts", "kd", "vid"]', "epochs=1"))
    assert [(row["arm"], row["loss"]) for row in both.rows()] == [
        (ALONE, "xent"), (TAUGHT, "ts"), (TAUGHT, "kd"), (TAUGHT, "vid"), (RANDOM, "ts"), (RANDOM, "kd"),
        (RANDOM, "vid"),
    ]  # fmt: skip
    result = weights_of(both)
    assert {name for name in result if "alone" not in name} == {
        f"lenet5-taught{arm}{loss}-seed0.safetensors" for arm in ("", "-random") for loss in ("", "-kd", "-vid")
    }
    for loss in ("ts", "kd", "vid"):
        single = weights_of(train_students(config(digits, tmp_path / loss, f"loss={loss}", "epochs=1")))
        assert single == {name: result[name] for name in single}
    assert len(set(result.values())) == len(result)


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")
def test_compiled_students_learn_the_same(digits: Cache, tmp_path: Path) -> None:
    """Weights are equal up to rounding, parameter names are unchanged, and the students were compiled."""
    tiny = tmp_path / "tiny.py"
    tiny.write_text(
        "from torch import nn\n\n\n"
        "def build(num_classes):\n    return nn.Sequential(nn.Flatten(), nn.Linear(256, num_classes))\n"
    )
    plain, compiled = (
        train_students(
            config(digits, tmp_path / name, "epochs=1", f"student={tiny}", f"compile={name}", arms=(TAUGHT,))
        )
        for name in ("false", "true")
    )
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    name = "student-tiny-taught-seed0.safetensors"
    one, two = (safetensors.torch.load_file(run.path / name) for run in (plain, compiled))
    assert one.keys() == two.keys()
    assert all(torch.allclose(one[key], two[key], atol=1e-5) for key in one)
    assert compiled.config == {**plain.config, "compile": True}


def test_compile_without_a_compiler_is_refused(digits: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(RecipeError) as refused:
        train_students(config(digits, tmp_path / "run", "compile=true"))
    assert str(refused.value) == (
        "compile=true needs a C++ compiler (g++ or clang++), and none is installed. Install one, or leave the setting "
        "out."
    )
    assert not (tmp_path / "run").exists()


def test_options_of_a_loss(digits: Cache, tmp_path: Path) -> None:
    run = train_students(config(digits, tmp_path / "run", "loss=kd", "losses.kd.alpha=1", arms=(TAUGHT,)))
    assert {row["xent"] for row in run.rows()} == {0.0}
    assert run.config["losses"] == {"kd": {"alpha": 1}}
    with pytest.raises(RecipeError) as refused:
        train_students(config(digits, tmp_path / "other", "loss=kd", "losses.kd.beta=1"))
    assert str(refused.value) == "The loss kd has no option 'beta'. There are: temperature, alpha."


def test_validation_images_are_not_trained_on(digits: Cache, tmp_path: Path) -> None:
    run_config = config(digits, tmp_path / "run", "val_fraction=0.2", "seeds=2", arms=(TAUGHT,))
    trainer = open_trainer(run_config, RunFolder(tmp_path, {}, {}), torch.device("cpu"))
    data, source = trainer.batches.data, trainer.batches
    held_back = []
    for seed in (0, 1):
        train, validation = (set(rows.tolist()) for rows in data.validation_split(seed))
        assert (len(train), len(validation)) == (800, 200)
        assert train | validation == set(range(1000))
        images = {image.numpy().tobytes() for _, batch in source.epoch(seed, 1) for image in batch.images}
        (unseen,) = data.train.batches([torch.tensor(sorted(validation))])
        assert not images & {image.numpy().tobytes() for image in data.preprocess.normalise(unseen)}
        held_back.append(validation)
    assert held_back[0] != held_back[1]

    result = train_students(run_config)
    assert all(0 < row["val_accuracy"] < 1 for row in result.rows())
    assert all(round(200 * row["val_accuracy"], 6).is_integer() for row in result.rows())
    assert result.config["val_fraction"] == 0.2


@pytest.mark.parametrize(
    ("fraction", "kind", "message"),
    [
        (0.95, DatasetError, "digits has 50 training images, too few for a batch of 100. Use smaller batches: --set "
         "batch_size=12"),
        (1e-5, RecipeError, "val_fraction=1e-05 of 1,000 training images selects none. Use a larger fraction: --set "
         "val_fraction=0.1"),
    ],
)  # fmt: skip
def test_an_unusable_validation_fraction_is_refused(
    digits: Cache, tmp_path: Path, fraction: float, kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind) as refused:
        train_students(config(digits, tmp_path / "run", f"val_fraction={fraction}"))
    assert str(refused.value) == message


def test_mse_weight_auto_is_one_over_the_variance(digits: Cache, tmp_path: Path) -> None:
    run = train_students(config(digits, tmp_path / "run", "mse_weight=auto", arms=(TAUGHT,)))
    features = digits.train.features.load().astype(np.float64)
    weight = float(1 / features.var(axis=0).mean())
    assert run.read_json("summary.json")["mse_weight"] == pytest.approx(weight)
    assert ((features - features.mean(axis=0)) ** 2).mean() * weight == pytest.approx(1)
    number = train_students(config(digits, tmp_path / "number", f"mse_weight={weight!r}", arms=(TAUGHT,)))
    assert number.rows()[-1]["mse"] == pytest.approx(run.rows()[-1]["mse"], rel=1e-4)
    assert run.config["mse_weight"] == "auto"


def test_mse_weight_is_a_number_or_auto() -> None:
    with pytest.raises(RecipeError) as refused:
        load.load("digits", ["mse_weight=much"])
    assert str(refused.value) == "The recipe digits: mse_weight: neither auto nor a number of 0 or more."


def test_equal_features_have_no_variance(digits: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(digits.train.features), "take", lambda _column, rows: np.ones((len(rows), 84)))
    with pytest.raises(RecipeError) as refused:
        resolve_mse_weight(load.load("digits", ["mse_weight=auto"]), digits)
    assert str(refused.value) == (
        "All cached features of digits.h5 are equal, so mse_weight=auto has no variance to divide by. "
        "Give a number: --set mse_weight=1"
    )


def test_the_ratio_of_the_losses_is_printed_once(
    digits: Cache, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train_students(config(digits, tmp_path / "run", "seeds=2", "mse_weight=100", arms=(ALONE, TAUGHT)))
    first = run.rows()[1]
    ratio = first["mse"] / first["xent"]
    assert ratio > 10
    message = [line for line in capsys.readouterr().err.splitlines() if " / xent " in line]
    assert message == [
        f"lenet5, taught, epoch 1: mse {first['mse']:.3g} / xent {first['xent']:.3g} = {ratio:.2g}, "
        "so the labels hardly count: try --set mse_weight=auto"
    ]


def test_curves_for_tensorboard(digits: Cache, tmp_path: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run_config = config(digits, tmp_path / "run", "tensorboard=true", arms=(ALONE, TAUGHT))
    run = train_students(run_config)
    folders = sorted((run.path / "tensorboard").iterdir())
    assert [folder.name for folder in folders] == ["lenet5-alone-seed0", "lenet5-taught-seed0"]
    result = events.EventAccumulator(str(folders[1])).Reload()
    assert result.Tags()["scalars"] == [
        "accuracy/train", "loss/mse", "loss/xent", "seconds/training", "accuracy/test", "seconds/testing",
        "seconds/teacher",
    ]  # fmt: skip
    for tag, column in (("accuracy/test", "test_accuracy"), ("loss/mse", "mse")):
        expected = [(row["epoch"], row[column]) for row in run.rows() if row["arm"] == TAUGHT]
        assert [(point.step, point.value) for point in result.Scalars(tag)] == [
            (epoch, pytest.approx(value)) for epoch, value in expected
        ]
    shutil.rmtree(run.path / "tensorboard")
    (run.path / "summary.json").unlink()
    train_students(run_config)  # goes on, from the end
    assert (run.path / "summary.json").exists()


def test_minstd_is_another_run_and_warns_when_it_repeats(
    digits: Cache, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train_students(config(digits, tmp_path / "run", "random_generator=minstd", arms=(RANDOM,)))
    assert run.config["random_generator"] == "minstd"
    message = " ".join(capsys.readouterr().err.split())
    assert "8,388,607 images of 1×16×16. A seed draws 140, no more than that." in message
    usual = train_students(config(digits, tmp_path / "usual", arms=(RANDOM,)))
    assert usual.config["random_generator"] == "mt19937"
    assert run.rows()[0]["mse"] != usual.rows()[0]["mse"]


def test_minstd_continues_over_batches_and_epochs(digits: Cache, tmp_path: Path) -> None:
    run_config = config(digits, tmp_path / "run", "random_generator=minstd", arms=(RANDOM,))
    trainer = open_trainer(run_config, RunFolder(tmp_path, {}, {}), torch.device("cpu"))
    source = trainer.batches
    drawn = [batch.random[0] for epoch in (0, 1) for _, batch in source.epoch(0, epoch) if batch.random]
    expected = torch.from_numpy(
        np.concatenate(
            [minstd.numbers(0, "random images", i * 7 * 256, 7 * 256).reshape(7, 1, 16, 16) for i in range(20)]
        )
    )
    torch.testing.assert_close(torch.cat(drawn), source.data.preprocess.normalise(expected))

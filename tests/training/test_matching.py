"""Students of their own width: what is trained, what resumes, and what their files hold."""

import json
from pathlib import Path

import pytest
import safetensors
import torch
from safetensors.torch import load_file

from shared import interrupted_at
from tspipe import losses
from tspipe.cache import Cache
from tspipe.deploy.fold import fold
from tspipe.deploy.student import load_student
from tspipe.errors import RecipeError
from tspipe.losses import Sizes, Target
from tspipe.losses._statistics import TeacherStatistics
from tspipe.models.output import Output
from tspipe.recipes import load
from tspipe.training.arms import TAUGHT
from tspipe.training.config import StudentConfig
from tspipe.training.matching import encoded, fit_encoder, match_widths
from tspipe.training.trainer import train_students

NARROW = """
from torch import nn

def build(num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(256, 12), nn.ReLU(), nn.Linear(12, num_classes))
"""


def config(cache: Cache, folder: Path, *overrides: str) -> StudentConfig:
    (folder / "narrow.py").write_text(NARROW)
    settings = [f"student={folder}/narrow.py", "epochs=1", "batch_size=200", "checkpoint_seconds=0", *overrides]
    recipe = load.load("digits", settings, facts={"preprocess": cache.manifest["preprocess"]})
    return StudentConfig(recipe, cache, (TAUGHT,), out=folder / "run")


def correlated_rows() -> TeacherStatistics:
    """Return the statistics of 300 rows of 8 features that are linear in 2 numbers."""
    generator = torch.Generator().manual_seed(0)
    features = torch.rand(300, 2, generator=generator) @ torch.rand(2, 8, generator=generator)
    return TeacherStatistics(lambda: [(features, torch.arange(300) % 3)], lambda: torch.nn.Linear(8, 3), (3, 8))


@pytest.fixture
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tspipe.training.matching._STEPS", 20)


@pytest.mark.usefixtures("few_steps")
@pytest.mark.parametrize("match", ["linear", "autoencoder", "none"])
def test_a_student_keeps_its_own_width(match: str, digits: Cache, tmp_path: Path) -> None:
    loss = "pkt" if match == "none" else "nd"
    run = train_students(config(digits, tmp_path, f"match={match}", f"loss={loss}"))
    path = run.path / f"student-narrow-taught-{loss}-seed0.safetensors"
    with safetensors.safe_open(path, "pt") as file:
        facts = json.loads(file.metadata()["tspipe"])
        assert file.get_tensor("head.weight").shape == (10, 12)
    assert (facts["width"], facts["native_width"]) == ("12", "true")
    student = load_student(path, network=str(tmp_path / "narrow.py"))
    images = torch.rand(3, 1, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(fold(student)(images), student(images))


@pytest.mark.usefixtures("few_steps")
def test_a_resumed_run_has_the_same_autoencoder(digits: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def head(folder: Path) -> torch.Tensor:
        return load_file(folder / "run/student-narrow-taught-seed0.safetensors")["head.weight"]

    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    settings = "match=autoencoder", "loss=ts"
    train_students(config(digits, tmp_path / "whole", *settings))
    interrupted = config(digits, tmp_path / "parts", *settings)
    with monkeypatch.context() as patch:
        interrupted_at(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            train_students(interrupted)
    fit_encoder.cache_clear()
    train_students(interrupted)
    assert torch.equal(head(tmp_path / "parts"), head(tmp_path / "whole"))


@pytest.mark.usefixtures("few_steps")
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ("match=none", "loss=ts"),
            "The loss ts cannot compare the student's 12 features with 84 of the teacher's. Use --match linear, or ",
        ),
        (
            ("match=linear", "loss=simkd"),
            "The loss simkd gives the student a classifier of 84 features, and ",
        ),
        (("match=autoencoder", "loss=srrl"), "The losses simkd and srrl use the teacher's classifier, which takes "),
    ],
)
def test_losses_that_need_another_width_are_refused(
    settings: tuple[str, ...], message: str, digits: Cache, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError) as refused:
        train_students(config(digits, tmp_path, *settings))
    assert str(refused.value).startswith(message)
    assert not (tmp_path / "run").exists()


def test_an_autoencoder_keeps_what_there_is_to_keep(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tspipe.training.matching._STEPS", 300)
    statistics = correlated_rows()
    encoder = fit_encoder(statistics, 3)
    assert "turns 8 features of the teacher into 3; 9" in capsys.readouterr().err
    ((features, _),) = statistics.blocks()
    codes = encoder.encode(features)
    assert codes.min() >= 0
    torch.testing.assert_close(codes.var(0).mean(), features.var(0).mean())
    means = encoded(statistics, 3, 3).class_means
    torch.testing.assert_close(means, torch.stack([codes[i::3].mean(0) for i in range(3)]))
    fit_encoder.cache_clear()
    assert torch.equal(fit_encoder(statistics, 3).encode(features), codes)


def test_only_losses_of_features_are_matched() -> None:
    sizes, statistics = Sizes(8, 3, 2), correlated_rows()
    kd, ts = (losses.build(name, Sizes(8, 3, 8)).module for name in ("kd", "ts"))
    assert match_widths(kd, "linear", sizes, statistics) is kd
    matched = match_widths(ts, "linear", sizes, statistics)
    target = Target(torch.rand(4, 8), torch.empty(4, 0), torch.zeros(4, dtype=torch.int64))
    sum(matched(Output(torch.rand(4, 2), torch.rand(4, 3)), target).values()).backward()
    assert all(parameter.grad is not None for parameter in matched.parameters())


def test_a_matched_loss_warms_up() -> None:
    matched = match_widths(losses.build("nd", Sizes(8, 3, 8)).module, "linear", Sizes(8, 3, 2), correlated_rows())
    matched.start_epoch(4)
    assert matched.loss.ramp == 0.25

"""The arms of a comparison: who sees which images with which targets."""

from pathlib import Path

import pytest
import torch
from torch import nn

from shared import POOL_ROWS, interrupted_at, metrics_of, pool_config, weights_of
from tspipe.data.random_images import KINDS
from tspipe.errors import RecipeError
from tspipe.extraction.extract import extract
from tspipe.losses import Target, xent
from tspipe.models.feature_net import FeatureNet
from tspipe.recipes import load
from tspipe.training.arms import ALONE, ALONE_RANDOM, RANDOM, TAUGHT, learner_name, named_arms, select_arms
from tspipe.training.batches import Batch, RandomImages
from tspipe.training.config import StudentConfig
from tspipe.training.learner import StudentWithLoss
from tspipe.training.trainer import train_students


@pytest.mark.parametrize("kind", KINDS)
def test_only_mixtures_have_labels_of_their_own(kind: str) -> None:
    arms = select_arms(True, load.load("digits", [f"random_kind={kind}"]))
    assert arms == (ALONE, *([ALONE_RANDOM] if kind in ("mixed", "cutmix") else []), TAUGHT, RANDOM)
    assert select_arms(True, load.load("digits", [f"random_kind={kind}", "random_images=0"])) == (ALONE, TAUGHT)


def test_arms_are_named_briefly() -> None:
    mixed = load.load("digits", ["random_kind=mixed"])
    assert named_arms("taught,alone-random", mixed) == (ALONE_RANDOM, TAUGHT)
    assert named_arms(None, mixed) == select_arms(True, mixed)
    with pytest.raises(RecipeError, match="no arm 'own' with these settings"):
        named_arms("own", mixed)


@pytest.mark.parametrize("weight", [1.0, 0.25])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_student_alone_learns_the_mixed_labels(weight: float, smoothing: float) -> None:
    """Compared with λ CE(a) + (1 − λ) CE(b) in float64 (Zhang et al., section 2)."""
    torch.manual_seed(0)
    network, loss = FeatureNet(nn.Linear(3, 4), nn.Linear(4, 5)).double(), xent.Loss(smoothing)
    images, random = torch.randn(6, 3).double(), torch.randn(4, 3).double()
    empty, first, second = torch.empty(0, 0), torch.tensor([0, 1, 2, 3]), torch.tensor([4, 1, 0, 2])
    share = torch.tensor([0.25, 0.5, 1.0, 0.125])
    labels = share[:, None] * torch.eye(5)[first] + (1 - share)[:, None] * torch.eye(5)[second]
    target = Target(empty, empty, torch.arange(6) % 5)
    batch = Batch(images, target, RandomImages(random, Target(empty, empty, torch.full((4,), 4)), labels))
    student = StudentWithLoss(network, loss, False, weight)
    _, terms = student(*batch.of_arm(ALONE_RANDOM))

    def each(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)

    real, mixed = each(network(images).logits, target.labels), network(random).logits
    mixtures = share * each(mixed, first) + (1 - share) * each(mixed, second)
    expected = (real.sum() + weight * mixtures.sum()) / (6 + weight * 4)
    torch.testing.assert_close(terms["xent"], expected, rtol=1e-6, atol=0)
    _, plain = student(*batch.of_arm(ALONE))
    torch.testing.assert_close(plain["xent"], real.mean())


@pytest.mark.parametrize("source", ["live", "pool"])
def test_a_resumed_run_with_mixed_labels(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    """Both arms see the same images; the teacher labels them for one, the dataset for the other."""
    settings = ["epochs=1", "seeds=1", "batch_size=250", "random_images=7", "random_kind=mixed"]
    cache = extract(pool_config(teacher, tmp_path / "digits.h5", "random_kind=mixed"))
    facts = {"preprocess": cache.manifest["preprocess"]}
    recipe = load.load("digits", [*settings, f"random_source={source}", "checkpoint_seconds=0"], facts=facts)
    config = StudentConfig(recipe, cache, (ALONE, ALONE_RANDOM, RANDOM), out=tmp_path / "run")
    run = train_students(config)
    weights = weights_of(run)
    assert len(set(weights.values())) == 3
    cost = {"cache_bytes": cache.size, "cached_passes": 1000 + 797 + POOL_ROWS, "epoch_passes": 0}
    assert run.read_json("summary.json")["cost"] == {**cost, "epoch_passes": 4 * 7 * (source == "live")}
    interrupted_at(monkeypatch, 5)
    config = StudentConfig(recipe, cache, config.arms, out=tmp_path / "killed")
    with pytest.raises(KeyboardInterrupt):
        train_students(config)
    result = train_students(config)
    assert (weights_of(result), metrics_of(result)) == (weights, metrics_of(run))


def test_names_of_learners() -> None:
    assert learner_name("lenet5", ALONE_RANDOM, "xent", 0) == "lenet5-alone-random-seed0"

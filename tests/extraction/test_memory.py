"""Memory: stage one and verify hold a few blocks, never the logits of a whole split."""

import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from tspipe.cache import Cache
from tspipe.cache.verify import find_damage
from tspipe.extraction.extract import Contents, ExtractConfig, extract
from tspipe.extraction.verify import VerifyConfig, compare_teacher, match_data
from tspipe.models import networks, weights
from tspipe.recipes import load

CLASSES, TRAIN = 2_000, 2_048
LOGITS = 4 * CLASSES * TRAIN  # 16 MB
DATASET = f"""
import numpy as np
from tspipe.data.datasets import from_array

def load(root, split):
    count = {{"train": {TRAIN}, "test": 32}}[split]
    pixels = np.random.default_rng(count).integers(0, 256, (count, 4, 4, 1), dtype=np.uint8)
    return from_array(pixels, np.arange(count) % {CLASSES}, [str(i) for i in range({CLASSES})])
"""
NETWORK = """
from torch import nn

def build(num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 4), nn.ReLU(), nn.Linear(4, num_classes))
"""


def peak(action: Callable[[], object]) -> int:
    """Return the most bytes that numpy and Python hold at once."""
    tracemalloc.start()
    action()
    largest = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return largest


@pytest.fixture
def config(tmp_path: Path) -> ExtractConfig:
    (tmp_path / "many.py").write_text(DATASET)
    (tmp_path / "wide.py").write_text(NETWORK)
    torch.manual_seed(0)
    network = networks.build(f"{tmp_path}/wide.py", CLASSES, (1, 4, 4))
    weights.save(tmp_path / "w.safetensors", network, {})
    settings = [f"dataset={tmp_path}/many.py", f"teacher.network={tmp_path}/wide.py", "compute.block_rows=64"]
    recipe = load.load("digits", [*settings, "preprocess.resize=none"])
    return ExtractConfig(
        recipe, weights.read(tmp_path / "w.safetensors"), tmp_path / "many.h5", contents=Contents(images=True)
    )


def test_no_stage_holds_all_logits(config: ExtractConfig) -> None:
    made: list[Cache] = []
    assert peak(lambda: made.append(extract(config))) < LOGITS / 4  # type: ignore[arg-type]
    (cache,) = made
    logits = cache.train.logits
    assert logits.shape == (TRAIN, CLASSES)
    assert peak(lambda: find_damage(cache.path)) < LOGITS / 4
    checking = VerifyConfig(config.recipe)
    assert peak(lambda: match_data(cache, checking)) < LOGITS / 4
    compared = []
    assert peak(lambda: compared.append(compare_teacher(cache, checking, TRAIN + 32))) < LOGITS / 4
    assert np.max(compared[0].logits.largest) < 1e-4
    assert len(compared[0].changed) == TRAIN + 32
    assert peak(logits.load) > LOGITS  # or the measurement would miss it

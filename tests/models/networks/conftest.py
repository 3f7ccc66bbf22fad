"""Fixtures of the networks' tests."""

import pytest
import torch
from torch import Tensor, nn


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Use the same initial weights in every run."""
    torch.manual_seed(0)


@pytest.fixture
def fast_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copy initial weights from one array of random numbers, because drawing millions takes seconds."""
    noise = torch.randn(2**20, generator=torch.Generator().manual_seed(0)) * 0.05

    def fill(tensor: Tensor, *_: object, **__: object) -> Tensor:
        if not tensor.is_meta:
            with torch.no_grad():
                for part in tensor.flatten().split(len(noise)):
                    part.copy_(noise[: len(part)])
        return tensor

    for name in ("kaiming_normal_", "kaiming_uniform_", "normal_", "trunc_normal_", "uniform_", "xavier_uniform_"):
        monkeypatch.setattr(nn.init, name, fill)

"""What the tests of networks share."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """The same initial weights in every run; the one thread that small networks want is set for all tests."""
    torch.manual_seed(0)

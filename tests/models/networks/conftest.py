"""Fixtures of the networks' tests."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Use the same initial weights in every run."""
    torch.manual_seed(0)

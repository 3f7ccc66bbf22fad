"""A checkpoint is used only if it is sound, finite and of the same run; else the one before it."""

import os
import random
from pathlib import Path

import pytest
import torch

from tspipe.errors import TrainingError
from tspipe.training.checkpoint import Checkpointer, Position, load_training_state, read_checkpoint, training_state


def saved(folder: Path, identity: str = "a") -> Checkpointer:
    """Return a checkpointer that has saved twice."""
    result = Checkpointer(folder / "checkpoint.safetensors", 0, identity)
    for epoch in (1, 2):
        result.save({"w": torch.full((3, 4), float(epoch)), "n": torch.tensor(epoch)}, Position(0, epoch, 5))
    return result


def test_the_last_checkpoint_is_loaded_and_the_one_before_is_kept(tmp_path: Path) -> None:
    checkpointer = saved(tmp_path)
    loaded = checkpointer.load()
    assert loaded is not None
    assert loaded[1] == (0, 2, 5)
    assert loaded[0]["w"].equal(torch.full((3, 4), 2.0))
    assert read_checkpoint(checkpointer.previous)[1] == (0, 1, 5)
    checkpointer.delete()
    assert list(tmp_path.iterdir()) == []
    assert checkpointer.load() is None


def test_a_kill_between_two_checkpoints_loses_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpointer = saved(tmp_path)
    checkpointer.path.replace(checkpointer.previous)
    loaded = checkpointer.load()
    assert loaded is not None
    assert loaded[1] == (0, 2, 5)
    assert capsys.readouterr().err == ""


def test_a_flipped_bit_anywhere_is_detected(tmp_path: Path) -> None:
    checkpointer = saved(tmp_path)
    content = checkpointer.path.read_bytes()
    padding = content.rindex(b"}") + 1, content.index(b"\0", 8)  # spaces after the header
    draw = random.Random(0)
    for place in draw.sample([i for i in range(len(content)) if not padding[0] <= i < padding[1]], 60):
        flipped = bytearray(content)
        flipped[place] ^= 1 << draw.randrange(8)
        checkpointer.path.write_bytes(flipped)
        loaded = checkpointer.load(visible=False)
        assert loaded is not None
        assert loaded[1] == (0, 1, 5), place


@pytest.mark.parametrize("length", [0, 5, 100, -1])
def test_a_truncated_checkpoint_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str], length: int) -> None:
    checkpointer = saved(tmp_path)
    checkpointer.path.write_bytes(checkpointer.path.read_bytes()[:length])
    loaded = checkpointer.load()
    assert loaded is not None
    assert loaded[1] == (0, 1, 5)
    message = f"The checkpoint {checkpointer.path} is damaged. Training continues from before it.\n"
    assert capsys.readouterr().err == message


def test_weights_that_are_not_finite_are_not_used(tmp_path: Path) -> None:
    checkpointer = saved(tmp_path)
    checkpointer.save({"w": torch.tensor([1.0, torch.nan])}, Position(0, 3))
    with pytest.raises(TrainingError, match="has weights that are not finite"):
        read_checkpoint(checkpointer.path)
    loaded = checkpointer.load()
    assert loaded is not None
    assert loaded[1] == (0, 2, 5)


def test_a_checkpoint_of_another_run_is_not_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = saved(tmp_path, "another").path
    assert Checkpointer(path, 0, "a").load() is None
    assert capsys.readouterr().err.startswith(
        f"{path} is a checkpoint of other settings or data. Training continues from before it.\n"
    )
    with pytest.raises(TrainingError) as refused:
        Checkpointer(path, 0, "a").load(refuse_foreign=True)
    assert str(refused.value).endswith("Use those to resume it, or delete it to start again.")


def test_a_named_pipe_and_a_folder_are_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, reason in ((tmp_path / "pipe", "it is not a regular file"), (tmp_path, "Is a directory")):
        with pytest.raises(TrainingError) as refused:
            read_checkpoint(path)
        assert str(refused.value) == f"The checkpoint {path} cannot be read: {reason}."


def test_a_folder_of_the_checkpoints_name_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    path.mkdir()
    with pytest.raises(TrainingError) as refused:
        Checkpointer(path, 0, "a").load()
    assert str(refused.value) == f"{path} is a folder, and checkpoints are written there. Remove it."


@pytest.mark.parametrize("name", ["module/other", "optimizer/9/step", "optimizer/x/step"])
def test_state_that_does_not_fit_is_one_sentence(name: str) -> None:
    module = torch.nn.Linear(2, 3)
    optimizer = torch.optim.Adam(module.parameters())
    module(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    state = training_state(module, optimizer)
    load_training_state(state, module, optimizer)
    with pytest.raises(TrainingError, match="does not fit the network"):
        load_training_state({**state, name: torch.ones(1)}, module, optimizer)

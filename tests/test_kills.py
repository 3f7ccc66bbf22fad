"""Both stages, killed at random moments many times in a row, end with the same result as without a kill.

TSPIPE_KILLS=1000 in the environment sets the number of kills.
"""

import os
import random
import shutil
from pathlib import Path

import safetensors.torch

from conftest import Zygote
from shared import TEACHER
from tspipe.cache import Cache
from tspipe.extraction.extract import Contents, ExtractConfig, extract
from tspipe.models import weights
from tspipe.recipes import load
from tspipe.training import checkpoint

KILLS = int(os.environ.get("TSPIPE_KILLS", "6"))


def test_stage_one(zygote: Zygote, teacher: Path, tmp_path: Path) -> None:
    """A finished file is removed and written again, so that kills fall everywhere, even at the end.

    Each start has a random number of processes: one without torchrun, or one, two or three with it.
    """
    settings = [*TEACHER, "compute.block_rows=16"]
    arguments = load.load("digits", settings)
    complete = extract(
        ExtractConfig(arguments, weights.read(teacher), tmp_path / "whole.h5", contents=Contents(random_pool=100))
    )
    sizes = complete.dimensions
    blocks = {f"{section} {block}" for section in sizes.sections for block in range(sizes.blocks(section))}
    out = tmp_path / "digits.h5"
    arguments = ["cache", "--dataset", "digits", "--weights", teacher, "--out", out, "--random-pool", 100]
    arguments += [f"--set={setting}" for setting in settings]
    draw, kills, files, processes, parts = random.Random(0), 0, 0, 0, 0
    written: set[str] = set()
    before: set[str] = set()
    while kills < KILLS or not out.exists():
        ranks = draw.choice([None, 1, 2, 3])
        run = zygote.run(*arguments, seconds=draw.uniform(0, 0.7) if kills < KILLS else None, ranks=ranks)
        kills, processes = kills + run.killed, processes + run.killed * (ranks or 1)
        assert run.killed or run.code == 0, run.lines
        computed = [line for line in run.lines if line.startswith("computed ")]
        assert len(set(computed)) == len(computed)  # not by two processes either
        parts += any(tmp_path.glob("digits.h5.part-?"))
        for event, block in (line.split(" ", 1) for line in run.lines if line.startswith(("computed ", "written "))):
            if event == "computed":
                assert block not in before  # a block is never computed again after its checksum was written
            else:
                written.add(block)
        before = set(written)
        if out.exists():  # also if the kill came after the last step
            assert out.read_bytes() == complete.path.read_bytes()
            assert written <= blocks
            assert len(blocks - written) <= processes  # a kill may come between a checksum and its line
            assert zygote.run(*arguments).code == 0
            out.unlink()
            written, before, files = set(), set(), files + 1
            if kills >= KILLS:
                break
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix != ".lock") == ["whole.h5"]
    print(
        f"\nstage one: {kills} kills, {parts} of which left part files of other ranks, {files} files of {len(blocks)} "
        "blocks, no block twice, all bytes the same"
    )


SMALL = ["epochs=2", "seeds=2", "random_images=8", "batch_size=100", "checkpoint_seconds=0"]


def test_stage_two(zygote: Zygote, digits: Cache, tmp_path: Path) -> None:
    """A finished run is removed and started again, so that no kill comes after its end."""

    def arguments(out: Path) -> list[object]:
        settings = [f"--set={setting}" for setting in SMALL]
        return ["student", "--cache", digits.path, "--student", "lenet5", "--compare", "--out", out, *settings]

    complete, killed = tmp_path / "whole", tmp_path / "killed"
    finished = zygote.run(*arguments(complete))
    assert finished.code == 0, finished.lines
    draw, kills, runs = random.Random(0), 0, 0
    before = (0, 0, 0)
    while kills < KILLS // 3 or not runs:
        run = zygote.run(*arguments(killed), seconds=draw.uniform(0.1, 0.6) if kills < KILLS // 3 else None)
        assert run.killed or run.code == 0, run.lines
        if (killed / "summary.json").exists():
            assert_the_same_students(killed, complete)
            shutil.rmtree(killed)
            runs, before = runs + 1, (0, 0, 0)
            continue
        kills += run.killed
        if saved := checkpoint.Checkpointer(killed / "checkpoint.safetensors", 0, None).load():
            now = saved[1]
            assert now >= before  # a checkpoint never goes back
            before = now
    print(f"\nstage two: {kills} kills in {runs} runs, weights the same to the last bit")


def assert_the_same_students(one: Path, two: Path) -> None:
    names = sorted(path.name for path in two.glob("student-*"))
    assert names
    for name in names:
        uninterrupted, resumed = (safetensors.torch.load_file(folder / name) for folder in (two, one))
        assert resumed.keys() == uninterrupted.keys()
        assert all(resumed[key].equal(uninterrupted[key]) for key in uninterrupted)

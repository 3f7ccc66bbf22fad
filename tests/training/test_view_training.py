"""Views: students see the teacher's pixels, bit for bit, and other views are refused."""

import contextlib
import random
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conftest import Result
from forging import forge, refusal
from shared import interrupted_at, small, spoil
from tspipe.cache import Cache, CacheWriter, open_cache
from tspipe.data import views
from tspipe.data.preprocess import Preprocess, shift_and_flip
from tspipe.errors import CacheError, CacheMismatch, RecipeError
from tspipe.experiments import bench
from tspipe.extraction import blocks as rows
from tspipe.extraction import extract as stage
from tspipe.extraction import forward
from tspipe.extraction.extract import Contents, extract
from tspipe.models.teacher import load_teacher, run_teacher
from tspipe.recipes import load
from tspipe.training import batches, learner
from tspipe.training.arms import ALONE, RANDOM, TAUGHT
from tspipe.training.config import StudentConfig
from tspipe.training.run_folder import RunFolder
from tspipe.training.trainer import open_trainer, train_students
from tspipe.utils.distributed import Group

Tspipe = Callable[..., Result]
V = 3
VIEWS = [f"views.count={V}", "views.shift=3", "features.dtype=float32"]
CROP = ["preprocess.resize=[20,20]", "preprocess.crop=16"]
STUDENT = ["student=lenet5", "loss=ts", "epochs=2", "seeds=1", "batch_size=4", "random_images=2"]


def stage_two(cache: Cache, folder: Path, *overrides: str, arms: tuple[str, ...] = (TAUGHT,)) -> StudentConfig:
    """Of a cache that `small` describes; the run folder is new with each number of overrides."""
    facts = {"preprocess": cache.manifest["preprocess"], **views.facts(cache.manifest)}
    recipe = load.load("folder", [f"dataset=folder:{folder}", *STUDENT, *overrides], facts=facts)
    return StudentConfig(recipe, cache, arms, out=folder.parent / f"run{len(overrides)}")


def students(run: RunFolder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(run.path.glob("student-*.safetensors"))}


@pytest.fixture(scope="module")
def cropped(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """16 training images of 20×20 pixels in blocks of 4, cropped to 16×16; beside it lies its folder of images."""
    return extract(small(tmp_path_factory.mktemp("views") / "shapes", *VIEWS, *CROP))


def words(seed: int, purpose: str, number: int, block: int) -> Iterator[int]:
    """What Python's own Mersenne Twister gives from the state that cache/README.md describes."""
    entropy = np.random.SeedSequence([seed, zlib.crc32(purpose.encode()), number, block])
    state = entropy.generate_state(624, np.uint32)
    twister = random.Random()
    twister.setstate((3, (2**31, *state[1:].tolist(), 623), None))
    while True:
        yield twister.getrandbits(32)


@given(
    seed=st.integers(0, 5),
    count=st.integers(2, 5),
    shift=st.integers(0, 9),
    flip=st.booleans(),
    block=st.integers(0, 3),
)
def test_views_are_drawn_as_the_format_specifies(seed: int, count: int, shift: int, flip: bool, block: int) -> None:
    draw, expected = words(seed, "cached views", 0, block), []
    assert zlib.crc32(b"cached views") == 1_604_584_741
    for _ in range(7):
        expected.append([0, 0, 0])
        for _ in range(count - 1):
            dy, dx, mirrored = (next(draw) for _ in range(3))
            expected.append([dy % (2 * shift + 1) - shift, dx % (2 * shift + 1) - shift, mirrored % 2 if flip else 0])
    manifest = {"count": count, "shift": shift, "flip": flip, "seed": seed}
    result = views.block_views(manifest, range(block * 7, block * 7 + 7), 7)
    assert result.dtype == np.int16
    assert result.tolist() == expected


def test_a_cache_describes_its_views(cropped: Cache) -> None:
    assert cropped.manifest["views"] == {"count": V, "flip": True, "seed": 0, "shift": 3}
    assert cropped.train.views is not None
    assert (cropped.train.views.shape, cropped.train.views.dtype) == ((16 * V, 3), np.dtype("<i2"))
    assert (cropped.train.features.shape, cropped.train.logits.shape) == ((16 * V, 84), (16 * V, 2))
    stored = cropped.train.views.load().reshape(16, V, 3)
    assert not stored[:, 0].any()
    assert {*np.unique(stored[:, 1:, :2]).tolist()} == set(range(-3, 4))
    assert {*stored[:, 1:, 2].ravel().tolist()} == {0, 1}
    assert cropped.test.views is None
    assert (cropped.test.features.shape, cropped.test.checksums.shape) == ((8, 84), (2, 5, 32))


def test_the_first_view_and_the_test_split_are_plain(cropped: Cache) -> None:
    folder = cropped.path.parent / "shapes"
    plain = extract(replace(small(folder, "features.dtype=float32", *CROP), out=folder.parent / "plain.h5"))
    assert plain.test.checksums.load().tobytes() == cropped.test.checksums.load().tobytes()
    assert plain.manifest["teacher"] == cropped.manifest["teacher"]
    np.testing.assert_allclose(cropped.train.features[::V], plain.train.features.load(), rtol=1e-5, atol=1e-6)


class Noted:
    """Records the images that the teacher and the students get."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.taught: list[torch.Tensor] = []
        self.batches: list[batches.Batch] = []
        batch, step = rows.Replayed.batch, learner.Learner.step

        def seen(*arguments: Any) -> torch.Tensor:
            self.taught.append(batch(*arguments).clone())
            return self.taught[-1]

        def learnt(this: Any, batch: batches.Batch, number: int) -> None:
            self.batches.append(batch)
            step(this, batch, number)

        monkeypatch.setattr(rows.Replayed, "batch", seen)
        monkeypatch.setattr(learner.Learner, "step", learnt)


@pytest.mark.parametrize(
    ("settings", "images", "limits"),
    [(CROP, False, []), (CROP, False, ["memory=1"]), ([], True, []), ([], True, ["memory=1"])],
    ids=["local images, held", "decoded each epoch", "pixels of the cache", "read each epoch"],
)
def test_students_see_what_the_teacher_saw(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: list[str], images: bool, limits: list[str]
) -> None:
    """Pixels are equal in every arm, and the live teacher's output equals the cached one up to float32 rounding."""
    noted, arms, folder = Noted(monkeypatch), (ALONE, TAUGHT, RANDOM), tmp_path / "shapes"
    cache = extract(replace(small(folder, *VIEWS, *settings, "compute.batch_size=5"), contents=Contents(images)))
    saw = torch.cat(noted.taught)
    assert (saw.shape, saw.dtype) == ((16 * V, 3, 16, 16), torch.uint8)
    if images:  # stage two needs no dataset then
        folder.rename(tmp_path / "away")
    train_students(stage_two(cache, folder, *limits, arms=arms))
    preprocess = Preprocess.from_dict(cache.manifest["preprocess"])
    teacher = load_teacher(cache, load.load("folder"), (3, 16, 16), torch.device("cpu"))
    seen: list[list[int]] = []
    for epoch in range(2):
        draw = words(0, "views", epoch // V, 0)
        seen.append([(next(draw) + epoch) % V for _ in range(16)])
        for batch in batches.shuffled_batches(0, epoch, 16, 4):
            at = [i * V + seen[epoch][i] for i in batch.tolist()]
            for _ in arms:
                result = noted.batches.pop(0)
                assert result.images.equal(preprocess.normalise(saw[at]))
                assert result.target.labels.tolist() == cache.train.labels[batch].tolist()
            np.testing.assert_array_equal(result.target.features, cache.train.features[at])
            output = run_teacher(teacher, result.images)
            torch.testing.assert_close(
                output.features, torch.from_numpy(cache.train.features[at]), rtol=1e-5, atol=1e-6
            )
            torch.testing.assert_close(output.logits, torch.from_numpy(cache.train.logits[at]), rtol=1e-5, atol=1e-6)
    assert noted.batches == []
    assert seen[0] != seen[1]


def test_a_view_is_a_crop_from_elsewhere_in_the_image(cropped: Cache) -> None:
    """Of an image that has room around the crop nothing comes in at the edges."""
    preprocess = Preprocess.from_dict(cropped.manifest["preprocess"])
    image = np.random.default_rng(0).integers(1, 256, (20, 20, 3), dtype=np.uint8)
    given = torch.from_numpy(preprocess.before_views.apply(image)).permute(2, 0, 1)[None]
    for dy, dx, flip in ((0, 0, 0), (2, -1, 0), (-2, 2, 1)):
        result = preprocess.replay(given, torch.tensor([[dy, dx, flip]]))[0].permute(1, 2, 0).numpy()
        run_config = image[2 - dy : 18 - dy, 2 - dx : 18 - dx]
        if flip:  # it is the moved image that is mirrored, whole
            run_config = image[2 - dy : 18 - dy, ::-1][:, 2 + dx : 18 + dx]
        np.testing.assert_array_equal(result, run_config)
    np.testing.assert_array_equal(preprocess.replay(given)[0].permute(1, 2, 0), preprocess.apply(image))


def test_kills_and_several_processes_do_not_change_the_file(
    cropped: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_config = replace(small(cropped.path.parent / "shapes", *VIEWS, *CROP), out=tmp_path / "again.h5")
    job, write_block, written = stage._prepare(run_config), CacheWriter.write_block, 0
    every = {split: list(range(job.dimensions.blocks(split))) for split in ("train", "test")}
    with job.writer(2) as writer:
        stage._write_share(writer, job, every, Group(2, 3))

    def killed(*arguments: Any) -> None:
        nonlocal written
        written += 1
        if written == 3:  # the first is taken from the other process
            raise KeyboardInterrupt
        write_block(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(CacheWriter, "write_block", killed)
        with pytest.raises(KeyboardInterrupt):
            extract(run_config)
    assert extract(run_config).path.read_bytes() == cropped.path.read_bytes()


def test_progress_counts_views(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[int] = []

    @contextlib.contextmanager
    def progress(what: str, total: int, unit: str, done: int, visible: bool) -> Iterator[Any]:
        assert (total, unit, done, visible) == (16 * V + 8, "views", 0, True)
        yield lambda count, what: shown.append(count)

    monkeypatch.setattr(stage, "progress", progress)
    extract(small(tmp_path / "shapes", *VIEWS))
    assert shown == [4 * V] * 4 + [4] * 2


def test_a_feature_beyond_float16_names_the_image_of_the_view(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taught = forward.run_teacher_on_blocks

    def loud(*arguments: Any) -> tuple[np.ndarray, np.ndarray]:
        features, logits = taught(*arguments)
        if arguments[-2:] == ("train", 1):
            features[2 * V + 1] = 1e6
        return features, logits

    monkeypatch.setattr(forward, "run_teacher_on_blocks", loud)
    with pytest.raises(CacheError) as refused:
        extract(small(tmp_path / "shapes", *VIEWS[:2]))
    assert str(refused.value) == (
        "The teacher's features of 'a/06.png' reach beyond 65,504, the largest float16. "
        "Store them as float32: --set features.dtype=float32"
    )


def test_cropped_pixels_cannot_be_stored_with_views(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as refused:
        extract(replace(small(tmp_path / "shapes", *VIEWS, *CROP), contents=Contents(images=True)))
    assert str(refused.value) == (
        "--images keeps pixels that are cropped, and the crop takes away what views need. Leave out --images, the "
        "views (--set views.count=0), or the crop (--set preprocess.crop=none)."
    )
    assert not (tmp_path / "shapes.h5.part").exists()
    cache = extract(
        replace(small(tmp_path / "shapes", *VIEWS), contents=Contents(images=True))
    )  # somebody else's file may claim it
    forge(cache.path, lambda manifest: manifest["preprocess"].update(crop=8))
    assert refusal(cache.path) == "its images are cropped, and so cannot be used for its views."


DAMAGE = [
    [("train_views", 4), ("train_labels", 15)],
    [("train_features", 5 * V), ("train_features", 16 * V - 1), ("train_logits", 0), ("train_views", 14 * V)],
    [("test_features", 7), ("train_checksums", 1)],
]


@pytest.mark.parametrize("places", DAMAGE)
def test_repair_makes_the_views_again(
    tspipe: Tspipe, cropped: Cache, tmp_path: Path, places: list[tuple[str, int]]
) -> None:
    path, folder = tmp_path / "copy.h5", cropped.path.parent / "shapes"
    path.write_bytes(cropped.path.read_bytes())
    spoil(path, *places)
    assert tspipe("verify", path, folder).code == 1
    result = tspipe("verify", "--repair", path, folder)
    assert (result.code, result.error) == (0, "")
    assert path.read_bytes() == cropped.path.read_bytes()
    result = tspipe("verify", path, folder, "--data", "--teacher", 24)
    assert (result.code, result.error) == (0, "")
    assert result.out.endswith("Changed argmax: 0 of 24\n")


def test_damaged_views_are_named_with_their_rows(tspipe: Tspipe, cropped: Cache, tmp_path: Path) -> None:
    path = tmp_path / "copy.h5"
    path.write_bytes(cropped.path.read_bytes())
    spoil(path, ("train_views", 4 * V))
    assert tspipe("verify", path).says(
        f"{path} is damaged: train_views, rows 12 to 23. Get the file again, or repair it: "
        f"tspipe verify --repair {path}"
    )


def test_views_other_than_the_cached_ones_are_refused(cropped: Cache) -> None:
    folder = cropped.path.parent / "shapes"
    for field, stored, local in (("shift", 3, 2), ("count", 3, 0), ("flip", True, False)):
        with pytest.raises(CacheMismatch) as refused:
            train_students(stage_two(cropped, folder, f"views.{field}={local}".lower(), arms=(ALONE,)))
        assert str(refused.value) == (
            f"shapes.h5 was made with views.{field} = {stored}, not {local}: its targets belong to those views. Leave "
            "the setting out, or make another cache with it."
        )
    assert not (folder.parent / "run1").exists()


def test_fresh_views_are_refused_if_an_arm_is_taught(tmp_path: Path) -> None:
    folder = tmp_path / "shapes"
    cache = extract(small(folder))
    for arms in ((TAUGHT,), (ALONE, RANDOM)):
        with pytest.raises(CacheMismatch) as refused:
            train_students(stage_two(cache, folder, "views.count=8", arms=arms))
        assert str(refused.value) == (
            "shapes.h5 has no views: its targets belong to unchanged images, so a taught student that sees "
            "shifted or flipped ones would learn the wrong targets. Make the cache again with views (tspipe "
            "cache --views 8 --force), have the teacher label new ones (--set view_source=live), or train without "
            "(--set views.count=0)."
        )
    assert not (tmp_path / "run1").exists()


@given(count=st.integers(2, 6), seed=st.integers(0, 9), cycle=st.integers(0, 3))
def test_as_many_epochs_as_views_show_each_view_once(count: int, seed: int, cycle: int) -> None:
    stored = torch.arange(5 * count)[:, None].expand(-1, 3)
    epoch_views = views.EpochViews(5, views.Views(count=count), stored, torch.device("cpu"))
    epochs = [epoch_views.batches(seed, cycle * count + i, [torch.arange(5)]) for i in range(count)]
    assert all(rows[0].tolist() == shown[0][:, 0].tolist() for rows, shown in epochs)
    assert torch.stack([rows[0] for rows, _ in epochs]).sort(0).values.T.flatten().tolist() == list(range(5 * count))


@pytest.mark.parametrize("labels", ["dataset", "teacher"])
def test_the_teacher_labels_new_views_live(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, labels: str) -> None:
    """Every arm sees the same views, and a resumed run those of an uninterrupted one."""
    noted, folder = Noted(monkeypatch), tmp_path / "shapes"
    cache = extract(small(folder))
    settings = ["view_source=live", "views.shift=2", f"labels={labels}", "checkpoint_seconds=0", "epochs=1"]
    run = train_students(stage_two(cache, folder, *settings, arms=(ALONE, TAUGHT, RANDOM)))
    teacher = load_teacher(cache, load.load("folder"), (3, 16, 16), torch.device("cpu"))
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images_of(folder)])).permute(0, 3, 1, 2)
    draw = words(0, "views", 0, 0)
    drawn = torch.tensor([[next(draw) % 5 - 2, next(draw) % 5 - 2, next(draw) % 2] for _ in range(16)])
    shown = Preprocess.from_dict(cache.manifest["preprocess"]).normalise(shift_and_flip(pixels, drawn))
    for batch in batches.shuffled_batches(0, 0, 16, 4):
        for _ in range(3):
            result = noted.batches.pop(0)
            output = run_teacher(teacher, shown[batch])
            assert result.images.equal(shown[batch])
            torch.testing.assert_close(result.target.features, output.features)
            expected = output.logits.argmax(1) if labels == "teacher" else torch.from_numpy(cache.train.labels[batch])
            assert result.target.labels.equal(expected)
    assert all(row["seconds_teacher"] > 0 for row in run.rows())
    assert run.read_json("summary.json")["cost"]["epoch_passes"] == 16 + 4 * 2
    if labels == "dataset":
        config = replace(stage_two(cache, folder, *settings, arms=(ALONE, TAUGHT, RANDOM)), out=tmp_path / "killed")
        interrupted_at(monkeypatch, 7)
        with pytest.raises(KeyboardInterrupt):
            train_students(config)
        assert students(train_students(config)) == students(run)


def test_live_views_must_differ_from_the_images() -> None:
    with pytest.raises(RecipeError, match="view_source=live has nothing to draw"):
        load.load("digits", ["view_source=live", "views.shift=0", "views.flip=false"])


def test_students_alone_may_have_fresh_views(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Views are drawn again each epoch."""
    noted, folder = Noted(monkeypatch), tmp_path / "shapes"
    cache = extract(small(folder, *CROP))
    run = train_students(stage_two(cache, folder, "views.count=8", "views.shift=2", arms=(ALONE,)))
    assert run.config["views"] == {"count": 8, "flip": True, "shift": 2}
    preprocess = Preprocess.from_dict(cache.manifest["preprocess"])
    whole = [preprocess.before_views.apply(np.asarray(pixels)) for pixels in images_of(folder)]
    pixels = torch.from_numpy(np.stack(whole)).permute(0, 3, 1, 2)
    for epoch in range(2):
        draw = words(0, "views", epoch, 0)
        drawn = torch.tensor([[next(draw) % 5 - 2, next(draw) % 5 - 2, next(draw) % 2] for _ in range(16)])
        moved = shift_and_flip(pixels, drawn)[:, :, 2:18, 2:18]
        for batch in batches.shuffled_batches(0, epoch, 16, 4):
            assert noted.batches.pop(0).images.equal(preprocess.normalise(moved[batch]))
    assert noted.batches == []


def images_of(folder: Path) -> list[Any]:
    from PIL import Image

    return [Image.open(path) for path in sorted((folder / "train").rglob("*.png"))]


def test_a_run_records_its_views(cropped: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupted epoch resumes with the same views."""
    folder = cropped.path.parent / "shapes"
    run_config = replace(stage_two(cropped, folder, "checkpoint_seconds=0"), out=tmp_path / "killed")
    whole = train_students(replace(run_config, out=tmp_path / "whole"))
    assert whole.config["views"] == {"count": V, "flip": True, "shift": 3}
    taken = interrupted_at(monkeypatch, 3, 7)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            train_students(run_config)
    assert students(train_students(run_config)) == students(whole)
    assert len(taken) == 2 * 4 + 2


def test_processes_that_split_a_batch_share_its_views(cropped: Cache, tmp_path: Path) -> None:
    run_config = stage_two(cropped, cropped.path.parent / "shapes", "batch_size=5")

    def batches_of(group: Group) -> list[batches.Batch]:
        trainer = open_trainer(run_config, RunFolder(tmp_path, {}, {}), torch.device("cpu"), group)
        return [batch for _, batch in trainer.batches.epoch(0, 1, slice(1, None))]

    for whole, *parts in zip(batches_of(Group()), *(batches_of(Group(rank, 2)) for rank in range(2)), strict=True):
        assert [len(part.images) for part in parts] == [3, 2]
        assert torch.cat([part.images for part in parts]).equal(whole.images)
        assert torch.cat([part.target.features for part in parts]).equal(whole.target.features)
    empty = Preprocess((0.5,), (0.5,), crop=3).replay(torch.empty(0, 1, 4, 4), torch.empty(0, 3))
    assert empty.shape == (0, 1, 3, 3)


def test_on_the_command_line(tspipe: Tspipe, tmp_path: Path) -> None:
    folder = tmp_path / "shapes"
    small(folder)
    settings = ["--set=compute.block_rows=4", "--weights", folder / "w.safetensors", "--teacher", "lenet5"]
    settings += ["--set=views.shift=4"]
    made = tspipe("cache", "--dataset", f"folder:{folder}", "--views", 2, "--out", "x.h5", *settings)
    assert (made.code, made.error) == (0, "")
    output = "views       2 of each training image, moved by up to 4 pixels, mirrored, seed 0"
    assert output in made.out
    assert output in tspipe("info", f"file://{tmp_path}/x.h5").out
    assert open_cache("x.h5").manifest["views"] == {"count": 2, "flip": True, "seed": 0, "shift": 4}
    again = tspipe("cache", "--dataset", f"folder:{folder}", "--views", 0, "--out", "x.h5", *settings)
    assert again.error == (
        "x.h5 is another cache: views is (count 2, flip True, seed 0, shift 4), not absent. Move it away, "
        "replace it (tspipe cache --force) or write another (--out)."
    )
    made = tspipe("student", "--cache", "x.h5", "--data", folder, *(f"--set={s}" for s in STUDENT))
    assert (made.code, made.error) == (0, "")


def test_the_benchmark_accepts_a_cache_with_views(cropped: Cache) -> None:
    result = bench.bench(replace(stage_two(cropped, cropped.path.parent / "shapes"), out=None), 0.1)
    assert [line.what for line in result.lines][-1] == "cohort of 2 / bare"

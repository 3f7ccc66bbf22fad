"""A cache beside any PyTorch dataset: every image gets its own targets, whatever the order, in any worker."""

import pickle
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import Compose, PILToTensor, RandomHorizontalFlip, ToTensor

import tspipe
from pets import plan, write
from shared import make_folder, small
from tspipe.cache import Cache
from tspipe.cache.read import read_keys
from tspipe.data import datasets
from tspipe.data.local import open_local
from tspipe.data.preprocess import Preprocess
from tspipe.errors import CacheMismatch, DatasetError
from tspipe.extraction.extract import ExtractConfig, extract
from tspipe.models import networks, weights
from tspipe.recipes import load


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """The cache of a folder of 16 + 8 images, `photos/` beside it."""
    local = tmp_path_factory.mktemp("photos")
    folder = make_folder(local / "photos")
    torch.manual_seed(0)
    weights.save(local / "w.safetensors", networks.build("lenet5", 2, (3, 16, 16)), {})
    recipe = load.load("folder", [f"dataset=folder:{folder}", "teacher.network=lenet5"])
    return extract(ExtractConfig(recipe, weights.read(local / "w.safetensors"), local / "photos.h5"))


def images(photos: Cache, split: str = "train") -> ImageFolder:
    return ImageFolder(str(photos.path.parent / "photos" / split), Preprocess.from_dict(photos.manifest["preprocess"]))


def plain(digits: Cache) -> TensorDataset:
    """The digits without keys."""
    train = datasets.open_dataset("digits").train
    return TensorDataset(torch.from_numpy(np.stack([train.read(i) for i in range(1000)])), torch.tensor(train.labels))


class Shuffled(Dataset):
    """The digits in another order, with keys."""

    def __init__(self, order: Sequence[int]):
        self.train = datasets.open_dataset("digits").train
        self.order = list(order)
        self.keys = [self.train.keys[i] for i in self.order]

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int, str]:
        i = self.order[index]
        return torch.from_numpy(self.train.read(i)), int(self.train.labels[i]), "more"


def test_a_sample_is_image_label_features_logits(digits: Cache) -> None:
    targets = tspipe.CachedTargets(plain(digits), digits)
    assert len(targets) == 1000
    image, label, features, logits = targets[7]
    assert image.equal(plain(digits)[7][0])
    assert label == digits.train.labels[7]
    assert (features.shape, features.dtype) == ((84,), torch.float32)
    assert (logits.shape, logits.dtype) == ((10,), torch.float32)
    np.testing.assert_array_equal(features, digits.train.features[7])
    np.testing.assert_array_equal(targets[-1][3], digits.train.logits[999])
    with pytest.raises(IndexError):
        targets[1000]


def test_images_are_found_by_key_not_by_position(digits: Cache) -> None:
    order = np.random.default_rng(0).permutation(1000)[:300]
    targets = tspipe.CachedTargets(Shuffled(order), digits.path)
    for i in (0, 5, 299):
        np.testing.assert_array_equal(targets[i][2], digits.train.features[int(order[i])])


@pytest.mark.parametrize("keyed", [True, False])
def test_subsets(digits: Cache, keyed: bool) -> None:
    order = np.random.default_rng(1).permutation(1000) if keyed else np.arange(1000)
    complete = Shuffled(order) if keyed else plain(digits)
    part = Subset(Subset(complete, list(range(900, 100, -1))), [3, 0, 799])
    targets = tspipe.CachedTargets(part, digits)
    for i, index in enumerate((897, 900, 101)):
        np.testing.assert_array_equal(targets[i][2], digits.train.features[int(order[index])])


def test_an_image_folder_has_its_paths_as_keys(photos: Cache) -> None:
    folder = images(photos)
    folder.samples.reverse()
    targets = tspipe.CachedTargets(folder, photos)
    assert photos.train.keys[15] == b"b/07.png"
    np.testing.assert_array_equal(targets[0][2], photos.train.features[15])
    # What the transform made of the image is what the teacher saw.
    network = networks.build("lenet5", 2, (3, 16, 16))
    network.load_state_dict(weights.parse(photos.teacher_weights(), "w"))
    with torch.no_grad():
        torch.testing.assert_close(network.eval()(targets[0][0][None])[0], targets[0][3], rtol=1e-4, atol=1e-5)


def test_the_other_split_is_suggested_where_it_fits(digits: Cache, photos: Cache, tmp_path: Path) -> None:
    with pytest.raises(CacheMismatch, match=r'image 0 is a test image: give split="test"\.$'):
        tspipe.CachedTargets(images(photos, "test"), photos)
    pets = tmp_path / "pets.h5"
    write(pets, plan({"train": 2, "test": 1}))
    with pytest.raises(CacheMismatch, match=r"no train image 'te0'.* It is a test image: split=\"test\"$"):
        tspipe.CachedTargets([(0, 0)], pets, keys=["te0"])
    with pytest.raises(CacheMismatch, match=r'by\. For its test images: split="test"$'):
        tspipe.CachedTargets([(0, 0)] * len(digits.test), digits)


def test_the_test_split(photos: Cache) -> None:
    targets = tspipe.CachedTargets(images(photos, "test"), photos, "test")
    np.testing.assert_array_equal(targets[6][2], photos.test.features[6])


@pytest.mark.parametrize("method", ["fork", "spawn"])  # a forkserver's workers get the dataset as spawned ones do
def test_workers_of_every_kind(photos: Cache, method: str) -> None:
    targets = tspipe.CachedTargets(images(photos), photos)
    loader = DataLoader(targets, batch_size=6, num_workers=1 + (method == "fork"), multiprocessing_context=method)
    result = [torch.cat(parts) for parts in zip(*loader, strict=True)]
    assert result[0].shape == (16, 3, 16, 16)
    assert result[1].tolist() == photos.train.labels.tolist()
    np.testing.assert_array_equal(result[2], photos.train.features)
    np.testing.assert_array_equal(result[3], photos.train.logits)


def test_it_pickles_small(digits: Cache) -> None:
    dataset = plain(digits)
    targets = tspipe.CachedTargets(dataset, digits)
    assert len(pickle.dumps(targets)) - len(pickle.dumps(dataset)) < 1000
    again = pickle.loads(pickle.dumps(targets))
    np.testing.assert_array_equal(again[3][2], digits.train.features[3])


def test_a_cache_replaced_meanwhile_is_noticed(photos: Cache, digits: Cache, tmp_path: Path) -> None:
    path = tmp_path / "photos.h5"
    path.write_bytes(photos.path.read_bytes())
    data = pickle.dumps(tspipe.CachedTargets(images(photos), path))
    path.write_bytes(digits.path.read_bytes())
    with pytest.raises(CacheMismatch) as refused:
        pickle.loads(data)[0]
    assert str(refused.value) == f"{path} was replaced by another cache meanwhile. Start again."


def test_another_label_names_the_image(digits: Cache) -> None:
    dataset = plain(digits)
    dataset.tensors[1][12] = (dataset.tensors[1][12] + 1) % 10
    targets = tspipe.CachedTargets(dataset, digits)
    stored, local = int(digits.train.labels[12]), int(dataset.tensors[1][12])
    with pytest.raises(CacheMismatch) as refused:
        targets[12]
    assert str(refused.value) == (
        f"digits.h5: image 12 has label {local} in the dataset, {stored} in the cache (row 12). Give the dataset the "
        "cache was made from, or check_labels=False."
    )
    assert tspipe.CachedTargets(dataset, digits, check_labels=False)[12][1] == local


def test_what_does_not_fit_is_said_at_once(digits: Cache, photos: Cache) -> None:
    def printed(error: type[Exception], *arguments: object, **options: object) -> str:
        with pytest.raises(error) as refused:
            tspipe.CachedTargets(*arguments, **options)
        return str(refused.value)

    assert printed(CacheMismatch, Subset(plain(digits), [0]), photos) == (
        "photos.h5 has 16 train images, the dataset 1,000 and no keys to find them by. Give them: "
        "CachedTargets(…, keys=[…])"
    )
    assert printed(CacheMismatch, Shuffled([5]), photos) == (
        "photos.h5 has no train image '5', which the dataset has at index 0."
    )
    assert printed(DatasetError, plain(digits), digits, keys=["0"]) == "1 keys for 1,000 images."
    assert printed(DatasetError, plain(digits), digits, "val") == "There is no split 'val': give train or test."
    with pytest.raises(DatasetError) as refused:
        tspipe.CachedTargets([1] * 16, photos)[2]
    assert str(refused.value) == "dataset[2] is no (image, label)."


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (lambda keys: keys[:5], "5 keys for 16 images."),
        (lambda keys: [*keys, "a/more.png"], "17 keys for 16 images."),
        (lambda keys: iter(keys[:5]), "5 keys for 16 images."),
        (lambda keys: [None] * 16, "The key of image 0 is None. Give keys that are str, as in the cache."),
        (lambda keys: [*keys[:15], 7], "The key of image 15 is 7. Give keys that are str, as in the cache."),
        (lambda keys: 7, "The key of image 0 is 7. Give keys that are str, as in the cache."),
        (lambda keys: "a" * 16, "1 keys for 16 images."),
    ],
)
def test_keys_that_do_not_fit_the_dataset(photos: Cache, keys: Callable[[list[str]], object], message: str) -> None:
    stored = [key.decode() for key in photos.train.keys]
    for attribute in (False, True):
        folder, options = images(photos), {}
        if attribute:
            folder.keys = keys(stored)
        else:
            options = {"keys": keys(stored)}
        with pytest.raises(DatasetError) as refused:
            tspipe.CachedTargets(folder, photos, **options)
        assert str(refused.value) == message
    folder = images(photos)
    folder.keys = dict.fromkeys(np.array(stored)).keys()
    assert len(tspipe.CachedTargets(folder, photos)) == 16


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ([], "The dataset has no images."),
        ([0, 16], "A Subset has the index 16 of a dataset of 16 images."),
        ([-17], "A Subset has the index -17 of a dataset of 16 images."),
        ([0.5], "The indices of a Subset are not a list of integers."),
        ([[0, 1]], "The indices of a Subset are not a list of integers."),
    ],
)
def test_a_subset_that_does_not_fit_its_dataset(photos: Cache, indices: list[object], message: str) -> None:
    with pytest.raises(DatasetError) as refused:
        tspipe.CachedTargets(Subset(images(photos), indices), photos)
    assert str(refused.value) == message


def test_concatenated_datasets_are_matched_by_the_keys_of_their_parts(digits: Cache) -> None:
    order = np.random.default_rng(2).permutation(1000)
    parts = [Subset(Shuffled(order), list(range(600, 1000))), Subset(Shuffled(order), list(range(600)))]
    targets = tspipe.CachedTargets(ConcatDataset(parts), digits)
    for i, index in ((0, 600), (399, 999), (400, 0), (999, 599)):
        np.testing.assert_array_equal(targets[i][2], digits.train.features[int(order[index])])
    with pytest.raises(DatasetError) as refused:
        tspipe.CachedTargets(ConcatDataset([Shuffled(order[:500]), plain(digits)]), digits)
    assert str(refused.value) == "Some of the concatenated datasets have keys and some have not. Give all: keys=[…]"


@pytest.mark.parametrize("label", ["3", 0.0, np.float32(1), torch.tensor(1.0), (1, 0), torch.tensor([0.0, 1.0]), None])
def test_a_label_that_is_no_class_number(photos: Cache, label: object) -> None:
    dataset = [("image", label)] * 16
    with pytest.raises(DatasetError) as refused:
        tspipe.CachedTargets(dataset, photos)[3]
    assert str(refused.value) == (
        "The label of image 3 is no class number, so it cannot be compared with the cache's. Where that is meant: "
        "CachedTargets(…, check_labels=False)"
    )
    assert tspipe.CachedTargets(dataset, photos, check_labels=False)[3][1] is label


def test_a_dataset_without_a_length(photos: Cache) -> None:
    with pytest.raises(DatasetError) as refused:
        tspipe.CachedTargets(iter([]), photos)
    assert str(refused.value) == "CachedTargets takes a map-style dataset, one with a length and dataset[i]."


@pytest.fixture
def mixed(tmp_path: Path) -> Cache:
    """The cache of a folder with a photograph that EXIF rotates, and an image of 16 bits."""
    folder = tmp_path / "photos"
    config, draw, exif = small(folder), np.random.default_rng(1), Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(draw.integers(0, 256, (16, 16, 3), np.uint8)).save(folder / "train/a/rotated.jpg", exif=exif)
    Image.fromarray(draw.integers(0, 65536, (16, 16), np.uint16)).save(folder / "train/b/wide.png")
    return extract(config)


def teacher_error(cache: Cache, samples: tspipe.CachedTargets) -> float:
    """Return how far the cached logits are from those of the cache's teacher for the images of the dataset."""
    network = networks.build("lenet5", 2, (3, 16, 16)).eval()
    network.load_state_dict(weights.parse(cache.teacher_weights(), "w"))
    with torch.no_grad():
        return max(float((network(image[None])[0] - logits).abs().max()) for image, _, _, logits in samples)


def test_students_get_the_pixels_that_the_teacher_saw(mixed: Cache) -> None:
    transform, folder = Preprocess.from_dict(mixed.manifest["preprocess"]), mixed.path.with_suffix("") / "train"
    decoded = ImageFolder(str(folder), transform, loader=tspipe.load_image)
    assert teacher_error(mixed, tspipe.CachedTargets(decoded, mixed)) < 1e-4
    with pytest.raises(CacheMismatch) as refused:
        tspipe.CachedTargets(ImageFolder(str(folder), transform), mixed)
    assert str(refused.value) == (
        "photos.h5: image 17 has other pixels in the dataset than the teacher saw. If the file is the same, it is "
        "decoded differently: use ImageFolder(…, loader=tspipe.load_image)"
    )
    (folder / "b/wide.png").unlink()  # Preprocess can rotate what torchvision's loader did not
    assert teacher_error(mixed, tspipe.CachedTargets(ImageFolder(str(folder), transform), mixed)) < 1e-4
    with pytest.raises(CacheMismatch, match=r"^photos.h5: image 8 has other pixels"):
        tspipe.CachedTargets(ImageFolder(str(folder), ToTensor()), mixed)


class InMemory(TensorDataset):
    """A dataset that shows its images as torchvision's CIFAR and MNIST do."""

    def __init__(self, data: np.ndarray | torch.Tensor, labels: np.ndarray):
        super().__init__(torch.as_tensor(data), torch.from_numpy(labels))
        self.data = data


@pytest.mark.parametrize("planes_first", [False, True])
def test_the_pixels_of_a_dataset_in_memory_are_compared(digits: Cache, planes_first: bool) -> None:
    train = datasets.open_dataset("digits").train
    array = np.array(train.array)
    data = torch.from_numpy(array.transpose(0, 3, 1, 2)) if planes_first else array[..., 0]
    np.testing.assert_array_equal(
        tspipe.CachedTargets(InMemory(data, train.labels), digits)[3][2], digits.train.features[3]
    )
    other = InMemory(255 - data, train.labels)
    with pytest.raises(CacheMismatch, match=r"has other pixels in the dataset than .*check_pixels=False$"):
        tspipe.CachedTargets(other, digits)
    assert len(tspipe.CachedTargets(other, digits, check_pixels=False)) == 1000


def test_another_preprocessing_is_refused(photos: Cache) -> None:
    folder, other = images(photos), Preprocess((0.0,) * 3, (1.0,) * 3, resize=(8, 8))
    for transform in (other, Compose([other])):
        folder.transform = transform
        with pytest.raises(CacheMismatch, match=r"^photos.h5 was made with preprocess.mean = \[.*\], the dataset's "):
            tspipe.CachedTargets(folder, photos)
        assert len(tspipe.CachedTargets(folder, photos, check_pixels=False)) == 16


class Wrapper(Dataset):
    """A folder in another order, without keys; the images are Pillow's or arrays."""

    def __init__(self, folder: ImageFolder, order: Sequence[int], convert: Callable[[Image.Image], object]):
        self.folder, self.order, self.convert = folder, order, convert

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> tuple[object, int]:
        image, label = self.folder[self.order[index]]
        return self.convert(image), label


@pytest.mark.parametrize("convert", [lambda image: image, np.asarray, PILToTensor()])
def test_raw_images_of_a_dataset_without_keys_are_compared(
    photos: Cache, convert: Callable[[Image.Image], object]
) -> None:
    folder = ImageFolder(images(photos).root)
    assert len(tspipe.CachedTargets(Wrapper(folder, range(16), convert), photos)) == 16
    exchanged = Wrapper(folder, [1, 0, *range(2, 16)], convert)  # of one class
    with pytest.raises(CacheMismatch) as refused:
        tspipe.CachedTargets(exchanged, photos)
    assert str(refused.value) == (
        "photos.h5: image 0 of the dataset is not the unchanged one that the teacher saw. Check its order and its "
        "transforms, or use check_pixels=False where that is meant."
    )
    assert len(tspipe.CachedTargets(exchanged, photos, check_pixels=False)) == 16


def test_images_that_are_drawn_at_random_are_refused(photos: Cache) -> None:
    folder = ImageFolder(images(photos).root, Compose([RandomHorizontalFlip(), ToTensor()]))
    state = torch.get_rng_state()
    with pytest.raises(CacheMismatch) as refused:
        for _ in range(3):  # one in 2^16 passes a check
            tspipe.CachedTargets(folder, photos)
    assert str(refused.value).endswith(
        "differs each time it is loaded, and the teacher's targets belong to the unchanged image. Leave out random "
        "transforms, or use check_pixels=False where that is meant."
    )
    assert torch.get_rng_state().equal(state)
    folder.transform = RandomHorizontalFlip(1.0)
    with pytest.raises(CacheMismatch, match="is not the unchanged one that the teacher saw"):
        tspipe.CachedTargets(folder, photos)


def test_images_with_one_key_are_refused(photos: Cache) -> None:
    """Names without their folders: two images would get the targets of one."""
    folder = images(photos)
    names = [Path(path).name for path, _ in folder.samples]
    remedy = "which would get the targets of one. Use keys that occur once, such as paths below a common folder."
    with pytest.raises(CacheMismatch) as refused:
        tspipe.CachedTargets(folder, photos, keys=names)
    assert str(refused.value) == f"The dataset has 2 images with the key '00.png', {remedy}"
    again = images(photos)
    with pytest.raises(CacheMismatch) as refused:
        tspipe.CachedTargets(ConcatDataset([folder, again]), photos)
    assert str(refused.value) == f"The dataset has 2 images with the key 'a/00.png', {remedy}"
    for repeated, row in ((ConcatDataset([folder, folder]), 1), (Subset(folder, [3, 3, 4]), 3)):
        np.testing.assert_array_equal(tspipe.CachedTargets(repeated, photos)[1][2], photos.train.features[row])


def test_a_cache_with_one_key_twice_is_refused(photos: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(photos.train.keys), "load", lambda column: np.array([b"a"] * 16))
    with pytest.raises(CacheMismatch, match=r"^photos.h5 has 16 images with the key 'a', which would get"):
        tspipe.CachedTargets(images(photos), photos)


def test_keys_are_compared_in_one_unicode_form(photos: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache and a dataset made on different systems."""
    keys = [f"e\u0301{i}" for i in range(16)]
    monkeypatch.setattr(type(photos.train.keys), "load", lambda column: np.array([key.encode() for key in keys]))
    composed = [f"\u00e9{i}" for i in range(16)]
    assert len(tspipe.CachedTargets(images(photos), photos, keys=composed)) == 16


def test_a_split_made_by_stage_one_is_found_again_in_the_whole_folder(tmp_path: Path) -> None:
    small(tmp_path / "photos")
    shutil.rmtree(tmp_path / "photos" / "test")
    cache = extract(small(tmp_path / "photos", "split.fraction=0.25"))
    assert cache is not None and cache.manifest["dataset"]["split"] == {"fraction": 0.25, "seed": 0}
    folder, transform = str(tmp_path / "photos" / "train"), Preprocess.from_dict(cache.manifest["preprocess"])
    train, test = (tspipe.CachedTargets(ImageFolder(folder, transform), cache, split) for split in ("train", "test"))
    assert (len(train), len(test)) == (12, 4)
    for targets, rows in ((train, cache.train), (test, cache.test)):
        for i in range(len(targets)):
            _, label, features, _ = targets[i]
            assert label == rows.labels[i] and torch.equal(features, torch.from_numpy(rows.features[i]).float())
    with pytest.raises(CacheMismatch, match="has no test image 'a/"):
        tspipe.CachedTargets(Subset(train.dataset, range(3)), cache, "test")
    local = open_local(cache, f"folder:{tmp_path / 'photos'}", None, download=False, trust=False)
    assert local.test.keys == read_keys(cache.test)

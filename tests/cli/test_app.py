"""The commands, as typed: what they print, what they leave, and what bad input gets."""

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
import torch

from shared import TEACHER, make_folder
from tspipe.cache import Cache, open_cache
from tspipe.models import networks, weights

SET = [f"--set={setting}" for setting in TEACHER]


def test_the_three_stages(tspipe: Callable, tmp_path: Path) -> None:
    made = tspipe("teacher", "--dataset", "digits", "--epochs", 1, *SET)
    assert made.code == 0
    trained, metrics = made.out.splitlines()
    assert trained.endswith("The weights are in checkpoints/digits-lenet5.safetensors")
    assert metrics.endswith("checkpoints/digits-lenet5.metrics.csv (checkpoints/digits-lenet5.curves.png)")
    assert (tmp_path / "checkpoints/digits-lenet5.curves.png").stat().st_size > 1000
    again = tspipe("teacher", "--dataset", "digits", "--epochs", 1, *SET)
    assert (again.code, again.out) == (0, f"{trained}\n")
    other = tspipe("teacher", "--dataset", "digits", "--epochs", 1, *SET, "--set=teacher.epochs=2")
    assert other.code == 1
    assert other.error == (
        "checkpoints/digits-lenet5.safetensors holds weights of other settings. Replace them with --force, or choose "
        "--out."
    )

    made = tspipe("cache", "--dataset", "digits", "--teacher", "lenet5")
    assert made.code == 0
    assert made.out.startswith("Teacher lenet5 with the weights checkpoints/digits-lenet5.safetensors (SHA-256 ")
    assert made.out.endswith("Next: tspipe student --cache cache/digits-lenet5.h5\n")
    cache = open_cache("cache/digits-lenet5.h5")

    made = tspipe("student", "--cache", "cache/digits-lenet5.h5", "--epochs", 1, "--seeds", 1)
    assert made.code == 0
    (run,) = (tmp_path / "runs").iterdir()
    assert run.name.startswith("digits-lenet5-")
    assert (run / "curves.png").stat().st_size > 1000
    assert f"Run folder: runs/{run.name}" in made.out
    assert "The teacher's labels for random images: " in made.out
    assert all(len(line) <= 80 for line in made.out.splitlines())
    # The same command on a finished run prints its table again.
    again = tspipe("student", "--cache", cache.path, "--epochs", 1, "--seeds", 1)
    assert again == made._replace(err="")


def test_cache_trains_a_missing_teacher_first(tspipe: Callable) -> None:
    settings = [*SET, "--set=teacher.epochs=1"]
    made = tspipe("cache", "--train-teacher", "--dataset", "digits", "--teacher", "lenet5", *settings)
    assert made.out.splitlines()[0] == "There are no weights for lenet5 on digits yet, so the teacher is trained first."
    made = tspipe("cache", "--train-teacher", "--dataset", "digits", "--teacher", "lenet5", *settings)
    assert made.out.startswith("Teacher lenet5 with the weights checkpoints/digits-lenet5.safetensors")


def test_recorded_preprocess_overrides_the_recipe_but_not_set(tspipe: Callable) -> None:
    tspipe("teacher", "--dataset", "digits", "--epochs", 1, *SET, "--set=preprocess.mean=[0.25]")
    tspipe("cache", "--dataset", "digits", "--teacher", "lenet5", "--out", "a.h5")
    tspipe("cache", "--dataset", "digits", "--teacher", "lenet5", "--out", "b.h5", "--set=preprocess.mean=[0.75]")
    assert open_cache("a.h5").manifest["preprocess"]["mean"] == [0.25]
    assert open_cache("b.h5").manifest["preprocess"]["mean"] == [0.75]


def test_a_folder_of_images(tspipe: Callable, tmp_path: Path) -> None:
    """A published checkpoint, a folder of images, and students, by commands alone."""
    make_folder(tmp_path / "photos" / "shapes", train=20)
    torch.manual_seed(0)
    state = networks.build("lenet5", 2, (3, 16, 16)).state_dict()
    torch.save(
        {"state_dict": {key: value + 1 for key, value in state.items()}, "state_dict_ema": state}, "published.pth"
    )
    made = tspipe("cache", "--dataset", "folder:photos/shapes", "--teacher", "lenet5", "--weights", "published.pth")
    assert made.code == 0, made.err
    assert "the weights published.pth (state_dict_ema, not state_dict; SHA-256 " in made.out
    settings = ["--epochs", 1, "--set=batch_size=10", "--random-images", 3]
    made = tspipe("student", "--cache", "cache/shapes-lenet5.h5", "--data", "photos/shapes", *settings)
    assert made.code == 0, made.err
    lost = tspipe("student", "--cache", "cache/shapes-lenet5.h5", *settings, "--seeds", 2)
    assert lost.code == 1
    assert lost.error == (
        "There is no train split in data/shapes: looked for data/shapes/train. The layout is train/CLASS/IMAGE and "
        "test/CLASS/IMAGE. Name it with --data FOLDER."
    )


def test_fine_tuning_keeps_all_but_the_head(tspipe: Callable, tmp_path: Path) -> None:
    make_folder(tmp_path / "shapes")
    torch.manual_seed(0)
    start = networks.build("lenet5", 5, (3, 16, 16))
    weights.save(tmp_path / "start.safetensors", start, {})
    made = tspipe(
        "teacher", "--dataset", "folder:shapes", "--teacher", "lenet5", "--weights", "start.safetensors",
        "--epochs", 1, "--set=teacher.lr=1e-9", "--set=teacher.batch_size=8",
    )  # fmt: skip
    assert made.code == 0, made.err
    result = weights.read(tmp_path / "checkpoints/shapes-lenet5.safetensors").tensors
    assert result["classifier.4.weight"].shape == (2, 84)
    for name, value in start.state_dict().items():
        if not name.startswith("classifier.4"):
            torch.testing.assert_close(result[name], value, atol=1e-6, rtol=1e-6)


def test_weights_for_other_classes_are_refused(tspipe: Callable, tmp_path: Path) -> None:
    make_folder(tmp_path / "shapes")
    torch.manual_seed(0)
    weights.save(tmp_path / "w.safetensors", networks.build("lenet5", 2, (3, 16, 16)), {"classes": '["a", "c"]'})
    flags = ("cache", "--dataset", "folder:shapes", "--teacher", "lenet5", "--weights", "w.safetensors")
    refused = tspipe(*flags)
    assert refused.code == 1
    assert refused.error == (
        "w.safetensors was trained for other classes: class 1 is 'c' in place of 'b' of folder:shapes. Fine-tune it "
        "(tspipe teacher --dataset folder:shapes --weights w.safetensors), or use it as it is: --set "
        "teacher.any_classes=true"
    )
    made = tspipe(*flags, "--set=teacher.any_classes=true")
    assert made.code == 0, made.err
    assert "The teacher gives all 8 test images the same class" in made.err


def test_info(tspipe: Callable, digits: Cache) -> None:
    shown = tspipe("info", digits.path)
    lines = [line.rstrip() for line in shown.out.splitlines()]
    correct = digits.manifest["teacher"]["correct"]
    assert lines == [
        "file        digits.h5, 661.8 KiB",
        f"id          {digits.id[:12]}",
        "dataset     digits, 10 classes: 0, 1, 2, 3, 4, …",
        "images      1,000 train, 797 test",
        "licence     CC BY 4.0",
        "preprocess  resize 16×16 (bilinear), mean [0.305], std [0.376]",
        f"teacher     lenet5, weights {digits.manifest['teacher']['weights_sha256'][:12]} (in the file)",
        f"accuracy    {correct['train'] / 10:.2f} % train, {correct['test'] / 7.97:.2f} % test",
        "features    84 × float16, logits 10 × float32",
        "computed    cpu, float32, batches of 64",
    ]


@pytest.mark.parametrize("what", ["datasets", "networks", "losses", "recipes"])
def test_list(tspipe: Callable, what: str) -> None:
    shown = tspipe("list", what)
    assert shown.code == 0
    assert shown.out.splitlines() == sorted(shown.out.splitlines())
    assert {"datasets": "cub200", "networks": "timm:NAME", "losses": "ts", "recipes": "cifar10"}[what] in shown.out


def test_a_recipe_is_shown_with_values_and_defaults(tspipe: Callable) -> None:
    command = "recipe", "cifar10,strong", "--set", "teacher.lr=0.2"
    shown = tspipe(*command)
    assert all(len(line) <= 80 for line in shown.out.splitlines())
    assert "\n\nteacher.epochs = 200\n    " in shown.out
    assert "\nteacher.lr = 0.2  (default 0.1)\n    The initial learning rate.\n" in shown.out
    rows = {setting["setting"]: setting for setting in json.loads(tspipe(*command, "--json").out)}
    assert all(name in shown.out for name in rows)
    assert rows["optimizer"] | {"meaning": ""} == {
        "setting": "optimizer",
        "value": "sgd",
        "default": "adam",
        "values": "adam or adamw or sgd",
        "meaning": "",
    }
    values = {name: row["value"] for name, row in rows.items()}
    assert (values["teacher.lr"], values["students.alexnet.lr"], values["preprocess.crop"]) == (0.2, 0.01, None)
    assert "students.alexnet.momentum" not in values


def test_set_help_needs_no_other_flag(tspipe: Callable) -> None:
    for command in ("teacher", "cache", "student", "bench", "verify", "reproduce"):
        shown = tspipe(command, "--set", "help")
        assert (shown.code, shown.err) == (0, "")
        assert shown.out.startswith("tspipe recipe NAME shows every setting")


def test_a_reader_of_the_output_may_stop(tspipe: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    def print_into_closed_pipe() -> list[str]:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    for stream in ("stdout", "stderr"):  # which typer replaces
        monkeypatch.setattr(sys, stream, getattr(sys, stream))
    monkeypatch.setattr("tspipe.recipes.load.names", print_into_closed_pipe)
    result = tspipe("list", "recipes")
    assert (result.code, result.err) == (1, "")


@pytest.mark.parametrize("command", [[], ["teacher"], ["cache"], ["student"], ["info"], ["list"], ["recipe"]])
def test_help_fits_eighty_columns(tspipe: Callable, command: list[str]) -> None:
    shown = tspipe(*command, "--help")
    assert shown.code == 0
    assert all(len(line) <= 80 for line in shown.out.splitlines())


ERRORS = [
    (
        ["student", "--cache", "nope.h5"],
        "There is no file nope.h5. Make the cache first: tspipe cache --dataset NAME",
    ),
    (["info", "."], ".: it is not a regular file, so not a tspipe cache."),
    (
        ["cache", "--dataset", "digit"],
        "Unknown dataset 'digit'. There are: digits, cifar10, cifar100, cub200, fashion_mnist, folder.",
    ),
    (
        ["cache", "--dataset", "digits"],
        "There are no weights for resnet20 on digits: checkpoints/digits-resnet20.safetensors does not exist. Give a "
        "file (--weights FILE) or train the teacher: tspipe teacher --dataset digits",
    ),
    (
        ["teacher", "--dataset", "digits", "--teacher", "resnet21"],
        "Unknown network 'resnet21'. There are: resnet32, resnet20, resnet18, alexnet, lenet5, lenet5_wide, "
        "mobilenet_v2, ntsnet, resnet110, resnet44, resnet50, resnet56.",
    ),
    (
        ["teacher", "--dataset", "digits", "--set", "epoch=3"],
        "The recipe digits has no field 'epoch'. Did you mean 'epochs'?",
    ),
    (["teacher", "--dataset", "./mine.py", "--recipe", "digits"], "There is no file mine.py."),
    (
        ["teacher", "--dataset", "./mine.py"],
        "There is no recipe for mine. Name one with --recipe: best, cifar10, cifar100, cub200, digits, "
        "fashion_mnist, folder, strong, table1, table2_cifar10, table2_cifar100, table3, or a TOML file.",
    ),
]


@pytest.mark.parametrize(
    ("arguments", "expected"), ERRORS, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_bad_input_is_one_sentence_and_exit_code_1(tspipe: Callable, arguments: list[str], expected: str) -> None:
    result = tspipe(*arguments)
    assert result.code == 1
    assert result.error == expected
    assert result.out == ""
    assert "Traceback" not in result.err


def test_usage_is_exit_code_2(tspipe: Callable) -> None:
    assert tspipe("student").code == 2
    assert tspipe("list", "colours").code == 2


def test_a_checkpoint_that_does_not_fit_is_identified(tspipe: Callable, tmp_path: Path) -> None:
    torch.save(networks.build("resnet32", 10, (1, 16, 16)).state_dict(), "w.pt")
    result = tspipe("cache", "--dataset", "digits", "--weights", "w.pt")
    assert result.code == 1
    assert result.error.startswith("w.pt does not fit resnet20: 72 keys not in the network ")
    assert result.error.endswith("It seems to be resnet32 with 10 classes: use --teacher resnet32")


def test_debug_shows_the_traceback(tspipe: Callable) -> None:
    from tspipe.errors import NotACache

    with pytest.raises(NotACache):
        tspipe("--debug", "info", "nope.h5")


def test_text_of_a_foreign_file_is_escaped(tspipe: Callable, tmp_path: Path) -> None:
    name = "\x1b[31mred\x07.h5"
    (tmp_path / name).write_bytes(b"")
    result = tspipe("info", name)
    assert "\x1b[31m" not in result.err.replace("\x1b[31m╭", "")
    assert "\\x1b[31mred\\x07.h5" in result.error


MINE = """
import numpy as np
from tspipe.data.datasets import from_array

def load(root, split):
    draw = np.random.default_rng(["train", "test"].index(split))
    return from_array(draw.integers(0, 256, (40, 16, 16, 1), dtype=np.uint8), draw.integers(0, 2, 40), ["a", "b"])
"""


def test_plugins_for_dataset_teacher_and_student(tspipe: Callable, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "net.py").write_text(
        "from torch import nn\n"
        "def build(num_classes, input_shape, hidden=5):\n"
        "    c, h, w = input_shape\n"
        "    layers = nn.Flatten(), nn.Linear(c * h * w, hidden), nn.ReLU(), nn.Linear(hidden, num_classes)\n"
        "    return nn.Sequential(*layers)\n"
    )
    settings = ["--recipe", "digits", "--set=teacher.epochs=1", "--set=teacher.options.hidden=7"]
    network = ["--teacher", "./net.py"]
    made = tspipe("cache", "--train-teacher", "--dataset", "./mine.py", *network, *settings)
    assert made.code == 0, made.err
    manifest = open_cache("cache/mine-net.h5").manifest
    assert manifest["teacher"]["network"] == "net"
    assert made.out.endswith(
        "Next: tspipe student --cache cache/mine-net.h5 --recipe digits --set dataset=./mine.py --teacher ./net.py\n"
    )
    assert manifest["teacher"]["options"] == {"hidden": 7, "input_shape": [1, 16, 16]}
    student = ["student", "--cache", "cache/mine-net.h5", "--epochs", 1, "--seeds", 1, "--set=batch_size=20"]
    refused = tspipe(*student)
    assert refused.code == 1
    assert refused.error == (
        "cache/mine-net.h5 is of the dataset 'mine', which is not one of tspipe's. Name its file and a recipe: "
        "--set dataset=./mine.py --recipe NAME"
    )
    student += ["--recipe", "digits", "--set=dataset=./mine.py"]
    # The file names a network; only the user can say that it is this file of code.
    refused = tspipe(*student, "--random-images", 3)
    assert refused.code == 1
    assert refused.error == (
        "The teacher of mine-net.h5 is 'net', which is not one of tspipe's networks. Name its file: "
        "--teacher ./net.py (of tspipe verify: --set teacher.network=./net.py)"
    )
    made = tspipe(*student)
    assert made.code == 0, made.err
    assert (
        "The teacher of mine-net.h5 needs the file of its network (--teacher ./net.py), so students train without "
        "random images.\n"
    ) in made.err
    refused = tspipe(*student, "--teacher", "resnet20")
    assert refused.error == (
        "The teacher of cache/mine-net.h5 is 'net', not 'resnet20'. Leave out --teacher, or give the file of this "
        "network: --teacher ./net.py"
    )
    made = tspipe(*student, "--teacher", "./net.py", "--student", "./net.py")
    assert made.code == 0, made.err


def test_weights_of_another_network_are_refused(tspipe: Callable, tmp_path: Path) -> None:
    tspipe("teacher", "--dataset", "digits", *SET, "--set=teacher.epochs=1")
    result = tspipe("cache", "--dataset", "digits", "--weights", "checkpoints/digits-lenet5.safetensors")
    assert result.code == 1
    assert result.error == (
        "checkpoints/digits-lenet5.safetensors holds the weights of lenet5, not of resnet20: use --teacher lenet5"
    )


def test_a_plugin_named_like_a_built_in_is_refused(tspipe: Callable, tmp_path: Path) -> None:
    (tmp_path / "lenet5.py").write_text("def build(num_classes): ...")
    result = tspipe("teacher", "--dataset", "digits", "--teacher", "./lenet5.py")
    assert result.code == 1
    assert result.error == "./lenet5.py has the name of a network of tspipe's. Give the file another name."


def test_ctrl_c_says_how_to_resume(tspipe: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tspipe.training.train_teacher.train_teacher", interrupted)
    result = tspipe("teacher", "--dataset", "digits")
    assert result.code == 130
    assert result.err == "Interrupted. Run the same command again to resume from the last checkpoint.\n"


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes")]
)
def test_out_of_memory_is_a_sentence(tspipe: Callable, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def hungry(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("tspipe.training.train_teacher.train_teacher", hungry)
    result = tspipe("teacher", "--dataset", "digits")
    assert result.code == 1
    assert result.error.startswith("Out of memory. Use smaller batches in stage one (--set compute.batch_size=N) ")


def test_the_version(tspipe: Callable) -> None:
    assert tspipe("--version").out == f"tspipe {metadata.version('tspipe')}\n"


@pytest.mark.parametrize(
    ("words", "completion"),
    [
        ("teacher --dataset cifar", "cifar10"),
        ("student --student lenet5_", "lenet5_wide"),
        ("cache --recipe st", "strong"),
    ],
)
def test_shell_completion(words: str, completion: str) -> None:
    environment = {**os.environ, "_TSPIPE_COMPLETE": "complete_bash", "COMP_WORDS": f"tspipe {words}"}
    environment["COMP_CWORD"] = str(len(words.split()))
    program = "import sys; sys.argv[0] = 'tspipe'; from tspipe.cli.app import main; main()"
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False
    )
    assert completion in result.stdout.split()


def test_a_plug_in_that_ends_the_command_is_an_error(
    tspipe: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network, whose code runs in many places. A variable of another program does not hide it."""
    monkeypatch.setenv("SETUP_COMPLETE", "1")
    (tmp_path / "mine.py").write_text("def build(*arguments):\n    raise SystemExit(0)\n")
    result = tspipe("teacher", "--dataset", "digits", "--teacher", "./mine.py", "--set=teacher.pretrained=false")
    assert result.code == 1
    assert result.error == "A plug-in ended the command with exit(0). Raise an error in its place."

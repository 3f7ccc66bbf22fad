"""Students and exports that are pushed: what travels, what the receiver is told, and the model card."""

import hashlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image

import tspipe as library
from shared import error_message
from tspipe.deploy import executorch, exported, model_card, publish
from tspipe.deploy.export import ExportConfig, export
from tspipe.deploy.facts import ExportFacts
from tspipe.deploy.student import find_students

NAME = "student-lenet5-taught-seed0.safetensors"


class Hub(MemoryFileSystem):
    """The Hugging Face hub, in memory."""

    protocol = "hf"
    store: ClassVar[dict] = {}
    pseudo_dirs: ClassVar[list] = [""]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict]:
    """Yield the contents of an empty hub by path."""
    find = fsspec.get_filesystem_class
    monkeypatch.setattr(fsspec, "get_filesystem_class", lambda name: Hub if name == "hf" else find(name))
    Hub.store.clear()
    yield Hub.store
    Hub.store.clear()


def test_a_student_on_the_hub_has_a_card_that_is_kept_once_edited(tspipe: Callable, run: Path, hub: dict) -> None:
    command = ["push", run, "hf://me/digits", "--student", "*-taught-*"]
    pushed = tspipe(*command)
    assert (pushed.code, pushed.err) == (0, "")
    name = find_students(run, "*-taught-*")[0].name  # of the best epoch
    sha256 = hashlib.sha256((run / name).read_bytes()).hexdigest()
    assert pushed.out == (
        f"Pushed to hf://me/digits/{name}: SHA-256 {sha256[:12]}\n  The receiver needs tspipe.\n"
        "  Its model card is hf://me/digits/README.md.\n"
        f"Its SHA-256 is in a file beside it. Next: tspipe predict hf://me/digits/{name} IMAGE\n"
    )
    assert {path.rpartition("/")[2] for path in hub} == {name, f"{name}.sha256", "README.md"}
    (path,) = (path for path in hub if path.endswith("README.md"))
    card = hub[path].getvalue().decode()
    assert card.startswith("---\npipeline_tag: image-classification\n")
    assert "| Data | `digits`; its licence: `CC BY 4.0` |\n| Teacher | `lenet5` |" in card
    assert f"| SHA-256 | `{sha256}` |" in card
    assert f"| Cache | tspipe cache `{library.load_student(run / name).facts.cache[:12]}` |" in card

    assert "Its model card is" in tspipe(*command).out  # not edited, so written again
    Hub().pipe(path, card.replace("`digits`", "handwritten digits").encode())
    again = tspipe(*command).out
    assert "hf://me/digits/README.md is not a card of tspipe's, or was edited, and is kept. Replace it: --fo" in again
    assert "handwritten" in hub[path].getvalue().decode()
    assert "Its model card is" in tspipe(*command, "--force").out
    assert hub[path].getvalue().decode() == card


def test_the_card_of_a_student_alone_names_no_teacher_and_that_of_a_users_network_its_file(run: Path) -> None:
    facts = library.load_student(run, student="*-alone-*").facts
    card = model_card.model_card(facts, "hf://me/digits/x.safetensors", "0" * 64)
    assert "An image classifier, trained without a teacher, with tspipe." in card
    assert "| Teacher | none |" in card
    card = model_card.model_card(facts.model_copy(update={"labels": "teacher"}), "hf://me/digits/x.pt", "0" * 64)
    assert "An image classifier, trained on a teacher's labels, with tspipe." in card
    assert "| Teacher | `lenet5` |" in card
    card = model_card.model_card(facts.model_copy(update={"network": "mine"}), "hf://me/digits/x.safetensors", "0" * 64)
    assert "    tspipe predict hf://me/digits/x.safetensors IMAGE --network ./mine.py\n" in card
    assert "load_student(\"x.safetensors\", network='./mine.py')" in card


@pytest.mark.parametrize(("suffix", "count"), [(".onnx", 1), (".pt2", 2), (".safetensors", 2)])
def test_an_export_of_ones_own_network_that_tspipe_rebuilds_needs_its_file(suffix: str, count: int) -> None:
    facts = ExportFacts.model_construct(network="mine")
    needed = publish.needs(Path(f"x{suffix}"), facts)
    assert len(needed) == count
    assert count == 1 or needed[1] == "for tspipe's commands also the network's file (--network ./mine.py)"


def test_the_code_of_a_network_of_torch_hub_needs_trust(run: Path) -> None:
    network = f"hub:a/b@{'0' * 40}:c"
    facts = library.load_student(run).facts.model_copy(update={"network": network})
    card = model_card.model_card(facts, "hf://me/digits/x.safetensors", "0" * 64)
    assert "    tspipe predict hf://me/digits/x.safetensors IMAGE --trust-remote-code\n" in card
    assert f"\nnetworks.trust_remote_code()  # of {network}\n" in card
    assert publish.needs(Path("x.safetensors"), facts)[1:] == [
        f"the code of {network}, which runs only with --trust-remote-code (an export needs none)"
    ]


def test_a_standalone_export_travels_with_its_python_file(tspipe: Callable, run: Path, tmp_path: Path) -> None:
    student = library.load_student(run / NAME)
    export(student, ExportConfig("safetensors", tmp_path / "out" / "net.safetensors"), None)
    assert tspipe("push", "out/net.safetensors", "team/best.safetensors").code == 0
    pulled = tspipe("pull", "team/best.safetensors")
    assert pulled.out == (
        "Pulled best.safetensors: its SHA-256 matches\nPulled best.py, which is code: read it before you run it\n"
        "  You need PyTorch and the Python file beside it.\nNext: tspipe predict best.safetensors IMAGE\n"
    )
    for suffix in (".py", ".safetensors"):
        expected = Path("out/net").with_suffix(suffix).read_bytes()
        assert Path("best").with_suffix(suffix).read_bytes() == expected
    Path("out/net.py").unlink()
    assert tspipe("push", "out/net.safetensors", "team").says("out/net.py, which runs out/net.safetensors, is not …")


def test_a_student_at_a_url_classifies(
    tspipe: Callable, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    Image.new("L", (16, 16)).save(tmp_path / "black.png")
    shutil.copy(run / NAME, tmp_path / NAME)
    result = tspipe("predict", f"file://{tmp_path}/{NAME}", "black.png")
    assert (result.code, result.error) == (0, "")
    assert result.out.splitlines()[-1].startswith("black.png: ")
    data = bytearray((tmp_path / NAME).read_bytes())
    data[-1] ^= 1
    (tmp_path / NAME).write_bytes(data)
    assert "its weights have changed since tspipe wrote them" in tspipe("push", NAME, "team").error
    assert not (tmp_path / "team").exists()


@pytest.mark.parametrize(("suffix", "needed"), [(".onnx", False), (".pte", False), (".pt2", True)])
def test_exports_that_have_a_runtime_need_no_network_file(suffix: str, needed: bool) -> None:
    facts: Any = SimpleNamespace(network="mine")
    command = model_card.command(f"s3://team/x{suffix}", Path(f"x{suffix}"), facts)
    assert ("--network ./mine.py" in command) is needed


def test_a_program_for_phones_that_is_damaged_is_not_pushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(data: bytes) -> None:
        raise RuntimeError("Failed to load program, error: 0x23")

    monkeypatch.setattr(exported, "check_installed", lambda name: None)
    monkeypatch.setattr(executorch, "load", load)
    (tmp_path / "x.pte").write_bytes(b"damaged")
    expected = f"{tmp_path}/x.pte is damaged, or not an export of tspipe's to ExecuTorch."
    assert error_message(publish.read_facts, tmp_path / "x.pte") == expected

"""Networks of torch.hub: their code runs only if the user trusts it, whatever a file says. No test uses the network."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from shared import make_folder
from tspipe.cache import open_cache
from tspipe.errors import NetworkError
from tspipe.models import networks, weights
from tspipe.models.networks import _hub

COMMIT = "0123456789abcdef" * 2 + "01234567"
NAME = f"hub:someone/nets@{COMMIT}:tiny"
HUBCONF = """
from pathlib import Path
from torch import nn
Path(__file__).with_name("has_run").touch()
def tiny(num_classes=1000, width=4):
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes))
"""


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder with the repository's code, as torch.hub has fetched it."""
    monkeypatch.setattr(_hub, "_trusted", False)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    folder = tmp_path / f"hub/someone_nets_{COMMIT}"
    folder.mkdir(parents=True)
    (folder / "hubconf.py").write_text(HUBCONF)
    return folder


def test_code_runs_only_if_it_is_trusted(code: Path) -> None:
    with pytest.raises(NetworkError) as error:
        networks.build(NAME, 2, (3, 8, 8))
    assert str(error.value) == (
        f"{NAME} runs the code of https://github.com/someone/nets/tree/{COMMIT} on this machine. If you trust it: "
        "--trust-remote-code"
    )
    assert not (code / "has_run").exists()
    networks.trust_remote_code()
    assert networks.build(NAME, 2, (3, 8, 8), {"width": 8})(torch.zeros(1, 3, 8, 8)).shape == (1, 2)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        (
            "hub:someone/nets:tiny",
            "names no commit, so its code may change. Write hub:someone/nets@COMMIT:tiny with the 40 digits that this "
            "command prints: git ls-remote https://github.com/someone/nets HEAD",
        ),
        ("hub:../nets:tiny", "is not a network of torch.hub. Write it as hub:OWNER/REPO@COMMIT:NAME"),
        (NAME.replace("tiny", "none"), "cannot be built: Cannot find callable none in hubconf. Its entry point must"),
        (NAME.replace("nets", "absent"), "cannot be built: no connection. Put its code there: git clone https://git"),
    ],
)
def test_refusals(code: Path, monkeypatch: pytest.MonkeyPatch, name: str, problem: str) -> None:
    def fetch(*_: object) -> None:
        raise OSError("no connection")

    monkeypatch.setattr(torch.hub, "_validate_not_a_forked_repo", fetch)
    networks.trust_remote_code()
    with pytest.raises(NetworkError, match=f"^{re.escape(f'{name} {problem}')}"):
        networks.build(name, 2, (3, 8, 8))


@pytest.mark.parametrize("option", [{"skip_validation": True}, {"source": "local"}, {"model": "x"}, {"depth": 1}])
def test_options_are_those_of_the_entry_point(code: Path, option: dict) -> None:
    networks.trust_remote_code()
    with pytest.raises(NetworkError, match="cannot be built: "):
        networks.build(NAME, 2, (3, 8, 8), option)


def test_a_cache_and_a_student_never_run_it_on_their_own(
    code: Path, tspipe: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_folder(tmp_path / "photos")
    networks.trust_remote_code()
    weights.save(tmp_path / "w.safetensors", networks.build(NAME, 2, (3, 16, 16)), {})
    trust, size = "--trust-remote-code", "--set=preprocess.resize=[16,16]"
    made = tspipe("cache", "--dataset", "folder:photos", "--teacher", NAME, "--weights", "w.safetensors", size, trust)
    assert made.code == 0, made.err
    (path,) = (tmp_path / "cache").glob("*.h5")
    assert path.name == f"photos-hub-someone_nets_{COMMIT}-tiny.h5"
    assert open_cache(path).manifest["teacher"]["network"] == NAME
    train = ["student", "--cache", path, "--data", "photos", "--epochs", 1, "--student", NAME, "--out", "run"]
    train += ["--random-images", 4, "--set=batch_size=8"]

    def forget() -> None:
        monkeypatch.setattr(_hub, "_trusted", False)
        (code / "has_run").unlink(missing_ok=True)

    forget()
    refused = tspipe(*train)
    assert (refused.code, "If you trust it: --trust-remote-code" in refused.error) == (1, True)
    assert not (code / "has_run").exists()
    trained = tspipe(*train, trust)
    assert trained.code == 0, trained.err
    forget()
    predict = "predict", "run", "photos/test/a/00.png", "--json"
    assert "--trust-remote-code" in tspipe(*predict).error
    assert not (code / "has_run").exists()
    assert len(json.loads(tspipe(*predict, trust).out)) == 1

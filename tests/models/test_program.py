"""A teacher's program runs without its Python, and a hostile one does nothing else."""

import json
from typing import Any

import pytest
import torch
from safetensors.torch import save
from torch import nn

from tspipe.errors import NetworkError
from tspipe.models import feature_net, program
from tspipe.models.inference import freeze
from tspipe.models.probe import probe_images

SHAPE = (3, 16, 16)


class Net(nn.Module):
    """Convolution, batch norm, a residual, attention, a constant that is no weight, and a mask with −∞."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.relu = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True)
        self.attention = nn.Linear(8, 24)
        self.register_buffer("scale", torch.tensor([2.0]), persistent=False)
        self.fc = nn.Linear(8, 5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.relu(self.norm(self.conv(images)))
        x = x + self.scale * torch.tensor([0.5])
        tokens = nn.functional.adaptive_avg_pool2d(x, 4).flatten(2).transpose(1, 2)
        q, k, v = self.attention(tokens).chunk(3, dim=2)
        weights = (q @ k.transpose(1, 2)).masked_fill(torch.eye(16, dtype=torch.bool), float("-inf")).softmax(2)
        return self.fc((weights @ v).mean(1))


@pytest.fixture(scope="module")
def net() -> Net:
    torch.manual_seed(0)
    net = Net().eval().requires_grad_(False)
    net.norm.running_mean.uniform_()  # type: ignore[union-attr]
    return net


@pytest.fixture(scope="module")
def stored(net: Net) -> tuple[bytes, dict[str, torch.Tensor]]:
    tensors = dict(net.state_dict())
    return program.export(_copy(tensors), "net", SHAPE), tensors


def test_it_computes_what_the_network_does_for_any_number_of_images(net: Net, stored: Any) -> None:
    loaded = program.load(*stored, SHAPE, "x")
    for count in (1, 2, 7):
        images = torch.rand(count, *SHAPE).contiguous(memory_format=torch.channels_last)
        assert torch.allclose(loaded(images), net(images), rtol=1e-5, atol=1e-6)
    frozen = freeze(loaded, "x", SHAPE, torch.device("cpu"))
    reference = feature_net.split(Net().eval(), "net", probe_images(SHAPE))
    assert frozen.width == reference.width == 8
    assert [sum(p.numel() for p in one.parameters()) for one in (frozen, net)] == [501, 501]
    assert stored[0] == program.export(_copy(stored[1]), "net", SHAPE)


def _copy(tensors: dict[str, torch.Tensor]) -> Net:
    net = Net().eval().requires_grad_(False)
    net.load_state_dict(tensors)
    return net


def forged(*nodes: Any, head: str = "fc") -> bytes:
    text = json.dumps({"head": head, "nodes": [["input"], *nodes]})
    return save({}, {"program": text})


IMAGES = {"node": 0}


@pytest.mark.parametrize(
    ("nodes", "reason"),
    [
        ([["from_file.default", ["/etc/passwd"], {}]], "has the operation 'from_file.default'"),
        ([["relu_.default", [IMAGES], {}]], "has the operation 'relu_.default'"),
        ([["__class__.default", [IMAGES], {}]], "has the operation '__class__.default'"),
        ([["getitem", [IMAGES, "__class__"], {}]], "has the operation 'getitem'"),
        ([["mul", [[1], 10**12], {}]], "has the operation 'mul'"),
        ([["mul", [2**62, 2**62], {}]], "has the operation 'mul'"),
        ([["repeat.default", [IMAGES, [1, 1, 2**14, 2**14]], {}]], "needs 1,649,267,441,664 bytes for 2 images"),
        ([["full.default", [[2**40], 1.0], {}]], "needs 4,398,046,511,104 bytes"),
        ([["relu.default", [IMAGES], {}], ["output", 1]], "does not return the features"),
        ([["relu.default", [IMAGES], {}]], "has no output"),
        ([["relu.default", [IMAGES], {}]] * 30_000, "at most 20,000"),
        ([["relu.default", [{"node": 9}], {}]], "is damaged"),
        ([["parameter", "nowhere"]], "is damaged"),
        ([["relu.default", [IMAGES, 1, 2], {}]], "is damaged"),
        ([[]], "is damaged"),
        ([["output", -1]], "is damaged"),
    ],
)
def test_a_hostile_program_is_refused(stored: Any, nodes: list[Any], reason: str) -> None:
    with pytest.raises(NetworkError, match=reason):
        program.load(forged(*nodes), stored[1], SHAPE, "x")


def test_memory_is_bounded_for_any_number_of_images(stored: Any) -> None:
    squares = [["mul", [{"node": node}, {"node": node}], {}] for node in (1, 2, 3)]
    nodes = [["sym_size.int", [{"node": 0}, 0], {}], *squares, ["zeros.default", [[{"node": 4}]], {}]]
    nodes += [["new_zeros.default", [{"node": 0}, [{"node": 1}, 8]], {}], ["output", 6]]
    network = program.load(forged(*nodes), stored[1], SHAPE, "x")
    assert network(torch.zeros(2, *SHAPE)).shape == (2, 5)
    with pytest.raises(NetworkError, match=r"an operation needs 1,125,899,906,842,624 bytes for 64 images\."):
        network(torch.zeros(64, *SHAPE))


@pytest.mark.parametrize("data", [b"", b"\x80\x04pickle", b"\xff" * 100, save({}), save({}, {"program": "[" * 9999})])
def test_bytes_that_are_no_program(stored: Any, data: bytes) -> None:
    with pytest.raises(NetworkError, match="x is damaged, or needs a newer tspipe"):
        program.load(data, stored[1], SHAPE, "x")


def test_what_cannot_be_stored_is_named() -> None:
    class Sorting(Net):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.fc(self.conv(images).mean((2, 3)).sort(1).values)

    class Branching(Net):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.fc(self.conv(images).mean((2, 3)) * (2 if images.sum() > 0 else 1))

    with pytest.raises(NetworkError, match=r"net uses the operation aten\.sort\.default, which programs do not have"):
        program.export(Sorting().eval(), "net", SHAPE)
    with pytest.raises(NetworkError, match=r"^net cannot be stored as a program: .*Leave out --portable-teacher\.$"):
        program.export(Branching().eval(), "net", SHAPE)

"""Each loss against its paper's formula, computed a second time in NumPy, float64; its gradient against differences."""

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tspipe import losses
from tspipe.losses import NO_LABEL, Sizes, Target
from tspipe.losses._statistics import TeacherStatistics
from tspipe.models.output import Output

N, D, C = 7, 5, 4
Array = NDArray[Any]
STATISTICS = TeacherStatistics.placeholder(D, C)


def softmax(z: Array) -> Array:
    powers = np.exp(z - z.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def kl(p: Array, q: Array) -> float:
    return sum(a * np.log(a / b) for a, b in zip(p, q, strict=True))


def xent(z: Array, labels: Array) -> float:
    return float(np.mean([-np.log(softmax(row)[y]) for row, y in zip(z, labels, strict=True) if y >= 0]))


def standard(z: Array) -> Array:
    return (z - z.mean(axis=1, keepdims=True)) / z.std(axis=1, ddof=1, keepdims=True)


class Batch:
    """A batch of random outputs, of which the last image has no label."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)

        def draw(width: int) -> torch.Tensor:
            return torch.randn(N, width, generator=generator, dtype=torch.float64)

        self.output = Output(draw(D).requires_grad_(), draw(C).requires_grad_())
        self.target = Target(draw(D), draw(C), torch.tensor([0, 1, 2, 3, 0, 1, NO_LABEL]))
        self.s, self.z = (part.detach().numpy() for part in self.output)
        self.f, self.t, self.y = (part.numpy() for part in self.target)
        self.xent = xent(self.z, self.y)


Terms = dict[str, float]


def dkd(batch: Batch, loss: Any, z: Array | None = None, t: Array | None = None) -> Terms:
    z, t = batch.z if z is None else z, batch.t if t is None else t
    tckd, nckd = [], []
    for student, teacher, y in zip(z / loss.temperature, t / loss.temperature, batch.y, strict=True):
        if y < 0:
            continue
        p, q = softmax(teacher), softmax(student)
        tckd.append(kl(np.array([p[y], 1 - p[y]]), np.array([q[y], 1 - q[y]])))
        nckd.append(kl(np.delete(p, y) / (1 - p[y]), np.delete(q, y) / (1 - q[y])))
    scale = loss.temperature**2
    return {
        "tckd": loss.alpha * scale * np.mean(tckd),
        "nckd": loss.beta * scale * np.mean(nckd),
        "xent": batch.xent,
    }


def dkd_lskd(batch: Batch, loss: Any) -> Terms:
    return dkd(batch, loss, standard(batch.z), standard(batch.t))


def kd(temperature: float, z: Array, t: Array) -> float:
    pairs = zip(softmax(t / temperature), softmax(z / temperature), strict=True)
    return float(temperature**2 * np.mean([kl(p, q) for p, q in pairs]))


def lskd(batch: Batch, loss: Any) -> Terms:
    return {"kl": 9 * kd(2, standard(batch.z), standard(batch.t)), "xent": 0.1 * batch.xent}


def dist(batch: Batch, loss: Any) -> Terms:
    q, p = softmax(batch.z), softmax(batch.t)
    inter = np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(q, p, strict=True)])
    intra = np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(q.T, p.T, strict=True)])
    return {"inter": 1 - inter, "intra": 1 - intra, "xent": batch.xent}


def pkt(batch: Batch, loss: Any) -> Terms:
    def probabilities(features: Array) -> Array:
        unit = [row / np.sqrt(row @ row) for row in features]
        similarity = np.array([[(a @ b + 1) / 2 for b in unit] for a in unit])
        return similarity / similarity.sum(axis=1)[:, None]

    p, q = probabilities(batch.f), probabilities(batch.s)
    return {"pkt": 30_000 * (p * np.log(p / q)).sum() / N**2, "xent": batch.xent}


def huber(difference: float) -> float:
    return difference**2 / 2 if abs(difference) <= 1 else abs(difference) - 0.5


def rkd(batch: Batch, loss: Any) -> Terms:
    def distances(x: Array) -> Array:
        all_pairs = np.array([[np.linalg.norm(a - b) for b in x] for a in x])
        return all_pairs / all_pairs[~np.eye(N, dtype=bool)].mean()

    def cosine(x: Array, i: int, j: int, k: int) -> float:
        if i in (j, k):
            return 0.0
        a, b = x[j] - x[i], x[k] - x[i]
        return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))

    pairs = np.mean([huber(a) for a in (distances(batch.s) - distances(batch.f)).flat])
    triples = itertools.product(range(N), repeat=3)
    angles = np.mean([huber(cosine(batch.s, *ijk) - cosine(batch.f, *ijk)) for ijk in triples])
    return {"distance": 25 * pairs, "angle": 50 * angles, "xent": batch.xent}


def nd(batch: Batch, loss: Any) -> Terms:
    ((features, labels),) = STATISTICS.blocks()
    means = [features.double().numpy()[labels.numpy() == y].mean(axis=0) for y in range(C)]
    terms = [
        1 - s @ means[y] / np.linalg.norm(means[y]) / max(np.linalg.norm(s), np.linalg.norm(f))
        for s, f, y in zip(batch.s, batch.f, batch.y, strict=True)
        if y >= 0
    ]
    return {"nd": 2 * np.mean(terms), "kl": kd(4, batch.z, batch.t), "xent": batch.xent}


def projector(batch: Batch, loss: Any) -> Terms:
    ((features, _),) = STATISTICS.blocks()
    cached = features.double().numpy()
    weight, bias = (p.detach().numpy() for p in loss.projector[0].parameters())
    projected = batch.s @ weight.T + bias
    projected = (projected - projected.mean(axis=0)) / np.sqrt(projected.var(axis=0) + 1e-4)
    difference = projected - (batch.f - cached.mean(axis=0)) / cached.std(axis=0)
    value = np.log((difference**4).sum()) if loss.distance == "logsum" else (difference**2).mean()
    return {"projector": 2 * value, "xent": batch.xent}


def srrl(batch: Batch, loss: Any) -> Terms:
    weight = loss.connector[0].weight.detach().numpy()
    connected = batch.s @ weight.T
    connected = np.maximum((connected - connected.mean(axis=0)) / np.sqrt(connected.var(axis=0) + 1e-5), 0)
    w, b = (p.numpy() for p in loss.classifier.parameters())
    return {
        "mse": ((connected - batch.f) ** 2).mean(),
        "regression": ((connected @ w.T + b - batch.t) ** 2).mean(),
        "xent": batch.xent,
    }


def simkd(batch: Batch, loss: Any) -> Terms:
    return {"mse": ((batch.s - batch.f) ** 2).mean()}


def crd(batch: Batch, loss: Any) -> Terms:
    def embed(layer: torch.nn.Linear, x: Array) -> Array:
        weight, bias = (p.detach().numpy() for p in layer.parameters())
        return np.array([row / np.linalg.norm(row) for row in x @ weight.T + bias])

    torch.manual_seed(3)
    rows = torch.randint(len(loss.memory), (loss.negatives,)).numpy()
    s, t = embed(loss.embed_student, batch.s), embed(loss.embed_teacher, batch.f)
    others = embed(loss.embed_teacher, loss.memory.numpy()[rows])
    e = np.exp(s @ others.T / 0.07)
    constant = loss.negatives * e.mean()
    total = 0.0
    for i in range(N):
        score = np.exp(s[i] @ t[i] / 0.07)
        total -= np.log(score / (score + constant))
        total -= sum(
            np.log(constant / (e[i, k] + constant))
            for k, row in enumerate(rows)
            if loss.memory_labels[row] != batch.y[i]
        )
    return {"crd": 0.8 * total / N, "xent": batch.xent}


REFERENCES: list[tuple[Callable[..., Terms], dict[str, Any]]] = [
    (dkd, {}), (dkd, {"alpha": 0.5, "beta": 2.0, "temperature": 1.5}), (dkd_lskd, {}), (lskd, {}), (dist, {}),
    (pkt, {}), (rkd, {}), (nd, {}), (projector, {}), (projector, {"distance": "mse"}), (srrl, {}), (simkd, {}),
    (crd, {"negatives": 9, "embedding": 3}),
]  # fmt: skip


def term_function(loss: Any, batch: Batch) -> Callable[[torch.Tensor, torch.Tensor], dict[str, torch.Tensor]]:
    def evaluate(features: torch.Tensor, logits: torch.Tensor) -> dict[str, torch.Tensor]:
        torch.manual_seed(3)  # crd draws its negatives
        terms: dict[str, torch.Tensor] = loss(Output(features, logits), batch.target)
        return terms

    return evaluate


@pytest.mark.parametrize(("reference", "options"), REFERENCES, ids=lambda value: getattr(value, "__name__", ""))
def test_a_loss_is_its_papers(reference: Callable[..., Terms], options: dict[str, Any]) -> None:
    batch = Batch()
    torch.manual_seed(0)
    loss = losses.build(reference.__name__, Sizes(D, C, D), options, STATISTICS).module.double()
    evaluate = term_function(loss, batch)
    terms = {name: term.item() for name, term in evaluate(*batch.output).items()}
    assert terms == pytest.approx(reference(batch, loss), rel=1e-5)
    weights = [parameter for parameter in loss.parameters() if parameter.requires_grad]
    inputs = (*batch.output, *weights)
    assert torch.autograd.gradcheck(lambda *args: sum(evaluate(*args[:2]).values()), inputs, fast_mode=True)

"""Contrastive representation distillation of Tian, Krishnan and Isola (arXiv 1910.10699)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tspipe.losses import Target, check_options, cross_entropy
from tspipe.losses._statistics import Memory
from tspipe.models.output import Output


class Loss(nn.Module):
    """weight · the noise-contrastive loss of the student's and the teacher's embeddings, and the cross-entropy.

    An embedding is a normalised linear map to `embedding` numbers; both are learned, and dropped after training. Each
    student's embedding is compared with the teacher's of the same image, and with those of `negatives` rows drawn from
    the cache, without those of its own class. h = e^(s·t/τ) / (e^(s·t/τ) + K·Z), where Z is the mean of e^(s·t/τ) in
    the first batch, as in the authors' code. They also compare the teacher's with stored embeddings of the student's,
    and store the teacher's of earlier epochs; here the teacher's features are in the cache, so none is out of date.
    """

    needs = frozenset({"features", "labels"})
    memory: Tensor
    memory_labels: Tensor
    mean_score: Tensor

    def __init__(
        self,
        student_dim: int,
        memory: Memory,
        weight: float = 0.8,
        negatives: int = 16_384,
        temperature: float = 0.07,
        embedding: int = 128,
    ):
        super().__init__()
        check_options(
            "crd", {"negatives": negatives, "temperature": temperature, "embedding": embedding}, {"weight": weight}
        )
        self.weight, self.negatives, self.temperature = weight, negatives, temperature
        self.embed_student = nn.Linear(student_dim, embedding)
        self.embed_teacher = nn.Linear(memory.features.shape[1], embedding)
        self.register_buffer("memory", memory.features, persistent=False)
        self.register_buffer("memory_labels", memory.labels, persistent=False)
        self.register_buffer("mean_score", torch.zeros(()))  # Z; 0 until the first batch

    def forward(self, student: Output, target: Target) -> dict[str, Tensor]:
        """Return the terms `crd` and `xent`."""
        drawn = torch.randint(len(self.memory), (self.negatives,), device=self.memory.device)
        s = F.normalize(self.embed_student(student.features)) / self.temperature
        t = F.normalize(self.embed_teacher(target.features))
        negatives = F.normalize(self.embed_teacher(self.memory[drawn].to(t.dtype)))
        crd = self._contrast((s * t).sum(1), s @ negatives.T, target.labels[:, None] == self.memory_labels[drawn])
        return {"crd": self.weight * crd, "xent": cross_entropy(student.logits, target.labels)}

    def _contrast(self, positive: Tensor, negative: Tensor, same_class: Tensor) -> Tensor:
        """Return −log h of the positives (m,) and the sum of −log(1 − h) of the negatives (m, K), over m images."""
        with torch.no_grad():
            mean = negative.exp().mean()
            self.mean_score.copy_(torch.where(self.mean_score > 0, self.mean_score, mean))
        offset = (self.negatives * self.mean_score).log()
        of_negatives = F.softplus(negative - offset).masked_fill(same_class, 0).sum(1)
        return (F.softplus(offset - positive) + of_negatives).mean()

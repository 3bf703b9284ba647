"""CRD's trainable side, and its memory of every training image's embedding."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ContrastiveMemory(nn.Module):
    """Embeds both sides, and scores each against what it remembers of the other (Tian et al., ICLR 2020).

    Args:
        student_width: D.
        teacher_width: E.
        labels: [N] int of the training images, of two classes at least.
        width: of the embeddings, M.
        negatives: images of other classes that each image is compared with. They are drawn with replacement, all at once on the
            device, by (seed, image, place) alone, where the authors draw them without, image by image in the loader.
        temperature: of the scores.
        momentum: share of an embedding that is kept when it is remembered anew.
        seed: of the first, random memories.
    """

    memory_student: Tensor
    memory_teacher: Tensor
    normalizers: Tensor
    by_class: Tensor
    labels: Tensor
    first: Tensor
    counts: Tensor

    def __init__(
        self,
        student_width: int,
        teacher_width: int,
        labels: Tensor,
        *,
        width: int = 128,
        negatives: int = 16384,
        temperature: float = 0.07,
        momentum: float = 0.5,
        seed: int = 0,
    ):
        super().__init__()
        self.embed_student, self.embed_teacher = nn.Linear(student_width, width), nn.Linear(teacher_width, width)
        self.negatives, self.temperature, self.momentum = negatives, temperature, momentum
        self.population = len(labels)
        labels = labels.cpu().long()
        counts = torch.bincount(labels)
        if (counts > 0).sum() < 2:
            raise ValueError("a contrastive memory needs images of two classes at least; there are no negatives in one")
        generator = torch.Generator(device="cpu").manual_seed(seed)
        bound = (3 / width) ** 0.5
        for name in ("memory_student", "memory_teacher"):
            memory = torch.rand(self.population, width, generator=generator, device="cpu")
            self.register_buffer(name, memory.mul_(2 * bound).sub_(bound))
        self.register_buffer("normalizers", -torch.ones(2, device="cpu"))  # negative: not set by a first batch yet
        self.register_buffer("by_class", labels.argsort(stable=True), persistent=False)
        self.register_buffer("labels", labels, persistent=False)
        self.register_buffer("first", counts.cumsum(0) - counts, persistent=False)
        self.register_buffer("counts", counts, persistent=False)

    def forward(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Features [B,D] and [B,E] -> embeddings [B,M] of length 1."""
        ours, theirs = self.embed_student(student), self.embed_teacher(teacher)
        precise = self.memory_student.dtype
        return F.normalize(ours.to(precise), dim=1), F.normalize(theirs.to(precise), dim=1)

    def scores(self, student: Tensor, teacher: Tensor, indices: Tensor, seed: int) -> Tensor:
        """exp(similarity / temperature), [2,B,1+negatives], the image itself first.

        Args:
            student: [B,M], scored against the teacher's memory.
            teacher: [B,M], scored against the student's memory.
            indices: [B] int, which training images these are.
            seed: of the negatives.
        """
        drawn = torch.cat([indices[:, None], self._draw(indices, seed)], dim=1)

        def score(anchors: Tensor, memory: Tensor) -> Tensor:
            similarity = torch.bmm(memory[drawn], anchors[:, :, None])[:, :, 0]
            return torch.exp(similarity / self.temperature)

        with torch.autocast(student.device.type, enabled=False):
            return torch.stack([score(student, self.memory_teacher), score(teacher, self.memory_student)])

    def normalize(self, scores: Tensor, mean: Tensor) -> Tensor:
        """Divided, each side, by what `mean` [2] of the first batch's scores makes the sum over all images, as published."""
        with torch.no_grad():
            normalizers = torch.where(self.normalizers < 0, mean * self.population, self.normalizers)
            self.normalizers.copy_(normalizers)
        # Not by the buffer: a second call before backward writes to it, which autograd refuses.
        return scores / normalizers[:, None, None]

    def _draw(self, indices: Tensor, seed: int) -> Tensor:
        """[B,negatives] indices of images of other classes: places in a list sorted by class, with a jump over the own class."""
        own = self.labels[indices][:, None]
        others = self.population - self.counts[own]
        places = torch.arange(self.negatives, device=indices.device)
        place = (_uniform(indices[:, None] * self.negatives + places, seed) * others).long()
        return self.by_class[place + (place >= self.first[own]) * self.counts[own]]

    @torch.no_grad()
    def update(self, student: Tensor, teacher: Tensor, indices: Tensor) -> None:
        """Remembers embeddings [B,M] of images `indices`, those of all processes, so that their memories stay one."""
        for memory, new in ((self.memory_student, student), (self.memory_teacher, teacher)):
            memory[indices] = F.normalize(torch.lerp(new.to(memory.dtype), memory[indices], self.momentum), dim=1)


def _uniform(counters: Tensor, seed: int) -> Tensor:
    """A number in [0, 1) for each int64: the mixing of SplitMix64 (Steele et al., 2014), whose multiplications wrap around."""

    def mixed(z: Tensor, shift: int) -> Tensor:
        return z ^ ((z >> shift) & ((1 << (64 - shift)) - 1))  # >> alone would copy the sign

    z = counters * -0x61C8864680B583EB + seed  # constants of the reference code, as signed integers
    z = mixed(z, 30) * -0x40A7B892E31B1A47
    z = mixed(z, 27) * -0x6B2FB644ECCEEE15
    return ((mixed(z, 31) >> 11) & ((1 << 53) - 1)).double() * 2.0**-53

"""ReviewKD's fusion and CRD's memory against their formulas written out; that they learn is in test_projectors.py."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deit_kd import losses
from deit_kd.models.projectors.contrastive_memory import ContrastiveMemory
from deit_kd.models.projectors.review_fusion import ReviewFusion


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def fusion_of(student_widths: tuple[int, ...], teacher_widths: tuple[int, ...]) -> ReviewFusion:
    torch.manual_seed(0)
    return ReviewFusion(student_widths, teacher_widths)


def test_fusion_of_resnet32x4_and_resnet8x4() -> None:
    widths, sizes = (64, 128, 256, 256), [(32, 32), (16, 16), (8, 8), (1, 1)]
    fusion = fusion_of(widths, widths)
    stages = [random(2, width, *size) for width, size in zip(widths, sizes, strict=True)]
    fused = fusion(stages, sizes)
    assert [level.shape for level in fused] == [stage.shape for stage in stages]
    losses.hierarchical_context(fused, stages).backward()
    for name, parameter in fusion.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("width", [48, 600])
def test_fusion_starts_and_is_as_wide_as_published(width: int) -> None:
    fusion = fusion_of((16, width), (8, 24))
    convolutions = [layer for layer in (*fusion.inputs.modules(), *fusion.outputs.modules()) if isinstance(layer, nn.Conv2d)]
    assert [(layer.in_channels, layer.out_channels) for layer in convolutions] == [
        (16, min(width, 512)), (width, min(width, 512)), (min(width, 512), 8), (min(width, 512), 24),
    ]  # fmt: skip
    for layer in convolutions:
        bound = math.sqrt(3 / layer.weight[0].numel())  # kaiming_uniform_ with a = 1
        assert 0.95 * bound < layer.weight.detach().abs().max() <= bound
        assert layer.bias is None


def written_out(fusion: ReviewFusion, stages: list[Tensor], sizes: list[tuple[int, int]]) -> list[Tensor]:
    """Place by place, with fresh batch normalization (scale 1, shift 0) over the batch and its places."""

    def normalize(x: Tensor) -> Tensor:
        channels = x.transpose(0, 1).flatten(1)
        mean, variance = channels.mean(1), channels.var(1, correction=0)
        return (x - mean.view(1, -1, 1, 1)) / (variance.view(1, -1, 1, 1) + 1e-5).sqrt()

    def nearest(x: Tensor, size: tuple[int, int]) -> Tensor:
        rows = [y * x.shape[2] // size[0] for y in range(size[0])]
        return x[:, :, rows][:, :, :, [z * x.shape[3] // size[1] for z in range(size[1])]]

    fused: list[Tensor] = []
    residual: Tensor | None = None
    for level in (2, 1, 0):
        first, last = (layers[level][0].weight for layers in (fusion.inputs, fusion.outputs))
        x = normalize(torch.einsum("oi,bihw->bohw", first[:, :, 0, 0], stages[level]))
        if residual is not None:
            deeper = nearest(residual, (x.shape[2], x.shape[3]))
            attention = fusion.attention[level][0]
            mixed = torch.zeros_like(x)
            for y in range(x.shape[2]):
                for z in range(x.shape[3]):
                    both = torch.cat([x[:, :, y, z], deeper[:, :, y, z]], 1)
                    own, other = torch.sigmoid(both @ attention.weight[:, :, 0, 0].t() + attention.bias).unbind(1)
                    mixed[:, :, y, z] = own[:, None] * x[:, :, y, z] + other[:, None] * deeper[:, :, y, z]
            x = mixed
        residual = nearest(x, sizes[level])
        patches = F.unfold(residual, 3, padding=1)
        fused.insert(0, normalize((last.flatten(1) @ patches).view(len(x), -1, *sizes[level])))
    return fused


def test_fusion_written_out_on_unequal_sizes() -> None:
    fusion, sizes = fusion_of((3, 4, 5), (6, 7, 8)).double(), [(9, 7), (3, 4), (1, 1)]
    stages = [random(3, *shape, seed=1).double() for shape in ((3, 6, 6), (4, 4, 2), (5, 1, 1))]
    expected = written_out(fusion, stages, sizes)
    for ours, theirs in zip(fusion(stages, sizes), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)


LABELS = torch.tensor([4, 0, 2, 0, 4, 2, 2, 2, 0])  # not sorted; classes 1 and 3 have no image


def memory(**more: int) -> ContrastiveMemory:
    torch.manual_seed(0)
    return ContrastiveMemory(5, 7, LABELS, **{"width": 4, "negatives": 6, **more})


def scored(contrast: ContrastiveMemory, student: Tensor, teacher: Tensor, indices: Tensor, seed: int) -> Tensor:
    """Of a batch that is whole."""
    scores = contrast.scores(student, teacher, indices, seed)
    return contrast.normalize(scores, scores.mean(dim=(1, 2)))


def test_first_memory_is_the_seeds_alone() -> None:
    contrast = memory(width=48)
    torch.manual_seed(99)
    again = ContrastiveMemory(5, 7, LABELS, width=48, seed=0)
    bound = 1 / math.sqrt(48 / 3)
    for name in ("memory_student", "memory_teacher"):
        first = getattr(contrast, name)
        assert torch.equal(first, getattr(again, name))
        assert not torch.equal(first, getattr(memory(width=48, seed=1), name))
        assert 0.95 * bound < first.abs().max() <= bound
    assert not torch.equal(contrast.memory_student, contrast.memory_teacher)
    assert (contrast.normalizers < 0).all()
    embeddings = {f"embed_{side}.{part}" for side in ("student", "teacher") for part in ("weight", "bias")}
    assert set(contrast.state_dict()) == embeddings | {"memory_student", "memory_teacher", "normalizers"}


def test_negatives_are_of_other_classes_and_the_seeds_alone() -> None:
    contrast, indices = memory(negatives=500), torch.arange(len(LABELS))
    drawn = contrast._draw(indices, 11)
    torch.rand(7)
    assert torch.equal(drawn, contrast._draw(indices, 11)), "whatever else was drawn"
    for index, row in enumerate(drawn):
        others = {other for other in range(len(LABELS)) if LABELS[other] != LABELS[index]}
        assert set(row.tolist()) == others


def test_scores_and_loss_of_the_published_code_written_out() -> None:
    contrast, indices = memory(), torch.tensor([1, 5])
    anchors = contrast(random(2, 5), random(2, 7))
    drawn = torch.cat([indices[:, None], contrast._draw(indices, 2)], 1)
    expected = torch.zeros(())
    for anchor, remembered in zip(anchors, (contrast.memory_teacher, contrast.memory_student), strict=True):
        raw = torch.stack([torch.stack([(anchor[b] @ remembered[i] / 0.07).exp() for i in drawn[b]]) for b in range(2)])
        p = raw / (raw.mean().detach() * len(LABELS))  # nothing flows through the normalizer
        noise = 6 / len(LABELS)
        positive, negatives = torch.log(p[:, 0] / (p[:, 0] + noise + 1e-7)), torch.log(noise / (p[:, 1:] + noise + 1e-7))
        expected = expected - (positive.sum() + negatives.sum()) / 2
    loss = sum(losses.noise_contrastive(score, contrast.population) for score in scored(contrast, *anchors, indices, 2))
    assert isinstance(loss, Tensor)
    torch.testing.assert_close(loss, expected)
    weights = list(contrast.parameters())
    ours, theirs = (torch.autograd.grad(value, weights, retain_graph=True) for value in (loss, expected))
    for gradient, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-5)


def test_scores_may_be_asked_twice_and_remembered_before_backward() -> None:
    contrast, indices = memory(), torch.tensor([0, 2])
    anchors = contrast(random(2, 5), random(2, 7))
    total = torch.stack([scored(contrast, *anchors, indices, seed)[0].mean() for seed in (0, 1)]).sum()
    contrast.update(anchors[0], anchors[1], indices)
    total.backward()
    assert not contrast.memory_student.requires_grad
    assert contrast.embed_student.weight.grad is not None


def test_memory_is_float32_under_autocast() -> None:
    contrast, indices = memory(), torch.tensor([0, 2])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        anchors = contrast(random(2, 5), random(2, 7))
        scores = scored(contrast, *anchors, indices, 0)
        contrast.update(anchors[0], anchors[1], indices)
    fresh = memory()
    for value, expected in zip(scores, scored(fresh, *anchors, indices, 0), strict=True):
        assert value.dtype == torch.float32
        assert torch.equal(value, expected)
    fresh.update(anchors[0], anchors[1], indices)
    assert torch.equal(contrast.memory_teacher, fresh.memory_teacher)
    assert contrast.memory_teacher.dtype == torch.float32

"""Taps, projectors, and what stands between student and teacher with weights of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from deit_kd import losses
from deit_kd import recipe as recipes
from deit_kd.errors import UserError
from deit_kd.models.build import build_distiller, build_teachers
from deit_kd.models.distiller import Distiller, StudentOutput, project
from deit_kd.models.features import forward_with_intermediates, select_feature, stages_of
from deit_kd.models.projectors.contrastive_memory import ContrastiveMemory
from deit_kd.models.projectors.review_fusion import ReviewFusion
from deit_kd.models.projectors.vectors import Orthonormal, build_projector, first_matrix
from deit_kd.recipe import Projector

GENERATOR = torch.Generator()


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=GENERATOR.manual_seed(seed))


def off_orthonormal(projector: Orthonormal) -> float:
    q = projector.matrix().detach().double()
    gram = q.t() @ q if q.shape[0] >= q.shape[1] else q @ q.t()
    return (gram - torch.eye(len(gram), dtype=torch.float64)).abs().max().item()


def test_orthonormal_columns_survive_a_thousand_decayed_steps(tmp_path: Path) -> None:
    """With weight decay on the student beside it as the recipes have it, at a quarter of their widths."""
    torch.manual_seed(0)
    student, projector = nn.Linear(16, 48), Orthonormal(48, 756)
    groups = [{"params": student.parameters(), "weight_decay": 0.05}, {"params": projector.parameters(), "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=5e-4)
    images, teacher = random(8, 16), random(8, 756, seed=1)
    first = off_orthonormal(projector)
    start, values = projector.matrix().detach().clone(), []
    for _ in range(1000):
        loss = losses.layer_norm_smooth_l1(projector(student(images)), teacher)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    assert first < 1e-5
    assert off_orthonormal(projector) < 1e-5
    assert values[-1] < 0.5 * values[0]
    assert (projector.matrix() - start).abs().max() > 0.01, "it learns"
    assert [(name, tuple(value.shape)) for name, value in projector.state_dict().items()] == [("weight", (756, 48))]
    save_file(projector.state_dict(), tmp_path / "projector.safetensors")
    again = Orthonormal(48, 756)
    again.load_state_dict(load_file(tmp_path / "projector.safetensors"))
    assert torch.equal(again.matrix(), projector.matrix())


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_orthonormal_map_does_not_die_of_weight_decay(decay: float) -> None:
    projector = Orthonormal(8, 24)
    optimizer = torch.optim.SGD(projector.parameters(), lr=0.1, weight_decay=decay)
    for step in range(50):
        optimizer.zero_grad()
        F.mse_loss(projector(random(16, 8, seed=step)), random(16, 24, seed=step + 100)).backward()
        assert projector.weight.grad is not None
        assert projector.weight.grad.abs().max() > 0
        optimizer.step()
    assert off_orthonormal(projector) < 1e-5


def test_orthonormal_map_keeps_lengths_and_its_gradient_is_right() -> None:
    projector = Orthonormal(6, 10).double()
    features = random(4, 6).double()
    torch.testing.assert_close(projector(features).norm(dim=1), features.norm(dim=1))
    assert torch.autograd.gradcheck(
        lambda weight: torch.func.functional_call(projector, {"weight": weight}, features), projector.weight
    )
    assert off_orthonormal(Orthonormal(10, 6)) < 1e-5, "a narrower teacher: orthonormal rows"
    torch.nn.init.uniform_(projector.weight, 0.9, 1.1)  # nearly parallel columns
    assert off_orthonormal(projector) < 1e-5


def test_orthonormal_weight_is_not_decayed() -> None:
    recipe = recipes.load(
        "deit_ti_vkd",
        ["teacher.weights=random", "teacher.name=resnet10t", "student.model_args={embed_dim: 48, depth: 1}", "data.img_size=32"],
    )
    distiller = build_distiller(recipe, 1000, build_teachers(recipe, 1000))
    assert "projectors.0.weight" in distiller.no_weight_decay()


@pytest.mark.parametrize(
    ("config", "kinds"),
    [
        (Projector(kind="none"), ["Identity"]),
        (Projector(kind="linear", bias=False, depth=1, width="teacher"), ["Linear"]),
        (Projector(kind="linear", bias=True, depth=2, width=32), ["Linear", "BatchNorm1d", "ReLU", "Linear"]),
        (Projector(kind="linear", bias=True, depth=3, width="teacher"), ["Linear", "BatchNorm1d", "ReLU", "Linear", "BatchNorm1d", "ReLU", "Linear"]),
        (Projector(kind="bn_dropout_linear", dropout=0.5), ["BatchNorm1d", "Dropout", "Linear"]),
        (Projector(kind="orthonormal"), ["Orthonormal"]),
    ],
)  # fmt: skip
def test_projectors_of_vectors_and_maps(config: Projector, kinds: list[str]) -> None:
    width = 8 if config.kind == "none" else 12
    projector = build_projector(config, 8, width).eval()
    assert [type(layer).__name__ for layer in (projector if isinstance(projector, nn.Sequential) else [projector])] == kinds
    places = random(3, 8, 2, 5)
    projected = project(projector, places, places)
    assert projected.shape == (3, width, 2, 5)
    torch.testing.assert_close(projected[:, :, 1, 3], project(projector, places[:, :, 1, 3], places))
    matrix = first_matrix(projector)
    assert (matrix is None) == (config.kind == "none")
    linears = [layer for layer in projector.modules() if isinstance(layer, nn.Linear)]
    if config.kind == "linear":
        assert [layer.bias is not None for layer in linears] == [config.bias] * (config.depth or 0)
        assert [layer.out_features for layer in linears[:-1]] == [32 if config.width == 32 else 12] * (len(linears) - 1)


@pytest.mark.parametrize(
    "name",
    [
        "resnet18",
        "regnety_002",
        "mobilenetv1_100",
        "convnext_atto",
        "cifar_resnet8x4",
        "swin_tiny_patch4_window7_224",
        "deit_tiny_distilled_patch16_224",
        "deit_tiny_convstem_distilled_patch16_224",
    ],
)
def test_taps_of_many_architectures(name: str) -> None:
    size = 32 if name.startswith("cifar") else 64
    model = timm.create_model(name, **({"img_size": size} if "patch" in name else {})).eval()
    images, taps = random(2, 3, size, size), ["pooled", "spatial", "stages", "stages_and_pooled", 1, -1]
    with torch.inference_mode():
        hidden = forward_with_intermediates(model, images, stages_of(model, taps))
        plain = model.forward_features(images)
        torch.testing.assert_close(hidden.final, plain)
        assert select_feature(model, hidden, "pooled").ndim == 2
        spatial = select_feature(model, hidden, "spatial")
        stages = select_feature(model, hidden, "stages")
        levels = select_feature(model, hidden, "stages_and_pooled")
        assert spatial.ndim == 4
        assert len(levels) == len(stages) + 1 == (4 if name.startswith("cifar") else 5)
        assert all(stage.ndim == 4 for stage in stages)
        assert torch.equal(select_feature(model, hidden, -1), stages[-1])
        if "deit" in name:
            assert torch.equal(select_feature(model, hidden, "class_token"), plain[:, 0])
            assert torch.equal(select_feature(model, hidden, "distillation_token"), plain[:, 1])
            torch.testing.assert_close(select_feature(model, hidden, "prefix_tokens"), plain[:, :2].mean(1))
            torch.testing.assert_close(spatial.flatten(2).mean(2), select_feature(model, hidden, "pooled"))
        else:
            with pytest.raises(UserError, match="has no such token"):
                select_feature(model, hidden, "class_token")
    with pytest.raises(UserError, match="has stages 0 to"):
        stages_of(model, [99])


def test_dense_logits_average_to_the_logits() -> None:
    model, images = timm.create_model("resnet18").eval(), random(2, 3, 64, 64)
    with torch.inference_mode():
        dense = select_feature(model, forward_with_intermediates(model, images, []), "dense_logits")
        torch.testing.assert_close(dense.mean((2, 3)), model(images), rtol=1e-4, atol=1e-5)
    hidden_layer = timm.create_model("mobilenetv3_small_100").eval()
    with torch.inference_mode(), pytest.raises(UserError, match="cannot be applied to each place"):
        select_feature(hidden_layer, forward_with_intermediates(hidden_layer, images, []), "dense_logits")


def test_a_mismatch_names_both_sides() -> None:
    common = ["teacher.weights=random", "teacher.name=resnet18", "data.img_size=64"]
    recipe = recipes.load("deit_ti_two_stages", [*common, "projector={kind: none}", "distill.teacher_tap=2"])
    with pytest.raises(
        UserError, match=r"3 of the student is \[B, 192, 4, 4\], 2 of resnet18 is \[B, 128, 8, 8\].*use projector.kind=linear"
    ):
        build_distiller(recipe, 1000, build_teachers(recipe, 1000))
    recipe = recipes.load("cifar100_resnet32x4_resnet8x4_at", ["teacher.weights=random", "student.name=cifar_vgg8"])
    with pytest.raises(UserError, match="4 and 3 stages cannot be paired"):
        build_distiller(recipe, 100, build_teachers(recipe, 100))
    recipe = recipes.load("quickstart", ["student={name: resnet10t, drop_path: 0, model_args: {}}"])
    with pytest.raises(UserError, match="resnet10t has no distillation head; use kd_head=class"):
        build_distiller(recipe, 10, build_teachers(recipe, 10))
    recipe = recipes.load("cifar100_resnet32x4_resnet8x4_dkd", ["teacher.weights=random"])
    with pytest.raises(UserError, match="needs 3 classes, the data has 2; use kl_distillation"):
        build_distiller(recipe, 2, build_teachers(recipe, 2))


def test_review_fusion_gives_the_teachers_shapes_and_learns() -> None:
    torch.manual_seed(0)
    widths, teacher_widths, sizes = (6, 8, 10, 10), (5, 7, 9, 11), [(8, 8), (5, 5), (2, 2), (1, 1)]
    fusion = ReviewFusion(widths, teacher_widths)
    stages = [random(4, width, size, size, seed=size) for width, size in zip(widths, (8, 4, 2, 1), strict=True)]
    wanted = [random(4, width, *size, seed=width) for width, size in zip(teacher_widths, sizes, strict=True)]
    optimizer = torch.optim.Adam(fusion.parameters(), 1e-2)
    values = []
    for _ in range(40):
        fused = fusion(stages, sizes)
        assert [level.shape for level in fused] == [level.shape for level in wanted]
        loss = losses.hierarchical_context(fused, wanted)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in fusion.parameters())
        optimizer.step()
        values.append(loss.item())
    assert values[-1] < 0.7 * values[0]


def memory(**more: int | float) -> ContrastiveMemory:
    torch.manual_seed(0)
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 2, 2, 0])
    return ContrastiveMemory(5, 7, labels, **{"width": 4, "negatives": 6, **more})  # type: ignore[arg-type]


def scored(contrast: ContrastiveMemory, student: Tensor, teacher: Tensor, indices: Tensor, seed: int) -> Tensor:
    """Of a batch that is whole."""
    scores = contrast.scores(student, teacher, indices, seed)
    return contrast.normalize(scores, scores.mean(dim=(1, 2)))


def test_contrastive_scores_and_memory_written_out() -> None:
    contrast = memory(momentum=0.25)
    students, teachers = contrast(random(3, 5), random(3, 7))
    torch.testing.assert_close(students.norm(dim=1), torch.ones(3))
    indices = torch.tensor([0, 4, 7])
    before = contrast.memory_student.clone(), contrast.memory_teacher.clone()
    scores = scored(contrast, students, teachers, indices, seed=3)
    drawn = torch.cat([indices[:, None], contrast._draw(indices, 3)], 1)
    assert drawn.shape == (3, 7)
    for sample in range(3):
        assert not (contrast.labels[drawn[sample, 1:]] == contrast.labels[indices[sample]]).any(), "negatives are of other classes"
    raw = [
        torch.stack([torch.stack([torch.exp(anchor[b] @ remembered[i] / 0.07) for i in drawn[b]]) for b in range(3)])
        for anchor, remembered in ((students, before[1]), (teachers, before[0]))
    ]
    for value, expected in zip(scores, raw, strict=True):
        torch.testing.assert_close(value, expected / (expected.mean() * 9), rtol=1e-4, atol=1e-8)
    kept = contrast.normalizers.clone()
    scored(contrast, students, teachers, indices, seed=4)
    assert torch.equal(contrast.normalizers, kept), "set by the first batch alone"
    contrast.update(students.detach(), teachers.detach(), indices)
    mixed = 0.25 * before[0][4] + 0.75 * students[1]
    torch.testing.assert_close(contrast.memory_student[4], (mixed / mixed.norm()).detach())
    assert torch.equal(contrast.memory_student[1], before[0][1])


def test_contrastive_negatives_are_uniform_over_the_other_classes_and_seeded() -> None:
    contrast = memory(negatives=30_000)
    drawn = contrast._draw(torch.tensor([1, 2]), seed=5)
    assert torch.equal(drawn, contrast._draw(torch.tensor([1, 2]), seed=5))
    assert not torch.equal(drawn, contrast._draw(torch.tensor([1, 2]), seed=6))
    for row, others in zip(drawn, ({0, 2, 3, 5, 6, 7, 8}, {0, 1, 3, 4, 8}), strict=True):
        counts = row.bincount(minlength=9)
        assert set(counts.nonzero().flatten().tolist()) == others
        assert (counts[counts > 0] / 30_000 - 1 / len(others)).abs().max() < 0.01
    with pytest.raises(ValueError, match="two classes at least"):
        ContrastiveMemory(5, 7, torch.zeros(4, dtype=torch.long))


def test_contrast_is_saved_with_its_memory_and_learns(tmp_path: Path) -> None:
    contrast = memory()
    students, teachers, indices = random(9, 5), random(9, 7, seed=1), torch.arange(9)
    optimizer = torch.optim.Adam(contrast.parameters(), 2e-2)
    values = []
    for step in range(60):
        embedded = contrast(students, teachers)
        scores = scored(contrast, *embedded, indices, step)
        contrast.update(embedded[0].detach(), embedded[1].detach(), indices)
        loss = losses.noise_contrastive(scores[0], 9) + losses.noise_contrastive(scores[1], 9)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in contrast.parameters())
        optimizer.step()
        values.append(loss.item())
    assert sum(values[-10:]) < 0.9 * sum(values[:10])
    save_file(contrast.state_dict(), tmp_path / "contrast.safetensors")
    again = memory(seed=1)
    again.load_state_dict(load_file(tmp_path / "contrast.safetensors"))
    assert torch.equal(again.memory_teacher, contrast.memory_teacher)
    assert torch.equal(scored(again, *embedded, indices, 1)[0], scored(contrast, *embedded, indices, 1)[0])


def test_the_student_of_two_teachers() -> None:
    student = timm.create_model("deit_tiny_two_teachers_patch16_224", img_size=32, depth=2, num_classes=7).eval()
    images = random(2, 3, 32, 32)
    with torch.inference_mode():
        output, plain = Distiller(student)(images), student(images)
    assert len(output.dist_logits) == 2
    torch.testing.assert_close(plain, (output.logits + output.dist_logits[0] + output.dist_logits[1]) / 3)
    torch.testing.assert_close(output.prediction(), plain)
    assert not torch.equal(output.dist_logits[0], output.dist_logits[1])
    assert student.dist_token_2.std() > 0.01
    student.reset_classifier(3)
    assert student(images).shape == (2, 3)
    full = timm.create_model("deit_tiny_two_teachers_patch16_224")
    assert sum(p.numel() for p in full.parameters()) == 5_910_800 + 1000 * 193 + 2 * 192  # a head, a token and its position more


@pytest.mark.parametrize("name", ["pit_ti_distilled_224", "levit_128s", "efficientformer_l1", "deit_tiny_distilled_patch16_224"])
def test_distillation_heads_of_every_family_are_timms(name: str) -> None:
    torch.manual_seed(0)
    student, images = timm.create_model(name, num_classes=5), torch.randn(2, 3, 224, 224)
    distiller = Distiller(student.eval())
    assert distiller.distillation_heads == 1
    with torch.no_grad():
        output = distiller(images)
        torch.testing.assert_close(output.prediction(), student(images))
        student.set_distilled_training(True)
        student.training = True  # of the network alone: its batch norms and dropout stay as they are
        torch.testing.assert_close((output.logits, *output.dist_logits), tuple(student(images)))


def test_taps_of_a_network_that_ends_in_tokens_alone() -> None:
    with torch.device("meta"), torch.no_grad():
        student, images = timm.create_model("pit_ti_distilled_224").eval(), torch.empty(2, 3, 224, 224)
        hidden = forward_with_intermediates(student, images, [])
        for tap in ("class_token", "distillation_token", "prefix_tokens"):
            assert select_feature(student, hidden, tap).shape == (2, 256)  # type: ignore[union-attr]
        with pytest.raises(UserError, match="tap spatial: PoolingVisionTransformer ends in tokens that form no square map"):
            select_feature(student, hidden, "spatial")


def test_a_degenerate_orthonormal_map_is_no_error_but_not_finite() -> None:
    """An error would make the host wait for the device at each step; a loss that is not finite skips the step."""
    projector = Orthonormal(6, 10)
    nn.init.zeros_(projector.weight)
    assert projector(random(4, 6)).isnan().all()


def test_the_mean_of_heads_is_taken_in_float32() -> None:
    heads = torch.tensor([[[1.0, 1.0078125]], [[1.0, 1.0]]]).bfloat16()
    prediction = StudentOutput(heads[0], (heads[1],), ()).prediction()
    assert prediction.dtype == torch.float32
    assert prediction[0, 1] > prediction[0, 0], "in bfloat16 both are 1"
    assert StudentOutput(heads[0].double(), (heads[1].double(),), ()).prediction().dtype == torch.float64

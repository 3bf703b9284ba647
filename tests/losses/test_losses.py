"""Every loss against the authors' values and gradients, and at its limits."""

from __future__ import annotations

import ast
import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map_only

from conftest import ROOT
from deit_kd import losses
from deit_kd.losses.shares import by_shares
from deit_kd.recipe.objectives import FEATURE_OBJECTIVES, LOGIT_OBJECTIVES

OF_ROWS = {*LOGIT_OBJECTIVES, *FEATURE_OBJECTIVES}
REFERENCE = json.loads((ROOT / "tests" / "reference" / "losses.json").read_text())


def project(e: dict[str, Tensor]) -> Tensor:
    return e["z_s"] @ e["weight"].t() + e["bias"]


def means(e: dict[str, Tensor]) -> Tensor:
    centers = e["class_means"][e["labels"]]
    if "lam" in e:
        centers = e["lam"] * centers + (1 - e["lam"]) * centers.flip(0)
    return centers


def deit(e: dict[str, Tensor], weight: float, distillation: Tensor) -> Tensor:
    return (1 - weight) * F.cross_entropy(e["logits_cls"], e["labels"]) + weight * distillation


CASES: dict[str, Callable[[dict[str, Any]], Tensor]] = {
    "logsum_correlation": lambda e: losses.logsum_correlation(project(e), e["z_t"], norm_eps=0.0),
    "logsum_difference": lambda e: losses.logsum_difference(project(e), e["z_t"]),
    "vkd_orthogonal": lambda e: losses.layer_norm_smooth_l1(e["z_s"] @ e["projection"].t(), e["z_t"]),
    "kd_T1": lambda e: losses.kl_distillation(e["logits_s"], e["logits_t"]),
    "kd_T4": lambda e: losses.kl_distillation(e["logits_s"], e["logits_t"], 4.0),
    "dkd_a1_b8_T4": lambda e: losses.decoupled_distillation(e["logits_s"], e["logits_t"], e["labels"]),
    "dkd_a1_b0.5_T1": lambda e: losses.decoupled_distillation(e["logits_s"], e["logits_t"], e["labels"], 1.0, 0.5, 1.0),
    "nd_factor2": lambda e: 2.0 * losses.norm_direction(e["emb_s"], e["emb_t"], means(e)),
    "nd_mixup_lam0.3_factor1.5": lambda e: 1.5 * losses.norm_direction(e["emb_s"], e["emb_t"], means(e)),
    "dist_T1": lambda e: losses.dist(e["logits_s"], e["logits_t"]),
    "dist_T4": lambda e: losses.dist(e["logits_s"], e["logits_t"], 4.0),
    "nkd_gamma1.5_T1": lambda e: losses.normalized_distillation(e["logits_s"], e["logits_t"], e["labels"]),
    "at_p2": lambda e: losses.attention_transfer(e["map_s"], e["map_t"]),
    "deit_hard_alpha0.5_tau1": lambda e: deit(e, 0.5, losses.hard_distillation(e["logits_dist"], e["logits_t"])),
    "deit_soft_alpha0.1_tau3": lambda e: deit(e, 0.1, losses.soft_distillation(e["logits_dist"], e["logits_t"], 3.0)),
}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-4)])
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_of_the_authors(name: str, dtype: torch.dtype, tolerance: float) -> None:
    entry = {
        key: (torch.tensor(value) if key == "labels" else torch.tensor(value, dtype=dtype)) if isinstance(value, list) else value
        for key, value in REFERENCE[name].items()
    }
    inputs = {key.removeprefix("grad_"): value for key, value in entry.items() if key.startswith("grad_")}
    # The DeiT entries name their inputs logits_cls and logits_dist, and the gradients grad_cls and grad_dist.
    inputs = {key if key in entry else f"logits_{key}": value for key, value in inputs.items()}
    assert inputs
    for key in inputs:
        entry[key].requires_grad_()
    loss = CASES[name](entry)
    assert loss.ndim == 0
    assert loss.dtype == dtype
    assert loss.item() == pytest.approx(entry["loss"], rel=tolerance)
    for (key, expected), gradient in zip(inputs.items(), torch.autograd.grad(loss, [entry[key] for key in inputs]), strict=True):
        scale = expected.abs().max().item()
        torch.testing.assert_close(gradient, expected, rtol=tolerance, atol=tolerance * scale, msg=lambda m, k=key: f"{k}: {m}")


def test_every_reference_entry_is_used() -> None:
    assert set(REFERENCE) == set(CASES)


# Losses that no reference entry holds, against the formula written out once more, sample by sample.


def naive_correlation_congruence(student: Tensor, teacher: Tensor) -> Tensor:
    total = torch.zeros((), dtype=student.dtype)
    for i in range(len(student)):
        for j in range(len(student)):
            kernels = []
            for f in (student, teacher):
                dot = (f[i] / f[i].norm()) @ (f[j] / f[j].norm())
                kernels.append(math.exp(-0.8) * (1 + 0.8 * dot + 0.32 * dot**2))
            total = total + (kernels[0] - kernels[1]) ** 2
    return total / len(student) ** 2


def naive_hierarchical_context(student: Tensor, teacher: Tensor) -> Tensor:
    """One level of 6 x 6: full size, then means over parts of a 4 x 4, 2 x 2 and 1 x 1 grid."""

    def parts(x: Tensor, count: int) -> Tensor:
        edges = [(math.floor(k * 6 / count), math.ceil((k + 1) * 6 / count)) for k in range(count)]
        rows = [torch.stack([x[:, :, a:b, c:d].mean((2, 3)) for c, d in edges]) for a, b in edges]
        return torch.stack(rows)

    total = (student - teacher).square().mean()
    for weight, count in ((0.5, 4), (0.25, 2), (0.125, 1)):
        total = total + weight * (parts(student, count) - parts(teacher, count)).square().mean()
    return total / 1.875


def naive_noise_contrastive(scores: Tensor, _: Tensor) -> Tensor:
    scores, total = scores.exp(), torch.zeros((), dtype=scores.dtype)
    noise = (scores.shape[1] - 1) / 50
    for row in scores:
        total = total - torch.log(row[0] / (row[0] + noise + 1e-7))
        for negative in row[1:]:
            total = total - torch.log(noise / (negative + noise + 1e-7))
    return total / len(scores)


def naive_dense(student: Tensor, teacher: Tensor) -> Tensor:
    """Student 6 x 6 against teacher 3 x 3 at the epoch where half of the decision is global."""
    losses_of_places = []
    for b in range(len(student)):
        everywhere = teacher[b].mean((1, 2))
        for y in range(3):
            for x in range(3):
                label = (0.5 * teacher[b, :, y, x] + 0.5 * everywhere).argmax()
                logits = student[b, :, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2].mean((1, 2))
                losses_of_places.append(torch.logsumexp(logits, 0) - logits[label])
    return torch.stack(losses_of_places).mean()


def naive_mean_direction(student: Tensor, means: Tensor) -> Tensor:
    return torch.stack([1 - s @ m / (s.norm() * m.norm()) for s, m in zip(student, means, strict=True)]).mean()


Loss = Callable[[Tensor, Tensor], Tensor]
WRITTEN_OUT: dict[str, tuple[Loss, Loss, tuple[int, ...], tuple[int, ...]]] = {
    "correlation_congruence": (losses.correlation_congruence, naive_correlation_congruence, (5, 4), (5, 7)),
    "hierarchical_context": (
        lambda s, t: losses.hierarchical_context([s], [t]), naive_hierarchical_context, (2, 3, 6, 6), (2, 3, 6, 6),
    ),
    "noise_contrastive": (lambda s, _: losses.noise_contrastive(s.exp(), 50), naive_noise_contrastive, (4, 9), (1,)),
    "dense_hard_distillation": (lambda s, t: losses.dense_hard_distillation(s, t, 0.5), naive_dense, (2, 5, 6, 6), (2, 5, 3, 3)),
    "mean_direction": (losses.mean_direction, naive_mean_direction, (5, 4), (5, 4)),
    "mean_squared": (losses.mean_squared, lambda s, t: sum((s - t).flatten() ** 2) / s.numel(), (3, 4, 2, 2), (3, 4, 2, 2)),
}  # fmt: skip


@pytest.mark.parametrize("name", WRITTEN_OUT)
def test_other_losses_equal_their_formula_written_out(name: str) -> None:
    loss, naive, *shapes = WRITTEN_OUT[name]
    generator = torch.Generator().manual_seed(4)
    student, teacher = (torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes)
    student.requires_grad_()
    value, expected = loss(student, teacher), naive(student, teacher)
    assert value.ndim == 0
    assert value.item() == pytest.approx(expected.item(), rel=1e-9)
    ours, theirs = (torch.autograd.grad(each, student)[0] for each in (value, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-10)
    single = loss(student.detach().float(), teacher.float())
    assert single.dtype == torch.float32
    assert single.item() == pytest.approx(expected.item(), rel=1e-4)


def test_every_loss_has_values_to_be_compared_with() -> None:
    from_authors = {
        "logsum_correlation",
        "logsum_difference",
        "layer_norm_smooth_l1",
        "norm_direction",
        "attention_transfer",
        "dist",
    }
    from_authors |= {
        "kl_distillation",
        "decoupled_distillation",
        "normalized_distillation",
        "hard_distillation",
        "soft_distillation",
    }
    assert from_authors | set(WRITTEN_OUT) | {"logsum"} == OF_ROWS  # logsum: the family that logsum_difference belongs to


def test_every_row_has_a_function_and_every_function_a_row() -> None:
    assert set(losses.__all__) - {"Key", "function_of", "register"} == OF_ROWS


LABELS = torch.arange(6) % 4
MEANS = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(8)) + 1


def as_map(features: Tensor) -> Tensor:
    """[B,D] -> [B,D,5,5] that differs from place to place."""
    return features[:, :, None, None] * torch.linspace(-1, 1, 25, dtype=features.dtype).view(5, 5)


VECTOR_LOSSES: dict[str, Loss] = {
    **{name: getattr(losses, name) for name in ("logsum_correlation", "logsum_difference", "logsum", "layer_norm_smooth_l1")},
    **{f"logsum {kind}": partial(losses.logsum, normalization=kind) for kind in ("none", "l2", "layer")},
    **{name: getattr(losses, name) for name in ("mean_squared", "correlation_congruence")},
    "norm_direction": lambda s, t: losses.norm_direction(s, t, MEANS.to(s.dtype)[: len(s)]),
    "mean_direction": lambda s, _: losses.mean_direction(s, MEANS.to(s.dtype)[: len(s)]),
    "attention_transfer": lambda s, t: losses.attention_transfer(s[:, None, None], t[:, None, None]),
    "hierarchical_context": lambda s, t: losses.hierarchical_context(
        [as_map(s), s[:, :, None, None]], [as_map(t), t[:, :, None, None]]
    ),
}
LOGIT_LOSSES: dict[str, Loss] = {
    **{name: getattr(losses, name) for name in ("kl_distillation", "soft_distillation", "hard_distillation", "dist")},
    "decoupled_distillation": lambda s, t: losses.decoupled_distillation(s, t, LABELS[: len(s)]),
    "normalized_distillation": lambda s, t: losses.normalized_distillation(s, t, LABELS[: len(s)]),
    "dense_hard_distillation": lambda s, t: losses.dense_hard_distillation(s[:, :, None, None], t[:, :, None, None], 0.3),
    "noise_contrastive": lambda s, _: losses.noise_contrastive(s.softmax(1), 50),
}
ALL_LOSSES = {**VECTOR_LOSSES, **LOGIT_LOSSES}


def test_every_loss_meets_its_limits() -> None:
    assert {name.split()[0] for name in ALL_LOSSES} == OF_ROWS


@pytest.mark.parametrize("name", ALL_LOSSES)
def test_gradients_by_finite_differences(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(6, 4, dtype=torch.float64, generator=generator) for _ in range(2))
    assert torch.autograd.gradcheck(lambda s: ALL_LOSSES[name](s, teacher), student.requires_grad_())


@pytest.mark.parametrize("name", ALL_LOSSES)
@pytest.mark.parametrize("case", ["identical", "dead teacher channel", "dead student channel", "large", "bfloat16", "float16"])
def test_limits_are_finite(name: str, case: str) -> None:
    student, teacher = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(1))
    if case == "identical":
        student = teacher.clone()
    elif case == "dead teacher channel":
        teacher[:, 2] = 0.0
    elif case == "dead student channel":
        student[:, 2] = 0.0
    elif case == "large":
        student, teacher = student * 1e4, teacher * 1e4
    else:
        student, teacher = (each.to(getattr(torch, case)) for each in (student, teacher))
    student.requires_grad_()
    value = ALL_LOSSES[name](student, teacher)
    value.backward()
    assert value.dtype == torch.float32
    assert value.isfinite()
    assert student.grad is not None
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("name", VECTOR_LOSSES)
def test_no_feature_at_all_is_finite(name: str) -> None:
    student = torch.zeros(6, 4, requires_grad=True)
    value = VECTOR_LOSSES[name](student, torch.zeros(6, 4))
    value.backward()
    assert value.isfinite()
    assert student.grad is not None
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("name", ALL_LOSSES)
def test_a_batch_of_one_is_a_value_or_a_clear_error(name: str) -> None:
    student, teacher = torch.randn(2, 1, 4, generator=torch.Generator().manual_seed(6))
    if name in ("logsum_correlation", "logsum_difference", "logsum", "dist"):
        with pytest.raises(ValueError, match="at least 2 samples"):
            ALL_LOSSES[name](student, teacher)
    else:
        assert ALL_LOSSES[name](student, teacher).isfinite()


def test_correlation_has_the_hand_computed_value() -> None:
    # Channel 0 is equal (corr 1), channel 1 opposite (corr -1), channel 2 dead in the teacher (corr 0): sum = 0 + 2^4 + 1.
    student = torch.tensor([[1.0, 1.0, 3.0], [-1.0, -1.0, 5.0]], dtype=torch.float64)
    teacher = torch.tensor([[2.0, -4.0, 1.0], [-2.0, 4.0, 1.0]], dtype=torch.float64)
    assert losses.logsum_correlation(student, teacher, norm_eps=1e-12).item() == pytest.approx(math.log(17 + 1e-5), abs=1e-9)


def test_difference_is_the_batch_member_of_the_family() -> None:
    student, teacher = torch.randn(2, 8, 5, generator=torch.Generator().manual_seed(2))
    assert losses.logsum_difference(student, teacher) == losses.logsum(student, teacher, 4.0, "batch", eps=0.0, norm_eps=1e-4)
    plain = losses.logsum(student, teacher, power=2.0, normalization="none", eps=0.0)
    assert plain.item() == pytest.approx(math.log((student - teacher).square().sum().item()), rel=1e-6)


def test_mismatched_widths_and_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="project the student first"):
        losses.logsum_correlation(torch.randn(4, 3), torch.randn(4, 5))
    with pytest.raises(ValueError, match="must be batch, l2, layer or none"):
        losses.logsum(torch.randn(4, 3), torch.randn(4, 3), normalization="instance")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least 3 classes"):
        losses.decoupled_distillation(torch.randn(4, 2), torch.randn(4, 2), torch.zeros(4, dtype=torch.long))


@pytest.mark.parametrize(
    ("loss", "student", "teacher", "message"),
    [
        (losses.mean_squared, (4, 3), (4, 5), "project the student first"),
        (losses.mean_direction, (4, 3), (1, 3), "project the student first"),
        (losses.soft_distillation, (4, 3), (1, 3), "project the student first"),
        (losses.correlation_congruence, (4, 3), (1, 3), "student has 4 samples and teacher 1"),
        (lambda s, t: losses.hierarchical_context([s], [t]), (4, 3, 5, 5), (4, 3, 4, 4), "project the student first"),
        (lambda s, t: losses.hierarchical_context([s], [t, t]), (4, 3, 5, 5), (4, 3, 5, 5), "zip"),
        (lambda s, t: losses.dense_hard_distillation(s, t, 0.5), (4, 5, 2, 2), (4, 3, 2, 2), "the same samples and classes"),
        (lambda s, t: losses.dense_hard_distillation(s, t, 0.5), (4, 5, 2, 2), (1, 5, 2, 2), "the same samples and classes"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(loss: Loss, student: tuple[int, ...], teacher: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loss(torch.randn(student), torch.randn(teacher))


def test_what_decides_moves_from_the_place_to_the_whole() -> None:
    generator = torch.Generator().manual_seed(7)
    student, teacher = torch.randn(3, 5, 2, 2, generator=generator), torch.randn(3, 5, 6, 6, generator=generator)
    pooled = F.avg_pool2d(teacher, 3)  # the teacher's map is the larger
    everywhere = teacher.mean((2, 3)).argmax(1)[:, None, None].expand(3, 2, 2)
    torch.testing.assert_close(losses.dense_hard_distillation(student, teacher, 0.0), F.cross_entropy(student, pooled.argmax(1)))
    torch.testing.assert_close(losses.dense_hard_distillation(student, teacher, 1.0), F.cross_entropy(student, everywhere))


@pytest.mark.parametrize("name", ["mean_squared", "correlation_congruence", "hierarchical_context", "attention_transfer"])
def test_distances_vanish_between_the_same(name: str) -> None:
    features = torch.randn(6, 4, generator=torch.Generator().manual_seed(5))
    assert VECTOR_LOSSES[name](features, features.clone()).item() == pytest.approx(0.0, abs=1e-12)


def test_norm_direction_by_hand() -> None:
    # Along the mean and shorter than the teacher: 1 - 3/5. Longer than the teacher, at 60 degrees: 1 - cos 60.
    student = torch.tensor([[3.0, 0.0], [4.0, 4.0 * math.sqrt(3)]])
    teacher = torch.tensor([[0.0, 5.0], [1.0, 0.0]])
    class_means = torch.tensor([[7.0, 0.0], [2.0, 0.0]])
    assert losses.norm_direction(student, teacher, class_means).item() == pytest.approx((0.4 + 0.5) / 2, rel=1e-6)


def test_losses_import_torch_alone() -> None:
    for file in Path(losses.__file__).parent.glob("*.py"):  # the registry, which is no loss, needs rows and errors
        if file.stem in ("registry", "__init__"):
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for module in modules:
                assert module.split(".")[0] in ("torch", "typing", "__future__", "math", "collections") or module.startswith(
                    "deit_kd.losses."
                ), module


@pytest.mark.parametrize("power", [1.0, 4.0, 10.0, 24.0])
def test_no_power_overflows(power: float) -> None:
    """In float32, where features of 1e4 to the tenth exceed what it holds: the value and gradient are float64's."""
    student, teacher = (1e4 * torch.randn(8, 16, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    student.requires_grad_()
    value = losses.logsum(student, teacher, power, normalization="none")
    (gradient,) = torch.autograd.grad(value, student)
    exact = losses.logsum(student.double(), teacher.double(), power, normalization="none")
    (wanted,) = torch.autograd.grad(exact, student)
    torch.testing.assert_close(value.double(), exact, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-9)


def inputs(name: str) -> tuple[Any, ...]:
    """Of a loss: two tensors, and whatever else it compares."""
    torch.manual_seed(0)
    maps = [torch.randn(4, 6, side, side) for side in (4, 2)]
    others: dict[str, tuple[Any, ...]] = {
        "mean_direction": (torch.randn(4, 6), torch.randn(4, 6)),
        "norm_direction": (torch.randn(4, 6), torch.randn(4, 6), torch.randn(4, 6)),
        "attention_transfer": (maps[0], maps[0] + 1),
        "hierarchical_context": (maps, [each + 1 for each in maps]),
        "noise_contrastive": (torch.rand(4, 9), 40),
        "dense_hard_distillation": (maps[0], maps[1], 0.5),
    }
    reads_labels = name in LOGIT_OBJECTIVES and LOGIT_OBJECTIVES[name].reads_labels
    labels = (torch.tensor([0, 1, 5, 2]),) if reads_labels else ()
    return others.get(name, (torch.randn(4, 6), torch.randn(4, 6), *labels))


@pytest.mark.parametrize("name", sorted(OF_ROWS))
def test_a_loss_is_one_graph_and_waits_for_no_value(name: str) -> None:
    """torch.compile does not break it, and tensors without values give a tensor: no mask, no number that Python reads."""
    function, arguments = getattr(losses, name), inputs(name)
    torch._dynamo.reset()
    explained = torch._dynamo.explain(function)(*arguments)
    assert (explained.graph_count, explained.graph_break_count) == (1, 0), explained.break_reasons
    value = function(*tree_map_only(Tensor, lambda tensor: tensor.to("meta"), arguments))
    assert value.shape == ()


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("logsum_correlation", {"power": 4.0}),
        *(("logsum", {"power": 4.0, "normalization": each}) for each in ("l2", "layer", "none")),
    ],
    ids=str,
)
def test_a_loss_of_shares_is_that_of_all_rows(name: str, parameters: dict[str, Any]) -> None:
    """Value and gradient, also far from zero, where sums of squares would cancel; and of equal sides, where all is zero."""
    torch.manual_seed(0)
    steps = by_shares(name, parameters)
    assert steps is not None
    for far, same in ((0.0, False), (1e6, False), (0.0, True)):
        teacher = torch.randn(12, 5, dtype=torch.float64) + far
        student = (teacher.clone() if same else torch.randn(12, 5, dtype=torch.float64) + far).requires_grad_()
        whole = getattr(losses, name)(student, teacher, **parameters)
        of_each = [steps.of_rows(*rows, **parameters) for rows in zip(student.chunk(4), teacher.chunk(4), strict=True)]
        shares = steps.of_shares(torch.stack(of_each), **parameters)
        torch.testing.assert_close(shares, whole, rtol=1e-10, atol=1e-12)
        gradients = [torch.autograd.grad(value, student)[0] for value in (shares, whole)]
        torch.testing.assert_close(*gradients, rtol=1e-6 if far else 1e-9, atol=1e-10)
    assert by_shares("logsum", {"normalization": "batch"}) is None

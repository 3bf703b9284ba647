"""Every loss against the authors' values and gradients, and at its limits."""

from __future__ import annotations

import ast
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from deit_kd import losses

REFERENCE = json.loads((Path(__file__).parent / "reference" / "losses.json").read_text())


def project(e: dict[str, Tensor]) -> Tensor:
    return e["z_s"] @ e["weight"].t() + e["bias"]


def means(e: dict[str, Tensor]) -> Tensor:
    centres = e["class_means"][e["labels"]]
    if "lam" in e:
        centres = e["lam"] * centres + (1 - e["lam"]) * centres.flip(0)
    return centres


def deit(e: dict[str, Tensor], weight: float, distillation: Tensor) -> Tensor:
    return (1 - weight) * F.cross_entropy(e["logits_cls"], e["labels"]) + weight * distillation


# The deit_soft entry divides its KL by all B*K elements, ours by B: a factor of K = 5.
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
    "nkd_gamma1.5_T1": lambda e: losses.normalised_distillation(e["logits_s"], e["logits_t"], e["labels"]),
    "at_p2": lambda e: losses.attention_transfer(e["map_s"], e["map_t"]),
    "deit_hard_alpha0.5_tau1": lambda e: deit(e, 0.5, losses.hard_distillation(e["logits_dist"], e["logits_t"])),
    "deit_soft_alpha0.1_tau3": lambda e: deit(e, 0.1, losses.kl_distillation(e["logits_dist"], e["logits_t"], 3.0) / 5),
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


FEATURE_LOSSES = [losses.logsum_correlation, losses.logsum_difference, losses.logsum, losses.layer_norm_smooth_l1]


@pytest.mark.parametrize("loss", FEATURE_LOSSES)
def test_feature_gradients_by_finite_differences(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(6, 4, dtype=torch.float64, generator=generator) for _ in range(2))
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher), student.requires_grad_())


@pytest.mark.parametrize("loss", FEATURE_LOSSES)
@pytest.mark.parametrize("case", ["identical", "dead teacher channel", "dead student channel", "large", "bfloat16"])
def test_limits_are_finite(loss: Callable[[Tensor, Tensor], Tensor], case: str) -> None:
    student, teacher = torch.randn(2, 8, 5, generator=torch.Generator().manual_seed(1))
    if case == "identical":
        student = teacher.clone()
    elif case == "dead teacher channel":
        teacher[:, 2] = 0.7
    elif case == "dead student channel":
        student[:, 2] = 0.7
    elif case == "large":
        student, teacher = student * 1e4, teacher * 1e4
    else:
        student, teacher = student.bfloat16(), teacher.bfloat16()
    student.requires_grad_()
    value = loss(student, teacher)
    value.backward()
    assert value.dtype == torch.float32
    assert value.isfinite()
    assert student.grad is not None
    assert student.grad.isfinite().all()


def test_correlation_has_the_hand_computed_value() -> None:
    # Channel 0 is equal (corr 1), channel 1 opposite (corr -1), channel 2 dead in the teacher (corr 0): sum = 0 + 2^4 + 1.
    student = torch.tensor([[1.0, 1.0, 3.0], [-1.0, -1.0, 5.0]], dtype=torch.float64)
    teacher = torch.tensor([[2.0, -4.0, 1.0], [-2.0, 4.0, 1.0]], dtype=torch.float64)
    assert losses.logsum_correlation(student, teacher, norm_eps=1e-12).item() == pytest.approx(math.log(17 + 1e-5), abs=1e-9)


def test_difference_is_the_batch_member_of_the_family() -> None:
    student, teacher = torch.randn(2, 8, 5, generator=torch.Generator().manual_seed(2))
    assert losses.logsum_difference(student, teacher) == losses.logsum(student, teacher, 4.0, "batch", eps=0.0, norm_eps=1e-4)
    plain = losses.logsum(student, teacher, power=2.0, normalisation="none", eps=0.0)
    assert plain.item() == pytest.approx(math.log((student - teacher).square().sum().item()), rel=1e-6)


@pytest.mark.parametrize("loss", [losses.logsum_correlation, losses.logsum_difference])
def test_one_sample_is_refused(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    with pytest.raises(ValueError, match="at least 2 samples"):
        loss(torch.randn(1, 4), torch.randn(1, 4))


def test_mismatched_widths_and_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="project the student first"):
        losses.logsum_correlation(torch.randn(4, 3), torch.randn(4, 5))
    with pytest.raises(ValueError, match="must be batch, l2, layer or none"):
        losses.logsum(torch.randn(4, 3), torch.randn(4, 3), normalisation="instance")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least 3 classes"):
        losses.decoupled_distillation(torch.randn(4, 2), torch.randn(4, 2), torch.zeros(4, dtype=torch.long))


def test_logit_losses_stand_huge_logits() -> None:
    generator = torch.Generator().manual_seed(3)
    student, teacher = torch.randn(2, 6, 4, generator=generator) * 1e4
    labels = torch.arange(6) % 4
    student.requires_grad_()
    total = (
        losses.kl_distillation(student, teacher)
        + losses.hard_distillation(student, teacher)
        + losses.decoupled_distillation(student, teacher, labels)
        + losses.dist(student, teacher)
        + losses.normalised_distillation(student, teacher, labels)
    )
    total.backward()
    assert total.isfinite()
    assert student.grad is not None
    assert student.grad.isfinite().all()


def test_norm_direction_by_hand() -> None:
    # Along the mean and shorter than the teacher: 1 - 3/5. Longer than the teacher, at 60 degrees: 1 - cos 60.
    student = torch.tensor([[3.0, 0.0], [4.0, 4.0 * math.sqrt(3)]])
    teacher = torch.tensor([[0.0, 5.0], [1.0, 0.0]])
    class_means = torch.tensor([[7.0, 0.0], [2.0, 0.0]])
    assert losses.norm_direction(student, teacher, class_means).item() == pytest.approx((0.4 + 0.5) / 2, rel=1e-6)


def test_losses_import_torch_alone() -> None:
    for file in Path(losses.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for module in modules:
                assert module.split(".")[0] in ("torch", "typing", "__future__") or module.startswith("deit_kd.losses."), module

"""The step of every recipe on a GPU that is not there (`tests/fake_gpu.py`), and as torch.compile sees it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from deit_kd import recipe as recipes
from deit_kd.distributed.batch_norm import synchronize_batch_norms
from deit_kd.models.build import build_distiller, build_teachers, resolve
from programs import run_script
from small_recipes import COMMON, NAMES, one_of_each_kind, reduced

# What may make the host wait on a step that is not logged, and why.
ALLOWED = {
    "synchronizes: training/nonfinite.py: event.synchronize()": "several GPUs: a byte of the step before, which is there long before",
}
# Most kernel launches of a step at the small size, by phase. They are only lowered.
LAUNCHES = {
    "deit_vkd:tiny": {
        "augmentation": 258,
        "teacher": 182,
        "student and losses": 208,
        "backward and the rest": 284,
        "optimizer": 6,
        "buffers": 9,
    },
    "deit_soft:tiny": {"augmentation": 99, "teacher": 182, "student and losses": 195, "backward and the rest": 248, "optimizer": 6},
    "imagenet_logsum": {"teacher": 92, "student and losses": 170, "backward and the rest": 164, "optimizer": 1, "buffers": 9},
    "cifar100_crd": {"teacher": 85, "student and losses": 170, "backward and the rest": 155, "optimizer": 1, "buffers": 9},
    "finetune:full": {"student and losses": 176, "backward and the rest": 229, "optimizer": 44},
    "quickstart:distilled": {"teacher": 117, "student and losses": 210, "backward and the rest": 269, "optimizer": 6},
}
KINDS = one_of_each_kind()


def rehearse(names: Sequence[str], *options: object) -> list[dict[str, Any]]:
    done = run_script("tests/fake_gpu.py", *names, *options)
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert ("so few that it may wait for its host" in done.stdout) == ("--processes" in options)
    assert [each["recipe"] for each in found] == list(names), done.stderr[-2000:]
    return found


def assert_right(found: dict[str, Any]) -> None:
    """No tensors on two devices, no shape that depends on values, no wait but those that are allowed, a gradient for every parameter."""
    assert "error" not in found, found
    assert {what: number for what, number in found["waits"].items() if what not in ALLOWED} == {}, found["recipe"]
    assert found["without_gradient"] == [], found["recipe"]


def test_one_recipe_of_each_kind_on_a_gpu() -> None:
    for found in rehearse(KINDS):
        assert_right(found)
        for phase, most in LAUNCHES.get(found["recipe"], {}).items():
            assert found["launches"][phase] <= most, (found["recipe"], phase)


@pytest.mark.slow
def test_one_recipe_of_each_kind_as_the_first_of_eight_with_accumulation_and_an_average() -> None:
    for found in rehearse(KINDS, "--processes", 8, "--device-batch-size", 4, "ema_decay=0.9"):
        assert_right(found)


def test_a_teacher_that_is_read_from_a_cache() -> None:
    (found,) = rehearse(["quickstart:distilled"], "--cached")
    assert_right(found)
    assert "teacher" not in found["launches"]


@pytest.mark.slow
def test_every_recipe_on_a_gpu() -> None:
    for found in rehearse([name for name in NAMES if name not in KINDS]):
        assert_right(found)


def one_of_each_pair_of_networks() -> list[str]:
    """By student, teachers and projectors."""
    pairs: dict[Any, str] = {}
    for name in KINDS:
        recipe = recipes.load(name, reduced(name))
        parts = [(each.teacher.name, each.projector.kind) for each in recipe.distillations()]
        pairs.setdefault((recipe.student.name, *sorted(parts)), name)
    return list(pairs.values())


@pytest.fixture
def eight_processes() -> Iterator[None]:
    """This is the first; the others answer nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    yield
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.usefixtures("eight_processes")
@pytest.mark.parametrize("name", one_of_each_pair_of_networks())
def test_networks_are_one_graph_for_the_compiler(name: str) -> None:
    """Teachers, and the student with projectors and batch norms over all processes."""
    recipe = resolve(recipes.load(name, [*COMMON, *reduced(name)]))
    teachers = build_teachers(recipe, 10)
    distiller = build_distiller(recipe, 10, teachers, torch.arange(40) % 10)
    synchronize_batch_norms(distiller)
    images = torch.randn(8, 3, recipe.data.img_size, recipe.data.img_size)
    taps = [
        teacher(images).tapped.get(each.distill.teacher_tap) if each.distill.feature_weight else None  # type: ignore[arg-type]
        for teacher, each in zip(teachers, recipe.distillations(), strict=True)
    ]
    for compute, arguments in [(distiller.train()._compute, (images, taps)), *((each._compute, (images,)) for each in teachers)]:
        torch._dynamo.reset()
        explained = torch._dynamo.explain(compute)(*arguments)
        assert (explained.graph_count, explained.graph_break_count) == (1, 0), explained.break_reasons

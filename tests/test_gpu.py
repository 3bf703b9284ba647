"""What only a GPU can show: `bash launch/test.sh -m gpu`. DEIT_KD_TEST_DEVICE=cpu tries the same tests on a CPU, where they show nothing new."""

from __future__ import annotations

import copy
import json
import math
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from conftest import SMALL
from deit_kd import recipe as recipes
from deit_kd.data.decode import as_pixels
from deit_kd.data.loader import _seeded
from deit_kd.data.on_device.augment import Finish
from deit_kd.data.on_device.draws import WorkerTransform, make_plan
from deit_kd.distributed.batch_norm import synchronize_batch_norms
from deit_kd.models.projectors.vectors import Orthonormal
from deit_kd.training import loop
from deit_kd.training.metrics import read_metrics
from deit_kd.training.optim import build_optimizer
from objectives import OBJECTIVES
from sections import optimizing
from small_recipes import COMMON, one_of_each_kind, reduced

DEVICE = torch.device(os.environ.get("DEIT_KD_TEST_DEVICE", "cuda"))
ON_GPU = DEVICE.type == "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(ON_GPU and not torch.cuda.is_available(), reason="torch finds no GPU"),
]
needs_a_gpu = pytest.mark.skipif(not ON_GPU, reason="a CPU has nothing of it")
QUICK = [*SMALL, "teacher.name=resnet10t", "teacher.weights=random", "run.log_every_steps=1", "ema_decay=0.9"]
Cli = Callable[..., tuple[int, str]]


@pytest.fixture
def train(train_cli: Cli, fashion_folder: Path, tmp_path: Path) -> Callable[..., Path]:
    """Trains the quick start on a few images, and gives the run folder."""

    def run(name: str, steps: int, *more: object, recipe: str = "quickstart") -> Path:
        words = [
            "--device",
            DEVICE.type,
            "--recipe",
            recipe,
            "--data",
            fashion_folder,
            "--output",
            tmp_path / name,
            "--max-steps",
            steps,
        ]
        code, printed = train_cli(*words, *(QUICK if recipe == "quickstart" else []), *more)
        assert code == 0, printed
        return tmp_path / name

    return run


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(folder) if line["kind"] == "train"]


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "student/model.safetensors")


def far_apart(one: Path, other: Path) -> float:
    """The largest relative difference of a tensor of two students."""
    ours, theirs = weights(one), weights(other)
    return max(((ours[name] - theirs[name]).norm() / theirs[name].norm().clamp_min(1e-6)).item() for name in theirs)


@pytest.mark.parametrize("name", one_of_each_kind())
def test_one_recipe_of_each_kind_trains_eagerly(name: str, train: Callable[..., Path]) -> None:
    folder = train("run", 2, *COMMON, *reduced(name), "run.compile=false", recipe=name)
    assert all(map(math.isfinite, losses(folder)))
    assert len(losses(folder)) == 2


@pytest.mark.parametrize("name", ["deit_vkd:tiny", "imagenet_logsum", "cifar100_nd:resnet32x4_resnet8x4_dkd"])
def test_compiled_it_is_one_graph_with_the_same_losses(name: str, train: Callable[..., Path]) -> None:
    small = [*COMMON, *reduced(name), "run.precision=no"]
    eager = train("eager", 2, *small, "run.compile=false", recipe=name)
    compiled = train("compiled", 2, *small, "run.compile=true", recipe=name)
    assert losses(compiled) == pytest.approx(losses(eager), rel=1e-2)
    (line,) = [line for line in read_metrics(compiled) if line["kind"] == "compiled"]
    assert line["graph_breaks"] == 0


def test_a_run_in_float32_is_the_cpus(train: Callable[..., Path], train_cli: Cli, fashion_folder: Path, tmp_path: Path) -> None:
    exact = ["run.precision=no", "run.speed=plain", "run.augment_on=cpu"]
    here = train("here", 4, *exact)
    words = ["--device", "cpu", "--recipe", "quickstart", "--data", fashion_folder, "--output", tmp_path / "cpu", "--max-steps", 4]
    code, printed = train_cli(*words, *QUICK, *exact)
    assert code == 0, printed
    assert losses(here) == pytest.approx(losses(tmp_path / "cpu"), rel=1e-3)
    assert far_apart(here, tmp_path / "cpu") < 0.05


@pytest.mark.parametrize("precision", ["no", "bf16", *(["fp16"] if ON_GPU else [])])
def test_a_run_that_was_stopped_goes_on(precision: str, train: Callable[..., Path]) -> None:
    """As exactly as the kernels of the device are; in fp16 with the scale of the loss."""
    settings = [f"run.precision={precision}", "run.save_every_steps=2", "run.speed=plain"]
    whole = train("whole", 4, *settings)
    train("parts", 2, *settings)
    parts = train("parts", 4, *settings)
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-3)
    assert far_apart(parts, whole) < 0.05


def test_the_teacher_is_folded_laid_out_and_cast(train: Callable[..., Path]) -> None:
    speed = json.loads((train("run", 2, "run.precision=bf16", "run.compile=false") / "run.json").read_text())["speed"]
    (teacher,) = speed["teachers"]
    assert teacher["batch_norms_folded"] == 14
    assert teacher["layout"] in ("contiguous", "channels_last")
    assert teacher["weights"] in ("bfloat16", "float32")
    assert teacher["feature_error"] < 0.05


@needs_a_gpu
@pytest.mark.parametrize("name", ["deit_vkd:tiny", "imagenet_logsum", "cifar100_crd", "cifar100_nd:resnet32x4_resnet8x4_dkd"])
def test_steps_that_are_not_logged_wait_for_nothing(name: str, train: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """torch itself warns of each wait."""
    backward, waits = loop._backward, list[str]()

    def watched(*arguments: Any) -> Any:
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                return backward(*arguments)
            finally:
                torch.cuda.set_sync_debug_mode("default")
                waits.extend(f"{each.filename}:{each.lineno}" for each in caught if "synchroniz" in str(each.message))

    monkeypatch.setattr(loop, "_backward", watched)
    small = [*COMMON[:-1], *reduced(name), "run.compile=false", "run.log_every_steps=9", "data.train_images=auto"]
    train("run", 4, *small, recipe=name)
    assert waits == []


@pytest.fixture(scope="module")
def squares(photos: list[tuple[Path, int]]) -> list[Image.Image]:
    return [Image.open(file).convert("RGB").resize((112, 112)) for file, _ in photos]


@pytest.mark.parametrize(("policy", "jitter"), [("rand-m9-n4-p0.9-mstd0.5", 0), ("3a", 0.3)])
def test_augmentation_is_the_cpus(policy: str, jitter: float, squares: list[Image.Image]) -> None:
    """To the bit, but for what rotation and shear round."""
    more = [
        f"augmentation.auto_augment={policy}",
        "data.img_size=112",
        "augmentation.random_erasing=0.5",
        f"augmentation.color_jitter={jitter}",
    ]
    recipe = recipes.load("deit_ti", [*more, "augmentation.interpolation=random"])
    worker, drawn = WorkerTransform(recipe.data, recipe.augmentation, False), []
    for seed, image in enumerate(squares * 4):
        with _seeded(seed):
            drawn.append(worker(as_pixels(image)))
    images, plan = torch.stack([each.image for each in drawn]), make_plan(drawn)
    here, there = (
        Finish(recipe.data, device, decodes=False)(images.clone(), plan).cpu() for device in (DEVICE, torch.device("cpu"))
    )
    levels = (here - there).abs() * torch.tensor(recipe.data.std).view(3, 1, 1) * 255
    assert (levels > 0.01).float().mean() < 1e-3
    assert levels.mean() < 0.01


@needs_a_gpu
def test_jpegs_are_decoded_on_the_device(train: Callable[..., Path], photo_folder: Path) -> None:
    photos = ["--data", photo_folder, "data.img_size=64", "global_batch_size=8", "run.decode_on=device", "run.augment_on=device"]
    folder = train("run", 2, *photos, "data.num_classes=auto")
    assert json.loads((folder / "run.json").read_text())["decoded_on"] == "cuda"
    assert all(map(math.isfinite, losses(folder)))


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_skipped_first_step_changes_nothing(name: str) -> None:
    module = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)).to(DEVICE)
    base = "cifar100_kd" if name == "sgd" else "quickstart"
    optimizer: Any = build_optimizer(*optimizing(recipes.load(base, [f"optim.name={name}", "optim.weight_decay_on=all"])), module)
    before = [each.detach().clone() for each in module.parameters()]
    for each in module.parameters():
        each.grad = torch.full_like(each, float("nan"))
    optimizer.found_inf = torch.ones((), device=DEVICE)
    optimizer.step()
    del optimizer.found_inf
    assert all(map(torch.equal, before, module.parameters()))
    for each in module.parameters():
        each.grad = torch.ones_like(each)
    optimizer.step()
    assert all(each.isfinite().all() for each in module.parameters())


def test_an_orthonormal_projector_is_orthonormal() -> None:
    projector = Orthonormal(192, 1024).to(DEVICE)
    q = projector.matrix().double()
    assert (q.T @ q - torch.eye(192, device=DEVICE, dtype=torch.float64)).abs().max() < 1e-5


@pytest.fixture
def one_process() -> Iterator[None]:
    dist.init_process_group("nccl" if ON_GPU else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_batch_norms_over_processes_are_batch_norms(layout: torch.memory_format) -> None:
    """Their kernels on one process: outputs, gradients and running statistics."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4)).to(DEVICE)
    ours = synchronize_batch_norms(copy.deepcopy(plain))
    images = torch.randn(6, 3, 16, 16, device=DEVICE).to(memory_format=layout)
    for network in (ours, plain):
        network(images).square().mean().backward()
    for left, right in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(left.grad, right.grad, rtol=1e-3, atol=1e-5)
    for one, other in zip(ours.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_class_means_are_the_same_twice(tmp_path: Path, fashion_folder: Path) -> None:
    from deit_kd.cli import main

    for name in ("one", "two"):
        words = ["--data", str(fashion_folder), "--output", str(tmp_path / f"{name}.safetensors"), "--device", DEVICE.type]
        main(["class-means", "quickstart", *words, *SMALL, *OBJECTIVES["nd"], "data.num_classes=auto"])
    first, second = (load_file(tmp_path / f"{name}.safetensors")["class_means"] for name in ("one", "two"))
    assert torch.equal(first, second)


def test_the_verbs_work_on_the_device(train: Callable[..., Path], fashion_folder: Path, tmp_path: Path) -> None:
    from deit_kd.cli import main

    folder = train("run", 2)
    main(["evaluate", str(folder), "--data", str(fashion_folder), "--output", str(tmp_path / "report"), "--device", DEVICE.type])
    report = json.loads((tmp_path / "report/report.json").read_text())
    assert report["images"] == 40
    assert np.isfinite(report["nll"])

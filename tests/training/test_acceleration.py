"""What makes a run fast changes its numbers by what is reported at most, and never makes the host wait."""

from __future__ import annotations

import dataclasses
import json
import platform
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import SMALL, python_calls
from deit_kd import recipe as recipes
from deit_kd.data import LoaderConfig, TrainLoader, open_source
from deit_kd.data.on_device.augment import choose_augmentation
from deit_kd.errors import UserError
from deit_kd.models import Teacher, load_teacher
from deit_kd.models.folding import fold_batch_norms
from deit_kd.recipe import Run
from deit_kd.tasks.classification import Classification
from deit_kd.training import acceleration, loop
from deit_kd.training.metrics import read_metrics

RANDOM_TEACHER = ("teacher.name=resnet18", "teacher.weights=random")  # knows no names of classes
Cli = Callable[..., tuple[int, str]]
CNNS = {  # name: batch norms that read a convolution alone, of all
    "resnet18": (20, 20),
    "regnety_002": (44, 44),
    "tf_efficientnet_lite0": (49, 49),  # convolutions that pad by themselves
    "densenet121": (59, 121),
    "repvgg_a0": (44, 61),
    "convnext_atto": (0, 0),
}


def cnn(name: str, precision: str = "auto") -> Teacher:
    """With the running statistics of no fresh network."""
    torch.manual_seed(0)
    teacher = load_teacher(name, 10, weights="random", precision=precision, folds_first=True)
    for norm in norms(teacher):
        norm.running_mean.normal_(0, 0.1)
        norm.running_var.uniform_(0.5, 1.5)
        norm.weight.data.uniform_(0.5, 1.5)
    return teacher


def norms(teacher: Teacher) -> list[Any]:
    return [each for each in teacher.modules() if isinstance(each, nn.BatchNorm2d)]


@pytest.mark.parametrize("name", CNNS)
def test_folding_changes_rounding_alone(name: str) -> None:
    teacher, images = cnn(name), torch.randn(2, 3, 64, 64)
    folded, of_all = CNNS[name]
    before, count = teacher(images), len(norms(teacher))
    (quick,) = acceleration.prepare(Run(), [teacher], lambda: images, Accelerator(cpu=True)).teachers
    after = teacher(images)
    assert (quick.batch_norms_folded, count) == (folded, of_all)
    assert len(norms(teacher)) == of_all - folded
    for ours, reference, told in (
        (after.features, before.features, quick.feature_error),
        (after.logits, before.logits, quick.logit_error),
    ):
        error = ((ours - reference).norm() / reference.norm()).item()
        assert error < 1e-5
        assert error == pytest.approx(told, abs=1e-7)


class ReadTwice(nn.Module):
    """A network whose convolution is read past its norm, so that folding is wrong."""

    num_features, num_classes, feature_info = 8, 3, ()
    pretrained_cfg: dict[str, Any] = {}

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 3)
        nn.init.constant_(self.norm.running_var, 4.0)

    def forward_features(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return x + self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = x.mean(dim=(2, 3))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        return self.head


def test_what_changes_too_much_is_not_done() -> None:
    torch.manual_seed(0)
    info = dataclasses.replace(load_teacher("resnet18", 3, weights="random").info, name="read_twice")
    teacher, images = Teacher(ReadTwice().eval(), info), torch.randn(2, 3, 8, 8)
    before = teacher(images).logits
    (quick,) = acceleration.prepare(Run(), [teacher], lambda: images, Accelerator(cpu=True)).teachers
    assert (quick.batch_norms_folded, quick.layout) == (0, "contiguous")
    assert torch.equal(teacher(images).logits, before)
    with pytest.raises(UserError, match="teacher read_twice: folded .* outputs change by 0.*set run.fold_teacher=false"):
        acceleration.prepare(Run(fold_teacher=True), [teacher], lambda: images, Accelerator(cpu=True))


def test_bfloat16_weights_are_no_less_exact_than_autocast() -> None:
    teacher, images = cnn("regnety_002"), torch.randn(2, 3, 64, 64)
    exact = teacher(images).features
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    with accelerator.autocast():
        theirs = ((teacher(images).features - exact).norm() / exact.norm()).item()
    (quick,) = acceleration.prepare(Run(), [teacher], lambda: images, accelerator).teachers
    assert quick.weights == "bfloat16"
    assert {p.dtype for p in teacher.parameters()} == {torch.bfloat16}
    assert 1e-4 < quick.feature_error < 1.5 * theirs
    assert teacher(images).features.dtype == torch.float32


def test_half_precision_is_rounded_once_after_folding() -> None:
    images, errors = torch.randn(2, 3, 64, 64), {}
    for dtype in (torch.bfloat16, torch.float16):
        rounded, teacher = cnn("regnety_002"), cnn("regnety_002", str(dtype).removeprefix("torch."))
        exact = teacher(images).features
        rounded.use(dtype)
        fold_batch_norms(rounded.model, partial(rounded.probe, images[:1]))
        twice = ((rounded(images).features - exact).norm() / exact.norm()).item()
        (quick,) = acceleration.prepare(Run(), [teacher], lambda: images, Accelerator(cpu=True)).teachers
        assert (quick.batch_norms_folded, f"torch.{quick.weights}") == (44, str(dtype))
        assert ((teacher(images).features - exact).norm() / exact.norm()).item() == pytest.approx(quick.feature_error, rel=1e-3)
        assert quick.feature_error < twice
        errors[dtype] = quick.feature_error
    assert errors[torch.float16] < errors[torch.bfloat16] / 3


def test_a_teacher_beyond_float16_is_refused() -> None:
    teacher, images = cnn("resnet18", "float16"), torch.randn(2, 3, 64, 64)
    teacher.model.fc.weight.mul_(1e6)
    with pytest.raises(UserError, match="teacher .*: its outputs are not finite in half precision; set teacher.precision=float32"):
        acceleration.prepare(Run(), [teacher], lambda: images, Accelerator(cpu=True))


def test_plain_is_what_timm_builds() -> None:
    teacher, images = cnn("resnet18"), torch.randn(2, 3, 64, 64)
    accelerated = acceleration.prepare(Run(speed="plain"), [teacher], lambda: images, Accelerator(cpu=True))
    assert accelerated == acceleration.Acceleration(
        (acceleration.TeacherAcceleration(0, "contiguous", "float32", 0.0, 0.0),), None, False
    )
    assert len(norms(teacher)) == 20


@pytest.mark.slow
def test_freed_memory_is_used_again() -> None:
    """Large tensors of one step after another touch no new page, where they otherwise touch all of theirs."""
    code = """
import resource, torch
from deit_kd.training.acceleration import keep_memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    kept = [torch.zeros(60 << 18) for _ in range(3)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
before = min(faults() for _ in range(6))
print(before, keep_memory(), min(faults() for _ in range(6)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, told, after = done.stdout.split()
    if platform.libc_ver()[0] == "glibc":
        assert told == "True"
        assert int(before) > 100 * int(after) + 10_000
    else:
        assert told == "False"


def test_memory_is_kept_on_a_cpu_unless_told_otherwise() -> None:
    glibc = platform.libc_ver()[0] == "glibc"
    for run, kept in ((Run(), glibc), (Run(keep_memory=False), False), (Run(speed="plain"), False)):
        assert acceleration.prepare(run, [], lambda: torch.empty(0), Accelerator(cpu=True)).keeps_memory is kept
    if glibc:
        assert acceleration.prepare(
            Run(speed="plain", keep_memory=True), [], lambda: torch.empty(0), Accelerator(cpu=True)
        ).keeps_memory


def test_what_is_folded_folds_no_more() -> None:
    model, image = cnn("resnet18").model, torch.randn(1, 3, 64, 64)
    assert [fold_batch_norms(model, lambda: model(image)) for _ in range(2)] == [20, 0]


def losses_of(folder: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(folder) if line["kind"] == "train"]


@pytest.mark.slow
def test_a_compiled_run_is_the_plain_run(train_cli: Cli, fashion_folder: Path, tmp_path: Path) -> None:
    """Loss by loss and with drop path, under the same names, without a break in a graph; what was done is recorded."""
    common = [
        "--recipe",
        "quickstart",
        "--data",
        fashion_folder,
        "--max-steps",
        3,
        *SMALL,
        "teacher.name=resnet10t",  # compiling takes time by the layer
        "teacher.weights=random",
        "student.model_args.depth=1",
        "run.log_every_steps=1",
        "student.drop_path=0.2",
    ]
    for name, override in (("plain", "run.speed=plain"), ("compiled", "run.compile=true")):
        code, printed = train_cli(*common, "--output", tmp_path / name, override)
        assert code == 0, printed
    assert losses_of(tmp_path / "compiled") == pytest.approx(losses_of(tmp_path / "plain"), rel=1e-4)
    (line,) = [line for line in read_metrics(tmp_path / "compiled") if line["kind"] == "compiled"]
    assert line["graphs"] >= 4  # teacher, student, two losses
    assert line["graph_breaks"] == 0
    recorded = json.loads((tmp_path / "compiled" / "run.json").read_text())["speed"]
    assert recorded["compiled"] == "default"
    assert recorded["teachers"][0]["batch_norms_folded"] == 14
    assert line["recompilations"] <= 3  # evaluation's batches: two sizes of the student, a second of the teacher
    card = (tmp_path / "compiled" / "student" / "README.md").read_text()
    assert "| Run | 14 batch norms folded, channels_last, weights in float32, compiled; features differ by" in card
    plain, compiled = (
        load_file(tmp_path / name / "checkpoints" / "step_00000003" / "module.safetensors") for name in ("plain", "compiled")
    )
    assert plain.keys() == compiled.keys()


@contextmanager
def counted_waits() -> Iterator[Counter[str]]:
    """Counts what would make the host wait for a GPU: numbers that Python reads of tensors."""
    waits: Counter[str] = Counter()

    class Reads(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func in (
                torch.ops.aten._local_scalar_dense.default,
                torch.ops.aten.nonzero.default,
                torch.ops.aten.is_nonzero.default,
            ):
                waits[str(func)] += 1
            return func(*args, **(kwargs or {}))

    names = ("item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__")
    originals = {name: getattr(Tensor, name) for name in names}

    def counting(name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **kwargs: Any) -> Any:
            waits[name] += 1
            return originals[name](*arguments, **kwargs)

        return call

    for name in names:
        setattr(Tensor, name, counting(name))
    try:
        with Reads():
            yield waits
    finally:
        for name, original in originals.items():
            setattr(Tensor, name, original)


def test_steps_that_are_not_logged_read_nothing_from_the_device(
    train_cli: Cli, fashion_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, with mixing, erasing, clipping, EMA and a coupled loss; and a step asks its teacher once."""
    fit, original, asked, seen = loop.fit, Classification.compute_terms, Counter[str](), []
    monkeypatch.setattr(loop, "fit", lambda *given, **values: fit(*given, **{**values, "reads_every_step": False}))
    forward = Teacher.forward

    def teach(teacher: Teacher, images: Tensor) -> Any:
        asked["teacher"] += 1
        return forward(teacher, images)

    monkeypatch.setattr(Teacher, "forward", teach)
    overrides = [
        *SMALL,
        *RANDOM_TEACHER,
        "run.workers=1",
        "run.log_every_steps=6",
        "ema_decay=0.9",
        "augmentation.mixup=0.8",
        "augmentation.cutmix=1.0",
    ]
    overrides += [
        "augmentation.mixup_prob=1.0",
        "augmentation.mixup_switch_prob=0.5",
        "augmentation.random_erasing=0.5",
        "optim.clip_grad=1.0",
    ]
    with counted_waits() as waits:

        def compute_terms(*arguments: Any) -> dict[str, Tensor]:
            seen.append((sum(waits.values()), asked["teacher"]))
            return original(*arguments)

        monkeypatch.setattr(Classification, "compute_terms", compute_terms)
        code, printed = train_cli(
            "--recipe", "quickstart", "--data", fashion_folder, "--output", tmp_path / "run", "--max-steps", 8, *overrides
        )
    assert code == 0, printed
    (first, asked_first), *_, (last, asked_last) = seen[1:6]  # the beginnings of the steps 2 to 6
    assert (last - first, asked_last - asked_first) == (0, 4)
    assert seen[6][0] > last, "the sixth step is logged"


@pytest.mark.parametrize("on", ["cpu", "device"])
def test_the_main_thread_does_nothing_for_each_image(on: str, fashion_folder: Path) -> None:
    """The calls of this package that one batch takes are as many for twice the images, up to kinds of operations not drawn before."""
    overrides = [f"run.augment_on={on}", "augmentation.auto_augment=rand-m9-mstd0.5-inc1", "augmentation.random_erasing=0.5"]
    recipe = recipes.load("quickstart", [*overrides, "augmentation.mixup=0.8", "augmentation.mixup_prob=1.0"])
    cpu, calls = torch.device("cpu"), []
    for size in (60, 120):
        batches = TrainLoader(
            open_source("image_folder", fashion_folder, "train"),
            choose_augmentation(recipe.data, recipe.augmentation, recipe.run, cpu),
            recipe.augmentation,
            LoaderConfig(cpu, 1, 0, 1, "refuse", print),
            num_classes=10,
            seed=5,
            global_batch_size=size,
            accumulation_steps=1,
        ).epoch(0)
        next(batches)
        with python_calls() as counted:
            batch = next(batches)
        assert len(batch.images) == size
        calls.append(Counter({place: n for place, n in counted.items() if "deit_kd" in place[0]}))
    assert sum(calls[0].values()) > 0
    assert sum(calls[1].values()) - sum(calls[0].values()) <= (20 if on == "device" else 0), calls


def test_the_teacher_is_compiled_alone_if_that_is_asked_for() -> None:
    teachers, example = [cnn("resnet18")], torch.randn(2, 3, 32, 32)
    run = Run(compile=False, compile_teacher="reduce-overhead")
    assert acceleration.prepare(run, teachers, lambda: example, Accelerator(cpu=True)).compiled is None
    assert teachers[0]._compiled is not None
    teachers = [cnn("resnet18")]
    run = Run(compile=True, compile_teacher=False)
    assert acceleration.prepare(run, teachers, lambda: example, Accelerator(cpu=True)).compiled == "default"
    assert teachers[0]._compiled is None


def test_cuda_graphs_of_the_student_are_refused_where_gradients_accumulate(
    train_cli: Cli, fashion_folder: Path, tmp_path: Path
) -> None:
    words = ["--recipe", "quickstart", "--data", fashion_folder, *SMALL, "--output", tmp_path, "--device-batch-size", 8]
    code, printed = train_cli(*words, "teacher.name=resnet10t", "teacher.weights=random", "run.compile=reduce-overhead")
    assert code == 2, printed
    assert "run.compile=reduce-overhead: its CUDA graphs write over gradients that micro-batches accumulate; use" in printed

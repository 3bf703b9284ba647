"""Counts of every recipe at full size, against published ones."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

from deit_kd import cli
from deit_kd import recipe as recipes
from deit_kd.errors import UserError
from deit_kd.models.build import build_distiller, build_teachers, make_plan
from deit_kd.models.summary import describe
from deit_kd.profiling import forecast, roofline
from deit_kd.profiling.devices import GPUS, Device, find_device
from deit_kd.profiling.forecast import count_step, training_of
from deit_kd.profiling.operations import Operation, StepCost
from sections import described

# parameters and GMACs: student (method's authors, timm), projector, RegNetY-160 (timm's results table)
PUBLISHED = {
    "deit_ti": (6_633_104, 2.429, 583_632),
    "deit_s": (23_797_520, 5.917, 1_164_240),
    "deit_ti_plain": (5_910_800, 1.261, 583_632),
    "deit_s_plain": (22_436_432, 4.624, 1_164_240),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipes_of_the_paper_are_planned_at_full_size(name: str) -> None:
    recipe = recipes.load(name)
    plan = make_plan(recipe, None)
    parameters, gmacs, projector = PUBLISHED[name]
    assert (plan.student_parameters, plan.projector_parameters, plan.teacher_parameters) == (parameters, projector, 83_590_140)
    assert plan.student_gmacs == pytest.approx(gmacs, abs=0.002)
    assert plan.teacher_gmacs == pytest.approx(15.91, abs=0.005)
    width = 384 if name.startswith("deit_s") else 192
    line = f"student pooled [B, {width}] -> linear -> [B, 3024] | logsum_correlation | regnety_160.deit_in1k pooled [B, 3024]"
    assert plan.taps == (line,)
    assert ("teacher features", "[B, 3024]") in plan.shapes
    text = describe(plan, 1_281_167, **described(recipe))
    assert recipe.student.name in text
    assert f"{1_281_167 // recipe.global_batch_size * recipe.epochs:,} steps" in text


def test_compute_of_a_run_by_hand() -> None:
    recipe = recipes.load("deit_ti_plain", ["epochs=1", "optim.warmup_epochs=0"])
    plan = make_plan(recipe, 1000)
    # a step is 3 student forwards and 1 teacher forward, 2 operations a multiply-accumulate
    assert plan.training_gflop_per_image == pytest.approx(2 * (3 * 1.261 + 15.912), rel=1e-3)
    assert f"{plan.training_gflop_per_image * 256 * 4 / 1e6:,.3g} PFLOP" in describe(plan, 1024, **described(recipe))


SOME = ("quickstart:distilled", "deit_logsum:tiny", "cifar100_kd")
FILES = [
    next(n for n in recipes.names() if n.partition(":")[0] == file)
    for file in sorted({n.partition(":")[0] for n in recipes.names()})
]


@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name in SOME else pytest.mark.slow) for name in FILES])
def test_every_recipe_dry_runs_from_the_command_line(
    name: str, train_cli: Callable[..., tuple[int, str]], photo_folder: Path
) -> None:
    data = [] if name.startswith("quickstart") and name != "quickstart_teacher" else ["--data", photo_folder]
    other = name == "quickstart_teacher" or name.startswith("cifar100")
    overrides = ["data.source=image_folder", "data.num_classes=auto", "data.train_images=auto"] if other else []
    recipe = recipes.load(name)
    if name.startswith("cifar100") and recipe.teacher:
        overrides.append("teacher.weights=random")  # its teacher is a run of cifar100_teacher
    code, printed = train_cli("--recipe", name, "--dry-run", *data, *overrides)
    assert "steps over" in printed
    fetched = [
        distillation.teacher.name
        for distillation in recipe.distillations()
        if ".tv_in1k" in (n := distillation.teacher.name) or "deit" in n or "swin" in n
    ]
    assert code == (2 if fetched else 0), printed  # tests run without the hub
    assert not fetched or "its weights are not in the hub's cache and cannot be fetched" in printed


@cache
def counted(name: str) -> StepCost:
    return count_step(recipes.load(name), None, half=True)


def test_a_step_is_counted_operation_by_operation() -> None:
    """RegNetY-160 and DeiT-Ti at 224 px: exact FLOPs by hand, bytes against a count of eager bf16 operations made apart from this one."""
    work = counted("deit_ti_plain")

    def total(operations: tuple[Operation, ...], field: str) -> float:
        return float(sum(getattr(each, field) for each in operations))

    assert total(work.teacher, "flops") == pytest.approx(31.82e9, rel=1e-3)  # 2 x 15.91 GMAC
    assert total(work.teacher, "bytes_per_image") == pytest.approx(339.5e6, rel=0.01)
    assert total(work.student_forward, "flops") == pytest.approx(2 * (1.261e9 + 192 * 3024), rel=1e-3)
    # twice the forward, less the gradient of the images that nobody asks for, and attention's backward makes its scores again
    images, scores = 2 * 196 * 768 * 192, 12 * 2 * 3 * 198**2 * 64
    backward = 2 * total(work.student_forward, "flops") - images + scores
    assert total(work.student_backward, "flops") == pytest.approx(backward, rel=1e-3)
    # 128 MB with fused attention in pure bf16; autocast adds casts and keeps norms and the residual stream in float32
    moved = total(work.student_forward, "bytes_per_image") + total(work.student_backward, "bytes_per_image")
    assert 128e6 < moved < 1.25 * 128e6
    convolutions = [each for each in work.teacher if each.name == "aten.convolution"]
    assert total(tuple(convolutions), "bytes_per_image") == pytest.approx(93.3e6, rel=0.01)
    assert work.trained_parameters == 5_910_800 + 583_632
    assert work.teacher_parameters == 83_590_140


def test_bytes_kept_for_backward_are_those_of_a_real_step() -> None:
    recipe = recipes.load("quickstart")
    work = count_step(recipe, 10, half=False)
    teachers = build_teachers(recipe, 10)
    distiller = build_distiller(recipe, 10, teachers).train()
    parameters = {p.untyped_storage().data_ptr() for p in distiller.parameters()}
    kept: dict[int, torch.Tensor] = {}  # keeps them alive, so that no address comes twice

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in parameters:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    images = torch.randn(6, 3, 28, 28)
    taught = teachers[0](images).tapped["pooled"]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        distiller(images, [taught])
    real = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    assert work.fixed_saved_bytes + 6 * work.saved_bytes_per_image == pytest.approx(real, rel=0.01)


def test_a_folded_teacher_moves_less() -> None:
    """247.5 MB an image in half precision without its batch norms, by the same count as 339.5 with them."""
    folded = count_step(recipes.load("deit_ti_plain"), None, half=False)
    assert sum(each.bytes_per_image for each in folded.teacher) / 2 == pytest.approx(247.5e6, rel=0.01)
    assert not any("batch_norm" in each.name for each in folded.teacher)


def test_more_gpus_take_fewer_hours_and_never_fewer_gpu_hours() -> None:
    recipe = recipes.load("deit_ti_plain", ["global_batch_size=1024"])
    plan, work = make_plan(recipe, None), counted("deit_ti_plain")
    rows = [
        roofline.predict(training_of(recipe), plan, work, GPUS["h200"], train_images=1_281_167, val_images=50_000, gpus=n)
        for n in (1, 2, 4, 8)
    ]
    hours, device_hours = [row.hours for row in rows], [row.device_hours for row in rows]
    assert hours == sorted(hours, reverse=True)
    assert device_hours == sorted(device_hours)
    assert rows[0].all_reduce_bytes == 0
    assert rows[3].all_reduce_bytes == 2 * 7 / 8 * plan.gradient_bytes
    assert rows[3].gather_bytes == 7 * 5 * 3024 * 4  # five numbers a channel from seven others, however large the batch
    assert rows[0].steps == 300 * 1251
    assert rows[0].images_per_second == pytest.approx(1024 / rows[0].step_seconds)
    apart = roofline.predict(training_of(recipe), plan, work, GPUS["h200"], train_images=1_281_167, gpus=4, nodes=2)
    assert apart.gather_seconds > rows[3].gather_seconds
    cached = roofline.predict(training_of(recipe), replace(plan, cached=True), work, GPUS["h200"], train_images=1_281_167)
    assert cached.teacher_seconds == 0
    assert cached.memory_bytes < rows[0].memory_bytes
    compiled = roofline.predict(training_of(recipe), plan, work, GPUS["h200"], train_images=1_281_167, compiled=True)
    assert compiled.hours < rows[0].hours


def test_memory_decides_batch_and_accumulation() -> None:
    recipe = recipes.load("deit_s_plain", ["global_batch_size=1024"])
    plan, work = make_plan(recipe, None), counted("deit_s_plain")
    batch = roofline.largest_batch(training_of(recipe), plan, work, GPUS["4090"])
    assert (
        roofline.memory_bytes(training_of(recipe), plan, work, batch)
        <= 0.9 * 24e9
        < roofline.memory_bytes(training_of(recipe), plan, work, 2 * batch)
    )
    small = Device("small", 1e14, 1e12, memory=6e9)
    cut = roofline.predict(training_of(recipe), plan, work, small, train_images=10_000)
    whole = roofline.predict(training_of(recipe), plan, work, GPUS["h200"], train_images=10_000)
    assert (whole.device_batch, whole.accumulation_steps) == (1024, 1)
    assert cut.device_batch * cut.accumulation_steps == 1024
    assert cut.memory_bytes <= 0.9 * 6e9
    with pytest.raises(UserError, match="not one image"):
        roofline.predict(training_of(recipe), plan, work, Device("tiny", 1e14, 1e12, memory=1e8), train_images=10_000)


def test_published_rates_gave_the_efficiencies() -> None:
    """Images a second of timm's tables, over the roofline of what is counted here."""
    ti, s = counted("deit_ti_plain"), counted("deit_s_plain")

    def share(operations: tuple[Operation, ...], rate: float, device: Device) -> float:
        return rate * roofline.seconds_of(operations, 256, device, 1.0) / 256

    eager = [share(ti.teacher, rate, GPUS[name]) for name, rate in (("3090", 1070), ("4090", 1664), ("5090", 2299))]
    assert eager == pytest.approx([0.77, 0.75, 0.68], abs=0.01)
    compiled = [share(ti.teacher, rate, GPUS[name]) for name, rate in (("4090", 2152), ("5090", 2848))]
    assert compiled == pytest.approx([0.97, 0.84], abs=0.01)
    students = [
        share((*work.student_forward, *work.student_backward), rate, GPUS["3090"]) for work, rate in ((ti, 2253), (s, 1033))
    ]
    assert students == pytest.approx([0.48, 0.62], abs=0.01)
    table = roofline.EFFICIENCY
    assert min(eager) < table["teacher"][False] < max(eager)
    assert min(students) < table["student"][False] < max(students)


def test_an_unknown_gpu_is_refused_by_name() -> None:
    with pytest.raises(UserError, match=r"--gpu h20: .*did you mean h200\?"):
        find_device("h20")


def test_a_cache_takes_what_its_formula_says() -> None:
    plan = make_plan(recipes.load("deit_ti_plain"), None)
    assert roofline.cache_bytes(plan, 384_350_100) == {
        "features bf16": 384_350_100 * 6048,
        "features int8": 384_350_100 * 3028,
        "logits fp16": 384_350_100 * 2000,
        "top-100 logits": 384_350_100 * 404,
    }


@pytest.mark.usefixtures("processor_clock")
@pytest.mark.slow
def test_plan_from_the_command_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    cli.main(["plan", "deit_ti_plain", "--gpu", "h100", "--gpus", "4", "--json", str(file), "epochs=30"])
    printed, content = capsys.readouterr().out, json.loads(file.read_text())
    assert "1,281,167 images (ImageNet-1k's, assumed" in printed
    assert "Predicted, not measured" in printed
    eager, compiled = content["predicted"]
    assert (eager["device"], eager["compiled"], compiled["compiled"]) == ("h100", False, True)
    assert eager["steps"] == 30 * (1_281_167 // 256)
    assert eager["device_hours"] == pytest.approx(4 * eager["hours"])
    of_a_core = content["core_seconds_per_image"]
    assert of_a_core["gpu"] < 0.5 * of_a_core["cpu"]  # augmentation is the GPU's
    assert eager["cores"] == math.ceil(eager["images_per_second"] * of_a_core["gpu"])
    for stated, place in (("cpu", "cpu"), ("device", "gpu")):  # a recipe that says where has one number
        cli.main(["plan", "deit_ti_plain", "--gpu", "h100", "--json", str(file), f"run.augment_on={stated}"])
        assert set(json.loads(file.read_text())["core_seconds_per_image"].values()) == {of_a_core[place]}
    with pytest.raises(SystemExit):
        cli.main(["plan", "cifar100_resnet32x4_resnet8x4_kd", "data.train_images=auto", "--gpu", "h100"])
    assert "pass --data DIR or --images N" in capsys.readouterr().err


@pytest.mark.usefixtures("processor_clock")
@pytest.mark.slow
def test_cores_of_a_gpu_that_decodes_are_told_on_a_machine_without_one(
    photo_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "plan.json"
    for overrides in ([], ["run.decode_on=device"]):
        cli.main(["plan", "deit_ti_plain", "--data", str(photo_folder), "--gpu", "h100", "--json", str(file), *overrides])
        seconds = json.loads(file.read_text())["core_seconds_per_image"]
        assert 0 < seconds["gpu"] < seconds["cpu"]
    assert "images/s of one core for a run on a CPU" in capsys.readouterr().out


@pytest.mark.usefixtures("processor_clock")
@pytest.mark.slow
def test_measured_steps_stand_beside_the_prediction(fashion_folder: Path) -> None:
    small = ["data.source=image_folder", "global_batch_size=24", "run.workers=0", "teacher.weights=random"]
    told = forecast.forecast(recipes.load("quickstart", small), fashion_folder, None, "cpu", 1, 1)
    assert told.train_images == 240
    in_workers, beside_a_gpu = told.core_seconds
    assert 0 < beside_a_gpu < 2 * in_workers
    measured = forecast.measure(told, fashion_folder, "cpu", 12, steps=3)
    assert measured["predicted"]["accumulation_steps"] == 2
    seconds = measured["seconds"]
    assert seconds["data"] + seconds["teacher"] + seconds["student"] == pytest.approx(seconds["whole"], rel=0.3)
    assert measured["hours"] == pytest.approx(10 * 10 * seconds["whole"] / 3600)
    # a network this small does not reach its roofline, but the order of magnitude must hold
    assert 0.05 < measured["predicted"]["step_seconds"] / seconds["whole"] < 5
    assert "predicted" in forecast.compare(measured)


def test_few_images_a_gpu_are_bound_by_launches() -> None:
    """As 256 images on eight, which are 32 each; 1,024 on one are not, and need no more time than the device does."""
    recipe = recipes.load("deit_ti_plain")
    plan, work = make_plan(recipe, None), counted("deit_ti_plain")
    training = training_of(recipe)
    assert training.augments
    few = roofline.predict(training, plan, work, GPUS["h200"], train_images=1_281_167, gpus=8)
    assert few.is_host_bound
    assert few.step_seconds == pytest.approx(few.host_seconds + few.all_reduce_seconds + few.gather_seconds)
    many = roofline.predict(
        training_of(recipes.load("deit_ti_plain", ["global_batch_size=1024"])), plan, work, GPUS["h200"], train_images=1_281_167
    )
    assert not many.is_host_bound
    assert many.step_seconds == pytest.approx(many.teacher_seconds + many.student_seconds)

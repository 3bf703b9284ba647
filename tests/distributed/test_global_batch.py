"""One global batch, however it is cut over processes and micro-batches: the same terms, gradients, weights, EMA and counts."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator, debug_launcher
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from conftest import SMALL
from deit_kd import losses
from deit_kd import recipe as recipes
from deit_kd.data import Batch
from deit_kd.data.build import open_data
from deit_kd.distributed import fsdp
from deit_kd.models import build
from deit_kd.recipe import Recipe
from deit_kd.recipe import Run as RunSection
from deit_kd.tasks.classification import Classification
from deit_kd.training import checkpoint
from deit_kd.training.loop import fit
from deit_kd.training.metrics import Tracker, read_metrics
from deit_kd.training.optim import build_optimizer, build_schedule
from deit_kd.training.setup import prepare
from objectives import COUPLED, NONE, OBJECTIVES
from sections import optimizing, scheduling

LAYOUTS = [(2, 1), (4, 1), (1, 4), (2, 2)]  # processes, accumulation steps
IN_ALL = ["logsum_correlation", "crd"]  # the others in the last alone, which has several of both
SHARDED = ["logsum l2", "crd"]  # of these also with the student cut over two processes
SIZE = ["global_batch_size=64", "run.log_every_steps=1", "ema_decay=0.9", "optim.clip_grad=1.0"]
MIXED = ["augmentation.mixup=0.8", "augmentation.cutmix=1.0", "augmentation.mixup_prob=1.0", "augmentation.mixup_switch_prob=0.5"]


class Double(Classification):
    """The task in float64, where rounding cannot hide a wrong gradient."""

    def train_batches(self, *arguments: Any) -> Iterator[Batch]:
        stream = self.train_loader.epoch
        self.train_loader.epoch = lambda *where: (  # type: ignore[method-assign]
            replace(batch, images=batch.images.double(), targets=batch.targets.double()) for batch in stream(*where)
        )
        return super().train_batches(*arguments)

    def evaluate(self, ema: nn.Module | None = None) -> dict[str, float]:
        for model in (self.student, ema):
            assert model is not None
            if not fsdp.is_sharded(model):
                model.float()
        return super().evaluate(ema)


def steps(
    data: Path, overrides: list[str], processes: int, accumulation: int, folder: Path, until: int, spoil: int | None, sharded: bool
) -> None:
    """Trains to step `until` in float64, from the newest checkpoint of the folder, with a log line and a checkpoint of each step.

    In step `spoil` the last process has no finite loss. Cut over processes by FSDP2 if `sharded`.
    """
    AcceleratorState._reset_state(reset_partial_state=True)  # a fork knows its parent's
    recipe = recipes.load("quickstart", [*SMALL, *SIZE, "teacher.weights=random", *overrides])
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == processes
    sources = open_data(recipe.data, data)
    (teacher,) = build.build_teachers(recipe, sources[0].class_names)
    teacher.double().dtype = torch.float64
    task = Double(recipe, accelerator, sources, [teacher], folder, 64 // processes // accumulation, print)
    assert task.accumulation_steps == accumulation
    for terms in task.teacher_terms:
        terms.class_means = None if terms.class_means is None else terms.class_means.double()
    task.module.double()
    if spoil is not None and accelerator.is_last_process:
        original, calls = task.compute_terms, itertools.count(1)
        task.compute_terms = lambda *arguments: (  # type: ignore[method-assign]
            {name: value * math.nan for name, value in terms.items()}
            if (terms := original(*arguments)) and next(calls) == spoil
            else terms
        )
    gradients = train(task, recipe, accelerator, folder, until, sharded)
    if accelerator.is_main_process:
        save_file(gradients, folder / "gradients.safetensors")


def train(
    task: Classification, recipe: Recipe, accelerator: Accelerator, folder: Path, until: int, sharded: bool
) -> dict[str, Tensor]:
    optimizer, ema = prepare(task, partial(build_optimizer, *optimizing(recipe)), recipe.ema_decay, accelerator, sharded)
    if sharded:
        qkv = task.student.get_parameter("blocks.1.attn.qkv.weight")
        assert (qkv.shape[0], qkv.to_local().shape[0]) == (144, 72)  # type: ignore[attr-defined]
    gradients: dict[str, Tensor] = {}
    bare = accelerator.unwrap_model(task.module)

    def keep(*_: object) -> None:
        for name, parameter in bare.named_parameters():
            gradients.setdefault(name, fsdp.gather({name: parameter.grad.clone()})[name])

    optimizer.optimizer.register_step_pre_hook(keep)
    tracker, schedule = Tracker(accelerator, folder, until), build_schedule(*scheduling(recipe), task.steps_per_epoch)
    resume = checkpoint.newest(folder / "checkpoints", print)
    assert fit(
        task,
        accelerator,
        optimizer,
        schedule,
        RunSection(log_every_steps=1, save_every_steps=1, keep_checkpoints=9, eval_every_epochs=9),
        tracker,
        folder,
        total_steps=until,
        clip_grad=recipe.optim.clip_grad,
        reads_every_step=True,
        ema=ema,
        resume=resume,
    )
    return gradients


Run = Callable[..., Path]


@pytest.fixture
def run(fashion_folder: Path) -> Run:
    """Trains on 240 images in a layout, (processes, accumulation steps), and gives the folder."""

    def run(
        overrides: list[str], layout: tuple[int, int], folder: Path, until: int = 3, spoil: int | None = None, sharded: bool = False
    ) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        arguments = (fashion_folder, overrides, *layout, folder, until, spoil, sharded)
        if layout[0] > 1:
            debug_launcher(steps, arguments, num_processes=layout[0])
        else:
            steps(*arguments)
        return folder

    return run


def difference(one: Path, other: Path) -> float:
    """The largest, over all tensors of a file, relative to the size of the tensor's numbers.

    A bias before a batch normalization has a gradient of zero, and of rounding: sizes below a millionth of the largest count as that.
    """
    ours, theirs = load_file(one), load_file(other)
    assert ours.keys() == theirs.keys()
    assert any(value.dtype == torch.float64 for value in ours.values())
    sizes = {name: value.abs().max() for name, value in theirs.items()}
    least = 1e-6 * max(sizes.values())
    return max(((ours[name] - theirs[name]).abs().max() / max(size, least)).item() for name, size in sizes.items())


def assert_layouts_agree(
    run: Run, overrides: list[str], layouts: list[tuple[int, int]], tmp_path: Path, sharded: bool = False, limit: float = 1e-10
) -> None:
    """Gradients, weights, averages and logged terms of each layout are those of one process with whole batches."""
    whole = run(overrides, (1, 1), tmp_path / "whole")
    for file in whole.glob("class_means*"):
        overrides = [item.replace("class_means: auto", f"class_means: {file}") for item in overrides]
    others = [run(overrides, layout, tmp_path / f"{layout[0]}x{layout[1]}") for layout in layouts]
    if sharded:
        others.append(run(overrides, (2, 2), tmp_path / "sharded", sharded=True))
    for folder in others:
        for file in (
            "gradients.safetensors",
            "checkpoints/step_00000003/module.safetensors",
            "checkpoints/step_00000003/ema.safetensors",
        ):
            assert difference(folder / file, whole / file) < limit, (folder.name, file)
        for ours, theirs in zip(read_metrics(folder), read_metrics(whole), strict=True):
            assert ours.keys() == theirs.keys()
            for key in ("kind", "step", "lr", "epoch", "images"):
                assert ours.get(key) == theirs.get(key)
            for key in {"loss", "ce", "kd", "feature"} & ours.keys():
                assert ours.get(key) == pytest.approx(theirs.get(key), rel=1e-6), (folder.name, key)


@pytest.mark.parametrize("name", COUPLED)
def test_layouts_agree(name: str, run: Run, tmp_path: Path) -> None:
    overrides = [*OBJECTIVES[name], *([] if name == "crd" else MIXED)]
    if name == "nd":  # without the adapter's batch norm, which is each device's own
        adapter = "bn_dropout_linear, dropout: 0.5", "linear, bias: true, depth: 1, width: teacher"
        overrides = [item.replace(*adapter) for item in overrides]
    assert_layouts_agree(run, overrides, LAYOUTS if name in IN_ALL else LAYOUTS[-1:], tmp_path, sharded=name in SHARDED)


@pytest.mark.parametrize(
    "student",
    [
        "student={name: deit_tiny_convstem_distilled_patch16_224, drop_path: 0, model_args: {embed_dim: 48, depth: 2, num_heads: 3}}",
        "student={name: resnet10t, drop_path: 0, model_args: {}}",
    ],
    ids=["conv stem", "CNN"],
)
def test_batch_norms_take_their_statistics_over_all_processes(student: str, run: Run, tmp_path: Path) -> None:
    """Of the student and of a projector of two layers; running statistics are compared with the weights."""
    two_layers = "projector={kind: linear, bias: true, depth: 2, width: 64}"
    overrides = [two_layers, *OBJECTIVES["logsum_correlation"][1:], *MIXED, student, "data.img_size=32"]
    assert_layouts_agree(run, overrides, [(2, 1)], tmp_path, limit=1e-9)  # roundings grow through batch norms one above the other


def gram_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Couples each two samples of a batch; a loss that the package does not have."""
    ours, theirs = (torch.nn.functional.normalize(each, dim=1) for each in (student, teacher))
    return (ours @ ours.t() - theirs @ theirs.t()).square().mean()


def of_the_likeliest(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """Couples samples through the spread of the labels' probabilities."""
    ours, theirs = (each.softmax(1).gather(1, labels[:, None]) for each in (student, teacher))
    return (ours.std() - theirs.std()).square() + (ours.mean() - theirs.mean()).square()


def test_layouts_agree_for_losses_that_a_user_registers(run: Run, tmp_path: Path, forgets: None) -> None:
    losses.register(gram_distance, compares="features", couples_samples=True, any_width=True)
    losses.register(of_the_likeliest, compares="logits", couples_samples=True, reads_labels=True)
    taps, head = "student_tap: pooled, teacher_tap: pooled", "kd_weight: 1, kd_head: distillation"
    loss = f"distill={{kd_loss: of_the_likeliest, {head}, feature_loss: gram_distance, feature_weight: 1, {taps}}}"
    assert_layouts_agree(run, [NONE, loss, *MIXED], LAYOUTS[-1:], tmp_path)


def test_device_statistics_are_those_of_a_micro_batch(run: Run, tmp_path: Path) -> None:
    """What the papers ran, and why it is not the default: the gradient is another."""
    overrides = [*OBJECTIVES["logsum_correlation"], "batch_statistics=device"]
    whole, cut, accumulated = (run(overrides, layout, tmp_path / str(layout)) for layout in ((1, 1), (2, 1), (1, 2)))
    file = "gradients.safetensors"
    assert difference(cut / file, whole / file) > 1e-3
    assert difference(cut / file, accumulated / file) < 1e-10
    state = json.loads((cut / "checkpoints/step_00000003/state.json").read_text())
    assert state["layout"] == {"processes": 2, "accumulation_steps": 1, "batch_statistics": "device"}


@pytest.mark.slow
def test_another_number_of_processes_goes_on(run: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """1 -> 2 -> 1 processes, two of them with a part of the student each, the last accumulating, against a run that nobody interrupted."""
    overrides = [*OBJECTIVES["logsum_correlation"], *MIXED]
    whole = run(overrides, (1, 1), tmp_path / "whole", until=6)
    elastic = tmp_path / "elastic"
    for layout, until, sharded in (((1, 1), 2, False), ((2, 1), 4, True), ((1, 4), 6, False)):
        run(overrides, layout, elastic, until, sharded=sharded)
    assert "step_00000004 was saved with processes 2, accumulation_steps 1, batch_statistics global; going on with processes 1" in (
        capfd.readouterr().err
    )
    for part in ("module", "ema", "optimizer"):
        file = f"checkpoints/step_00000006/{part}.safetensors"
        assert difference(elastic / file, whole / file) < 1e-9, part


def test_a_loss_that_is_not_finite_on_one_process_is_skipped_on_all(run: Run, tmp_path: Path) -> None:
    folder = run([*OBJECTIVES["kl"]], (2, 1), tmp_path / "spoilt", spoil=2)
    (skipped,) = [line for line in read_metrics(folder) if line["kind"] == "skipped"]
    assert skipped["step"] == 2
    assert len(skipped["samples"]) == 32
    assert not (folder / "checkpoints/step_00000002").exists(), "it holds nothing new"
    moments = load_file(folder / "checkpoints/step_00000003/optimizer.safetensors")
    assert {value.item() for name, value in moments.items() if name.endswith(".step")} == {2.0}

"""What a run needs before its first step: one list of checks, which train.py, --dry-run and `deit-kd doctor` share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator

from deit_kd.data import Source
from deit_kd.data.build import BAD_IMAGE, accumulation, open_data
from deit_kd.errors import UserError
from deit_kd.export.student import PERMISSIVE
from deit_kd.files.warn import collected, warn
from deit_kd.models import AnyTeacher, build, summary
from deit_kd.models.facts import facts_of, locate, unread
from deit_kd.models.teacher import doubts, other_classes
from deit_kd.recipe import Recipe
from deit_kd.tasks.setup import Loaders, make_loaders
from deit_kd.teacher_cache.class_means import must_fit
from deit_kd.training import optim, run_start


class Line(NamedTuple):
    """A finding: ok, warn or fail; what was looked at; what was found, with the remedy if it is not well."""

    severity: str
    name: str
    text: str


class Checks:
    """What a run would start with, looked at piece by piece; each check gives what is well in a line, and adds to `warnings`.

    Args:
        recipe: `build.resolve`d.
        data: the folder of --data.
        accelerator: of this process.
        device_batch_size: the largest micro-batch of one device.
        reads_weights: whether weights that are on this machine are read, as the run would do next; else their configurations are.
        output: the run folder, if the run did not enter it yet.
        resume: see `run_start.entered`.
        accept: see `run_start.entered`.
    """

    def __init__(
        self,
        recipe: Recipe,
        data: Path | None,
        accelerator: Accelerator,
        device_batch_size: int | None,
        reads_weights: bool,
        output: Path | None = None,
        resume: str = "auto",
        accept: str | None = None,
    ):
        self.output, self.resume, self.accept, self.said = output, resume, accept, set[str]()
        self.recipe, self.data, self.accelerator, self.device_batch_size = recipe, data, accelerator, device_batch_size
        self.reads_weights, self.warnings = reads_weights, list[str]()
        self.sources: tuple[Source, Source] | None = None
        self.loaders: Loaders | None = None
        self.teachers: list[AnyTeacher] = []

    def checks(self) -> dict[str, Callable[[], str]]:
        """By name, in the order in which they must be made. Each raises a UserError for what would end the run."""
        return {
            "data": self.open_data,
            "teacher": self.teacher,
            "batch": self.batch,
            "networks": self.networks,
            **({"output": self.folder} if self.output is not None else {}),
        }

    def new(self, warnings: list[str]) -> list[str]:
        """Those that no check gave yet, each once."""
        found = [text for text in dict.fromkeys(warnings) if text not in self.said]
        self.said |= set(found)
        return found

    @property
    def lacks_data(self) -> bool:
        """Whether there are no images to look at, because --data was not given."""
        return self.data is None and self.recipe.data.source != "fashion_mnist"

    def open_data(self) -> str:
        """Images of both splits, some of them read, and the classes."""
        train, val = open_data(self.recipe.data, self.data)
        for source in (train, val):
            for fault in unreadable(source):
                if self.recipe.data.on_bad_image == "refuse":
                    raise UserError(f"{fault}; {BAD_IMAGE}")
                self.warnings.append(f"{fault}; it is left out")
        self.sources = train, val
        return f"{len(train):,} training and {len(val):,} validation images of {train.origin}"

    def batch(self) -> str:
        """How the global batch is cut, and whether a teacher's cache is of these images."""
        if self.sources is None:
            steps = accumulation(self.recipe.global_batch_size, self.accelerator.num_processes, self.device_batch_size)
            return f"{self.recipe.global_batch_size} images on {self.accelerator.num_processes} processes in {steps} pieces"
        tell = self.warnings.append if self.reads_weights else _nobody  # the run makes them again, and says so itself
        self.loaders = make_loaders(self.recipe, self.accelerator, self.sources, self.device_batch_size, tell, self.teachers)
        loader = self.loaders.train
        return (
            f"{loader.global_batch_size} images = {self.accelerator.num_processes} x {loader.accumulation_steps} x "
            f"{loader.micro_batch_size} (processes x accumulation x device)"
        )

    def teacher(self) -> str:
        """Of each teacher where its weights are, whose classes it knows, its license, and what images it was trained on."""
        names = None if self.sources is None else self.sources[0].class_names
        told, here = [], True
        for distillation in {distillation.teacher: distillation for distillation in reversed(self.recipe.distillations())}.values():
            config = distillation.teacher
            if config.cache:
                told.append(f"{config.name} is not run: its answers are in {config.cache}")
                continue
            place = None
            if config.name.startswith("hf-hub:"):  # its configuration lies beside its weights
                place = locate(config.name, config.weights)
            facts = facts_of(config.name, config.weights)
            compares = any(
                each.distill.kd_weight or each.distill.teacher_tap == "dense_logits"
                for each in self.recipe.distillations()
                if each.teacher == config
            )
            if names and compares and config.weights == "pretrained" and facts.num_classes != len(names):
                raise UserError(other_classes(config.name, facts.num_classes, len(names)))
            place = place or locate(config.name, config.weights)
            here &= place.here
            if config.weights == "random":
                told.append(f"{config.name}: random weights")
                continue
            self.warnings += doubts(
                unread(config.name, config.weights, config.img_size), self.recipe.data.img_size, self.recipe.data.mean
            )
            license = (
                facts.license if facts.license in PERMISSIVE else f"{facts.license} (the student's card will not say apache-2.0)"
            )
            told.append(f"{config.name}: weights {place.words}, license {license}, {facts.num_classes} classes")
        if any(distillation.teacher.cache for distillation in self.recipe.distillations()) or (self.reads_weights and here):
            self.teachers = build.build_teachers(self.recipe, names)  # reads them, or opens the cache
        return "; ".join(told) or "none"

    def networks(self) -> str:
        """Student, projectors, class means and optimizer; weights to go on from."""
        classes = None if self.sources is None else len(self.sources[0].class_names)
        tune = self.recipe.finetune
        place = None if tune is None else locate(tune.weights)
        for number, distillation in enumerate(self.recipe.distillations()):
            teacher = self.teachers[number] if self.teachers else None
            train = self.loaders and self.loaders.train.source
            must_fit(self.recipe.data, self.recipe.augmentation, distillation.distill, teacher, train)
        if self.reads_weights and self.loaders and place and place.here and len(self.teachers) == len(self.recipe.distillations()):
            labels = torch.from_numpy(self.loaders.train.source.labels)
            built = build.build_distiller(self.recipe, len(self.loaders.train.source.class_names), self.teachers, labels)
        else:
            *_, built = build.build_models(self.recipe, classes)
        optim.build_optimizer(self.recipe.optim, tune, self.recipe.lr_factor(), built)
        return f"{self.recipe.student.name}" + (f", weights {place.words}" if place else ", fresh weights")

    def folder(self) -> str:
        """Whether the run may write there, and the run that is there is of this recipe."""
        assert self.output is not None
        run_start.must_fit(self.output, self.recipe, self.resume, self.accept, self.data)
        return str(self.output)


def unreadable(source: Source, most: int = 8) -> list[str]:
    """Which of some images, spread over the classes, cannot be read, and why."""
    by_class, found = np.argsort(source.labels, kind="stable"), []
    for index in by_class[np.linspace(0, len(source) - 1, min(most, len(source))).astype(int)].tolist():
        try:
            source[index]
        except Exception as error:  # PIL raises many types for broken files
            reason = " ".join(str(error).split()) or type(error).__name__
            found.append(f"{source.where(index)}: cannot be read ({reason})")
    return found


def look(found: Checks) -> Iterator[Line]:
    """A line a check: well, what is doubtful, or what would end the run."""
    failed = False
    for name, check in found.checks().items():
        found.warnings.clear()
        if name == "data" and found.lacks_data:
            yield Line("warn", name, "not looked at: pass --data")
        elif failed and name == "networks":
            yield Line("warn", name, "not looked at: mend first what fails above")
        else:
            fault = None
            try:
                with collected(found.warnings.append):
                    text = check()
            except UserError as error:
                fault = str(error)
            except Exception as error:  # a network, an image or a disk may raise any; each would end the run
                fault = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            found.warnings = found.new(found.warnings)
            if fault is not None:
                failed = True
                yield Line("fail", name, fault)
                continue
            doubtful = "; ".join(found.warnings)
            yield Line("warn", name, f"{text}; {doubtful}") if doubtful else Line("ok", name, text)


def rehearse(found: Checks, say: Callable[[str], None]) -> None:
    """The dry run: prints what the recipe amounts to, as far as it can be counted, and what is doubtful.

    Raises:
        UserError: what would end the run.
    """
    faults = []
    for line in look(found):
        if line.severity == "fail":
            faults.append(line.text)
        for warning in found.warnings:
            warn(warning)
    train = found.sources[0] if found.sources else None
    try:
        recipe = found.recipe
        text = summary.describe(
            build.make_plan(recipe, len(train.class_names) if train else None),
            len(train) if train else None,
            student_name=recipe.student.name,
            teachers=[distillation.teacher for distillation in recipe.distillations()],
            epochs=recipe.epochs,
            global_batch_size=recipe.global_batch_size,
            optim=recipe.optim,
            lr_factor=recipe.lr_factor(),
            keep_checkpoints=recipe.run.keep_checkpoints,
        )
        say(text)
    except UserError as error:
        faults = faults or [str(error)]  # else it is one of them again
    if len(faults) == 1:
        raise UserError(faults[0])
    if faults:
        raise UserError("\n  ".join([f"{len(faults)} faults would end the run", *faults]))


def must_start(
    recipe: Recipe, data: Path | None, accelerator: Accelerator, device_batch_size: int | None, warn: Callable[[str], None] = warn
) -> tuple[Source, Source]:
    """Makes all checks, before weights are read; gives the images of both splits.

    Args:
        recipe: see `Checks`, as `data`, `accelerator` and `device_batch_size`.
        data: the folder of --data.
        accelerator: of this process.
        device_batch_size: the largest micro-batch of one device.
        warn: takes what is doubtful.

    Raises:
        UserError: what would end the run, the first that is found.
    """
    found = Checks(recipe, data, accelerator, device_batch_size, reads_weights=False)
    for check in found.checks().values():
        check()
    for text in found.warnings:
        warn(text)
    assert found.sources is not None
    return found.sources


def _nobody(_: str) -> None:
    """Takes a warning."""

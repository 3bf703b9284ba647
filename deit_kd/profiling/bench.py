"""Where the time of a step goes: the real loop, timed with the data, without them, and the data alone. Not tried on a GPU yet."""

from __future__ import annotations

import itertools
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from tqdm import tqdm

from deit_kd.data import Batch, Source
from deit_kd.data.build import example_images, open_data
from deit_kd.data.on_device.augment import OnDevice, choose_augmentation
from deit_kd.distributed import fsdp
from deit_kd.distributed.accelerator import make_accelerator
from deit_kd.errors import UserError
from deit_kd.models import build
from deit_kd.recipe import Recipe, Run
from deit_kd.tasks.classification import Classification
from deit_kd.training import acceleration, optim, setup
from deit_kd.training.loop import fit
from deit_kd.training.metrics import Tracker

NEVER = 1 << 40  # steps


@dataclass(frozen=True)
class Bench:
    """Seconds of an optimizer step of this process, unless a name says otherwise; medians."""

    device: str
    processes: int
    workers: int  # of this process
    images_per_step: int  # of all processes
    micro_batch_size: int
    steps: int  # timed in each pass
    whole: float  # end to end
    wait: float  # of that, waiting for data
    step_only: float  # the same batch again and again
    teacher: float  # of that
    student: float  # of that: forward, backward, optimizer, and what of the all-reduce backward does not hide
    data_only: float  # the loader alone
    all_reduce: float  # of the gradients, alone; 0 of one process
    gather: float  # of what losses of the whole batch compare, alone
    read: float  # seconds of one core to read and decode one image
    transform: float  # seconds of one core for what workers do to it then
    augments_on: str  # cpu or device
    compiled: str | None  # torch.compile's mode

    @property
    def images_per_second(self) -> float:
        """End to end."""
        return self.images_per_step / self.whole


class _Timed(Classification):
    """The task without its evaluations. It stops at the first one, before the loop saves anything."""

    def evaluate(self, ema: nn.Module | None = None) -> dict[str, float]:
        return {}

    def inspect(self) -> dict[str, Any]:
        return {}

    def stop_early(self, evaluations: list[dict[str, Any]]) -> bool:
        return bool(evaluations)


class _Endless:
    """Stands where the train loader does: epochs without end, or the same micro-batches again and again."""

    def __init__(self, epoch: Callable[[int], Iterator[Batch]], same: list[Batch] | None = None):
        self._epoch, self._same = epoch, same

    def epoch(self, first: int, start_step: int = 0) -> Iterator[Batch]:
        if self._same is not None:
            return itertools.cycle(self._same)
        return itertools.chain.from_iterable(map(self._epoch, itertools.count(first)))


class _Kept(Tracker):
    """Keeps the lines instead of writing them, and shows a bar when it takes long."""

    def __init__(self, accelerator: Accelerator, what: str, steps: int):
        super().__init__(accelerator, Path(os.devnull).parent / "none", steps)
        self.kept: list[dict[str, Any]] = []
        self.evaluations: list[dict[str, Any]] = []
        hidden = None if accelerator.is_main_process else True
        self.bar = tqdm(total=steps, desc=what, unit="step", delay=2, leave=False, disable=hidden)

    def start(self, step: int) -> None:
        pass

    def lines(self, kind: str) -> list[dict[str, Any]]:
        return self.evaluations if kind == "eval" else []

    def say(self, text: str) -> None:
        if not text.startswith("stopped at step"):  # nothing is kept that could go on
            super().say(text)

    def advance(self) -> None:
        self.bar.update()

    def log(self, kind: str, step: int, values: Mapping[str, Any], with_the_next: bool = False) -> None:
        if kind in ("train", "eval"):
            (self.kept if kind == "train" else self.evaluations).append(dict(values))


class StepBenchmark:
    """Everything that train.py builds, ready to be timed.

    Args:
        recipe: what would be trained.
        data: its folder.
        device: auto, cpu or cuda.
        device_batch_size: the largest micro-batch; None for no accumulation.

    Raises:
        UserError: as train.py; or class means that would have to be computed first.
    """

    def __init__(self, recipe: Recipe, data: Path | None, device: str = "auto", device_batch_size: int | None = None):
        if any(distillation.distill.class_means == "auto" for distillation in recipe.distillations()):
            raise UserError("distill.class_means=auto: takes a pass over the data first; make a file with deit-kd class-means")
        sharded = fsdp.fsdp_requested()
        self.recipe = recipe = build.resolve(recipe)
        self.folder = tempfile.TemporaryDirectory()  # for what an interruption saves
        nowhere = Path(self.folder.name)
        self.accelerator = make_accelerator(recipe.run, recipe.optim.clip_grad, device, nowhere)
        with self.accelerator.main_process_first():
            self.sources: tuple[Source, Source] = open_data(recipe.data, data)
        teachers = build.build_teachers(recipe, self.sources[0].class_names)
        teachers = [teacher.to(self.accelerator.device) for teacher in teachers]
        say = self.accelerator.print
        example = partial(example_images, self.sources[1], recipe.data, recipe.evaluation)
        self.accelerated = acceleration.prepare(recipe.run, teachers, example, self.accelerator, sharded)
        compiled = self.accelerated.compiled
        self.task = _Timed(recipe, self.accelerator, self.sources, teachers, nowhere, device_batch_size, say, compiled)
        self.loader, self.stream = self.task.train_loader, _Endless(self.task.train_loader.epoch)
        self.schedule = optim.build_schedule(recipe.optim, recipe.lr_factor(), recipe.epochs, self.task.steps_per_epoch)
        self.reads_every_step = sharded or self.accelerator.device.type == "cpu"  # as train.py has it
        make_optimizer = partial(optim.build_optimizer, recipe.optim, recipe.finetune, recipe.lr_factor())
        self.optimizer, self.ema = setup.prepare(self.task, make_optimizer, recipe.ema_decay, self.accelerator, sharded)

    def time(self, steps: int, same_batch: bool = False) -> dict[str, float]:
        """Seconds a step of the real loop: `whole`, and `data`, `teacher`, `student` of it. A fifth more steps warm up.

        Beside them `processor`: of all threads of this process, warm-up included, whatever else the machine does.
        """
        every = max(1, steps // 5)
        steps = -(-steps // every) * every + every
        task: Any = self.task
        same = list(itertools.islice(self.loader.epoch(0), self.task.accumulation_steps)) if same_batch else None
        task.train_loader, task.steps_per_epoch = _Endless(self.loader.epoch, same), steps
        run = Run(log_every_steps=every, eval_every_epochs=1, save_every_steps=NEVER)
        tracker = _Kept(self.accelerator, "step alone" if same_batch else "end to end", steps)
        folder = Path(self.folder.name)
        busy = time.process_time()
        over = fit(
            task,
            self.accelerator,
            self.optimizer,
            self.schedule,
            run,
            tracker,
            folder,
            total_steps=NEVER,
            clip_grad=self.recipe.optim.clip_grad,
            reads_every_step=self.reads_every_step,
            ema=self.ema,
        )
        busy = (time.process_time() - busy) / steps
        tracker.bar.close()
        if not over:  # a signal
            raise KeyboardInterrupt
        timed = tracker.kept[1:]
        parts = {name: median(line.get(f"seconds_{name}", 0.0) for line in timed) for name in ("data", "teacher", "student")}
        rate = median(line["images_per_second"] for line in timed)
        return {"whole": self.loader.global_batch_size / rate, **parts, "processor": busy}

    def time_data(self, steps: int, most_seconds: float = 60.0) -> float:
        """Seconds a step of the loader alone, after what its workers had ready."""
        stream, micro = self.stream.epoch(0), self.task.accumulation_steps
        ready = 1 + 2 * self.loader.loader_config.workers
        for _ in tqdm(range(ready), desc="workers start", unit="batch", delay=2, leave=False):
            next(stream)
        started, taken = time.perf_counter(), 0
        for _ in tqdm(range(steps * micro), desc="data alone", unit="batch", delay=2, leave=False):
            next(stream)
            taken += 1
            if time.perf_counter() - started > most_seconds:
                break
        self._wait()
        return (time.perf_counter() - started) / taken * micro

    def time_communication(self) -> tuple[float, float]:
        """Seconds of an all-reduce of the gradients and of a gather of what losses of the whole batch compare, by themselves."""
        if self.accelerator.num_processes == 1:
            return 0.0, 0.0
        counted = build.make_plan(self.recipe, self.task.num_classes)
        gradients = torch.zeros(counted.gradient_bytes // 4, device=self.accelerator.device)
        numbers = self.loader.micro_batch_size * counted.gathered_per_image + counted.gathered_per_share
        rows = torch.zeros(1, max(1, numbers), device=self.accelerator.device)

        def seconds(function: Callable[[], Any]) -> float:
            times = []
            for _ in range(6):
                self.accelerator.wait_for_everyone()
                self._wait()
                started = time.perf_counter()
                function()
                self._wait()
                times.append(time.perf_counter() - started)
            return median(times[1:])

        gather = seconds(lambda: self.accelerator.gather(rows)) * self.task.accumulation_steps
        return seconds(lambda: self.accelerator.reduce(gradients)), gather if numbers else 0.0

    def _wait(self) -> None:
        if self.accelerator.device.type == "cuda":
            torch.cuda.synchronize()


def bench(benchmark: StepBenchmark, steps: int) -> Bench:
    """Times every part; all processes call it."""
    alone, whole = benchmark.time(steps, same_batch=True), benchmark.time(steps)
    all_reduce, gather = benchmark.time_communication()
    read, transform = image_seconds(benchmark.sources[0], benchmark.recipe, benchmark.accelerator.device)
    return Bench(
        device=benchmark.accelerator.device.type,
        processes=benchmark.accelerator.num_processes,
        workers=benchmark.loader.loader_config.workers,
        images_per_step=benchmark.loader.global_batch_size,
        micro_batch_size=benchmark.loader.micro_batch_size,
        steps=steps,
        whole=whole["whole"],
        wait=whole["data"],
        step_only=alone["whole"],
        teacher=alone["teacher"],
        student=alone["student"],
        data_only=benchmark.time_data(steps),
        all_reduce=all_reduce,
        gather=gather,
        read=read,
        transform=transform,
        augments_on=benchmark.loader.augments_on,
        compiled=benchmark.accelerated.compiled,
    )


def image_seconds(
    source: Source, recipe: Recipe, device: torch.device, images: int = 64, most_seconds: float = 1.5
) -> tuple[float, float]:
    """Seconds of one core to read and decode an image, and for what else a worker does to it: means over images spread over the source."""
    chosen, taken, reading, augmenting = choose_augmentation(recipe.data, recipe.augmentation, recipe.run, device), 0, 0.0, 0.0
    transform: Callable[[Any], Any] = chosen.worker if isinstance(chosen, OnDevice) else chosen
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a worker
    try:
        for index in range(0, len(source), max(1, len(source) // images)):
            before = time.perf_counter()
            try:
                image: Any = chosen.worker.read(source, index) if isinstance(chosen, OnDevice) else source[index][0]
            except Exception:  # the loader reports an image that cannot be read
                continue
            between = time.perf_counter()
            transform(image)
            taken, reading, augmenting = taken + 1, reading + between - before, augmenting + time.perf_counter() - between
            if reading + augmenting > most_seconds:
                break
    finally:
        torch.set_num_threads(threads)
    return (reading / taken, augmenting / taken) if taken else (math.nan, math.nan)

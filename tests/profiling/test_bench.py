"""Where a step's time goes: runs that are slow on purpose are told apart."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from conftest import SMALL, FakeClock
from deit_kd import cli
from deit_kd import recipe as recipes
from deit_kd.models import Teacher
from deit_kd.profiling.advice import Conditions, advise, bottleneck_of, describe
from deit_kd.profiling.bench import Bench, StepBenchmark, bench
from programs import run_script

CONDITIONS = Conditions(
    cores=16,
    threads=1,
    gpus=1,
    accumulation_steps=1,
    source="image_folder",
    img_size=224,
    precision="bf16",
    has_several_teachers=False,
)
ALONE = replace(CONDITIONS, cores=2, gpus=0, source="fashion_mnist", img_size=28, precision="auto")


def timed(**changes: Any) -> Bench:
    """A GPU whose step takes 100 ms, of which 40 the teacher, and waits for nothing."""
    made = Bench(
        device="cuda",
        processes=1,
        workers=4,
        images_per_step=256,
        micro_batch_size=256,
        steps=50,
        whole=0.102,
        wait=0.001,
        step_only=0.1,
        teacher=0.04,
        student=0.059,
        data_only=0.05,
        all_reduce=0.0,
        gather=0.0,
        read=0.001,
        transform=0.0005,
        augments_on="cpu",
        compiled=None,
    )
    return replace(made, **changes)


def test_a_run_that_waits_for_slow_images_is_bound_by_data(
    fashion_folder: Path, monkeypatch: pytest.MonkeyPatch, fake_clock: FakeClock
) -> None:
    from deit_kd.data.sources.folder_source import FolderSource

    read = FolderSource.__getitem__

    def slow(source: FolderSource, index: int) -> Any:
        fake_clock.pass_by(0.01)
        return read(source, index)

    monkeypatch.setattr(FolderSource, "__getitem__", slow)
    recipe = recipes.load("quickstart", [*SMALL, "teacher.weights=random"])
    found = bench(StepBenchmark(recipe, fashion_folder, "cpu"), steps=4)
    assert found.wait > 0.24
    assert found.data_only > 0.24
    assert found.step_only < found.whole - 0.2
    assert found.read > 0.01
    assert bottleneck_of(found) == "data"
    advice = advise(found, ALONE)
    assert advice[0].startswith("run.workers="), advice


def test_a_run_with_a_slow_teacher_is_bound_by_it(
    fashion_folder: Path, monkeypatch: pytest.MonkeyPatch, fake_clock: FakeClock
) -> None:
    forward = Teacher.forward

    def slow(teacher: Teacher, images: Any) -> Any:
        fake_clock.pass_by(0.3)
        return forward(teacher, images)

    monkeypatch.setattr(Teacher, "forward", slow)
    recipe = recipes.load("quickstart", [*SMALL, "teacher.weights=random"])
    found = bench(StepBenchmark(recipe, fashion_folder, "cpu"), steps=3)
    assert found.teacher > 0.3
    assert found.student < 0.3
    assert found.all_reduce == found.gather == 0
    assert bottleneck_of(found) == "teacher"
    printed = describe(found, ALONE)
    assert "The bottleneck is the teacher" in printed
    assert "teacher.cache" in printed
    assert "run.compile" not in printed  # nobody measured it on a CPU here


def test_the_verdict_follows_the_numbers() -> None:
    assert bottleneck_of(timed()) == "student"
    assert bottleneck_of(timed(teacher=0.06, student=0.039)) == "teacher"
    assert bottleneck_of(timed(whole=0.2, wait=0.1)) == "data"
    assert bottleneck_of(timed(processes=8, all_reduce=0.05)) == "communication"
    # workers on the cores that compute slow a CPU's step, but not by more than they work
    assert bottleneck_of(timed(device="cpu", whole=0.3, workers=1)) == "data"
    assert bottleneck_of(timed(device="cpu", whole=0.3, workers=1, read=1e-5, transform=1e-5)) == "student"


def test_advice_fits_the_measurement() -> None:
    def first_words(found: Bench, conditions: Conditions = CONDITIONS) -> list[str]:
        return [line.split(":")[0] for line in advise(found, conditions)]

    waits = {"whole": 0.2, "wait": 0.1, "data_only": 0.2}
    assert first_words(timed(**waits)) == ["run.workers=8", "deit-kd pack --short-side 256"]
    assert first_words(timed(**waits, transform=0.004)) == ["run.workers=8", "run.augment_on=device"]
    starved = timed(**{**waits, "data_only": 0.7}, transform=0.004)
    assert first_words(starved)[:2] == ["run.workers=15", "28 cores keep up with the step and 15 are free here"]
    far = timed(**{**waits, "data_only": 0.7}, read=0.1)  # waits for a disk, not for a core
    assert first_words(far)[0] == "run.workers=28"
    assert first_words(timed(**{**waits, "data_only": 0.05}, transform=0.004), replace(CONDITIONS, cores=5)) == [
        "run.augment_on=device"
    ]
    assert first_words(timed(teacher=0.06, student=0.039))[:2] == ["run.compile=true", "deit-kd cache-teacher, and teacher.cache"]
    assert first_words(timed()) == ["run.compile=true"]
    assert first_words(timed(compiled="default")) == []
    two = replace(CONDITIONS, gpus=2)
    assert first_words(timed(), two)[-1].startswith("1 of 2 GPUs work")
    talks = timed(processes=8, all_reduce=0.02, gather=0.03)
    assert "batch_statistics=device" in first_words(talks, replace(CONDITIONS, gpus=8))[-1]


@pytest.mark.slow
def test_bench_of_two_processes(fashion_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    launched = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, "-m", "deit_kd", "bench", "quickstart")
    done = run_script(
        *launched, "--data", fashion_folder, "--steps", 3, "--device", "cpu", "--json", file, *[*SMALL, "teacher.weights=random"]
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("The bottleneck is") == 1
    found = json.loads(file.read_text())
    assert (found["processes"], found["images_per_step"], found["micro_batch_size"]) == (2, 24, 12)
    assert found["all_reduce"] > 0
    assert found["gather"] > 0


def test_class_means_are_not_computed_to_time_a_step(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["bench", "deit_ti_nd", "teacher.weights=random", "distill.class_means=auto"])
    assert "deit-kd class-means" in capsys.readouterr().err

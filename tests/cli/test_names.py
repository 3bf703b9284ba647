"""Class names, files and addresses of others through whole commands: training, evaluation, prediction, conversion, a grid."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
from huggingface_hub import ModelCard
from PIL import Image

import deit_kd
from conftest import SMALL
from deit_kd import sweep as grid
from deit_kd import text
from deit_kd.cli import main
from deit_kd.data import open_source
from deit_kd.data.sources.folders import readable_name
from deit_kd.export.convert import _class_names
from deit_kd.export.publish import must_be_clean
from deit_kd.models.teacher import RELEASED, TeacherInfo
from nasty import NASTY

Cli = Callable[..., tuple[int, str]]
# What a file system takes for a folder.
FOLDERS = sorted(
    {name for name in NASTY if name.strip(" .") and not set(name) & set("/\0") and len(os.fsencode(name)) < 250}, key=os.fsencode
)
FOLDERS = [os.fsdecode(b"caf\xe9"), *FOLDERS[:: len(FOLDERS) // 30]]
OPTIONS = [*SMALL, "run.log_every_steps=1", "data.num_classes=auto", "optim.warmup_epochs=0", "global_batch_size=8"]


@pytest.fixture(scope="module")
def nasty_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root, generator = tmp_path_factory.mktemp("nasty"), np.random.default_rng(0)
    for split in ("train", "val"):
        for number, name in enumerate(FOLDERS):
            (root / split / name).mkdir(parents=True)
            pixels = generator.integers(0, 80, (28, 28, 3), dtype=np.uint8) + np.uint8(4 * number)
            Image.fromarray(pixels).save(root / split / name / os.fsdecode(b"caf\xe9\x1b[31m.png"))
    return root


def harmless(printed: str) -> None:
    printed.encode()
    assert not {character for character in printed if ord(character) < 32} - {"\n", "\r", "\t"}
    assert not set(printed) & set("\x9b\u202e\u2066\u2028")


@pytest.mark.usefixtures("pictures")
def test_a_run_on_nasty_names_is_whole(
    nasty_folder: Path, tmp_path: Path, train_cli: Cli, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    arguments = ["--recipe", "quickstart_alone", "--data", nasty_folder, "--output", run, "--max-steps", 2]
    code, printed = train_cli(*arguments, *OPTIONS)
    assert code == 0, printed
    harmless(printed)
    names = list(open_source("image_folder", nasty_folder, "train").class_names)
    assert sorted(names) == sorted({readable_name(name) for name in FOLDERS})
    assert json.loads((run / "student/config.json").read_text())["label_names"] == names, "the same names come back"
    assert list(deit_kd.load_student(run).pretrained_cfg["label_names"]) == names
    assert list(timm.create_model(f"local-dir:{run / 'student'}", pretrained=True).pretrained_cfg["label_names"]) == names
    card = ModelCard.load(run / "student/README.md")
    assert card.data.eval_results
    assert "\n## Limits\n" in card.text, "the card is whole"
    assert len(list((run / "plots").glob("*.png"))) >= 3
    for name in names:
        assert text.for_markdown(name, 100) in card.text
    must_be_clean(run / "student", run)

    main(["evaluate", str(run), "--data", str(nasty_folder), "--output", str(tmp_path / "report"), "--device", "cpu"])
    stored = json.loads((tmp_path / "report/report.json").read_text())
    assert [row["class"] for row in stored["per_class"]] == names
    assert (tmp_path / "report/report.png").stat().st_size > 10_000
    assert b"\x1b" not in (tmp_path / "report/report.md").read_bytes()
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(
            [
                "predict",
                str(run),
                *(str(path) for path in nasty_folder.glob("val/*/*.png")),
                str(nasty_folder / "none\x1b\udce9.png"),
            ]
        )
    assert ended.value.code == 1
    out, err = capsys.readouterr()
    assert out.isascii()
    harmless(err)
    lines = [json.loads(line) for line in out.splitlines()]
    assert {line["image"] for line in lines[:-1]} == {readable_name(str(path)) for path in nasty_folder.glob("val/*/*.png")}
    assert {row["label"] for line in lines[:-1] for row in line["predictions"]} <= set(names)


def test_a_bad_image_is_named_on_the_terminal_alone(nasty_folder: Path, tmp_path: Path, train_cli: Cli) -> None:
    data = tmp_path / "data"
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            (data / split / name).mkdir(parents=True)
            for number in range(8):
                Image.new("RGB", (28, 28), (number, 0, 0)).save(data / split / name / f"{number}.png")
    bad = data / "train/cat" / os.fsdecode(b"me and anna\xe9\x1b.png")
    bad.write_bytes(b"no image")
    run = tmp_path / "run"
    arguments = ["--recipe", "quickstart_alone", "--data", data, "--output", run, "--max-steps", 4, "data.on_bad_image=skip"]
    code, printed = train_cli(*arguments, *OPTIONS, "epochs=2")
    assert code == 0, printed
    harmless(printed)
    assert re.search(r"me and anna\\(udc|x)e9\\x1b\.png: ", printed)
    for file in (*run.glob("*.*"), *(run / "student").glob("*.*")):
        assert b"anna" not in file.read_bytes(), file


def test_no_secret_of_a_command_is_stored_or_printed(tmp_path: Path, train_cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """The address of data with user, password and token; weights and teachers in folders of their own."""
    arguments = ["--recipe", "quickstart_alone", "--data", "https://anna:PASSWORD@host.test/photos?token=TOKEN", "--output"]
    code, printed = train_cli(*arguments, tmp_path / "none", *OPTIONS)
    assert code == 2
    assert "PASSWORD" not in printed
    assert "TOKEN" not in printed
    monkeypatch.setattr("sys.argv", ["/home/anna/train.py", *map(str, arguments), "hf_abcDEF0123456789"])
    run = tmp_path / "of anna"
    code, printed = train_cli(
        "--recipe", "quickstart_alone", "--output", run, "--max-steps", 1, *SMALL[1:], "data.source=fashion_mnist"
    )
    assert code == 0, printed
    for file in (*run.glob("*.*"), *(run / "student").glob("*.*")):
        content = file.read_bytes()
        for word in (b"PASSWORD", b"TOKEN", b"hf_abc", b"//anna", b"/home/anna", str(tmp_path).encode()):
            assert word not in content, (file, word)
    command = json.loads((run / "run.json").read_text())["command"]
    assert command.startswith("python train.py --recipe quickstart_alone --data https://host.test/photos --output")


@pytest.mark.slow
def test_trackers_get_no_path(tmp_path: Path, train_cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate import Accelerator

    told: dict[str, Any] = {}
    monkeypatch.setattr(Accelerator, "init_trackers", lambda self, name, config: told.update(config))
    options = ["--recipe", "quickstart", "--output", tmp_path / "run", "--max-steps", 1, *SMALL[1:], "data.source=fashion_mnist"]
    code, printed = train_cli(*options, f"teacher.name={RELEASED / 'quickstart_teacher'}", "run.trackers=[tensorboard]")
    assert code == 0, printed
    assert told["teacher.name"] == ".../quickstart_teacher"
    stored = json.loads((tmp_path / "run/run.json").read_text())
    assert stored["teachers"][0]["name"] == ".../quickstart_teacher"
    card = (tmp_path / "run/student/README.md").read_text()
    assert str(RELEASED) not in card
    assert card.count(".../quickstart\\_teacher") + card.count(".../quickstart_teacher") >= 4
    must_be_clean(tmp_path / "run/student", tmp_path / "run")


def test_what_files_say_of_a_teacher_holds_no_folder() -> None:
    info = TeacherInfo("/home/anna/teacher", "weights of/anna/x.pth", "0" * 64, "mit", 1, 2, ("/m/01g317", "b"))
    assert info.facts() == {
        "name": ".../teacher", "weights": ".../x.pth", "sha256": "0" * 64, "license": "mit", "parameters": 1, "num_classes": 2,
        "label_names": ("/m/01g317", "b"),
    }  # fmt: skip
    assert TeacherInfo("regnety_160.deit_in1k", "pretrained", "", "", 1, 2, None).facts()["name"] == "regnety_160.deit_in1k"
    assert TeacherInfo("hf-hub:timm/a.b", "pretrained", "", "", 1, 2, None).facts()["name"] == "hf-hub:timm/a.b"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_a_list_of_class_names_of_any_editor(encoding: str, newline: str, tmp_path: Path) -> None:
    names = ["cat", "caf\u00e9", "two words", "form\x0cfeed", "line\u2028end"]
    mark = "\ufeff" if encoding == "utf-16-le" else ""
    (tmp_path / "names.txt").write_bytes((mark + newline.join(names) + newline).encode(encoding))
    assert _class_names(tmp_path / "names.txt", 5) == names
    (tmp_path / "names.json").write_bytes((mark + json.dumps(names, ensure_ascii=False)).encode(encoding))
    assert _class_names(tmp_path / "names.json", 5) == names


@pytest.mark.usefixtures("pictures")
def test_a_grid_over_nasty_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values of an axis that are paths, formulas, markup; nothing is trained."""
    for number in range(3):
        folder = tmp_path / "grid" / f"{number}"
        (folder / "student").mkdir(parents=True)
        (folder / "student/README.md").write_text("x")
        (folder / "metrics.jsonl").write_text(
            json.dumps({"kind": "eval", "step": 1, "epoch": 1.0, "top1": 50.0 + number, "top5": 1.0, "images": 1, "seconds": 1.0})
            + "\n"
        )
        run = {"data": {"train_images": 4, "name": "images of 2 <b>"}, "hardware": "CPU", "commit": "0" * 40}
        (folder / "run.json").write_text(json.dumps(run))
    cells = [{"teacher.weights": value} for value in ("=1+1", "/home/anna/w|x.pth", "$\\frac{1}$")]
    monkeypatch.setattr(grid, "_name", lambda cell, cells: str(cells.index(cell)))
    overrides = ["teacher.weights==1+1,/home/anna/w|x.pth", "a=https://u:PASSWORD@h.test/"]
    grid._write("quickstart", overrides, cells, tmp_path / "grid", None)
    csv, table = ((tmp_path / "grid" / f"grid.{kind}").read_text() for kind in ("csv", "md"))
    assert "'=1+1,50.00" in csv
    for content in (csv, table):
        assert "anna" not in content
        assert "PASSWORD" not in content
    assert "images of images" not in table
    assert "(images of 2 &lt;b&gt;)" in table
    assert (tmp_path / "grid/grid.png").stat().st_size > 5_000

"""`deit-kd evaluate` and `predict`: numbers counted by hand, each benchmark's layout, and what is refused."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from markdown_it import MarkdownIt
from PIL import Image
from torch import nn
from torch.nn import functional as F

from deit_kd import plots
from deit_kd.cli import main
from deit_kd.data import open_source
from deit_kd.data.sources.base import ArraySource
from deit_kd.errors import UserError
from deit_kd.evaluation import report
from deit_kd.evaluation.imagenet_benchmarks import Examination, open_benchmark
from deit_kd.models import load_student, load_teacher
from deit_kd.models.teacher import RELEASED
from fuzzing import limited
from nasty import NASTY

SYNSETS = timm.data.ImageNetInfo("imagenet-1k").label_names()
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def student(fashion_folder: Path) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=10, img_size=28, patch_size=7, embed_dim=48, depth=2)
    model.pretrained_cfg["input_size"] = (3, 28, 28)
    return model.eval()


@torch.inference_mode()
def test_numbers_are_those_counted_by_hand(student: nn.Module, fashion_folder: Path) -> None:
    source = open_source("image_folder", fashion_folder, "val")
    teacher = load_teacher("resnet10t", 10, weights="random", image_mean=(0.5,) * 3, image_std=(0.5,) * 3)
    found = report.evaluate_model(student, Examination(source), CPU, batch_size=7, teacher=teacher)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(student))
    images = torch.stack([transform(source[index][0]) for index in range(len(source))])
    labels = torch.from_numpy(source.labels)
    tokens = student.forward_features(images)
    heads = {"class": student.head(tokens[:, 0]), "distillation": student.head_dist(tokens[:, 1])}
    logits = sum(heads.values()) / 2

    def top(logits: torch.Tensor, k: int) -> float:
        return 100 * sum(label in row for label, row in zip(labels.tolist(), logits.topk(k).indices.tolist(), strict=True)) / 40

    assert (found["top1"], found["top5"]) == pytest.approx((top(logits, 1), top(logits, 5)))
    assert found["heads"] == {name: pytest.approx({"top1": top(each, 1), "top5": top(each, 5)}) for name, each in heads.items()}
    assert found["nll"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    confidence, answer = logits.softmax(1).max(1)
    place, ece = (confidence * 15).long(), 0.0
    for each in range(15):
        inside = place == each
        if inside.any():
            ece += abs(confidence[inside].sum().item() - (answer == labels)[inside].sum().item()) / 40
    assert found["ece"] == pytest.approx(ece, rel=1e-5)
    table = np.zeros((10, 10), dtype=int)
    np.add.at(table, (labels.numpy(), answer.numpy()), 1)
    assert found["confusion"] == table.tolist()
    wrong = {(str(a), str(b)): int(table[a, b]) for a in range(10) for b in range(10) if a != b and table[a, b]}
    names = {name: str(place) for place, name in enumerate(source.class_names)}
    assert {(names[row["class"]], names[row["answer"]]): row["images"] for row in found["confusions"]} == dict(
        sorted(wrong.items(), key=lambda item: (-item[1], int(item[0][0]), int(item[0][1])))[:20]
    )
    for label, row in enumerate(found["per_class"]):
        taken = (answer == label).sum().item()
        assert row["recall"] == pytest.approx(100 * table[label, label] / 4)
        assert row["precision"] == (pytest.approx(100 * table[label, label] / taken) if taken else None)
    assert found["agreement"] == pytest.approx(100 * (teacher(images).logits.argmax(1) == answer).sum().item() / 40)


def test_a_network_that_knows_gets_everything_right(fashion_folder: Path) -> None:
    """The quick start's teacher over the embedded test images: as its own card says, and in any order of the classes."""
    teacher = load_student("quickstart_teacher")
    source = open_source("fashion_mnist", None, "val")
    source.images, source.labels = source.images[:200], source.labels[:200]  # type: ignore[attr-defined]
    first = report.evaluate_model(teacher, Examination(source), CPU)
    assert first["top1"] > 85
    order = np.arange(10)[::-1]
    source.class_names = tuple(source.class_names[place] for place in order)
    source.labels = np.argsort(order)[source.labels]
    second = report.evaluate_model(teacher, Examination(source), CPU)
    assert second["top1"] == first["top1"]
    assert [row["class"] for row in second["per_class"]] == list(source.class_names)
    assert [row["recall"] for row in second["per_class"]] == [row["recall"] for row in first["per_class"]][::-1]
    assert second["answers"] == first["answers"] == list(open_source("fashion_mnist", None, "val").class_names)
    pairs = [{(row["class"], row["answer"]): row["images"] for row in each["confusions"]} for each in (first, second)]
    assert sum(pairs[0].values()) == sum(pairs[1].values())
    assert all(pairs[0].get(pair, number) == number for pair, number in pairs[1].items())
    source.class_names = (*source.class_names[:9], "Hat")
    with pytest.raises(UserError, match="'Hat' is none of the network's 10 classes"):
        report.evaluate_model(teacher, Examination(source), CPU)


def test_memory_does_not_grow_with_the_square_of_the_classes(tmp_path: Path) -> None:
    """A network of 30,000 classes: a matrix of them would take 7 GB as numbers, 29 GB as a list."""
    network = Answers([0, 1, 29_999], num_classes=30_000)
    images = np.full((6, 8, 8), np.arange(6)[:, None, None] % 3, np.uint8)
    labels = np.array([0, 1, 2, 5, 1, 29_999])
    source = ArraySource(images, labels, [f"c{number}" for number in range(30_000)], "many", "many")
    with limited():
        found = report.evaluate_model(network, Examination(source), CPU)  # type: ignore[arg-type]
        report.write(tmp_path, "many", found, source.class_names)
    assert found["top1"] == pytest.approx(400 / 6)
    assert found["confusions"] == [{"class": a, "answer": b, "images": 1} for a, b in (("c2", "c29999"), ("c5", "c0"))]
    assert "confusion" not in found
    assert "| c2 | c29999 | 1 |" in (tmp_path / "report.md").read_text()


@pytest.mark.usefixtures("pictures")
@pytest.mark.filterwarnings("error")
def test_names_of_others_in_a_report(tmp_path: Path) -> None:
    names = [name for name in NASTY if name]
    labels = np.arange(len(names)) % len(names)
    source = ArraySource(np.full((len(names), 8, 8), 0, np.uint8), labels, names, "x", "x")
    found = report.evaluate_model(Answers([0], num_classes=len(names)), Examination(source), CPU)  # type: ignore[arg-type]
    for few in (names[:28], names[28:56], names[56:]):
        plots.plot_report({**found, "confusion": np.eye(len(few)).tolist(), "answers": few}, few, tmp_path / "picture.png")
    few = ["$\\frac{1}$", os.fsdecode(b"caf\xe9"), "a\nb", "\U0001f431\u732b", "\x1b[31m", "y" * 1000]
    plots.contact_sheet([Image.new("L", (8, 8))] * 6, few, few[::-1], [0.5] * 6, tmp_path / "sheet.png")
    plots.plot_grid(["student.name", "seed$x$"], {(name, "$1$"): [1.0, 2.0] for name in few}, tmp_path / "grid.png")
    report.write(tmp_path, f"{few[0]} on $x$ <b>", found, names)
    tokens = MarkdownIt("commonmark").enable("table").parse((tmp_path / "report.md").read_text(encoding="utf-8"))
    opened = [place for place, token in enumerate(tokens) if token.type == "tr_open"]
    cells = [[token.content for token in tokens[start : start + 14] if token.type == "inline"] for start in opened]
    classes = cells[next(place for place, row in enumerate(cells) if row[0] == "class") + 1 :][: len(names)]
    assert [row[1] for row in classes] == ["1"] * len(names), "a name made a cell"
    assert not [token for token in tokens if token.type in ("html_block", "fence", "code_block", "hr")]
    assert [row["class"] for row in json.loads((tmp_path / "report.json").read_text())["per_class"]] == names


def test_a_report_holds_no_path(tmp_path: Path) -> None:
    shutil.copytree(RELEASED / "quickstart_teacher", tmp_path / "of anna")
    options = ["--output", str(tmp_path / "out"), "--teacher", str(tmp_path / "of anna")]
    main(["evaluate", str(tmp_path / "of anna"), *options])
    for file in ("report.json", "report.md"):
        assert str(tmp_path) not in (tmp_path / "out" / file).read_text()
    stored = json.loads((tmp_path / "out/report.json").read_text())
    assert (stored["weights"], stored["teacher"]) == (".../of anna", ".../of anna")


def test_agreement_goes_by_names_and_sizes(fashion_folder: Path, tmp_path: Path) -> None:
    """The student as its own teacher with its classes in another order, at another size, and with other classes."""
    source = open_source("image_folder", fashion_folder, "val")
    names = list(source.class_names)
    arguments = {"patch_size": 7, "embed_dim": 48, "depth": 2, "num_heads": 3, "img_size": 28}
    student = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=10, **arguments)
    cfg = {"input_size": [3, 28, 28]}

    def save(name: str, order: list[int], labels: list[str]) -> Path:
        weights = {key: value[order] if key.startswith("head") else value for key, value in student.state_dict().items()}
        other = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=len(order), **arguments)
        other.load_state_dict(weights)
        config = {"label_names": labels, "pretrained_cfg": cfg}
        timm.models._hub.save_for_hf(other, tmp_path / name, model_args=arguments, model_config=config, safe_serialization=True)
        return tmp_path / name

    backwards = list(range(10))[::-1]
    own, turned = save("own", list(range(10)), names), save("turned", backwards, names[::-1])
    same_rows, fewer = save("same rows", list(range(10)), names[::-1]), save("fewer", [0, 1, 2], names[:3])

    def agreement(teacher: Path, *options: str) -> float:
        main(
            [
                "evaluate",
                str(own),
                "--data",
                str(fashion_folder),
                "--teacher",
                str(teacher),
                "--output",
                str(tmp_path / "out"),
                *options,
            ]
        )
        return float(json.loads((tmp_path / "out/report.json").read_text())["agreement"])

    assert agreement(own) == 100
    assert agreement(turned) == 100
    assert agreement(turned, "--restrict") == 100
    assert agreement(same_rows) < 50
    assert 0 <= agreement(own, "--img-size", "42") <= 100, "a teacher of 28 px beside a student of 42"
    with pytest.raises(SystemExit):
        agreement(fewer)


class Answers(nn.Module):
    """A network that answers what a table says, by the brightness of an image, and else `second`."""

    def __init__(self, order: list[int], second: int = 0, num_classes: int = 1000):
        super().__init__()
        self.second = second
        self.num_classes, self.num_features = num_classes, 1
        self.order, self.feature_info = order, []  # type: ignore[var-annotated]
        self.pretrained_cfg = self.default_cfg = {
            "input_size": (3, 8, 8), "mean": (0.0,) * 3, "std": (1.0,) * 3, "crop_pct": 1.0, "interpolation": "nearest",
        }  # fmt: skip

    def get_classifier(self) -> nn.Module:
        return nn.Identity()

    def forward_features(self, images: torch.Tensor) -> torch.Tensor:
        return images

    def forward_head(self, images: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        brightness = (images.mean(dim=(1, 2, 3)) * 255).round().long()
        logits = torch.zeros(len(images), self.num_classes)
        logits[:, self.second] = 4.0
        for row, value in enumerate(brightness.tolist()):
            logits[row, self.order[value]] = 5.0
        return logits


def gray(path: Path, value: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (8, 8), value).save(path)


def folders(names: list[str]) -> Callable[[Path], None]:
    return lambda root: [gray(root / name / f"{number}.png", number) for number, name in enumerate(names)] and None


def exam(root: Path, benchmark: str, order: list[int], second: int = 0) -> dict[str, Any]:
    parts = open_benchmark(benchmark, root)
    return {name: report.evaluate_model(Answers(order, second), each, CPU) for name, each in parts.items()}  # type: ignore[arg-type]


def test_imagenet_and_sketch_keep_all_classes(tmp_path: Path) -> None:
    folders([SYNSETS[3], SYNSETS[700], SYNSETS[999]])(tmp_path / "val")
    for benchmark in ("imagenet", "imagenet-sketch"):
        assert exam(tmp_path, benchmark, [3, 700, 998])[""]["top1"] == pytest.approx(200 / 3)


def test_v2_has_numbers_for_names(tmp_path: Path) -> None:
    folders(["2", "10", "999"])(tmp_path)
    assert exam(tmp_path, "imagenet-v2", [2, 10, 0])[""]["top1"] == pytest.approx(200 / 3)


@pytest.mark.parametrize(("benchmark", "inside", "outside"), [("imagenet-a", 6, 0), ("imagenet-r", 1, 0)])
def test_a_and_r_answer_among_their_classes(benchmark: str, inside: int, outside: int, tmp_path: Path) -> None:
    folders([SYNSETS[inside]])(tmp_path / "good")
    assert exam(tmp_path / "good", benchmark, [outside], second=inside)[""]["top1"] == 100
    assert exam(tmp_path / "good", "imagenet", [outside], second=inside)[""]["top1"] == 0
    assert len(open_benchmark(benchmark, tmp_path / "good")[""].among) == 200  # type: ignore[arg-type]
    folders([SYNSETS[outside]])(tmp_path / "bad")
    with pytest.raises(UserError, match="is none of the 200 classes"):
        open_benchmark(benchmark, tmp_path / "bad")


def test_real_takes_any_of_several_answers(tmp_path: Path) -> None:
    """Of timm's table: which labels has which image of the validation set."""
    table = json.loads((Path(timm.data.__file__).parent / "_info/imagenet_real_labels.json").read_text())
    several = next(number for number, labels in enumerate(table) if len(labels) > 1)
    nothing = next(number for number, labels in enumerate(table) if not labels)
    for brightness, image in enumerate((several, nothing)):
        gray(tmp_path / f"val/{SYNSETS[0]}/ILSVRC2012_val_{image + 1:08d}.png", brightness)
    for label in table[several]:
        found = exam(tmp_path, "imagenet-real", [label, label])[""]
        assert (found["images"], found["top1"]) == (1, 100)
    assert exam(tmp_path, "imagenet-real", [next(n for n in range(9) if n not in table[several]), 0])[""]["top1"] == 0
    gray(tmp_path / f"val/{SYNSETS[0]}/photo.png", 3)
    with pytest.raises(UserError, match="ReaL's labels go by the names"):
        open_benchmark("imagenet-real", tmp_path)


@pytest.mark.slow
def test_c_is_averaged_over_corruptions_and_severities(tmp_path: Path) -> None:
    for corruption in report.CORRUPTIONS:
        for severity in range(1, 6):
            folders([SYNSETS[0], SYNSETS[1]])(tmp_path / corruption / str(severity))
    parts = exam(tmp_path, "imagenet-c", [0, 5])
    assert len(parts) == 75
    expected = {"top1": 50.0, "mce": float(np.mean([100 * 50 / error for error in report.CORRUPTIONS.values()]))}
    assert report.corruption_errors(parts) == pytest.approx(expected)
    parts.pop("fog/5")
    assert set(report.corruption_errors(parts)) == {"top1"}
    with pytest.raises(UserError, match="CORRUPTION/SEVERITY"):
        open_benchmark("imagenet-c", tmp_path / "fog")


@pytest.mark.usefixtures("pictures")
def test_the_command_writes_table_json_and_picture(photo_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--data", str(photo_folder / "val"), "--output", str(tmp_path / "report"), "--batch-size", "8"]
    model = timm.create_model("resnet10t", num_classes=1000)
    timm.models._hub.save_for_hf(model, tmp_path / "model", safe_serialization=True)
    main(["evaluate", str(tmp_path / "model"), *options])
    assert "| its head |" in capsys.readouterr().out
    stored = json.loads((tmp_path / "report/report.json").read_text())
    assert (stored["images"], stored["architecture"].split(".")[0]) == (20, "resnet10t")
    assert "| class | images |" in (tmp_path / "report/report.md").read_text()
    assert Image.open(tmp_path / "report/report.png").size[0] > 500
    bad = tmp_path / "photos"
    shutil.copytree(photo_folder / "val", bad)
    next(bad.rglob("*.jpg")).write_bytes(b"no image")
    main(["evaluate", str(tmp_path / "model"), "--data", str(bad), "--output", str(tmp_path / "19"), "--on-bad-image", "skip"])
    assert json.loads((tmp_path / "19/report.json").read_text())["images"] == 19
    for wrong, message in (
        (["--data", str(bad)], "cannot be read"),
        (["--benchmark", "imagenet-v3", "--data", str(bad)], "did you mean imagenet-v2"),
        (["--benchmark", "imagenet-a"], "needs --data DIR"),
        (["--data", str(tmp_path / "nowhere")], "no such directory"),
        ([], "is none of the network's 1000 classes"),
        (["--batch-size", "0"], "from 1 to"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(["evaluate", str(tmp_path / "model"), *wrong])
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err


class Input:
    """Standard input that holds bytes."""

    def __init__(self, content: bytes):
        self.buffer = io.BytesIO(content)


@pytest.fixture
def predictions(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, list[dict[str, Any]], str]]:
    """Gives (exit code, lines, complaints) of the command."""

    def run(*arguments: object, stdin: bytes = b"") -> tuple[int, list[dict[str, Any]], str]:
        monkeypatch.setattr(sys, "stdin", Input(stdin))
        with pytest.raises(SystemExit) as stopped:
            main(["predict", "quickstart_teacher", *map(str, arguments)])
        printed = capsys.readouterr()
        return int(stopped.value.code or 0), [json.loads(line) for line in printed.out.splitlines()], printed.err

    return run


def test_predictions(
    predictions: Callable[..., tuple[int, list[dict[str, Any]], str]], fashion_folder: Path, tmp_path: Path
) -> None:
    shoe = fashion_folder / "val/9 Ankle boot"
    code, lines, _ = predictions(shoe, "--top", 2, "--batch-size", 3)
    assert code == 0
    assert [Path(line["image"]).name for line in lines] == sorted(path.name for path in shoe.iterdir())
    assert {len(line["predictions"]) for line in lines} == {2}
    assert [line["predictions"][0]["label"] for line in lines].count("Ankle boot") >= 3
    one = sorted(shoe.iterdir())[0]
    alone = predictions(one)[1][0]["predictions"]
    assert [row["label"] for row in alone[:2]] == [row["label"] for row in lines[0]["predictions"]]
    assert sum(row["probability"] for row in predictions(one, "--top", 99)[1][0]["predictions"]) == pytest.approx(1, abs=1e-4)
    (tmp_path / "bad.png").write_bytes(one.read_bytes()[:100])
    code, lines, said = predictions(one, tmp_path / "bad.png", tmp_path / "none.png", one)
    assert (code, ["error" in line for line in lines]) == (1, [False, True, True, False])
    assert "bad.png" in said
    buffer = io.BytesIO()
    Image.open(one).save(buffer, "png")
    assert predictions("-", stdin=buffer.getvalue())[1][0]["predictions"] == alone
    assert predictions("-", stdin=f"{one}\n{one}\n".encode())[1][1]["predictions"] == alone
    (tmp_path / "empty").mkdir()
    code, lines, said = predictions(tmp_path / "empty", one)
    assert (code, lines[0]["error"], lines[1]["predictions"]) == (1, "a folder without images", alone)
    code, lines, said = predictions("-")
    assert (code, lines) == (2, [])
    assert "standard input is empty" in said

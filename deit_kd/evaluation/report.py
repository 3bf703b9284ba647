"""The full report on a network: accuracy of each head, calibration, classes, confusions, agreement with a teacher, speed."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from deit_kd.data import EvaluationLoader, LoaderConfig, open_source
from deit_kd.data.loader import SKIPPED
from deit_kd.data.sources.base import Split
from deit_kd.data.sources.catalog import open_folder_to_evaluate
from deit_kd.data.sources.folders import order_in_doubt
from deit_kd.data.transforms import MOST_RESIZED, own_transform
from deit_kd.data.workers import cores
from deit_kd.errors import UserError
from deit_kd.evaluation import counts
from deit_kd.evaluation.imagenet_benchmarks import Examination, open_benchmark
from deit_kd.files.atomic import clear, write_json, write_text
from deit_kd.files.documents import MEGABYTE, Document, read_json
from deit_kd.files.outputs import claimed, must_not_be_data
from deit_kd.files.warn import optional, warn
from deit_kd.models import Distiller, StudentOutput, Teacher, load_student, load_teacher
from deit_kd.models.features import TimmModel
from deit_kd.plots import plot_report
from deit_kd.text import for_markdown, for_terminal, redact_path

BINS = 15  # of confidence, for the calibration error
CORRUPTIONS = {  # AlexNet's error in percent, by which ImageNet-C divides (Hendrycks & Dietterich, ICLR 2019, table 1)
    "gaussian_noise": 88.6, "shot_noise": 89.4, "impulse_noise": 92.3, "defocus_blur": 82.0, "glass_blur": 82.6,
    "motion_blur": 78.6, "zoom_blur": 79.8, "snow": 86.7, "frost": 82.7, "fog": 81.9, "brightness": 56.5, "contrast": 85.3,
    "elastic_transform": 64.6, "pixelate": 71.8, "jpeg_compression": 60.7,
}  # fmt: skip


def class_names(named: Any, number: int) -> tuple[str, ...] | None:
    """Names of a network's classes: its own, or ImageNet's synsets for 1000 classes without names; None if unknown."""
    if isinstance(named, (list, tuple)):
        return tuple(named)
    return tuple(timm.data.ImageNetInfo("imagenet-1k").label_names()) if number == 1000 else None


def match_labels(known: tuple[str, ...] | None, number: int, names: Sequence[str], who: str = "the network") -> np.ndarray:
    """[data's classes] -> a network's class of that name; by their order, with a warning, where the network has no names.

    Args:
        known: names of the network's classes.
        number: of them.
        names: of the data's.
        who: whose they are, for messages.

    Raises:
        UserError: a class that the network does not know.
    """
    if known is None and len(names) == number:
        if doubt := order_in_doubt(who, names):
            warn(doubt)
        return np.arange(len(names))
    places = {name: place for place, name in enumerate(known or ())}
    if missing := [name for name in names if name not in places]:
        knows = f"{number} classes, {', '.join((known or ('without names',))[:3])} ..."
        raise UserError(f"the data's class {missing[0]!r} is none of {who}'s {knows}; fine-tune it on these data first")
    return np.array([places[name] for name in names])


@torch.inference_mode()
def evaluate_model(
    model: TimmModel,
    examination: Examination,
    device: torch.device,
    *,
    batch_size: int = 64,
    teacher: Teacher | None = None,
    restrict: bool = False,
    on_bad_image: str = "refuse",
    bar: str = "evaluating",
) -> dict[str, Any]:
    """Every number over the images of an examination, each counted once.

    Args:
        model: in eval mode; its own preprocessing is used.
        examination: images, and what counts as right.
        device: where to.
        batch_size: images at once.
        teacher: with whose decisions to compare; it gets the same images.
        restrict: answers are among the data's classes only.
        on_bad_image: refuse or skip.
        bar: what the progress bar says.

    Returns:
        top1 and top5 in percent of the mean of the heads (`heads` of each), nll, ece (of the top answer, 15 bins of equal width),
        reliability, per_class, confusions (the most frequent), confusion [data's classes, network's] of up to counts.MATRIX cells and the
        names of its columns as answers, agreement, images, seconds and images_per_second. Memory grows with images, not with classes
        by their square.

    Raises:
        UserError: classes that do not fit, or an image that cannot be read.
    """
    source = examination.source
    config = timm.data.resolve_model_data_config(model)
    transform = own_transform(**config)
    workers = min(16, cores() - 1)
    placed = LoaderConfig(device, 1, 0, workers, on_bad_image, _tell, remedy="remove it, or give --on-bad-image skip")
    batch_size = min(batch_size, max(1, MOST_RESIZED // math.prod(config["input_size"][1:])))  # fewer where images are very large
    loader = EvaluationLoader(source, transform, placed, batch_size)
    distiller = Distiller(model.to(device)).eval()
    own_names = class_names(model.pretrained_cfg.get("label_names"), model.num_classes)
    classes = match_labels(own_names, model.num_classes, source.class_names)
    accepted = torch.from_numpy(classes).to(device) if examination.accepted is None else None
    several = None
    if examination.accepted is not None:
        several = torch.zeros(len(source), model.num_classes, dtype=torch.bool)
        several[:, classes] = torch.from_numpy(examination.accepted)
        several = several.to(device)
    allowed = torch.zeros(model.num_classes, dtype=torch.bool, device=device)
    allowed[torch.from_numpy(classes if examination.among is None else classes[examination.among]).to(device)] = True
    everything = examination.among is None and not restrict
    if teacher is not None:  # its classes as the student's, -1 where the student has none of that name
        theirs = class_names(teacher.info.label_names, teacher.num_classes)
        matched = match_labels(theirs, teacher.num_classes, source.class_names, "the teacher")
        place_of = {name: place for place, name in enumerate(own_names or ())}
        as_ours = torch.tensor([place_of.get(name, -1) for name in theirs or ()] or [-1] * teacher.num_classes, device=device)
        as_ours[torch.from_numpy(matched).to(device)] = torch.from_numpy(classes).to(device)
        barred = torch.ones(teacher.num_classes, dtype=torch.bool, device=device)
        barred[torch.from_numpy(matched if examination.among is None else matched[examination.among]).to(device)] = False

    heads = (
        ["mean", "class", *(f"distillation{n or ''}" for n in range(distiller.distillation_heads))]
        if distiller.distillation_heads
        else ["mean"]
    )
    hits = {f"{head} {k}": torch.zeros((), device=device) for head in heads for k in (1, 5)}
    nll, agree, images = (torch.zeros((), dtype=torch.float64, device=device) for _ in range(3))
    bins = torch.zeros(3, BINS, dtype=torch.float64, device=device)  # images, confidence, right
    asked: list[Tensor] = []  # the class of each image, and the predicted one
    answered: list[Tensor] = []
    network, start = 0.0, time.perf_counter()
    for batch, labels in tqdm(loader, bar, delay=2, leave=False, disable=None):
        known = labels != SKIPPED
        batch, labels = batch[known], labels[known]
        began = time.perf_counter()
        output: StudentOutput = distiller(batch)
        if device.type == "cuda":
            torch.cuda.synchronize()
        network += time.perf_counter() - began
        each = zip(heads[1:], (output.logits, *output.dist_logits), strict=False)
        for head, logits in [("mean", output.prediction()), *each]:
            logits = logits.float() if everything else logits.float().masked_fill(~allowed, -torch.inf)
            top = logits.topk(min(5, logits.shape[1]), dim=1).indices
            right = top == accepted[labels][:, None] if accepted is not None else several[labels].gather(1, top)  # type: ignore[index]
            hits[f"{head} 1"] += right[:, 0].sum()
            hits[f"{head} 5"] += right.any(1).sum()
            if head == "mean":
                confidence = logits.double().softmax(1).amax(1)
                place = (confidence * BINS).long().clamp(max=BINS - 1)
                for row, value in enumerate((torch.ones_like(confidence), confidence, right[:, 0].double())):
                    bins[row].scatter_add_(0, place, value)
                if accepted is not None:
                    nll += F.cross_entropy(logits.double(), accepted[labels], reduction="sum")
                    asked.append(labels)
                    answered.append(top[:, 0])
                if teacher is not None:
                    said = teacher(batch).logits
                    agree += (as_ours[(said if everything else said.masked_fill(barred, -torch.inf)).argmax(1)] == top[:, 0]).sum()
        images += len(labels)
    seconds, total = time.perf_counter() - start, int(images)
    if not total:
        raise UserError(f"{source.origin}: no image can be read; mend them, or give other data")
    report: dict[str, Any] = {"images": total}
    report |= {f"top{k}": 100 * hits[f"mean {k}"].item() / total for k in (1, 5)}
    if accepted is not None:
        labeled, answers = torch.cat(asked).cpu().numpy(), torch.cat(answered).cpu().numpy()
        report |= {
            "nll": nll.item() / total,
            "per_class": counts.per_class(labeled, answers, classes, model.num_classes, source.class_names),
        }
        report |= counts.confusions(
            labeled, answers, classes, source.class_names, own_names or counts.named(classes, source.class_names, model.num_classes)
        )
    report |= _calibration(bins)
    report["heads"] = {head: {f"top{k}": 100 * hits[f"{head} {k}"].item() / total for k in (1, 5)} for head in heads[1:]}
    if teacher is not None:
        report["agreement"] = 100 * agree.item() / total
    return report | {"seconds": seconds, "images_per_second": total / seconds, "images_per_second_network": total / network}


def _calibration(bins: Tensor) -> dict[str, Any]:
    number, confidence, right = bins.cpu().numpy()
    filled = number > 0
    mean, accuracy = confidence[filled] / number[filled], right[filled] / number[filled]
    return {
        "ece": float((number[filled] * np.abs(mean - accuracy)).sum() / number.sum()),
        "reliability": [
            {"images": int(n), "confidence": float(c), "accuracy": float(a)}
            for n, c, a in zip(number[filled], mean, accuracy, strict=True)
        ],
    }


def _tell(text: str) -> None:
    tqdm.write(for_terminal(text))


def corruption_errors(parts: dict[str, dict[str, Any]]) -> dict[str, float]:
    """ImageNet-C: mean top-1 over all parts, and mCE where all fifteen corruptions are there at all five severities."""
    summary = {"top1": float(np.mean([part["top1"] for part in parts.values()]))}
    if set(parts) == {f"{name}/{severity}" for name in CORRUPTIONS for severity in range(1, 6)}:
        errors = {name: np.mean([100 - parts[f"{name}/{severity}"]["top1"] for severity in range(1, 6)]) for name in CORRUPTIONS}
        summary["mce"] = float(np.mean([100 * errors[name] / CORRUPTIONS[name] for name in CORRUPTIONS]))
    return summary


def describe(title: str, report: dict[str, Any]) -> str:
    """The report as Markdown."""
    lines = [f"# {for_markdown(title)}", "", "| head | top-1 % | top-5 % |", "|---|---|---|"]
    named = {
        "mean of the heads" if report["heads"] else "its head": report,
        **{f"{name} head": one for name, one in report["heads"].items()},
    }
    lines += [f"| {name} | {one['top1']:.2f} | {one['top5']:.2f} |" for name, one in named.items()]
    numbers = [
        ("negative log likelihood", "nll", ".4f"),
        ("calibration error (ECE, 15 bins)", "ece", ".4f"),
        ("agreement with the teacher, %", "agreement", ".2f"),
    ]
    numbers += [
        ("images", "images", ",d"),
        ("images a second, with decoding", "images_per_second", ".0f"),
        ("images a second, network alone", "images_per_second_network", ".0f"),
    ]
    lines += [
        "",
        "| | |",
        "|---|---|",
        *[f"| {name} | {format(report[key], kind)} |" for name, key, kind in numbers if key in report],
    ]
    if "per_class" in report:
        rows = [row for row in report["per_class"] if row["images"]]
        lines += ["", "| class | images | found % | right of those taken for it % |", "|---|---|---|---|"]
        for row in sorted(rows, key=lambda row: row["recall"]):
            precision = "" if row["precision"] is None else f"{row['precision']:.1f}"
            lines.append(f"| {for_markdown(row['class'])} | {row['images']} | {row['recall']:.1f} | {precision} |")
    if report.get("confusions"):
        lines += ["", "The most frequent confusions:", "", "| is | taken for | images |", "|---|---|---|"]
        pairs = [(for_markdown(row["class"]), for_markdown(row["answer"]), row["images"]) for row in report["confusions"]]
        lines += [f"| {one} | {other} | {number} |" for one, other, number in pairs]
    return "\n".join(lines) + "\n"


def write(folder: Path, title: str, report: dict[str, Any], names: Sequence[str]) -> None:
    """report.json, report.md and report.png; the confusion matrix in JSON up to 100 classes."""
    folder.mkdir(parents=True, exist_ok=True)
    clear(folder)
    kept = {key: value for key, value in report.items() if key not in ("confusion", "answers") or len(names) <= 100}
    write_json(folder / "report.json", kept, indent=1)
    write_text(folder / "report.md", describe(title, report))
    with optional(f"writing {folder / 'report.png'}"):
        plot_report(report, names, folder / "report.png")


class _Report(Document):
    """The keys that every report.json and summary.json has."""

    architecture: str
    parameters: int
    top1: float


def _is_report(folder: Path) -> bool:
    """Whether a folder holds a report, or one of parts, that `evaluate` wrote."""
    found = [folder / "summary.json", folder / "report.json", *folder.glob("*/*/report.json")]  # ImageNet-C: corruption, severity
    for file in (file for file in found if file.is_file()):
        with suppress(UserError):
            read_json(file, _Report, "", 256 * MEGABYTE)
            return True
    return False


def evaluate(
    weights: str,
    folder: Path,
    data: Path | None,
    *,
    source: str | None,
    split: Split,
    benchmark: str | None,
    teacher: str | None,
    device: torch.device,
    img_size: int | None,
    exif_orientation: str | None = None,
    label_column: str | None = None,
    **settings: Any,
) -> None:
    """`deit-kd evaluate`: writes a report of each part of what is asked for, and prints tables.

    Args:
        weights: see `load_student`.
        folder: of the report; of ImageNet-C with one folder a part, and summary.json.
        data: a folder, or what the source takes.
        source: a `data.source`; None: image_folder, or fashion_mnist without data.
        split: train or val.
        benchmark: see `open_benchmark`.
        teacher: see `load_teacher`.
        device: where to.
        img_size: pixels a side, if not the network's own.
        exif_orientation: apply or ignore; None: apply, but of a benchmark ignore, as published numbers do.
        label_column: see `open_source`.
        settings: see `evaluate_model`.

    Raises:
        UserError: see `load_student`, `load_teacher`, `open_source`, `evaluate_model`.
    """
    must_not_be_data(folder, data, all_of_it=True)
    model = load_student(weights, img_size=img_size)
    if benchmark:
        parts = open_benchmark(benchmark, data)
    elif data and split == "val" and source in (None, "image_folder"):
        parts = {"": Examination(open_folder_to_evaluate(data))}
    else:
        named = source or ("image_folder" if data else "fashion_mnist")
        parts = {"": Examination(open_source(named, data, split, label_column=label_column))}
    for examination in parts.values():
        examination.source.upright = (exif_orientation or ("ignore" if benchmark else "apply")) == "apply"
    config = timm.data.resolve_model_data_config(model)
    asked = load_teacher(teacher, image_mean=config["mean"], image_std=config["std"]).to(device) if teacher else None
    if asked is not None:  # it gets the student's images in its own size
        asked.img_size = timm.data.resolve_model_data_config(asked.model)["input_size"][-1]
    facts = {
        "weights": redact_path(weights),  # a report is shown to others
        "architecture": ".".join(filter(None, (model.pretrained_cfg["architecture"], model.pretrained_cfg.get("tag")))),
        "parameters": sum(p.numel() for p in model.parameters()),
        "teacher": teacher and redact_path(teacher),
        "device": str(device),
        "versions": {"torch": torch.__version__, "timm": timm.__version__},
    }
    with claimed(folder, "deit-kd evaluate", _is_report):
        found = {}
        for part, examination in parts.items():
            measured = evaluate_model(model, examination, device, teacher=asked, bar=part or "evaluating", **settings)
            found[part] = {**facts, "data": examination.source.name, **measured}
            title = f"{facts['weights']} on {benchmark or examination.source.name}{f', {part}' if part else ''}"
            write(folder / part, title, found[part], examination.source.class_names)
            row = f"{for_terminal(part):<24} top-1 {measured['top1']:6.2f} %"
            print(row if part else describe(title, measured).split("\n| class |")[0].strip())
        if len(found) > 1:
            summary = corruption_errors(found)
            top1 = {part: each["top1"] for part, each in found.items()}
            write_json(folder / "summary.json", {**facts, **summary, "parts": top1}, indent=1)
            print("  ".join(f"{name} {value:.2f}" for name, value in summary.items()))

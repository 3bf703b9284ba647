"""Pictures of a run: curves from metrics.jsonl, and a contact sheet of predictions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # a training machine has no screen

import matplotlib.pyplot as plt
import numpy as np
from matplotlib import font_manager
from PIL import Image

from deit_kd import recipe
from deit_kd.errors import UserError
from deit_kd.files.atomic import whole
from deit_kd.text import for_plot, printable
from deit_kd.training.metrics import TERM, read_metrics

# Fonts with characters that matplotlib's own lacks, where the machine has them.
OTHERS = (
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "Noto Sans",
    "Arial Unicode MS",
    "PingFang SC",
    "Microsoft YaHei",
    "WenQuanYi Zen Hei",
)
CLOSENESS = ("agreement", "feature_correlation", "feature_cosine", "cosine")  # the last of runs of earlier versions


def plot_run(folder: Path) -> list[Path]:
    """Draws what metrics.jsonl holds into `plots/`: losses, accuracy, learning rate, projector spectrum, where time goes."""
    metrics = read_metrics(folder)
    train = [line for line in metrics if line["kind"] == "train"]
    evaluations = [line for line in metrics if line["kind"] == "eval"]
    spectra = [line for line in metrics if line["kind"] == "projector" and "singular_values" in line]
    scores = next((line for line in metrics if line["kind"] == "teacher"), {})
    teachers = {name.removesuffix("_top1"): value for name, value in scores.items() if name.endswith("_top1")}
    plots = folder / "plots"
    plots.mkdir(exist_ok=True)
    written = []

    def save(name: str, figure: Any) -> None:
        _save(figure, plots / f"{name}.png")
        written.append(plots / f"{name}.png")

    if terms := [name for name in {name: None for line in train for name in line} if TERM.fullmatch(name)]:
        save("loss", _panels(train, terms, _in_nats(folder)))
    if train:
        save("learning_rate", _lines(train, ("lr",), "learning rate"))
        times = ("seconds_data", "seconds_teacher", "seconds_student")
        save("time", _lines(train, times, "where a step's seconds go", "seconds a step"))
        if any(name in line for line in train for name in CLOSENESS):
            save("agreement", _lines(train, CLOSENESS, "teacher and student: share of equal decisions, closeness of features"))
    if evaluations:
        names = ("top1", "ema_top1", "class_head_top1", "distillation_head_top1")
        figure = _lines(evaluations, names, "validation top-1", "%")
        for name, top1 in teachers.items():
            figure.axes[0].axhline(top1, color="black", linestyle=":", label=name)
        figure.axes[0].legend()
        save("top1", figure)
    if spectra:
        figure, axes = plt.subplots(figsize=(7, 4))
        colors = plt.get_cmap("viridis")(np.linspace(0, 0.9, len(spectra)))
        for line, color in zip(spectra, colors, strict=True):
            first_or_last = line is spectra[0] or line is spectra[-1]
            label = f"step {line['step']}, effective rank {line['effective_rank']:.1f}" if first_or_last else None
            axes.semilogy(range(1, len(line["singular_values"]) + 1), line["singular_values"], color=color, label=label)
        axes.set(title="singular values of the projector, dark to light over training", xlabel="index", ylabel="singular value")
        axes.legend()
        axes.grid(alpha=0.3)
        save("projector", figure)
    return written


def _in_nats(folder: Path) -> set[str]:
    """Terms that are a cross-entropy or a KL divergence, of the recipe that the run stored."""
    found = {"ce"}
    with suppress(UserError):  # of an earlier version, or not there
        distillations = recipe.load(folder).distillations()
        for number, distill in enumerate(distillation.distill for distillation in distillations):
            if distill.kd_loss == "hard_distillation" or (distill.kd_loss == "kl_distillation" and distill.temperature == 1):
                found.add(f"kd_{number}" if len(distillations) > 1 else "kd")  # another temperature squared multiplies the KL
    return found


def _panels(lines: Sequence[dict[str, Any]], names: Sequence[str], in_nats: set[str]) -> Any:
    """A panel for each term, since LogSum falls below 0 and would flatten all others."""
    columns = min(2, len(names))
    rows = -(-len(names) // columns)
    figure, grid = plt.subplots(
        rows, columns, figsize=(5 * columns, 2.6 * rows + 0.6), squeeze=False, sharex=True, layout="constrained"
    )
    for axes, name in zip(grid.flat, names, strict=False):
        _draw(axes, lines, name)
        axes.set(title=name, ylabel="nats" if name in in_nats else "")
        axes.grid(alpha=0.3)
        axes.tick_params(labelbottom=True)
    for axes in grid.flat[len(names) :]:
        axes.axis("off")
    figure.supxlabel(_ruler(lines)[1])
    figure.suptitle("training loss and its terms, without their weights; means of a log window")
    return figure


def _lines(lines: Sequence[dict[str, Any]], names: Sequence[str], title: str, ylabel: str = "") -> Any:
    figure, axes = plt.subplots(figsize=(7, 4))
    for name in names:
        _draw(axes, lines, name, name.removeprefix("seconds_"))
    axes.set(title=title, xlabel=_ruler(lines)[1], ylabel=ylabel)
    axes.legend()
    axes.grid(alpha=0.3)
    return figure


def _draw(axes: Any, lines: Sequence[dict[str, Any]], name: str, label: str | None = None) -> None:
    key = _ruler(lines)[0]
    points = [(line[key], line[name]) for line in lines if line.get(name) is not None]
    if points:
        axes.plot(*zip(*points, strict=True), label=label, marker="." if len(points) < 30 else None)


def _ruler(lines: Sequence[dict[str, Any]]) -> tuple[str, str]:
    """The key of the x axis, and its label."""
    return ("epoch", "epochs") if all("epoch" in line for line in lines) else ("step", "steps")


def _save(figure: Any, file: Path) -> None:
    with whole(file) as part:
        figure.savefig(part, format="png", dpi=120, bbox_inches="tight")
    plt.close(figure)


def _label(name: object, most: int = 40) -> str:
    """A name for a picture, with escapes for characters that no font here has."""
    faces, text = _faces(), printable(name, most)
    missing = {sign for sign in set(text) if not sign.isascii() and not any(face.get_char_index(ord(sign)) for face in faces)}
    return for_plot("".join(sign.encode("unicode_escape").decode() if sign in missing else sign for sign in text), 10 * most)


@cache
def _faces() -> list[Any]:
    """The fonts in use, in the order in which they are asked for a sign."""
    there = set(font_manager.get_font_names())
    families = ["DejaVu Sans", *(name for name in OTHERS if name in there)]
    matplotlib.rcParams.update({"font.family": families, "text.usetex": False})  # whatever the user's own settings say
    return [font_manager.get_font(font_manager.findfont(name)) for name in families]


def plot_grid(axes: Sequence[str], scores: Mapping[tuple[str, ...], Sequence[float]], file: Path) -> None:
    """Mean top-1 and its standard error against the axis with most values; a line for each combination of the others."""
    long = max(range(len(axes)), key=lambda axis: len({key[axis] for key in scores}))
    values = list(dict.fromkeys(key[long] for key in scores))
    figure, plot = plt.subplots(figsize=(7, 4.5))
    for others in dict.fromkeys(key[:long] + key[long + 1 :] for key in scores):
        rows = [(values.index(key[long]), row) for key, row in scores.items() if key[:long] + key[long + 1 :] == others and row]
        names = [
            _label(f"{name.rpartition('.')[2]} {value}")
            for name, value in zip([*axes[:long], *axes[long + 1 :]], others, strict=True)
        ]
        errors = [float(np.std(row, ddof=1) / len(row) ** 0.5) if len(row) > 1 else 0.0 for _, row in rows]
        plot.errorbar(
            [at for at, _ in rows], [float(np.mean(row)) for _, row in rows], errors, marker="o", capsize=3, label=", ".join(names)
        )
    plot.set(title="top-1 of the last weights, mean and standard error over seeds", xlabel=_label(axes[long]), ylabel="%")
    plot.set_xticks(range(len(values)), [_label(value) for value in values])
    if len(axes) > 1:
        plot.legend(fontsize=8)
    plot.grid(alpha=0.3)
    _save(figure, file)


def plot_report(report: Mapping[str, Any], names: Sequence[str], file: Path) -> None:
    """Confusion matrix (shares of each class), where there are few enough classes for one, and reliability diagram."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5.5))
    if "confusion" in report:
        table = np.array(report["confusion"], dtype=np.float32)
        shown = left.imshow(table / np.maximum(table.sum(1, keepdims=True), 1), cmap="viridis", vmin=0, vmax=1, aspect="auto")
        figure.colorbar(shown, ax=left)
        left.set(title="confusions: share of each class (row) by answer (column)", xlabel="answer", ylabel="class")
        if len(names) <= 30:
            left.set_yticks(range(len(names)), [_label(name, 25) for name in names], fontsize=8)
        if table.shape[1] <= 30:
            left.set_xticks(range(table.shape[1]), [_label(name, 25) for name in report["answers"]], fontsize=8, rotation=90)
    else:
        left.axis("off")
        if "confusions" in report:
            reason = (
                f"{len(names):,} classes are too many for a picture of their confusions;\nthe most frequent ones are in report.md"
            )
            left.text(0.5, 0.5, reason, ha="center", va="center")
    points = report["reliability"]
    right.plot([0, 1], [0, 1], color="gray", linestyle=":")
    sizes = [20 + 300 * point["images"] / report["images"] for point in points]
    right.scatter([point["confidence"] for point in points], [point["accuracy"] for point in points], s=sizes)
    right.set(
        title=f"reliability, ECE {report['ece']:.3f}; larger is more images",
        xlabel="confidence",
        ylabel="accuracy",
        xlim=(0, 1),
        ylim=(0, 1),
    )
    right.grid(alpha=0.3)
    _save(figure, file)


def contact_sheet(
    images: Sequence[Image.Image], labels: Sequence[str], predictions: Sequence[str], confidences: Sequence[float], file: Path
) -> None:
    """One picture of images with labels and predictions, mistakes in red."""
    columns = 8
    rows = -(-len(images) // columns)
    figure, grid = plt.subplots(rows, columns, figsize=(1.5 * columns, 2.0 * rows), squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for axes, image, label, prediction, confidence in zip(grid.flat, images, labels, predictions, confidences, strict=False):
        axes.imshow(image)
        right, taken = label == prediction, _label(prediction, 20)
        text = f"{taken}\n{confidence:.0%}" if right else f"{taken} {confidence:.0%}\nis {_label(label, 20)}"
        axes.set_title(text, fontsize=8, color="black" if right else "crimson")
    figure.tight_layout()
    _save(figure, file)

"""Pictures of a run: curves from metrics.jsonl, and a contact sheet of predictions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # a training machine has no screen

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

from deit_kd.tracking import TERMS, read_metrics


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
        figure.savefig(plots / f"{name}.png", dpi=120, bbox_inches="tight")
        plt.close(figure)
        written.append(plots / f"{name}.png")

    if train:
        terms = [name for name in {name: None for line in train for name in line} if name.split("_")[0] in TERMS]
        save("loss", _lines(train, terms, "training loss and its terms, mean of a log window"))
        save("learning_rate", _lines(train, ("lr",), "learning rate"))
        times = ("seconds_data", "seconds_teacher", "seconds_student")
        save("time", _lines(train, times, "where a step's seconds go", "seconds a step"))
        if any("agreement" in line or "cosine" in line for line in train):
            save("agreement", _lines(train, ("agreement", "cosine"), "teacher and student: equal decisions, feature cosine"))
    if evaluations:
        figure = _lines(evaluations, ("top1", "ema_top1", "class_head_top1", "distillation_head_top1"), "validation top-1", "%")
        for name, top1 in teachers.items():
            figure.axes[0].axhline(top1, color="black", linestyle=":", label=name)
        figure.axes[0].legend()
        save("top1", figure)
    if spectra:
        figure, axes = plt.subplots(figsize=(7, 4))
        colours = plt.get_cmap("viridis")(np.linspace(0, 0.9, len(spectra)))
        for line, colour in zip(spectra, colours, strict=True):
            first_or_last = line is spectra[0] or line is spectra[-1]
            label = f"step {line['step']}, effective rank {line['effective_rank']:.1f}" if first_or_last else None
            axes.semilogy(range(1, len(line["singular_values"]) + 1), line["singular_values"], color=colour, label=label)
        axes.set(title="singular values of the projector, dark to light over training", xlabel="index", ylabel="singular value")
        axes.legend()
        axes.grid(alpha=0.3)
        save("projector", figure)
    return written


def _lines(lines: Sequence[dict[str, Any]], names: Sequence[str], title: str, ylabel: str = "") -> Any:
    figure, axes = plt.subplots(figsize=(7, 4))
    for name in names:
        points = [(line["step"], line[name]) for line in lines if name in line]
        if points:
            axes.plot(*zip(*points, strict=True), label=name.removeprefix("seconds_"), marker="." if len(points) < 30 else None)
    axes.set(title=title, xlabel="step", ylabel=ylabel)
    axes.legend()
    axes.grid(alpha=0.3)
    return figure


def plot_grid(axes: Sequence[str], scores: Mapping[tuple[str, ...], Sequence[float]], file: Path) -> None:
    """Mean top-1 and its standard error against the axis with most values; a line for each combination of the others."""
    long = max(range(len(axes)), key=lambda axis: len({key[axis] for key in scores}))
    values = list(dict.fromkeys(key[long] for key in scores))
    figure, plot = plt.subplots(figsize=(7, 4.5))
    for others in dict.fromkeys(key[:long] + key[long + 1 :] for key in scores):
        rows = [(values.index(key[long]), row) for key, row in scores.items() if key[:long] + key[long + 1 :] == others and row]
        names = [
            f"{name.rpartition('.')[2]} {value}" for name, value in zip([*axes[:long], *axes[long + 1 :]], others, strict=True)
        ]
        errors = [float(np.std(row, ddof=1) / len(row) ** 0.5) if len(row) > 1 else 0.0 for _, row in rows]
        plot.errorbar(
            [at for at, _ in rows], [float(np.mean(row)) for _, row in rows], errors, marker="o", capsize=3, label=", ".join(names)
        )
    plot.set(title="top-1 of the last weights, mean and standard error over seeds", xlabel=axes[long], ylabel="%")
    plot.set_xticks(range(len(values)), values)
    if len(axes) > 1:
        plot.legend(fontsize=8)
    plot.grid(alpha=0.3)
    figure.savefig(file, format="png", dpi=120, bbox_inches="tight")
    plt.close(figure)


def plot_report(report: Mapping[str, Any], names: Sequence[str], file: Path) -> None:
    """Confusion matrix (shares of each class) and reliability diagram."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5.5))
    if "confusion" in report:
        table = np.array(report["confusion"], dtype=float)
        shown = left.imshow(table / np.maximum(table.sum(1, keepdims=True), 1), cmap="viridis", vmin=0, vmax=1, aspect="auto")
        figure.colorbar(shown, ax=left)
        left.set(title="confusions: share of each class (row) by answer (column)", xlabel="answer", ylabel="class")
        if len(names) <= 30:
            left.set_yticks(range(len(names)), names, fontsize=8)
        if table.shape[0] == table.shape[1] <= 30:
            left.set_xticks(range(len(names)), names, fontsize=8, rotation=90)
    else:
        left.axis("off")
    points = report["reliability"]
    right.plot([0, 1], [0, 1], color="grey", linestyle=":")
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
    figure.savefig(file, format="png", dpi=120, bbox_inches="tight")
    plt.close(figure)


def contact_sheet(
    images: Sequence[Image.Image], labels: Sequence[str], predictions: Sequence[str], confidences: Sequence[float], file: Path
) -> None:
    """One picture of images with what they are and what a student takes them for, the mistakes in red."""
    columns = 8
    rows = -(-len(images) // columns)
    figure, grid = plt.subplots(rows, columns, figsize=(1.5 * columns, 2.0 * rows), squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for axes, image, label, prediction, confidence in zip(grid.flat, images, labels, predictions, confidences, strict=False):
        axes.imshow(image)
        right = label == prediction
        text = f"{prediction}\n{confidence:.0%}" if right else f"{prediction} {confidence:.0%}\nis {label}"
        axes.set_title(text, fontsize=8, color="black" if right else "crimson")
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    plt.close(figure)

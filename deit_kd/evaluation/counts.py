"""Recall, precision and confusions of classes, counted from the label and the answer of each image; memory grows with images and classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

MATRIX = (
    1_000_000  # cells of the largest confusion matrix that is made; with more classes only the most frequent confusions are kept
)


def per_class(
    asked: np.ndarray, answers: np.ndarray, classes: np.ndarray, number: int, names: Sequence[str]
) -> list[dict[str, Any]]:
    """Recall and precision of each class in percent; None where there are no images to count.

    Args:
        asked: [N] the data's class of each image.
        answers: [N] the class that the network predicts.
        classes: [data's classes] -> the network's.
        number: of the network's classes.
        names: of the data's classes.
    """
    own, taken = np.bincount(asked, minlength=len(classes)), np.bincount(answers, minlength=number)[classes]
    right = np.bincount(asked[classes[asked] == answers], minlength=len(classes))
    return [
        {"class": name, "images": n, "recall": 100 * hits / n if n else None, "precision": 100 * hits / of if of else None}
        for name, n, of, hits in zip(names, own.tolist(), taken.tolist(), right.tolist(), strict=True)
    ]


def confusions(
    asked: np.ndarray, answers: np.ndarray, classes: np.ndarray, names: Sequence[str], answer_names: Sequence[str]
) -> dict[str, Any]:
    """The most frequent confusions, and the matrix of all where it is small; see `per_class`."""
    width = len(answer_names)
    wrong = classes[asked] != answers
    pairs, numbers = np.unique(asked[wrong].astype(np.int64) * width + answers[wrong], return_counts=True)
    order = np.argsort(-numbers, kind="stable")[:20]
    frequent = [
        (names[pair // width], answer_names[pair % width], n) for pair, n in zip(pairs[order], numbers[order].tolist(), strict=True)
    ]
    found: dict[str, Any] = {"confusions": [{"class": a, "answer": b, "images": n} for a, b, n in frequent]}
    if len(names) * width <= MATRIX:
        cells = np.bincount(asked.astype(np.int64) * width + answers, minlength=len(names) * width)
        found |= {"confusion": cells.reshape(len(names), width).tolist(), "answers": list(answer_names)}
    return found


def named(classes: np.ndarray, names: Sequence[str], number: int) -> list[str]:
    """Names for the classes of a network without names: the data's, in the network's order."""
    found = [str(place) for place in range(number)]
    for place, name in zip(classes.tolist(), names, strict=True):
        found[place] = name
    return found

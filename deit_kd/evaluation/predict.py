"""Predictions for images: a JSON object a line."""

from __future__ import annotations

import itertools
import math
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import timm
import torch

from deit_kd.data.decode import MOST_BYTES, decode_image, orientation, read_picture
from deit_kd.data.sources.folders import find_pictures, in_words, readable_name
from deit_kd.data.transforms import MOST_RESIZED, own_transform
from deit_kd.errors import UserError
from deit_kd.files.warn import warn
from deit_kd.models.features import TimmModel
from deit_kd.text import for_terminal, hide_secrets


@torch.inference_mode()
def predict(
    model: TimmModel, names: Sequence[str], device: torch.device, batch_size: int, top: int, upright: bool = True
) -> Iterator[dict[str, Any]]:
    """Yields a line for each image, in order: image, and predictions (label, index, probability), or error.

    Args:
        model: in eval mode; its own preprocessing and class names are used.
        names: files and folders; - reads standard input, an image or paths a line.
        device: where to.
        batch_size: images at once; fewer where they are very large.
        top: how many predictions of each.
        upright: images are turned as their EXIF orientation says, as viewers show them.

    Raises:
        UserError: an empty standard input.
    """
    config = timm.data.resolve_model_data_config(model)
    transform = own_transform(**config)
    batch_size = min(batch_size, max(1, MOST_RESIZED // math.prod(config["input_size"][1:])))
    labels = model.pretrained_cfg.get("label_names")
    if labels is None and model.num_classes == 1000:
        labels = timm.data.ImageNetInfo("imagenet-1k").label_descriptions()
    model = model.to(device)
    files = iter([each for name in names for each in _expand(name)])
    while some := list(itertools.islice(files, batch_size)):
        lines: list[dict[str, Any]] = []
        images = []
        for name, content in some:
            shown = hide_secrets(readable_name(name))
            try:
                if os.path.isdir(name):
                    raise ValueError("a folder without images")
                images.append(transform(decode_image(read_picture(name) if content is None else content, upright)))
                lines.append({"image": shown, "predictions": []})
            except Exception as error:  # Pillow raises many types for files that are no images
                reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error) or type(error).__name__
                lines.append({"image": shown, "error": for_terminal(" ".join(reason.split()))})
        if images:
            probabilities, indices = model(torch.stack(images).to(device)).float().softmax(1).topk(min(top, model.num_classes))
            rows = zip([line for line in lines if "error" not in line], probabilities.tolist(), indices.tolist(), strict=True)
            for line, values, places in rows:
                line["predictions"] = [
                    {"label": labels[place] if labels else str(place), "index": place, "probability": round(value, 6)}
                    for value, place in zip(values, places, strict=True)
                ]
        yield from lines


def _expand(name: str) -> list[tuple[str, bytes | None]]:
    """(name, content if it is read already) of each image that an argument stands for."""
    if name == "-":
        content = sys.stdin.buffer.read(MOST_BYTES)
        try:
            orientation(content)
        except Exception:  # not an image
            paths = [os.fsdecode(line) for line in content.splitlines() if line.strip()]
            if not paths:
                raise UserError("-: standard input is empty; pipe an image or a path a line into it") from None
            return [each for path in paths for each in (_expand(path) if path != "-" else [])]
        return [("-", content)]
    if not os.path.isdir(name):
        return [(name, None)]
    found = find_pictures(name)
    if found.left_out:
        warn(f"{for_terminal(name)}: left out are {in_words(found.left_out)}")
    return [(path, None) for path in found.paths] or [(name, None)]
